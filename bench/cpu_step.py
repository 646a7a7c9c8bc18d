"""One training step on a CPU, and scoring: golfgpt's against the published model and Muon loop, in turns.

    python -m bench.cpu_step [--recipes small baseline frontier] [--dtypes float32 bfloat16] [--compile]

Every form takes the same tokens from the same weights. They take turns, a step each, so that whatever else the machine
does meets all alike. Medians are printed, of the whole step, of the model (forward and backward) and of the optimizer,
and the ratio of golfgpt's best form to the published best. --compile adds the forms under torch.compile. Scoring takes
windows at a stride of 64; the published scripts compute all logits of a window and use the last 64.

Of `frontier`, only the model is measured, at a toy size on one packed row, against bench/published_frontier.py.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import published_frontier
from bench.forms import Form, Golfgpt, Published, Setup, made_up_tokens
from bench.step import Marks
from golfgpt.config import LoopConfig, ModelConfig, ParallelConfig
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.model.segments import Segments
from golfgpt.published.names import from_published
from golfgpt.recipes import get
from golfgpt.score.windows import Scorer
from golfgpt.tables import table
from golfgpt.train.attention_backend import select_backend
from golfgpt.train.compile_cache import compile_loss

CPU, WHO = torch.device("cpu"), ("golfgpt", "published")
PARTS = ("step", "model", "optimizer", "scoring")
WINDOWS, STRIDE = 16, 64


def setup_of(recipe: str, tokens: int, dtype: torch.dtype) -> Setup:
    setup = Setup.of(recipe, small=False, device=CPU, dtype=dtype)
    data = replace(setup.config.data, batch_tokens=tokens, seq_len=min(tokens, setup.config.data.seq_len))
    model = replace(setup.config.model, document_start=None)  # published pair tables do not know documents
    return replace(setup, config=replace(setup.config, data=data, model=model))


def forms(setup: Setup, compiled: bool) -> dict[str, Form]:
    """Form name -> form, with its first steps behind it."""
    dtype, data = str(setup.dtype).removeprefix("torch."), setup.config.data
    shapes = [(data.batch_tokens // data.seq_len, data.seq_len)]
    attention = select_backend("auto", setup.config.model, shapes, Ranks(0, 1, CPU), setup.dtype)
    threads = torch.get_num_threads()

    def ours(compile: str) -> Golfgpt:
        return Golfgpt(setup, attention, threads=threads, compile=compile)

    made = {f"published, {dtype}": Published(setup, attention), f"golfgpt, {dtype}": ours("off")}
    if compiled:
        loop = Published(setup, attention)
        loop.loop.loss = torch.compile(loop.loop.model, dynamic=False, fullgraph=True)
        loop.loop.orthogonalize = torch.compile(loop.loop.orthogonalize)
        loop.restart(setup.weights())
        loop.step(0, lambda phase: None)
        made[f"published, {dtype}, compiled"] = loop
        made[f"golfgpt, {dtype}, compiled"] = ours("on")
    return made


def measure(made: dict[str, Form], turns: int) -> dict[str, dict[str, float]]:
    """Form -> median milliseconds of the step, the model and the optimizer."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for step in range(turns):
        for name, form in made.items():
            marks = Marks(CPU)
            form.step(step, marks)
            marks("end")
            ms = marks.ms()
            model = ms["forward"] + ms["backward"]
            times[name].append({"step": ms["step"], "model": model, "optimizer": ms["optimizer"]})
    return {
        name: {part: median(each[part] for each in steps) for part in ("step", "model", "optimizer")}
        for name, steps in times.items()
    }


def scoring(form: Form, compiled: bool) -> Callable[[Tensor], Tensor]:
    """ids (B, T + 1) -> log probabilities (B, STRIDE) of the last targets."""
    if isinstance(form, Golfgpt):
        trainer = form.trainer
        scorer = Scorer(trainer.model, trainer.dtype, compiled=compiled)
        every = torch.ones(1, STRIDE, dtype=torch.bool)

        def score(ids: Tensor) -> Tensor:
            targets = ids[:, -STRIDE:]
            return scorer.logprobs(scorer.hidden(ids[:, :-1], STRIDE), targets, every.expand_as(targets))

        return torch.no_grad()(score)
    model = form.loop.model

    def windows(ids: Tensor) -> Tensor:
        logits, targets = model.logits(ids[:, :-1]).float(), ids[:, 1:]
        return -F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)[:, -STRIDE:]

    return torch.no_grad()(torch.compile(windows, dynamic=False) if compiled else windows)


def measure_scoring(made: dict[str, Form], setup: Setup, turns: int) -> dict[str, float]:
    """Form -> median milliseconds of WINDOWS windows. Raises RuntimeError if forms give different scores."""
    length = setup.config.data.seq_len
    text = torch.from_numpy(setup.tokens[: length + STRIDE * WINDOWS].astype("int64"))
    ids = text.unfold(0, length + 1, STRIDE)[:WINDOWS].contiguous()
    calls = {}
    for name, form in made.items():
        form.restart(setup.weights())
        calls[name] = scoring(form, name.endswith("compiled"))
    means = {name: call(ids).mean().item() for name, call in calls.items()}
    if max(means.values()) - min(means.values()) > 0.02:
        raise RuntimeError(f"the forms score differently: {means}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            begun = time.perf_counter()
            call(ids)
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: median(each) for name, each in times.items()}


# ---- frontier


def toy() -> ModelConfig:
    """`frontier` with 6 layers of width 192: 0 and 1, three times 2 and 3, then 4 and 5 in two lanes."""
    return replace(
        get("frontier").config.model, vocab_size=1024, num_layers=6, model_dim=192, num_heads=6, num_kv_heads=3,
        mlp_hidden=768, xsa_layers=tuple(range(6)), loop=LoopConfig(first=2, last=3, passes=3, start=0.35),
        parallel=ParallelConfig(kind="routed", first=4),
    )  # fmt: skip


def toy_forms(tokens: int, dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Form name -> forward and backward of a row of documents of 128 tokens at most; returns the loss. Raises
    RuntimeError if the forms give different losses."""
    config, kind = toy(), str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    plain = published_frontier.Model(config, tokens, dtype)
    for p in plain.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=p.shape[-1] ** -0.5)
    model = GPT(config)
    model.load_state_dict(from_published(plain.state_dict(), config))
    ids = torch.from_numpy(made_up_tokens(config.vocab_size, tokens + 1).astype("int64"))
    starts = torch.arange(0, tokens, 96, dtype=torch.int32)
    ids[starts] = config.document_start
    segments = Segments.of(torch.cat((starts, torch.full((64,), tokens, dtype=torch.int32))), tokens, 128, dtype)
    row = ids[None, :-1], ids[None, 1:], segments
    parameters = list(model.parameters())

    def ours(ids: Tensor, targets: Tensor, segments: Segments) -> Tensor:
        return model.loss(ids, targets, dtype=dtype, segments=segments)

    losses: dict[str, Callable[..., Tensor]] = {"published": plain, "golfgpt": ours}
    if compiled:
        losses["published, compiled"] = torch.compile(plain, dynamic=False, fullgraph=True)
        losses["golfgpt, compiled"] = compile_loss(ours, CPU)

    def run(name: str) -> Tensor:
        loss = losses[name](*row)
        torch.autograd.grad(loss, parameters if name.startswith("golfgpt") else list(plain.parameters()))
        return loss.detach()

    made = {f"{name}, {kind}": partial(run, name) for name in losses}
    first = [step().item() for step in made.values()]
    if max(first) - min(first) > 0.02:
        raise RuntimeError(f"the forms have different losses: {dict(zip(made, first, strict=True))}")
    return made


def measure_toy(made: dict[str, Callable[[], Tensor]], turns: int) -> dict[str, float]:
    """Form -> median milliseconds of forward and backward."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(turns):
        for name, step in made.items():
            begun = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: median(each) for name, each in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["small", "baseline"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="in a step")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}, {options.tokens} tokens a step")
    for recipe in options.recipes:
        made = {}
        if recipe == "frontier":
            for dtype in options.dtypes:
                made |= toy_forms(options.tokens, getattr(torch, dtype), options.compile)
            times = measure_toy(made, options.turns)
            print("\n" + table([f"{recipe}, toy", "model ms"], [[name, f"{ms:.1f}"] for name, ms in times.items()]))
            for name in times:
                if name.startswith("golfgpt"):
                    print(f"{times[name] / times[name.replace('golfgpt', 'published')]:.2f} x ({name})")
            continue
        for dtype in options.dtypes:
            made |= forms(setup_of(recipe, options.tokens, getattr(torch, dtype)), options.compile)
        results = measure(made, options.turns)
        scores = measure_scoring(made, setup_of(recipe, options.tokens, torch.float32), options.turns)
        results = {name: ms | {"scoring": scores[name]} for name, ms in results.items()}
        rows = [[name, *(f"{ms[part]:.1f}" for part in PARTS)] for name, ms in results.items()]
        print("\n" + table([recipe, *(f"{part} ms" for part in PARTS)], rows))
        for part in PARTS:
            by = "scoring" if part == "scoring" else "step"
            ours, theirs = (min((n for n in results if n.startswith(w)), key=lambda n: results[n][by]) for w in WHO)
            print(f"{part}: {results[ours][part] / results[theirs][part]:.2f} x ({ours} / {theirs})")
    return 0


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
