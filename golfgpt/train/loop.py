"""The training loop. It ends at max_steps, or when rank 0 votes that another step could cross the cap.

No microbatch begins after the cap. A step that passes it nevertheless is abandoned: no rank applies it. After a signal,
a step that takes long is abandoned too.

On a GPU, the next step is enqueued before the result of the previous one is read. If a result requires a checkpoint or
the end of training, the steps that are already enqueued are finished first. All ranks read the same results in the same
order.
"""

from __future__ import annotations

import math
from collections import deque

from golfgpt.config import RunConfig
from golfgpt.errors import BudgetError, NonFiniteError
from golfgpt.optim.schedule import lr_multiplier
from golfgpt.train import compile_cache
from golfgpt.train.clock import Ledger
from golfgpt.train.export import Exporter
from golfgpt.train.memory import memory_advice
from golfgpt.train.progress import Progress, too_short, training_time
from golfgpt.train.reporter import Reporter
from golfgpt.train.saver import Saver
from golfgpt.train.score import ModelScorer
from golfgpt.train.signals import Signals
from golfgpt.train.step import Pending, StepResult, TrainStep, Votes

UNDECAYED = 0.1
"""A learning rate that ends at more than this above its lowest multiplier is worth a warning: a model gains most from
the end of the decay."""


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
        self._abandoned = False
        """Whether a step was abandoned. What is enqueued after it changes nothing."""
        self._why = ""
        """Why training ends before max_steps, by this rank's clock."""

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
                if validate and self.done == issued:
                    self.scorer.validate(self.done, self.exporter)
                    self._graphs = compile_cache.graphs()
        self.signals.release()
        self.step.data.close()
        self._say_how_it_ended()

    def _launch(self) -> None:
        """Enqueue one step."""
        number, begun, pace = self.done + len(self._pending), self.ledger.elapsed("train"), self.step.pace
        abandoned = False
        with memory_advice(self.config, self.step.dtype.itemsize, first=pace.taken == 0):
            for microbatch, of in self.step.backward(number):
                if abandoned := self._abandons(number, microbatch, of, begun):
                    break
            layers = self.step.layers(number + 1 + self.step.ahead)
            crosses = pace.crosses_cap(begun, layers)
            if crosses and not self._why:
                steps, each = 2 * (1 + self.step.ahead), round(1.05 * pace.allowance(layers), 3)
                ends = f"{begun:.3f} + {steps} x {each:.3f} = {begun + steps * each:.3f}"
                self._why = f"another step could have ended at {ends} s, judged at the start of step {number + 1}"
            votes = Votes(crosses, self.saver.due(), bool(self.signals.caught), abandoned)
            pending = self.step.sum(number, begun, votes)
            self._pending.append((pending, self.step.update(pending)))

    def _abandons(self, number: int, microbatch: int, of: int, begun: float) -> bool:
        """Whether to leave step `number`, after so many of its microbatches: training is past the cap, or a signal came
        and the step takes long."""
        seconds, cap = self.ledger.elapsed("train"), self.config.schedule.cap
        if cap is not None and seconds > cap:
            if microbatch:
                taken = f"{microbatch} of {of} microbatches, {seconds - begun:.1f} s"
                self._why = f"step {number + 1} was abandoned after {taken}"
            elif not self._why:
                self._why = f"step {number} took longer than those before it"
            return True
        return self.progress.within(number, microbatch, of, seconds - begun) and bool(self.signals.caught)

    def _collect(self) -> StepResult:
        """Read the result of the oldest pending step."""
        pending, multiplier = self._pending.popleft()
        try:
            result = self.step.wait(pending)
        except NonFiniteError:
            self.saver.save(self.done, self.finished)
            self.step.ranks.barrier()
            raise
        if result.abandoned and not result.signaled:
            if self.done == 0:
                raise self._too_short(f"one step: {self._why or 'another rank is past it'}")
            self._stopping = True
        self._abandoned = self._abandoned or result.abandoned
        if self._abandoned:
            return result
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
            raise self._too_short(f"one step, which took {seconds:.1f} s")
        self.step.pace.sync(self.done, seconds)
        duration = per_layer * self.step.layers(self.done)
        if seconds + 1.05 * duration > schedule.cap:
            self._stopping = True
            ends = f"{seconds:.3f} + {1.05 * duration:.3f} = {seconds + 1.05 * duration:.3f}"
            self._why = f"another step could have ended at {ends} s"

    def _too_short(self, what: str) -> BudgetError:
        return too_short(self.config, self.step.ranks.device, what)

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
        """End the run after a signal, with the state saved, if there is any."""
        if self.done:
            saved = self.saver.save(self.done, self.finished)
            self.signals.saved = (
                f"state saved at step {self.done}" if saved else "the state of the last step could not be saved"
            )
        self.step.ranks.barrier()  # torchrun stops the other ranks as soon as one rank exits
        raise self.signals.interrupted()

    def _say_how_it_ended(self) -> None:
        c, pace = self.config, self.step.pace
        seconds, cap = self.ledger.seconds["train"], c.schedule.cap
        self.progress.end()
        if pace.taken == 0 and not self._why:
            self.reporter.line(f"training was over at step {self.done}: exporting and scoring again")
        elif self.done < c.schedule.max_steps:
            clock, steps = f"train_time:{seconds * 1000:.0f}ms", f"step:{self.done}/{c.schedule.max_steps}"
            self.reporter.log(f"stopping_early: wallclock_cap {clock} {steps}")
            self.reporter.line(
                f"training ended at {seconds:.2f} s of {cap:g}, after step {self.done:,}: "
                f"{self._why or 'another rank is past the cap'}"
            )
        rate = lr_multiplier(self.done, seconds, c.schedule)
        if pace.taken and max(rate - c.schedule.min_lr, 0.0) > UNDECAYED and c.schedule.decays:
            self.reporter.line(
                f"warning: the decay of the learning rate did not complete: it ended at {rate:.3f} of its base"
            )
        if self.loss >= 0.99 * math.log(c.model.vocab_size):
            self.reporter.line(
                f"warning: the loss of the last step is {self.loss:.4f}, no better than guessing one of "
                f"{c.model.vocab_size} tokens: lower the learning rates, or take more steps"
            )
        if cap is not None and seconds > cap:
            self.reporter.line(f"warning: training took {seconds:.3f} s, more than {training_time(c)}")
