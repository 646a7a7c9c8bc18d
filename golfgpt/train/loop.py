"""The training loop. It ends at max_steps, or when rank 0 votes that another step could cross the cap.

On a GPU, the next step is enqueued before the result of the previous one is read. If a result requires a checkpoint or
the end of training, the steps that are already enqueued are finished first. All ranks read the same results in the same
order.
"""

from __future__ import annotations

import math
from collections import deque

from golfgpt.config import RunConfig
from golfgpt.errors import BudgetError, NonFiniteError
from golfgpt.train import compile_cache
from golfgpt.train.clock import Ledger
from golfgpt.train.export import Exporter
from golfgpt.train.memory import memory_advice
from golfgpt.train.progress import Progress
from golfgpt.train.reporter import Reporter
from golfgpt.train.saver import Saver
from golfgpt.train.score import ModelScorer
from golfgpt.train.signals import Signals
from golfgpt.train.step import Pending, StepResult, TrainStep, Votes


class Loop:
    """Takes the steps of one execution of a run. `done` steps are already completed."""

    def __init__(
        self,
        config: RunConfig,
        step: TrainStep,
        saver: Saver,
        progress: Progress,
        ledger: Ledger,
        reporter: Reporter,
        signals: Signals,
        scorer: ModelScorer,
        exporter: Exporter,
        done: int,
        finished: bool,
    ):
        """`finished`: training is already over, and `run` only reports it."""
        self.config, self.step, self.saver, self.progress = config, step, saver, progress
        self.ledger, self.reporter, self.signals = ledger, reporter, signals
        self.scorer, self.exporter = scorer, exporter
        self.done, self.finished = done, finished
        self.loss = 0.0
        """Loss of the last step."""
        self._pending: deque[tuple[Pending, float]] = deque()
        """Enqueued steps whose results have not been read, with their learning-rate multipliers."""
        self._stopping = False
        """Whether the pending steps are the last ones."""
        self._graphs = 0
        """Number of graphs made by torch.compile when it was last checked."""

    def run(self) -> None:
        """Train. Raises Interrupted after a signal and NonFiniteError after a bad step, with the state saved."""
        c, pace = self.config, self.step.pace
        if not self.finished:
            self.step.data.seek(self.done)
        pace.start(self.ledger.seconds["train"])
        self.saver.start()
        self._graphs = compile_cache.graphs()
        self.signals.deferred = True
        with self.ledger.phase("train"):
            while self.done < c.schedule.max_steps and not self.finished:
                self._launch()
                issued = self.done + len(self._pending)
                validate = bool(c.runtime.val_every) and issued % c.runtime.val_every == 0
                drain = validate or issued == c.schedule.max_steps or pace.settling
                save = signaled = False
                while self._pending and (drain or len(self._pending) > self.step.ahead):
                    result = self._collect()
                    save, signaled = save or result.save, signaled or result.signaled
                    drain = drain or self._stopping or save or signaled
                if self._pending:
                    continue
                self.finished = self._stopping or self.done == c.schedule.max_steps
                if signaled:
                    self._leave()
                if self.finished:
                    self.step.check_finite()
                if self.finished or validate or save:
                    self.saver.save(self.done, self.finished)
                if validate:
                    self.scorer.validate(self.done, self.exporter)
                    self._graphs = compile_cache.graphs()
        self.signals.release()
        self.step.data.close()
        self._say_how_it_ended()

    def _launch(self) -> None:
        """Enqueue one step."""
        number, begun = self.done + len(self._pending), self.ledger.elapsed("train")
        with memory_advice(self.config, self.step.dtype.itemsize, first=self.step.pace.taken == 0):
            for microbatch, of in self.step.backward(number):
                self.progress.within(number, microbatch, of, self.ledger.elapsed("train") - begun)
            crosses = self.step.pace.crosses_cap(begun, self.step.layers(number + 1 + self.step.ahead))
            votes = Votes(crosses, self.saver.due(), bool(self.signals.caught))
            pending = self.step.sum(number, begun, votes)
            self._pending.append((pending, self.step.update(pending)))

    def _collect(self) -> StepResult:
        """Read the result of the oldest pending step."""
        pending, multiplier = self._pending.popleft()
        try:
            result = self.step.wait(pending)
        except NonFiniteError:
            self.saver.save(self.done, self.finished)
            self.step.ranks.barrier()
            raise
        self.done += 1
        self.loss = result.loss
        self._stopping = self._stopping or result.stop
        seconds, pace = self.ledger.elapsed("train"), self.step.pace
        settling, duration = pace.settling, pace.step_over(seconds, pending.layers)
        if settling and self.config.schedule.cap is not None:
            self._decide_for_all(seconds, duration / pending.layers)
        self._watch_compilation()
        last = not self._pending and (self._stopping or self.done == self.config.schedule.max_steps)
        self.progress.step(self.done, result, multiplier, seconds, duration, pace.mean, self.saver.projection, last)
        return result

    def _decide_for_all(self, seconds: float, per_layer: float) -> None:
        """Whether another step fits, by rank 0's clock and seconds for each layer of the step that is over. Decided so
        after each of the first two steps of an execution, when there is no step duration yet for rank 0's vote."""
        schedule = self.config.schedule
        seconds, per_layer = self.step.ranks.broadcast_object((seconds, per_layer))
        if seconds > schedule.cap and self.done == 1:
            raise BudgetError(
                f"{self._cap} is too short for one step, which took {seconds:.1f} s; raise --schedule.max-seconds or "
                "lower --data.batch-tokens"
            )
        self.step.pace.sync(self.done, seconds)
        duration = per_layer * self.step.layers(self.done)
        self._stopping = self._stopping or seconds + 1.05 * duration > schedule.cap

    @property
    def _cap(self) -> str:
        """The seconds of training, by their fields."""
        c = self.config.schedule
        reserve = f" less reserve_seconds {c.reserve_seconds:g}" if c.reserve_seconds else ""
        return f"schedule.max_seconds {c.max_seconds:g}{reserve}"

    def _watch_compilation(self) -> None:
        if not self.step.compiled or (graphs := compile_cache.graphs()) <= self._graphs:
            return
        if self.step.pace.taken > 1 or self.config.runtime.warmup_steps:
            self.reporter.line(
                f"warning: torch.compile made {graphs - self._graphs} new graphs by step {self.done} during training "
                "time; to see why, run with TORCH_LOGS=recompiles"
            )
        self._graphs = graphs

    def _leave(self) -> None:
        """End the run after a signal, with the state saved."""
        saved = self.saver.save(self.done, self.finished)
        self.signals.saved = (
            f"state saved at step {self.done}" if saved else "the state of the last step could not be saved"
        )
        self.step.ranks.barrier()  # torchrun stops the other ranks as soon as one rank exits
        raise self.signals.interrupted()

    def _say_how_it_ended(self) -> None:
        c, pace = self.config, self.step.pace
        seconds, cap = self.ledger.seconds["train"], c.schedule.cap
        if pace.taken == 0:
            self.reporter.line(f"training was over at step {self.done}: exporting and scoring again")
        elif self.done < c.schedule.max_steps:
            self.reporter.line(
                f"stopping_early: wallclock_cap train_time:{seconds * 1000:.0f}ms "
                f"step:{self.done}/{c.schedule.max_steps} (a step like the slowest recent one would take "
                f"{pace.slowest(self.step.layers(self.done)) * 1000:.0f}ms, so another could cross {cap:g} s)"
            )
        if self.loss >= 0.99 * math.log(c.model.vocab_size):
            self.reporter.line(
                f"warning: the training loss ended at {self.loss:.4f}, no better than guessing one of "
                f"{c.model.vocab_size} tokens: lower the learning rates, or take more steps"
            )
        if cap is not None and seconds > cap:
            self.reporter.line(f"warning: training took {seconds:.3f} s, more than {self._cap}")
