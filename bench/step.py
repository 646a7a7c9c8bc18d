"""One training step of a recipe on one device, as this project takes it and as the published scripts do.

    python -m bench.step [--recipes NAME ...] [--data DIR] [--seconds N] [--out DIR] [--trace]
    python -m bench.step --small            tiny models, on a CPU in a minute; shows that it works and no more

The forms, eager, published, published_all and golfgpt, are described in bench/forms.py; each does the work of one rank
of 8.

All start from the same weights and read the same tokens; the losses of their first steps show that they do the same
work (published_all stands for published, whose other matrices do not move). Then they take turns, a few steps each, so
that clocks drift alike; a turn's first step is not counted. Times are of CUDA events on a GPU, of the clock on a CPU.
At the end of the first recipe golfgpt and published_all train 200 steps from the same weights, and golfgpt from others:
their losses should be nearer to each other than those of two seeds are.

Tokens are made up, or those of DIR, a folder that `golfgpt data prepare` made with the recipe's vocabulary.

DIR/step-*.json (of --small small-step-*.json), written as it comes, the picture step.png at the end: gpu, sm, torch,
triton, cuda, driver, date, command, roofs, small, dtype, and

    entries     one per recipe
        recipe, tokens, seq_len, parameters, matrix_parameters
        flops       {"matrices", "attention"}, of bench/flops.py
        floor_ms    of bench/flops.py, at the measured roofs (null without a GPU)
        ready_seconds       {form: to compile and warm up}
        losses      {form: nats of each checked step}; loss_difference: {form: from golfgpt's, relative, at the worst
                    step}; same_work: whether all are in bounds
        forms       {form: {"ms": {"step", "forward", "backward", "optimizer", "data", "rest"}, "spread", "steps",
                    "tokens_per_second", "mfu", "of_floor", "peak_bytes"}}; medians, spread as in golfgpt_kernels.timing
        ratios      {form: {phase: golfgpt / form}}
        optimizer_share     of golfgpt's step
        fake_quant_ms       of quantizing all banks once, alone; fake_quant_share of golfgpt's step
        synchronizations    where golfgpt's step makes the host wait ("file:line"; null without a GPU)
        execution   golfgpt's kernels, attention, graph, threads, compile, and the trials that chose them; what graphs
                    keep of their own is not in peak_bytes
        attention   the backend of the other forms, and what was timed
        curve       of the first recipe: {"steps", "tokens", "losses": {"golfgpt", "published_all", "another seed"},
                    "difference": of the first two, mean of the last half, "spread": golfgpt's from another seed}
        failed      {form: why}
    unfinished  recipes that the time did not suffice for

data is everything before the forward, zeroing gradients included; optimizer is clipping and update; rest is what lies
between the backward and the update, and after it: the gradient norm, votes, clock and loss.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from golfgpt_kernels import set_implementation, timing, tuning
from golfgpt_kernels._dispatch import dtype_name
from torch import Tensor

from bench import report
from bench.flops import attention_flops, floor_ms, matrix_flops, matrix_parameters, mfu
from bench.forms import FORMS, Form, Setup, build
from bench.roofs import driver, roofs
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant.quantizer import Quantizer
from golfgpt.recipes import get
from golfgpt.train.attention_backend import Selection, select_backend
from golfgpt.train.execution import FIELDS
from golfgpt.train.step import Pending, TrainStep

RECIPES = ("baseline", "mixed-qat", "int5-int6-swa")
PHASES = report.STEP_PHASES
CHECKED_STEPS = 5  # codes that flip carry the forms apart in more steps
TURNS, STEPS_A_TURN = 6, 6
CURVE_STEPS, SMALL_CURVE_STEPS = 200, 20
# Relative. Tiny models on a CPU are within 4e-6 in float32 and 1e-3 in bf16; never measured on a GPU.
LOSS_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.01}
RESERVE = 20.0  # seconds of the budget for imports, the picture and the end of the process


# ---- timing


class Marks:
    """Where the phases of a step begin, on the device's own time line."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def __call__(self, phase: str) -> None:
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def ms(self) -> dict[str, float]:
        """Milliseconds of each phase, and of the step; after the device is done."""
        out = dict.fromkeys(("step", *PHASES), 0.0)
        for (phase, begin), (_, end) in pairwise(self.marks):
            out[phase] += begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)
        return out | {"step": sum(out.values())}


class Timed:
    """A form, its losses and times so far."""

    def __init__(self, form: Form, setup: Setup):
        self.form, self.setup = form, setup
        self.done, self.times = 0, []
        self.resident, self.peak = 0, 0  # bytes between steps, and at most

    def turn(self, steps: int) -> list[float]:
        """Take `steps` steps and return their losses."""
        cuda, device = self.setup.device.type == "cuda", self.setup.device
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        self.form.enter()
        losses, marks = [], []
        for step in range(self.done, self.done + steps):
            marks.append(Marks(device))
            losses.append(self.form.step(step, marks[-1]))
            marks[-1]("end")
        self.done += steps
        if cuda:
            torch.cuda.synchronize(device)
            self.peak = max(self.peak, self.resident + torch.cuda.max_memory_allocated(device) - before)
        self.times += [mark.ms() for mark in marks[1:]]
        return [number(loss) for loss in losses]

    def entry(self, floor: float | None) -> dict:
        """Medians so far."""
        config, data = self.setup.config.model, self.setup.config.data
        ms = {phase: statistics.median(times[phase] for times in self.times) for phase in ("step", *PHASES)}
        steps = sorted(times["step"] for times in self.times)
        low, high = (steps[int(share * (len(steps) - 1))] for share in (0.1, 0.9))
        return {
            "ms": {phase: round(value, 4) for phase, value in ms.items()},
            "spread": round((high - low) / ms["step"], 4),
            "steps": len(steps),
            "tokens_per_second": round(data.batch_tokens / ms["step"] * 1e3),
            "mfu": round(mfu(config, data.batch_tokens, data.seq_len, ms["step"]), 4),
            "of_floor": round(floor / ms["step"], 4) if floor else None,
            "peak_bytes": self.peak or None,
        }


def number(loss: Tensor | Pending) -> float:
    return loss.item() if isinstance(loss, Tensor) else loss.result().loss


def curve(setup: Setup, forms: Mapping[str, Form], steps: int) -> dict:
    """Losses of `steps` steps from the start, and how far they are apart in the last half of them."""

    def train(name: str, seed: int = 0) -> list[float]:
        forms[name].enter()
        forms[name].restart(setup.weights(seed))
        return [number(loss) for loss in [forms[name].step(step, lambda phase: None) for step in range(steps)]]

    def distance(a: Sequence[float], b: Sequence[float]) -> float:
        return statistics.mean(abs(x - y) for x, y in list(zip(a, b, strict=True))[steps // 2 :])

    ours, theirs, other = train("golfgpt"), train("published_all"), train("golfgpt", seed=1)
    losses = {"golfgpt": ours, "published_all": theirs, "another seed": other}
    return {
        "steps": steps, "tokens": setup.source, "losses": losses,
        "difference": distance(ours, theirs), "spread": distance(ours, other),
    }  # fmt: skip


def synchronizations(form: Form, step: int) -> list[str]:
    """Where a step makes the host wait for the GPU, as "file:line"."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            form.step(step, lambda phase: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def fake_quant_ms(trainer: TrainStep) -> float | None:
    """Quantizing all matrices once, alone; the step does it inside the launch that updates them. None without QAT."""
    copies, fake_quant = trainer.compute_copies, Quantizer(trainer.config.model, trainer.config.quant).fake_quant()
    quantized = [name for name in copies.banks if name in fake_quant]
    if not quantized:
        return None

    def quantize(_inputs: object) -> None:
        copies.refresh(quantized)

    return timing.time_us(quantize, [{}], trainer.ranks.device).us / 1e3


def trace(form: Form, step: int, file: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        for i in range(2):
            form.step(step + i, lambda phase: None)
        if cuda:
            torch.cuda.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))


# ---- one recipe


def new_entry(recipe: str, setup: Setup, measured: Mapping[str, float] | None) -> dict:
    model, data = setup.config.model, setup.config.data
    cost = model, data.batch_tokens, data.seq_len
    return {
        "recipe": recipe, "tokens": data.batch_tokens, "seq_len": data.seq_len,
        "parameters": sum(math.prod(shape) for shape in parameter_shapes(model).values()),
        "matrix_parameters": matrix_parameters(model),
        "flops": {"matrices": matrix_flops(*cost[:2]), "attention": attention_flops(*cost)},
        "floor_ms": round(floor_ms(*cost, **measured), 4) if measured else None,
        "ready_seconds": {}, "losses": {}, "loss_difference": {}, "same_work": None, "forms": {}, "ratios": {},
        "optimizer_share": None, "fake_quant_ms": None, "fake_quant_share": None, "synchronizations": None,
        "execution": None, "attention": None, "curve": None, "failed": {},
    }  # fmt: skip


def backend(setup: Setup) -> Selection:
    data = setup.config.data
    shape, ranks = (data.batch_tokens // data.seq_len, data.seq_len), Ranks(0, 1, setup.device)
    return select_backend("auto", setup.config.model, [shape], ranks, setup.dtype)


def measure(
    setup: Setup, entry: dict, save: Callable[[], None], traces: Path | None, turns: int, curve_steps: int
) -> None:
    """Build, check and time the forms into `entry`, which `save` keeps after every part."""
    cuda, built, attention = setup.device.type == "cuda", {}, backend(setup)
    entry["attention"] = str(attention)
    for name in FORMS:
        with failure(entry, name):
            before, began = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
            form = build(name, setup, attention, {name: timed.form for name, timed in built.items()})
            entry["ready_seconds"][name] = round(time.perf_counter() - began, 1)
            print(f"{entry['recipe']}: {name} is ready after {entry['ready_seconds'][name]} s", flush=True)
            timed = Timed(form, setup)
            if name == "published":  # the same memory, and losses that no other form can have
                timed.resident = built["published_all"].resident
            else:
                entry["losses"][name] = timed.turn(CHECKED_STEPS)
                timed.resident = torch.cuda.memory_allocated() - before if cuda else 0
                timed.times, timed.peak = [], 0
            built[name] = timed
        check_losses(entry, setup.dtype)
        save()
    for _ in range(turns):
        for name, timed in list(built.items()):
            with failure(entry, name):
                timed.turn(STEPS_A_TURN)
                entry["forms"][name] = timed.entry(entry["floor_ms"])
            if name in entry["failed"]:
                del built[name]
        add_ratios(entry)
        save()
    if "golfgpt" in built:
        with failure(entry, "details"):
            add_details(built["golfgpt"], entry)
        save()
    if curve_steps and {"golfgpt", "published_all"} <= built.keys():
        with failure(entry, "curve"):
            entry["curve"] = curve(setup, {name: timed.form for name, timed in built.items()}, curve_steps)
        save()
    for name in built.keys() & {"golfgpt", "published"} if traces else ():
        trace(built[name].form, built[name].done, traces / f"trace-{entry['recipe']}-{name}.json.gz")


@contextlib.contextmanager
def failure(entry: dict, name: str) -> Iterator[None]:
    """A form that fails says why, and the others go on; not so when the time is up, however it is wrapped."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TimeoutError) or "the time is up" in str(error):
            raise
        entry["failed"][name] = tuning.reason(error)
    gc.collect()


def check_losses(entry: dict, dtype: torch.dtype) -> None:
    """How far the other forms' losses are from golfgpt's, relative, at the worst step."""
    losses = dict(entry["losses"])
    ours = losses.pop("golfgpt", [])
    for name, theirs in losses.items() if ours else ():
        pairs = list(zip(ours, theirs, strict=True))
        finite = all(math.isfinite(a) and math.isfinite(b) for a, b in pairs)
        entry["loss_difference"][name] = max(abs(b / a - 1) for a, b in pairs) if finite else math.inf
    if entry["loss_difference"]:
        entry["same_work"] = all(worst <= LOSS_BOUND[dtype] for worst in entry["loss_difference"].values())


def add_ratios(entry: dict) -> None:
    if (ours := entry["forms"].get("golfgpt")) is None:
        return
    for name, theirs in entry["forms"].items():
        pairs = {phase: (ours["ms"][phase], theirs["ms"][phase]) for phase in ours["ms"]}
        entry["ratios"][name] = {phase: round(a / b, 4) for phase, (a, b) in pairs.items() if b}
        if theirs["peak_bytes"]:
            entry["ratios"][name]["peak_bytes"] = round(ours["peak_bytes"] / theirs["peak_bytes"], 4)
    entry["optimizer_share"] = round(ours["ms"]["optimizer"] / ours["ms"]["step"], 4)


def add_details(timed: Timed, entry: dict) -> None:
    """What is asked of golfgpt's step alone."""
    timed.form.enter()
    runtime, trials = timed.form.execution.runtime, timed.form.execution.trials
    entry["execution"] = {name: getattr(runtime, name) for name in FIELDS} | {"trials": [str(each) for each in trials]}
    if (ms := fake_quant_ms(timed.form.trainer)) is not None:
        entry["fake_quant_ms"] = round(ms, 4)
        entry["fake_quant_share"] = round(entry["fake_quant_ms"] / entry["forms"]["golfgpt"]["ms"]["step"], 4)
    if timed.setup.device.type == "cuda":
        entry["synchronizations"] = synchronizations(timed.form, timed.done)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="prepared folder to read (default: tokens are made up)"
    )
    parser.add_argument("--seconds", type=float, default=400.0, help="ends by then, with what there is (400)")
    parser.add_argument("--out", type=Path, help="folder of results (on a GPU: bench/results)")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="on a GPU bfloat16, on a CPU float32")
    parser.add_argument("--choose", action="store_true", help="choose golfgpt's execution, for later calls, and end")
    parser.add_argument("--trace", action="store_true", help="two steps of published and golfgpt by torch.profiler")
    options = parser.parse_args(arguments)
    try:
        for recipe in options.recipes:
            get(recipe)
    except InputError as error:
        parser.error(str(error))
    cuda = torch.cuda.is_available()
    if not (cuda or options.small):
        parser.error("bench.step needs a CUDA device; --small runs tiny models without one")
    if options.small and options.data:
        parser.error("--small makes its tokens up")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    out = options.out or (report.RESULTS if cuda else None)
    if options.trace and out is None:
        parser.error("--trace needs --out DIR on a CPU")
    result = tuning.environment(device) | {"date": time.strftime("%Y-%m-%d"), "command": "python -m bench.step"}
    result |= {"cuda": torch.version.cuda, "driver": driver(), "roofs": None, "small": options.small}
    result |= {"dtype": dtype_name(dtype), "entries": [], "unfinished": list(options.recipes)}
    stop = time.monotonic() + options.seconds - min(RESERVE, options.seconds / 4)

    def save() -> None:
        if out is not None:
            tuning.write_json(out / report.step_result_name(result), result)

    try:
        with timing.time_limit(stop - time.monotonic()), set_implementation("auto"):
            result["roofs"] = roofs(device) if cuda else None
            for recipe in options.recipes:
                setup = Setup.of(recipe, small=options.small, device=device, dtype=dtype, folder=options.data)
                if options.choose:
                    print(recipe, *build("golfgpt", setup, backend(setup), {}).execution.trials, sep="\n  ", flush=True)
                    continue
                entry = new_entry(recipe, setup, result["roofs"])
                result["entries"].append(entry)
                turns, steps = (1, SMALL_CURVE_STEPS) if options.small else (TURNS, CURVE_STEPS)
                steps = steps if recipe == options.recipes[0] else 0
                measure(setup, entry, save, out if options.trace else None, turns, steps)
                result["unfinished"].remove(recipe)
                torch._dynamo.reset()  # or its limit on recompilations would add up over recipes
                print(report.step_table(result | {"entries": [entry]}), flush=True)
    except Exception:  # after the limit whatever was raised may be the limit, wrapped
        if time.monotonic() < stop:
            raise
        print(f"the time is up; unfinished: {', '.join(result['unfinished'])}")
    if options.choose:
        return 0
    save()
    print(report.step_figures(result))
    if out is not None and any(entry["forms"] for entry in result["entries"]):
        report.step_picture([result], out / ("small-step.png" if options.small else "step.png"))
    wrong = [e["recipe"] for e in result["entries"] if e["failed"] or e["same_work"] is False]
    if wrong:
        print(f"a form failed or does other work: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
