"""One training step on a CPU: golfgpt's against the published model and Muon loop, in turns.

    python -m bench.cpu_step [--recipes small baseline] [--dtypes float32 bfloat16] [--compile]

Every form takes the same tokens from the same weights. They take turns, a step each, so that whatever else the machine
does meets all alike. Medians are printed, of the whole step, of the model (forward and backward) and of the optimizer,
and the ratio of golfgpt's best form to the published best. --compile adds the forms under torch.compile.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from bench.forms import Form, Golfgpt, Published, Setup
from bench.step import Marks
from golfgpt.distributed import Ranks
from golfgpt.tables import table
from golfgpt.train.attention_backend import select_backend

CPU, WHO = torch.device("cpu"), ("golfgpt", "published")


def setup_of(recipe: str, tokens: int, dtype: torch.dtype) -> Setup:
    setup = Setup.of(recipe, small=False, device=CPU, dtype=dtype)
    data = replace(setup.config.data, batch_tokens=tokens, seq_len=min(tokens, setup.config.data.seq_len))
    return replace(setup, config=replace(setup.config, data=data))


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
        for dtype in options.dtypes:
            made |= forms(setup_of(recipe, options.tokens, getattr(torch, dtype)), options.compile)
        results = measure(made, options.turns)
        header = [recipe, "step ms", "model ms", "optimizer ms"]
        rows = [[name, *(f"{ms[part]:.1f}" for part in ("step", "model", "optimizer"))] for name, ms in results.items()]
        print("\n" + table(header, rows))
        best = {who: min((n for n in results if n.startswith(who)), key=lambda n: results[n]["step"]) for who in WHO}
        for part in ("step", "model", "optimizer"):
            ratio = results[best["golfgpt"]][part] / results[best["published"]][part]
            print(f"{part}: {ratio:.2f} x ({best['golfgpt']} / {best['published']})")
    return 0


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
