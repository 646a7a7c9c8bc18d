"""`golfgpt preflight`: what a run does from its start to its score, each once, in a temporary run folder.

A run that cannot end well often says so late: at its first checkpoint, at the export, at the score. Here the pieces of
the run itself take two steps, write a checkpoint and go on from it, export, read the file back and score one batch. A
check that fails does not end the others, unless they need what it did not give. With several ranks it does: ranks that
go on without one that failed would wait for it.

On a CPU a step of a recipe for GPUs takes minutes. Where a step is expected to take more than LONG_STEP seconds, the
real model takes steps of one short row on each rank and scores short windows, and the table says so.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from golfgpt import distributed, vector_math
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.data.stream import Prefetcher, spans_of_rank
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, GolfError, InputError, Interrupted, VerificationError, interruption
from golfgpt.quant.budget import LEAST_FORECAST, budget_report, check_budget, forecast_bytes
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import RUNS
from golfgpt.score.evaluate import batch_windows, plan_windows, read_from, scorer_of, share, within_documents
from golfgpt.score.windows import score_windows
from golfgpt.tables import plural
from golfgpt.train.checkpoint import KEEP
from golfgpt.train.clock import Ledger
from golfgpt.train.export import Exporter
from golfgpt.train.forecast import forecast
from golfgpt.train.kernels import choose_kernels
from golfgpt.train.memory import activation_bytes, out_of_memory, ran_out
from golfgpt.train.progress import more_steps
from golfgpt.train.reporter import Reporter
from golfgpt.train.run_folder import RunFolder, load
from golfgpt.train.saver import Saver, newest
from golfgpt.train.score import ModelScorer
from golfgpt.train.signals import Signals
from golfgpt.train.step import StepResult, TrainStep
from golfgpt.train.train import check, choose_attention, choose_execution, reserve_time, warm_up

LONG_STEP, ROW = 4.0, 256
"""Seconds of a step, and the tokens of a row (and of a scored window) where it takes longer. Where it does not, some 15
steps are taken with the trials of threads and compilation."""
WARMUP_STEPS = 3
"""At most: more of them would compile nothing."""
LOG_BYTES = 300
"""Of a step in metrics.jsonl."""
ROUNDING = 1e-3
"""Relative difference of the losses when a GPU takes a step twice: its sums have no fixed order."""
COMPILE, SCORE = "compile and choose", "scored batch"
CHECKS = (
    *("data and settings", "model", COMPILE, "two steps", "checkpoint", "resume", "export", "byte budget", "reload"),
    *(SCORE, "time", "disk", "clock"),
)
"""The names of all checks, in their order. Those that need the result of one that fails are not made."""


@dataclass
class Row:
    """One check."""

    name: str
    when: str
    """When a run does what is checked."""
    found: str = ""
    verdict: Literal["ok", "warning", "fails"] = "ok"
    advice: str = ""
    """Of a warning or a failure."""
    seconds: float = 0.0
    exit_code: int = 0
    """That the run would end with."""


class _Over(Exception):
    """No further check can be made."""


class _Listener(Reporter):
    """Keeps the lines that a run would print."""

    def __init__(self, ranks: Ranks):
        super().__init__(None, speak=ranks.is_main, quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def preflight(config: RunConfig, count: Callable[[RunConfig], RunConfig]) -> list[Row]:
    """The checks of a run of `config`; under torchrun, those of this rank. `count` measures budget.code_bytes, as in
    `train`. What stays on disk is what runs keep for each other: choices and compiled code. Raises InputError for a
    device that is not there, OSError if no folder can be made, and Interrupted."""
    home = RUNS if RUNS.is_dir() else Path()
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".preflight-", dir=home)))
        signals = stack.enter_context(Signals(path / "none"))
        stack.enter_context(distributed.lost_peers(str))
        vector_math.resolve()
        ranks = distributed.start(config.runtime.device, config.runtime.peer_seconds)
        stack.callback(ranks.close)
        checks = _Checks(config, path, ranks, signals, stack)
        with contextlib.suppress(_Over):
            checks.start(count)
            checks.train()
            checks.end()
        with contextlib.suppress(_Over):
            checks.clock()
        return checks.rows


class _Checks:
    """The checks, in the order of a run."""

    def __init__(self, config: RunConfig, path: Path, ranks: Ranks, signals: Signals, stack: contextlib.ExitStack):
        self.whole = self.config = config
        """As the run would have it, and as it is tried."""
        self.path, self.ranks, self.signals, self.stack, self.rows = path, ranks, signals, stack, []
        self.listener, self.ledger, self.begun = _Listener(ranks), Ledger(), _clocks()
        stack.callback(self.listener.close)

    @contextlib.contextmanager
    def row(self, name: str, when: str, *, needed: bool = False) -> Iterator[Row]:
        """Any failure of the block is its verdict. Raises _Over if the checks that follow `needed` it."""
        row, begun = Row(name, when), time.perf_counter()
        self.listener.status(f"checking: {name}")
        try:
            with distributed.lost_peers(str):
                yield row
            row.verdict = "warning" if row.advice else "ok"
        except Exception as error:
            if stopped := interruption(error):
                raise Interrupted(
                    "stopped by a signal; nothing is left of preflight", stopped.exit_code - 128
                ) from None
            if ran_out(error):
                batch = InputError(f"out of memory, lower --eval.batch-tokens ({str(error)[:200]})")
                error = batch if name == SCORE else out_of_memory(self.config, 4, error)
            known = isinstance(error, GolfError | OSError)
            row.verdict, row.exit_code = "fails", getattr(error, "exit_code", 3 if known else 1)
            row.advice = str(error) if known else f"{type(error).__name__}: {error}"
        row.seconds = round(time.perf_counter() - begun, 1)
        self.rows.append(row)
        if row.exit_code and (needed or self.ranks.world > 1):
            raise _Over

    def start(self, count: Callable[[RunConfig], RunConfig]) -> None:
        ranks = self.ranks
        if self.config.runtime.threads:
            torch.set_num_threads(self.config.runtime.threads)
        with self.row("data and settings", "at the start", needed=True) as row:
            self.whole, self.dataset = check(self.config, ranks, False, count)
            data, assigned = self.whole.data, spans_of_rank(ranks.rank, ranks.world, self.whole.data.spans)
            Prefetcher(self.dataset.train, data, assigned, pin=False).close()  # some orders need many or long shards
            targets = plan_windows(self.dataset, self.whole).targets
            row.found = f"{self.dataset.train_tokens:,} tokens to train on, {targets:,} to score"
        with self.row("model", "at the start", needed=True) as row:
            self.stack.enter_context(choose_kernels(self.whole, ranks))
            self.step, row.advice = _affordable(self.whole, self.dataset, ranks)
            self.config, self.shortened = self.step.config, bool(row.advice)
            self.stack.callback(self.step.data.close)
            for p in self.step.model.parameters():
                ranks.broadcast_(p.data)
            self.step.prepare(0)
            self.step.average.begin()
            parameters, dtype = self.step.model.num_parameters(), self.step.dtype_choice.name
            row.found = f"{parameters:,} parameters, {ranks.device}, {dtype}"
        with self.row(COMPILE, "before the clock starts", needed=True) as row:
            attention = choose_attention(self.config, self.step)
            self.config = choose_execution(self.config, self.step, attention, self.listener, not self.shortened)
            if not self.shortened:
                self.config = reserve_time(self.config, self.step, self.dataset, self.listener)
            runtime = self.config.runtime
            few = replace(runtime, warmup_steps=min(runtime.warmup_steps, WARMUP_STEPS))
            warm_up(replace(self.config, runtime=few), self.step, self.ledger, self.listener)
            row.found = f"compile {runtime.compile}, attention {runtime.attention}, kernels {runtime.kernels}"

    def train(self) -> None:
        """Two steps, and the second one again from a checkpoint after the first."""
        step, dataset, config = self.step, self.dataset, self.config
        with self.row("two steps", "in the first seconds", needed=True) as row:
            self.folder = None
            if self.ranks.is_main:
                self.folder = RunFolder.create(self.path, config, dataset.need_tokenizer().model_bytes)
                self.stack.callback(self.folder.close)
            saver = Saver(config, self.path, dataset, step, self.ledger, self.folder, self.listener, self.signals)
            first, _ = self.take(0)
            before, saved = _state(step), saver.save(1, False)
            second, self.step_seconds = self.take(1)
            step.check_finite()
            row.found = f"losses {first.loss:.4f} and {second.loss:.4f}"
        self.checkpoint_bytes = sum(value.nbytes for value in before.values())
        every = config.runtime.checkpoint_seconds
        with self.row("checkpoint", f"every {every:g} s" if every else "after training") as row:
            if not saved:
                raise OSError(self.listener.lines[-1])
            row.found = f"{self.checkpoint_bytes:,} bytes in {self.ledger.seconds['checkpoint']:.1f} s"
        if not saved:
            return
        with self.row("resume", "after a kill") as row:
            saver.restore(self.folder and newest(self.folder, config, self.dataset))
            after = _state(step)
            if wrong := [name for name, value in before.items() if not torch.equal(value, after[name])]:
                raise VerificationError(f"{wrong[0]} does not come back from the checkpoint bit for bit")
            again, _ = self.take(1)
            if again != second and not (step.cuda and abs(again.loss / second.loss - 1) < ROUNDING):
                raise VerificationError(
                    "after a resume the step has loss and gradient norm "
                    f"{again.loss}, {again.grad_norm}, without one {second.loss}, {second.grad_norm}"
                )
            row.found = "the same step again, " + ("bit for bit" if again == second else "within rounding")

    def take(self, number: int) -> tuple[StepResult, float]:
        """Take a step, the first without the loop; its result, and the seconds of one that is not shortened."""
        step, begun = self.step, time.perf_counter()
        pending = step.launch(number, looping=step.ways()[-1] if number else None)
        self.ranks.synchronize()
        summed = time.perf_counter()
        step.update(pending)
        result = step.wait(pending)
        self.ranks.synchronize()
        parts = self.whole.data.batch_tokens / self.config.data.batch_tokens
        return result, parts * (summed - begun) + time.perf_counter() - summed

    def end(self) -> None:
        """Export, reload, score; and what the run needs until then."""
        config, step = self.config, self.step
        with self.row("export", "after training", needed=True) as row:
            tokens = min(config.quant.calibration_tokens, config.data.batch_tokens)
            quick = replace(config.quant, calibration_tokens=tokens, compressor="zlib", level=1)
            exporter = Exporter(replace(config, quant=quick), self.dataset, step, self.folder, self.listener)
            calibrate = config.quant.method == "gptq" and not self.shortened
            exporter.export(2, exporter.calibrate() if calibrate else None)
            row.found = f"{exporter.quantizer.payload_bytes:,} bytes before compression"
            size = forecast_bytes(Quantizer(config.model, config.quant))
        with self.row("byte budget", "after training") as row:
            report, most = (budget_report(round(n), config.budget) for n in (size, size / LEAST_FORECAST))
            row.found = f"forecast {report.total_bytes:,} of {report.limit_bytes:,} bytes"
            check_budget(size, config.budget)
            if most.margin_bytes < 0:
                row.advice = (
                    f"it may be {-most.margin_bytes:,} bytes over: the forecast is of Gaussian weights, as two steps "
                    f"do not tell what trained ones take, and was as low as {LEAST_FORECAST} of a published size; "
                    "--runtime.val-every N --runtime.probe measures it in the run"
                )
        with self.row("reload", "after training") as row:
            state, mine = load(self.path)[0].state_dict() if self.folder else {}, step.model.state_dict()
            if wrong := [name for name, value in state.items() if not torch.equal(value, mine[name].cpu())]:
                raise VerificationError(f"{wrong[0]} is read back with other values than were written")
            row.found = "model and tokenizer"
        with self.row(SCORE, "after training") as row:
            row.found = self.score()
            row.advice = "" if config.eval.ttt.kind == "off" else f"eval.ttt.kind {config.eval.ttt.kind} was not tried"
        cap, steps = config.schedule.cap, config.schedule.max_steps
        steps = steps if cap is None else min(steps, int(cap / self.step_seconds))
        with self.row("time", "at the first steps") as row:
            seconds = f"{self.step_seconds:,.0f} s" if self.step_seconds >= 10 else f"{self.step_seconds:.3f} s"
            row.found = f"{plural(steps, 'step')} of {seconds}"
            if not steps:
                raise BudgetError(
                    f"training ends after {cap:g} s, and a step takes about {seconds}; "
                    f"{more_steps(self.whole, self.ranks.device)}"
                )
        with self.row("disk", "at a checkpoint") as row:
            need = (KEEP + 1) * self.checkpoint_bytes + 2 * size + LOG_BYTES * steps
            folder = self.path.parent.resolve()
            free = shutil.disk_usage(folder).free
            row.found = f"{need:,} bytes of {free:,} that are free"
            if need > free:
                raise InputError(
                    f"a run writes {need:,} bytes ({KEEP + 1} checkpoints of {self.checkpoint_bytes:,} at once), and "
                    f"{free:,} are free in {folder}; free some, or work in another folder"
                )

    def score(self) -> str:
        """Score one batch with its proof, then one from the middle for its time."""
        config, ranks, windows = self.config, self.ranks, plan_windows(self.dataset, self.config)
        tokens = windows.window + (batch_windows(config, ranks) * ranks.world - 1) * windows.stride
        scorer = ModelScorer(config, self.dataset, self.step, self.ledger, self.listener, self.signals)
        score = scorer.score("scoring a batch", replace(config.eval, max_tokens=min(tokens, windows.targets)))
        mine, most = share(windows, config, ranks)
        document_start = self.dataset.need_tokenizer().bos_id if within_documents(config) else None
        timed = scorer_of(self.step.model, windows, document_start, config, ranks, self.step.dtype)
        middle, begun = mine[len(mine) // 2 :][:most], time.perf_counter()
        with torch.no_grad():
            for _ in score_windows(timed, read_from(self.dataset, ranks.device), windows, middle, most):
                ranks.synchronize()
        everything = plan_windows(self.dataset, self.whole)
        parts = len(everything) * everything.window / (len(middle) * windows.window * ranks.world)
        seconds = parts * (time.perf_counter() - begun)
        return f"{score.label} {score.val_bpb:.4f} after two steps; the score of the run takes {seconds:,.0f} s"

    def clock(self) -> None:
        with self.row("clock", "all the time") as row:
            steady, wall = (now - then for now, then in zip(_clocks(), self.begun, strict=True))
            row.found = f"{steady:.1f} s, {wall:.1f} s by the wall clock"
            if abs(steady - wall) > 0.5 + 0.01 * steady:
                raise VerificationError(
                    f"the clock that ends a run counted {steady:.2f} s, the wall clock {wall:.2f} s: the wall clock "
                    "was set meanwhile (try again), or one of the two is wrong"
                )


def _clocks() -> tuple[float, float]:
    """The clock of `Ledger`, and the wall clock."""
    return time.perf_counter(), time.time()


def _state(step: TrainStep) -> dict[str, Tensor]:
    """What a checkpoint holds, copied to the CPU. All ranks must call it."""
    parts = {"model": step.model.state_dict(), "optimizers": step.optimizers.state(), "average": step.average.state()}
    return {f"{part}.{k}": v.detach().cpu().clone() for part, state in parts.items() for k, v in state.items()}


def _affordable(config: RunConfig, dataset: Dataset, ranks: Ranks) -> tuple[TrainStep, str]:
    """The step of `config`, or on a CPU that is too slow for it a short one, and then what that means."""
    step = TrainStep(config, dataset, ranks)
    if step.cuda or (expected := forecast(step)).seconds <= LONG_STEP:
        return step, ""
    step.data.close()
    memory = activation_bytes(config.model, config.data.microbatch, step.dtype.itemsize)
    row, window = min(ROW, config.data.seq_len), min(ROW, config.window)
    data = replace(config.data, seq_len=row, batch_tokens=row * ranks.world, spans=ranks.world, microbatch_tokens=None)
    aware = within_documents(config)
    scored = replace(
        config.eval, window=window, stride=None, batch_tokens=window, rule="every_token", document_aware=aware
    )
    return TrainStep(replace(config, data=data, eval=scored), dataset, ranks), (
        f"steps and windows of {row} tokens were taken, because a whole step is long here ({expected}); not tried: "
        f"other executions of a step, and the memory of a microbatch (about {memory / 2**30:.1f} GiB)"
    )
