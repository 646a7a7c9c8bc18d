"""Messages of a run while it trains: first the settings, then a metric for each step and a line for some."""

from __future__ import annotations

import torch

from golfgpt import recipes
from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.errors import BudgetError
from golfgpt.quant.budget import budget_report, forecast_bytes
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import read_env, recipe_name
from golfgpt.score.evaluate import plan_windows
from golfgpt.tables import plural
from golfgpt.train.attention_backend import Selection
from golfgpt.train.forecast import Forecast
from golfgpt.train.reporter import Reporter
from golfgpt.train.status import status
from golfgpt.train.step import StepResult, TrainStep

PATIENCE = 5.0
"""Seconds after which a step takes long: its microbatches are shown, and a signal does not wait for its end."""
FEW = 10
"""Steps: a time that has fewer is worth a warning."""
HOPELESS = 3.0
"""Times the cap: a step forecast to take longer ends the run before it. On a busy CPU forecasts are too long."""
DECAY = 0.96
"""Decay of the running mean of the losses, per step. It is as noisy as a plain mean over the last 49 steps."""


def announce(config: RunConfig, dataset: Dataset, step: TrainStep, attention: Selection, reporter: Reporter) -> None:
    """Print which run this is, and log its settings."""
    c, say, ranks = config, reporter.log, step.ranks
    if reporter.folder:
        path, tokens = reporter.folder.path, dataset.train_tokens
        recipe = recipe_name(read_env(path))
        reporter.show(
            f"run {path}{f', recipe {recipe}' if recipe else ''}: {tokens:,} tokens of {c.data.path} to train on, "
            f"{plan_windows(dataset, c).targets:,} to score"
        )
        if tokens < c.data.batch_tokens:
            reporter.line(f"warning: each step takes {c.data.batch_tokens:,} tokens, more than there are: they repeat")
    cap = f"{c.schedule.cap:.3f}" if c.schedule.cap else "none"
    say(f"train_loader:dataset:{c.data.path} train_shards:{len(dataset.train)} digest:{dataset.digest[:16]}")
    say(f"val_loader:tokens:{dataset.val_tokens}")
    reporter.status("forecasting the size of the artifact")
    quantizer = Quantizer(c.model, c.quant)
    fit = f" mlp_hidden:{c.model.mlp_hidden} (fitted)" if c.budget.fit == "mlp_hidden" else ""
    parameters, forecast = step.model.num_parameters(), forecast_bytes(quantizer)
    say(f"model_params:{parameters} payload_bytes:{quantizer.payload_bytes} forecast_bytes:{forecast}{fit}")
    reporter.show(f"{parameters:,} parameters; model.golf will take about {forecast / 1e6:.2f} MB")
    budget = budget_report(forecast, c.budget)
    if budget.margin_bytes < 0:
        reporter.line(
            f"warning: the artifact is going to be over its budget, by this forecast: {budget}. golfgpt budget shows "
            "what takes the bytes; --budget.fit mlp_hidden finds the width that fits, if there is one"
        )
    if c.quant.qat != "off":
        when = f"from {c.quant.qat_start:.0%} of the budget" if c.quant.qat_start else "from step 0"
        lr = f", learning rate at most {c.quant.qat_below_lr:g} of its base" if c.quant.qat_below_lr < 1 else ""
        say(f"qat:{c.quant.qat} {quantizer.label} {when}{lr}")
    say(f"world_size:{ranks.world} spans:{c.data.spans} microbatch_tokens:{c.data.microbatch}")
    say(f"device:{ranks.device} dtype:{step.dtype_choice} compile:{step.compiled} threads:{torch.get_num_threads()}")
    say(f"attention:{attention}")
    say(
        f"train_batch_tokens:{c.data.batch_tokens} train_seq_len:{c.data.seq_len} "
        f"iterations:{c.schedule.max_steps} max_wallclock_seconds:{cap} seed:{c.seed}"
    )


def announce_time(config: RunConfig, expected: Forecast, reporter: Reporter) -> None:
    """Print how long training is going to take on a CPU, and warn of a time for hardly any steps. Raises BudgetError if
    not one step is going to fit."""
    c, steps, most = config.schedule, config.schedule.max_steps, config.schedule.max_steps * expected.seconds
    if capped := c.cap is not None and c.cap < most:
        steps, most = int(c.cap / expected.seconds), c.cap
    time = f"{most:,.{0 if most >= 10 else 1}f} s"
    if expected.slower:
        reporter.line(f"1 thread, because {expected.slower}; --runtime.threads decides otherwise, also at a resume")
    reporter.line(f"forecast: a step takes {expected}, or {plural(steps, 'step')} in {time}")
    if capped and expected.seconds > HOPELESS * c.cap:
        raise too_short(config, torch.device("cpu"), f"one step, forecast to take {expected}")
    if capped and steps < FEW:
        what = f"training for {plural(steps, 'step')} is next to nothing" if steps else "not one step may fit"
        reporter.line(f"warning: {what}: {more_steps(config, torch.device('cpu'))}")


def more_steps(config: RunConfig, device: torch.device) -> str:
    """What to do where too few steps fit into the time."""
    data, least = config.data, config.data.spans * config.data.seq_len
    ways = ["raise --schedule.max-seconds"]
    if device.type == "cpu" and data.batch_tokens > recipes.get("small").config.data.batch_tokens:
        ways.insert(0, "train --recipe small")
    if data.batch_tokens > least:
        ways.append(f"lower --data.batch-tokens (at least {least:,})")
    return " or ".join(ways)


def too_short(config: RunConfig, device: torch.device, what: str) -> BudgetError:
    """The error of a run that cannot take `what` in its time."""
    return BudgetError(f"{training_time(config)} is too short for {what}; {more_steps(config, device)}")


def training_time(config: RunConfig) -> str:
    """The cap on the seconds of training, by the fields that it comes from."""
    c = config.schedule
    reserve = f" less reserve_seconds {c.reserve_seconds:g}" if c.reserve_seconds else ""
    return f"schedule.max_seconds {c.max_seconds:g}{reserve}"


class Progress:
    """The live line, the step lines of train.log, and the running mean of the losses of this execution."""

    def __init__(self, config: RunConfig, dataset: Dataset, reporter: Reporter):
        self.config, self.reporter, self._manifest = config, reporter, dataset.manifest
        self._sum = self._weight = 0.0
        self._unsaid: tuple[str, str] | None = None
        """Lines of the last step for people and for train.log, if they were not written."""

    def within(self, step: int, done: int, of: int, waited: float) -> bool:
        """Show progress within a step that takes long. Returns whether it does."""
        if waited > PATIENCE:
            self.reporter.status(f"step {step + 1}: {done} of {of} microbatches after {waited:.0f} s")
        return waited > PATIENCE

    def step(
        self,
        done: int,
        result: StepResult,
        multiplier: float,
        seconds: float,
        duration: float,
        mean: float,
        projection: str,
        last: bool,
    ) -> None:
        """Report step number `done`, which took `duration` and ended at `seconds` of the training clock. `mean` is the
        mean duration of recent steps, `projection` the forecast size of the artifact, and `last` whether this is the
        last step."""
        c = self.config
        self._sum, self._weight = DECAY * self._sum + result.loss, DECAY * self._weight + 1
        smooth, bpb = self._sum / self._weight, None
        if m := self._manifest:
            bpb = bits_per_byte(smooth * m.train.tokens, m.train.decoded_bytes)
        row = {
            "step": done,
            "loss": result.loss,
            "loss_ema": smooth,
            "bpb_ema": bpb,
            "grad_norm": result.grad_norm,
            "lr_multiplier": multiplier,
            "train_seconds": round(seconds, 4),
            "step_seconds": round(duration, 6),
        }
        text, shown = status(c, row, mean), done <= 10 or done % c.runtime.log_every == 0 or last
        self.reporter.metric("train", tracked=shown, **row)
        self.reporter.status(f"{text}  {projection}".rstrip())
        self._unsaid = (
            text,
            (
                f"step:{done}/{c.schedule.max_steps} train_loss:{result.loss:.4f} train_time:{seconds * 1000:.0f}ms "
                f"step_avg:{seconds / done * 1000:.2f}ms train_loss_ema:{smooth:.4f}"
            ),
        )
        if shown:
            self.end()

    def end(self) -> None:
        """Write the lines of the last step, which was not known to be the last one if the next was abandoned."""
        if self._unsaid:
            shown, logged = self._unsaid
            self.reporter.show(shown)
            self.reporter.log(logged)
        self._unsaid = None
