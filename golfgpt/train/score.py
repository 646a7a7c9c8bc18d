"""Scores of the model in training, and of the exported file at the end."""

from __future__ import annotations

from dataclasses import asdict, replace

from golfgpt.config import EvalConfig, RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.score.evaluate import Score, evaluate
from golfgpt.score.sums import PartialSums
from golfgpt.score.ttt.evaluate import AdaptedScore, evaluate_adapted
from golfgpt.train.clock import Ledger
from golfgpt.train.export import Exporter
from golfgpt.train.reporter import Reporter
from golfgpt.train.signals import Signals
from golfgpt.train.step import TrainStep


class ModelScorer:
    """Scores the weights that `step` holds now on the validation split of `dataset`."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        step: TrainStep,
        ledger: Ledger,
        reporter: Reporter,
        signals: Signals,
    ):
        self.config, self.dataset, self.step = config, dataset, step
        self.ledger, self.reporter, self.signals = ledger, reporter, signals

    def score(self, what: str, eval: EvalConfig, keep: PartialSums | None = None) -> Score:
        """`what` stands on the live line before the progress."""
        return evaluate(
            self.step.model,
            self.dataset,
            replace(self.config, eval=eval),
            self.step.ranks,
            dtype=self.step.dtype,
            progress=lambda text: self.reporter.status(f"{what}: {text}"),
            keep=keep,
        )

    def adapted(self, what: str) -> AdaptedScore | None:
        """The score with test-time training; None if config.eval.ttt has none."""
        if self.config.eval.ttt.kind == "off":
            return None
        return evaluate_adapted(
            self.step.model,
            self.dataset,
            self.config,
            self.step.ranks,
            dtype=self.step.dtype,
            progress=lambda text: self.reporter.status(f"{what}: {text}"),
            say=self.reporter.line,
            deferred=self.signals.deferring("the adapted score ends where all ranks meet"),
        )

    def validate(self, done: int, exporter: Exporter) -> None:
        """Score the unquantized weights after `done` steps in chunks, off the training clock, on at most
        runtime.val_tokens. With runtime.probe, score them also as an export would leave them: averaged, quantized,
        decoded."""
        limits = self.config.eval.max_tokens, self.config.runtime.val_tokens
        chunks = replace(self.config.eval, stride=None, max_tokens=min(filter(None, limits), default=None))
        probe_bpb = probe_bytes = None
        with self.signals.at_once(), self.ledger.phase("validate"):
            score = self.score("validating", chunks)
            if self.config.runtime.probe:
                weights = {name: value.clone() for name, value in self.step.model.state_dict().items()}
                try:
                    probe_bytes = exporter.try_out()
                    probe_bpb = self.score("scoring a probe", chunks).val_bpb
                finally:
                    self.step.model.load_state_dict(weights)
        seconds = self.ledger.elapsed("train")
        probe = "" if probe_bpb is None else f"probe_bpb:{probe_bpb:.4f} probe_bytes:{probe_bytes} "
        self.reporter.show(f"step {done}  {score.label} {score.val_bpb:.4f}, validation")
        self.reporter.log(
            f"step:{done}/{self.config.schedule.max_steps} val_loss:{score.val_loss:.4f} "
            f"{score.key}:{score.val_bpb:.4f} {probe}train_time:{seconds * 1000:.0f}ms "
            f"step_avg:{seconds / done * 1000:.2f}ms"
        )
        self.reporter.metric("val", step=done, **asdict(score), probe_bpb=probe_bpb, probe_bytes=probe_bytes)
