"""How a run executes its steps where runtime says "auto": what makes the whole step fastest here.

Before the clock starts, alternatives are tried in turn: on a GPU Triton kernels for each part of a step, attention
backends and CUDA graphs, on a CPU fewer threads and compilation. Whole steps of the run are timed, with the alternative
and with the best so far, by turns. The alternative stays if it is faster by more than the times vary, and by 1 % at
least. Not every combination is tried.

Kernels and graphs run first in child processes, which compare their results with PyTorch's: within the error budget of
`golfgpt_kernels.testing`, bit for bit where codes or fake-quantized weights are concerned. A child that fails, crashes
or hangs costs that alternative only: the run's own process never launches it. The compiled step itself is compared with
a plain one in the same way, on a CPU in the run's own process.

The result is kept under $XDG_CACHE_HOME/golfgpt/execution, by device, versions and everything that shapes a step.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from golfgpt_kernels import cannot_run

from golfgpt.config import RunConfig, RuntimeConfig, from_dict, to_dict
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, interruption
from golfgpt.train import compile_cache
from golfgpt.train.attention_backend import MAX_ERROR, Selection, enable_backend
from golfgpt.train.children import settled, verdicts
from golfgpt.train.config import KERNELS
from golfgpt.train.kernels import set_kernels
from golfgpt.train.machine_cache import kept_value
from golfgpt.train.step import TrainStep

SECONDS = 300.0
"""How long to try. What does not fit is not tried."""
CHILD_SECONDS = 180.0
"""For all children at once: to import, compile and compare."""
TURNS, SHORT, TURN_SECONDS = 5, 3, 0.2
"""Turns of each, fewer where a step takes more than a second; a turn has as many steps as fit into TURN_SECONDS."""
TAKEN, COMPILED = "taken", "compiled step"
UNUSABLE = ("the gradient of", "losses", "overwrites", "ended by")
"""What the child of the compiled step says if the run must not use that step. torch 2.13 can compile a sum that is
never written, and a backward that writes over a weight (LOG.md)."""
CHECKED_TOKENS = 8192
MOST_CPU_ERROR = 0.25
"""Of a gradient's norm, of the compiled step on a CPU: what is not computed at all errs by more, rounding by less, but
in gradients of fewer than 64 elements, which are sums that may cancel and are not compared."""
LEAST_GAIN = 0.01
SLOW_STEP = 20.0
"""Seconds. Where a step takes longer (of a GPU's recipe on a CPU), nothing is timed."""
CPU_COMPILATION, CPU_GAIN = 60.0, 1.2
"""Seconds that Inductor's C++ takes, half of it where torch kept an earlier compilation, and what a compiled step has
gained on a CPU (LOG.md): a compilation is tried where training would repay it."""
FIELDS = ("kernels", "attention", "graph", "threads", "compile")
"""Of RuntimeConfig: what is chosen here."""


@dataclass(frozen=True)
class Alternative:
    """A change of the execution, by the values of fields of RuntimeConfig."""

    name: str
    fields: Mapping[str, Any]

    def on(self, runtime: RuntimeConfig) -> RuntimeConfig:
        """`runtime` with this change; kernels are added to those that it has, or replace those of the same ops."""
        fields = dict(self.fields)
        if "kernels" in fields and runtime.kernels != "eager":
            new = fields["kernels"]
            others = [part for part in runtime.kernels.split(",") if not KERNELS[part].keys() & KERNELS[new].keys()]
            fields["kernels"] = ",".join((*others, new))
        return replace(runtime, **fields)


@dataclass(frozen=True)
class Trial:
    """What was found out about an alternative."""

    name: str
    verdict: str
    """taken, slower, or why it was not timed."""
    ms: float | None = None
    """Of a step with it."""
    best_ms: float | None = None
    """Of a step with the best before it, at the same time."""

    def __str__(self) -> str:
        times = "" if self.ms is None else f" {self.ms:.2f} ms a step against {self.best_ms:.2f}"
        return f"{self.name}:{times} {self.verdict}"


@dataclass(frozen=True)
class Execution:
    """The chosen values of FIELDS, and why."""

    runtime: RuntimeConfig
    trials: Sequence[Trial] = ()
    kept: bool = False
    """Whether an earlier run made the trials."""


def alternatives(runtime: RuntimeConfig, step: TrainStep, attention: Selection) -> list[Alternative]:
    """What is to be tried, in this order, for the fields of `runtime` that are "auto"; nothing if kernels are eager."""
    if runtime.kernels == "eager":
        return []
    if not step.cuda:
        most = torch.get_num_threads()
        fewer = [most >> i for i in range(1, most.bit_length())] if runtime.threads == 0 else []
        threads = [Alternative(f"threads {count}", {"threads": count}) for count in fewer]
        compile = runtime.compile == "auto" and repays_compilation(step, step.config.schedule.cap or math.inf)
        return threads + [Alternative("compile", {"compile": "on"})] * compile
    if not (step.compiled and runtime.warmup_steps):
        return []
    parts = [part for part in KERNELS if part != "fake_quant" or step.config.quant.qat != "off"]
    kernels = [Alternative(part, {"kernels": part}) for part in parts] if runtime.kernels == "auto" else []
    others = [name for name in attention.ms if name not in (attention.backend, "math")]
    backends = [Alternative(f"attention {name}", {"attention": name}) for name in others]
    graphs = [Alternative(f"graph {graph}", {"graph": graph}) for graph in ("optimizer", "step")]
    return kernels + backends * (runtime.attention == "auto") + graphs * (runtime.graph == "auto")


def repays_compilation(step: TrainStep, seconds: float) -> bool:
    """Whether training for so long may repay the compilation of a CPU's step."""
    here = compile_cache.cache_file(step.config, step.dtype, step.ranks.device).exists()
    cost = CPU_COMPILATION / 2 if step.ranks.broadcast_object(here) else CPU_COMPILATION
    return seconds * (1 - 1 / CPU_GAIN) >= cost


def starting_point(runtime: RuntimeConfig, step: TrainStep, attention: Selection) -> RuntimeConfig:
    """`runtime` without any alternative."""
    chosen = {
        "dtype": step.dtype_choice.name,
        "attention": attention.backend,
        "compile": runtime.compile if step.cuda else "on" if step.compiled else "off",
        "graph": "off" if runtime.graph == "auto" else runtime.graph,
    }
    if runtime.kernels == "auto" and step.cuda and step.compiled and runtime.warmup_steps:
        chosen["kernels"] = "eager"
    return replace(runtime, **chosen)


def select_execution(
    step: TrainStep,
    attention: Selection,
    status: Callable[[str], None] = lambda text: None,
    *,
    trials: bool = True,
) -> Execution:
    """Choose for the fields of step.config.runtime that are "auto", and execute `step` like that from now on. All ranks
    must call it together, and all choose the same: what rank 0 does. `status` receives progress messages. Without
    `trials`, as for a run that goes on, nothing is tried."""
    config, ranks = step.config, step.ranks
    start = starting_point(config.runtime, step, attention)
    tries = alternatives(config.runtime, step, attention) if trials else []
    start, tries = ranks.broadcast_object((start, tries))
    found = Execution(start)
    if tries:
        tree = to_dict(replace(config, data=replace(config.data, path=None)))
        facts = {name: tree[name] for name in ("model", "quant", "data", "average", "runtime")}
        # Of rates only whether they are 0: others take the same steps.
        facts["optim"] = {name: bool(v) if isinstance(v, float) else v for name, v in tree["optim"].items()}
        facts |= {"world": ranks.world, "step_dtype": str(step.dtype), "cores": torch.get_num_threads()}
        facts |= {"tries": [each.name for each in tries]}

        def read(kept: dict[str, Any] | None) -> Execution | None:
            if not kept:
                return None
            runtime = from_dict(RuntimeConfig, asdict(start) | {name: kept["runtime"][name] for name in FIELDS})
            return Execution(runtime, tuple(Trial(**trial) for trial in kept["trials"]), kept=True)

        def lasting(value: dict[str, Any] | None) -> bool:
            return bool(value) and all(settled(trial["verdict"]) for trial in value["trials"])

        def keep(value: dict[str, Any] | None = None) -> Execution | None:
            return kept_value("execution", ranks.device, facts, read, lambda: value, lasting)[0]

        found = ranks.broadcast_object(keep() if ranks.is_main else None)
        if not found:
            found = Trials(step, start, status).run(tries)
            if ranks.is_main:
                keep({"runtime": asdict(found.runtime), "trials": [asdict(trial) for trial in found.trials]})
    use(step, found.runtime)
    return found


def use(step: TrainStep, runtime: RuntimeConfig) -> None:
    """Execute `step` as `runtime` says. Its graphs are yet to be captured."""
    set_process(runtime)
    step.execute(runtime)


def set_process(runtime: RuntimeConfig) -> None:
    """The part of an execution that concerns the whole process."""
    set_kernels(runtime.kernels)
    enable_backend(runtime.attention)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)


def available(runtime: RuntimeConfig, stored: RuntimeConfig, device: torch.device) -> tuple[RuntimeConfig, str]:
    """`runtime` with what `device` has in place of choices that a run made elsewhere (`stored`), and a sentence about
    what was replaced. What was asked for now (differs from `stored`) stays, and may fail."""
    instead = {}
    if stored.kernels not in ("auto", "eager") and cannot_run(device, torch.float32):
        instead["kernels"] = "eager"
    if device.type == "cpu" and stored.attention not in ("auto", "flash", "math"):
        instead["attention"] = "auto"
    if device.type == "cpu" and stored.graph in ("optimizer", "step"):
        instead["graph"] = "off"
    instead = {name: value for name, value in instead.items() if getattr(runtime, name) == getattr(stored, name)}
    names = ", ".join(f"{name} {getattr(stored, name)} ({value} here)" for name, value in instead.items())
    return replace(runtime, **instead), f"not available, so numbers may differ by rounding: {names}" if names else ""


class Trials:
    """Tries alternatives on whole steps, which leave no trace."""

    def __init__(self, step: TrainStep, start: RuntimeConfig, status: Callable[[str], None]):
        self.step, self.best, self.status = step, start, status
        self.begun, self.threads = time.monotonic(), torch.get_num_threads()
        self.steps = 1
        """In a turn."""

    def run(self, tries: Sequence[Alternative]) -> Execution:
        step, trials = self.step, []
        checks = {each.name: each.on(self.best) for each in tries if "kernels" in each.fields}
        refused = self._refused(checks | ({COMPILED: self.best} if step.cuda and step.compiled else {}))
        if why := refused.get(COMPILED):
            trials.append(Trial(COMPILED, why))
            if any(sign in why for sign in UNUSABLE):
                return Execution(replace(self.best, compile="off", graph="off"), tuple(trials))
        with step.undone():
            self._use(self.best)
            self.status("timing a training step")
            self._rehearse_all()
            seconds = self._turn(self.best) / 1e3
            self.steps = max(1, min(50, round(TURN_SECONDS / seconds)))
            for each in tries:
                if "threads" in each.fields and trials and trials[-1].verdict != TAKEN:
                    continue  # still fewer are no faster
                self.status(f"trying which step is fastest: {each.name}")
                why = refused.get(each.name) or self._too_long(each, seconds)
                trials.append(Trial(each.name, why) if why else self._try(each, SHORT if seconds > 1 else TURNS))
            self._use(self.best)
        return Execution(self.best, tuple(trials))

    def _use(self, runtime: RuntimeConfig) -> None:
        """With as many threads as at the start where `runtime` names no number."""
        use(self.step, replace(runtime, threads=runtime.threads or self.threads))

    def _rehearse_all(self) -> None:
        """Take what a run executes, before and after its loop begins."""
        for looping in self.step.ways():
            self.step.rehearse(looping)

    def _too_long(self, each: Alternative, step_seconds: float) -> str | None:
        """Why there is no time for it."""
        if step_seconds > SLOW_STEP:
            return f"not tried: a step takes {step_seconds:.0f} s"
        if self.step.ranks.broadcast_object(time.monotonic() - self.begun > SECONDS):
            return f"not tried: {SECONDS:.0f} s are over"
        lasts = self.step.config.schedule.max_steps * step_seconds
        if "compile" in each.fields and not repays_compilation(self.step, lasts):
            return f"not tried: {lasts:.0f} s of training do not repay a minute of compilation"
        return None

    def _try(self, each: Alternative, turns: int) -> Trial:
        new = each.on(self.best)
        why = self._refused({each.name: new})[each.name] if "graph" in each.fields else None
        if why := why or self._ready(new):
            self._use(self.best)
            return Trial(each.name, why)
        times = [(self._turn(self.best), self._turn(new)) for _ in range(turns)]
        before, ms = (median(column) for column in zip(*times, strict=True))
        spread = max((sorted(column)[-2] - min(column)) / median(column) for column in zip(*times, strict=True))
        taken = ms < before * (1 - max(LEAST_GAIN, spread))
        if taken:
            self.best = new
        verdict = TAKEN if taken else "slower" if ms > before else f"not clearly faster, times vary by {spread:.1%}"
        return Trial(each.name, verdict, round(ms, 3), round(before, 3))

    def _refused(self, runtimes: Mapping[str, RuntimeConfig]) -> dict[str, str | None]:
        """Rank 0's children's verdicts of kernels and graphs."""
        found = None
        if self.step.ranks.is_main and runtimes:
            self.status(f"checking in child processes: {', '.join(runtimes)}")
            if self.step.cuda:
                torch.cuda.empty_cache()
            found = verdicts({name: self._command(name, runtime) for name, runtime in runtimes.items()}, CHILD_SECONDS)
        return {
            name: why and f"refused: {why}" for name, why in (self.step.ranks.broadcast_object(found) or {}).items()
        }

    def _command(self, name: str, runtime: RuntimeConfig) -> list[str]:
        step, config = self.step, self.step.config
        if name not in KERNELS:
            runtime = replace(runtime, device=step.ranks.device.type)
            data = replace(config.data, path=None)
            config = replace(config, runtime=runtime, data=data)
            return [sys.executable, "-m", "golfgpt.train.execution", json.dumps(to_dict(config))]
        m, sizes = config.model, {"--rows": config.data.microbatch, "--device": step.ranks.device}
        sizes |= {"--dim": m.model_dim, "--kv": m.kv_dim, "--hidden": m.mlp_hidden, "--vocab": m.vocab_size}
        sizes |= {"--layers": m.num_layers, "--dtype": str(step.dtype).removeprefix("torch.")}
        sizes |= {"--slope": m.mlp_slope, "--softcap": m.logit_softcap}
        options = [str(part) for pair in sizes.items() for part in pair]
        (impl,) = set(KERNELS[name].values())
        return [sys.executable, "-m", "golfgpt_kernels", "check", *KERNELS[name], "--json", "--impl", impl, *options]

    def _ready(self, runtime: RuntimeConfig) -> str | None:
        """Compile it and capture its graphs, on all ranks; why that failed on some."""
        step = self.step

        def forward_and_backward() -> None:
            if runtime.compile != self.best.compile:  # on a CPU; a child has checked a GPU's compiled step
                self._check_compiled(runtime)
            self._use(runtime)
            for looping in step.ways():
                for _ in step.backward(0, looping):
                    pass

        def steps() -> None:
            self._rehearse_all()
            self._rehearse_all()

        if why := self._fails(forward_and_backward):
            return f"failed: {why}"
        if step.ranks.world > 1:  # ranks wait for each other in a step: where one fails, all end
            steps()
        elif why := self._fails(steps):
            return f"failed: {why}"
        why = self._fails(step.capture)
        return why and f"failed: {why}"

    def _check_compiled(self, runtime: RuntimeConfig) -> None:
        """Raises RuntimeError if gradients differ from those of the best so far, or a weight is overwritten."""
        step, gradients = self.step, []
        for each in (self.best, runtime):
            self._use(each)
            gradients.append({})
            for looping in step.ways():
                if name := step.overwritten(looping):
                    raise RuntimeError(f"it overwrites {name}")
                gradients[-1] |= {(name, looping): p.grad.clone() for name, p in step.model.named_parameters()}
        for (name, looping), gradient in gradients[0].items():
            norm, error = gradient.norm().item(), (gradients[1][name, looping] - gradient).norm().item()
            if gradient.numel() >= 64 and not error <= MOST_CPU_ERROR * norm + 1e-12:
                raise RuntimeError(f"the gradient of {name} differs by {error:.2g} of {norm:.2g}")

    def _fails(self, work: Callable[[], None]) -> str | None:
        """Why `work`, which needs no other rank, fails here or elsewhere."""
        why = None
        try:
            work()
        except GolfError:
            raise
        except Exception as error:
            if stopped := interruption(error):
                raise stopped from error
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        failed = self.step.ranks.sum_(torch.tensor(float(why is not None), device=self.step.ranks.device)).item()
        return why or ("it failed on another rank" if failed else None)

    def _turn(self, runtime: RuntimeConfig) -> float:
        """Milliseconds of a step, by rank 0's clock; of a loop that begins later, the mean of both ways."""
        step = self.step
        self._use(runtime)
        step.capture()
        if step.cuda:
            self._rehearse_all()  # the first after a change waits for the host
        step.ranks.synchronize()
        begun = time.perf_counter()
        for _ in range(self.steps):
            self._rehearse_all()
        step.ranks.synchronize()
        return step.ranks.broadcast_object(1e3 * (time.perf_counter() - begun) / (self.steps * len(step.ways())))


def check_step(config: RunConfig) -> str | None:
    """Why steps that are executed as config.runtime says differ from plain ones (neither compiled nor replayed, no
    kernels); None if they agree. Compares the losses of four steps, of up to CHECKED_TOKENS tokens each, and before
    them the gradient of every parameter, with and without the loop: its error against a plain step in float32 may be
    three times that of a plain step in the run's dtype, plus 5 % of the gradient's norm (50 % where fewer than 64
    elements are sums that may cancel)."""
    seq_len, ranks = config.data.seq_len, Ranks(0, 1, torch.device(config.runtime.device))
    tokens = min(config.data.batch_tokens, max(1, CHECKED_TOKENS // seq_len) * seq_len)
    data = replace(config.data, batch_tokens=tokens, spans=1, microbatch_tokens=None, path=None)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.model.vocab_size, (4 * tokens + 1,), generator=generator).numpy().astype("uint16")
    if data.document_start is not None:
        text[::997] = data.document_start
    plain = replace(config.runtime, kernels="eager", compile="off", graph="off")
    gradients, losses = [], []
    for runtime in (replace(plain, dtype="float32"), plain, config.runtime):
        step = TrainStep(replace(config, data=data, runtime=runtime), SimpleNamespace(train=[text]), ranks)
        with torch.no_grad():  # what starts at zero would hide gradients
            for p in step.model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device)
        use(step, runtime)
        step.warm_up(3 if step.compiled else 0)
        found = {}
        for looping in step.ways():
            if name := step.overwritten(looping):
                return f"it overwrites {name}"
            found |= {(name, looping): p.grad.clone() for name, p in step.model.named_parameters()}
        gradients.append(found)
        losses.append([])
        for number in range(4):
            pending = step.launch(number)
            step.update(pending)
            losses[-1].append(step.wait(pending).loss)
        step.data.close()
    exact, rounded, found = gradients
    for (name, looping), gradient in exact.items():
        norm, error, allowed = (
            x.norm().item() for x in (gradient, found[name, looping] - gradient, rounded[name, looping] - gradient)
        )
        allowed = 3 * allowed + (0.05 if gradient.numel() >= 64 else 0.5) * norm + 1e-12
        if not error <= allowed:
            return f"the gradient of {name} errs by {error:.2g} of {norm:.2g}, {allowed:.2g} is allowed"
    if not all(abs(a / b - 1) < MAX_ERROR for a, b in zip(*losses[1:], strict=True)):
        return f"losses {losses[2]}, those of plain steps {losses[1]}"
    return None


if __name__ == "__main__":
    print(json.dumps({"step": check_step(from_dict(RunConfig, json.loads(sys.argv[1])))}))
