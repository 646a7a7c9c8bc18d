"""The configuration of a run: its sections, conversion to and from JSON, and comparison.

Each section is defined next to the code that reads it (`golfgpt.model.config` and so on) and can be imported from here.
A recipe is another recipe with some fields replaced (`golfgpt.recipes`). On the command line, `--section.field value`
overrides any field. This module uses the standard library only, so a config can be read without importing torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from golfgpt.data.config import DataConfig
from golfgpt.files import from_json
from golfgpt.model.config import BigramConfig, LoopConfig, ModelConfig, ParallelConfig, ValueEmbeddingConfig
from golfgpt.optim.config import AverageConfig, OptimConfig, ScheduleConfig
from golfgpt.quant.config import BudgetConfig, QuantConfig, QuantRule
from golfgpt.score.config import EvalConfig, LoRAConfig, SGDConfig, TTTConfig
from golfgpt.train.config import RuntimeConfig

__all__ = [
    "AverageConfig",
    "BigramConfig",
    "BudgetConfig",
    "DataConfig",
    "EvalConfig",
    "LoRAConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "QuantConfig",
    "QuantRule",
    "RunConfig",
    "RuntimeConfig",
    "SGDConfig",
    "ScheduleConfig",
    "TTTConfig",
    "ValueEmbeddingConfig",
    "differences",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 1337
    """Seed of the initial weights. The order of the data does not depend on it."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2^63 - 1")
        if self.optim.grad_clip == "span" and self.data.span_tokens % self.data.microbatch:
            raise ValueError(
                f"optim.grad_clip span expected data.microbatch_tokens to divide the span's {self.data.span_tokens} "
                f"tokens, got {self.data.microbatch}"
            )
        if self.data.order == "packed":
            start, mixes = self.model.document_start, self.model.mixes_tokens
            if start != (self.data.document_start if mixes else None):
                raise ValueError(
                    f"model.document_start is {start}; expected data.document_start {self.data.document_start}: with "
                    'data.order "packed" attention stays within documents, and model.smear_gate and model.bigram must'
                )
        if self.stride > self.window:
            raise ValueError(
                f"eval.stride {self.stride} exceeds the window {self.window} (eval.window, else data.seq_len), so "
                f"tokens would be skipped; expected at most {self.window}"
            )
        self._check_ttt()

    def _check_ttt(self) -> None:
        ttt = self.eval.ttt
        if ttt.kind in ("lora", "phased"):
            if ttt.lora.rank > self.model.model_dim:
                raise ValueError(
                    f"eval.ttt.lora.rank is {ttt.lora.rank}; expected at most model.model_dim, {self.model.model_dim}"
                )
            if ttt.lora.chunk_tokens > self.window:
                raise ValueError(
                    f"eval.ttt.lora.chunk_tokens {ttt.lora.chunk_tokens} exceeds the window {self.window} in which "
                    f"a chunk is scored (eval.window, else data.seq_len); expected at most {self.window}"
                )
        if ttt.kind in ("sgd", "phased") and ttt.sgd.chunk_tokens < self.window:
            raise ValueError(
                f"eval.ttt.sgd.chunk_tokens {ttt.sgd.chunk_tokens} holds no sequence of the window {self.window} "
                f"(eval.window, else data.seq_len), so nothing would be learned; expected at least {self.window}"
            )

    @property
    def window(self) -> int:
        return self.eval.window or self.data.seq_len

    @property
    def stride(self) -> int:
        return self.eval.stride or self.window


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to nested plain values for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: dict[str, Any], path: str = "") -> Config:
    """Rebuild a config from the output of `to_dict`, strictly; `path` leads to it in messages.

    Raises ValueError with the full path for an unknown key, a missing key, a value of the wrong type, or a value that
    the dataclass rejects.
    """
    return from_json(cls, values, path)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """List the fields in which two configs of the same class differ, as 'section.field: old -> new'."""
    out = []
    for item in dataclasses.fields(a):
        x, y = getattr(a, item.name), getattr(b, item.name)
        if dataclasses.is_dataclass(x):
            out += differences(x, y, f"{path}{item.name}.")
        elif x != y:
            out.append(f"{path}{item.name}: {x!r} -> {y!r}")
    return out
