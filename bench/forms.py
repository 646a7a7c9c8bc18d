"""The forms of a training step that bench/step.py compares, made from the same weights and reading the same tokens.

    eager           golfgpt's model and optimizer, not compiled, no kernels
    published       bench/published.py as rank 0 of 8, which orthogonalizes every eighth matrix; no communication
    published_all   the same orthogonalizing all matrices
    golfgpt         golfgpt.train.step as a run executes it by default: what golfgpt.train.execution finds fastest

The work is that of one rank of 8: its span of tokens in one forward and backward, then the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from golfgpt_kernels._dispatch import dtype_name
from torch import Tensor

from bench import published
from golfgpt.config import BigramConfig, DataConfig, RunConfig, RuntimeConfig, ScheduleConfig
from golfgpt.data.shards import open_shard
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import of_kind, parameter_table
from golfgpt.recipes import get
from golfgpt.train.attention_backend import Selection, enable_backend
from golfgpt.train.execution import select_execution, set_process
from golfgpt.train.step import Pending, TrainStep

FORMS = ("eager", "published_all", "published", "golfgpt")
RANKS = 8
WARM_UP = 3  # steps

Mark = Callable[[str], None]  # is told the phase that begins


# ---- what they have in common


@dataclass(frozen=True)
class Setup:
    """What all forms of a recipe have in common."""

    config: RunConfig
    tokens: np.ndarray
    source: str
    """What the tokens are."""
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls, recipe: str, *, small: bool, device: torch.device, dtype: torch.dtype, folder: Path | None = None
    ) -> Setup:
        """One rank's share of a recipe, at a constant learning rate; `dtype` is the embeddings' too."""
        config = get(recipe).config
        model, quant = config.model, config.quant
        data = DataConfig(batch_tokens=config.data.batch_tokens // RANKS, seq_len=config.data.seq_len, spans=1)
        if small:
            pairs = {"bigram": BigramConfig(rows=64, dim=32)} if model.bigram.rows else {}
            model = replace(
                model, vocab_size=128, num_layers=model.num_layers // 3, model_dim=64, num_heads=4, num_kv_heads=2,
                mlp_hidden=64 * model.mlp_hidden // model.model_dim, **pairs,
            )  # fmt: skip
            data = DataConfig(batch_tokens=512, seq_len=64, spans=1)
            quant = replace(quant, keep_numel=0)
        optim = replace(config.optim, embed_dtype=dtype_name(dtype))
        schedule = ScheduleConfig(kind="warmdown_steps", warmdown_steps=0, max_seconds=None)
        config = replace(config, model=model, data=data, quant=quant, optim=optim, schedule=schedule)
        made_up = folder is None
        tokens = made_up_tokens(model.vocab_size) if made_up else read_tokens(folder, model.vocab_size)
        return cls(config, tokens, "made up" if made_up else folder.name, device, dtype)

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        """golfgpt's first ones, matrices and tables rounded as published models keep them. Those that start at zero are
        drawn, so that a loss depends on every part of the model from the first step on."""
        generator = torch.Generator().manual_seed(seed)
        weights = GPT(self.config.model, seed=self.config.seed + seed).state_dict()
        table = parameter_table(self.config.model)
        for name in [name for name in weights if name in of_kind(table, "matrix", "embedding")]:
            w = weights[name].float()
            if not w.any():
                w = torch.randn(w.shape, generator=generator) * w.size(-1) ** -0.5
            weights[name] = w.to(self.dtype).float()
        return weights


def made_up_tokens(vocab_size: int, count: int = 2_000_000) -> np.ndarray:
    """uint16 (count,): Zipf's frequencies, and in half of the places the token that follows from the one before."""
    random = np.random.default_rng(0)
    weights = 1 / (np.arange(vocab_size) + 10)
    drawn = random.choice(vocab_size, count, p=weights / weights.sum())
    follows = random.permutation(vocab_size)
    drawn[1:] = np.where(random.random(count - 1) < 0.5, follows[drawn[:-1]], drawn[1:])
    return drawn.astype(np.uint16)


def read_tokens(folder: Path, vocab_size: int) -> np.ndarray:
    """uint16, all train shards of a prepared folder. Raises InputError for one of another vocabulary."""
    shards = [np.asarray(open_shard(file)) for file in sorted(folder.glob("*_train_*.bin"))]
    if not shards or max(int(shard.max()) for shard in shards) >= vocab_size:
        raise InputError(f"{folder} holds no train shards with a vocabulary of {vocab_size}")
    return np.concatenate(shards)


# ---- the forms


class Published:
    """bench.published. The forms of all matrices and of rank 0's share are one model, compiled once."""

    def __init__(self, setup: Setup, attention: Selection, loop: published.Loop | None = None):
        self.world, self.attention = 1 if loop is None else RANKS, attention
        self.enter()
        self.loop = loop or published.Loop(setup.config, setup.tokens, setup.device, setup.dtype)
        if loop is None:
            self.restart(setup.weights())
            for step in range(WARM_UP):
                self.loop.step(step, lambda phase: None)
            self.restart(setup.weights())

    def enter(self) -> None:
        """Its attention uses torch's kernels: FlashAttention-3 would replace them for the whole process."""
        enable_backend("flash" if self.attention.backend == "flash3" else self.attention.backend)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        self.loop.load(weights)

    def step(self, step: int, mark: Mark) -> Tensor:
        self.loop.optimizers.muon.world = self.world
        return self.loop.step(step, mark)


class Golfgpt:
    """golfgpt.train.step's step, told apart into phases at the places where its parts meet."""

    def __init__(self, setup: Setup, attention: Selection, **runtime: Any):
        """`runtime`: fields of RuntimeConfig that are not left to "auto"."""
        fixed = dict(device=setup.device.type, dtype=dtype_name(setup.dtype), warmup_steps=WARM_UP)
        config = replace(setup.config, runtime=RuntimeConfig(**fixed, **runtime))
        self.trainer = TrainStep(config, SimpleNamespace(train=[setup.tokens]), Ranks(0, 1, setup.device))
        self.trainer.model.load_state_dict(setup.weights())
        self.execution = select_execution(self.trainer, attention)
        self.trainer.warm_up(WARM_UP)
        self.loss = self.trainer._loss
        self.last: Pending | None = None

    def enter(self) -> None:
        set_process(self.execution.runtime)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        self.trainer.model.load_state_dict(weights)
        self.trainer.optimizers.load_state({})
        self.trainer.prepare(0)

    def step(self, step: int, mark: Mark) -> Pending:
        """Like the training loop: the result of the step before is read when this one is enqueued."""

        def loss(*args, **options) -> Tensor:
            mark("forward")
            out = self.loss(*args, **options)
            mark("backward")
            return out

        mark("data")
        self.trainer._loss = loss
        if self.execution.runtime.graph == "step":
            mark("forward")  # and backward: the graph does not tell
        for _ in self.trainer.backward(step):
            pass
        mark("rest")
        pending = self.trainer.sum(step)
        mark("optimizer")
        self.trainer.update(pending)
        mark("rest")
        if self.last is not None:
            self.trainer.wait(self.last)
        self.last = pending
        return pending


Form = Published | Golfgpt


def build(name: str, setup: Setup, attention: Selection, built: Mapping[str, Form]) -> Form:
    """A form with the first weights that compiles nothing any more."""
    if name == "published":
        return Published(setup, attention, built["published_all"].loop)  # KeyError: that one failed
    if name == "published_all":
        return Published(setup, attention)
    plain = name == "eager" or setup.device.type != "cuda"
    fixed = dict(kernels="eager", graph="off", compile="off", threads=torch.get_num_threads())
    return Golfgpt(setup, attention, **(fixed if plain else {}))
