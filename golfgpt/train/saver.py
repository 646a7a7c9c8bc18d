"""Save a run to the disk of rank 0, and restore it on every rank."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from golfgpt.config import RunConfig, differences, to_dict
from golfgpt.data.shards import Dataset
from golfgpt.errors import InputError, NonFiniteError
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import read_config, stored, write_config
from golfgpt.train import checkpoint
from golfgpt.train.clock import Ledger
from golfgpt.train.reporter import Reporter
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.signals import Signals
from golfgpt.train.step import TrainStep

RESUMABLE = ("runtime.", "eval.", "budget.", "data.path")
"""Fields that may change when a run is resumed. None of them changes what is trained."""


class Found(NamedTuple):
    """What is there of a run that is to be continued."""

    saved: checkpoint.Checkpoint | None
    refused: dict[Path, str]
    """Damaged newer checkpoints, and what is wrong with them."""


def newest(folder: RunFolder, config: RunConfig, dataset: Dataset) -> Found:
    """The newest intact checkpoint of the run in `folder`, checked against what it is to be continued with; nothing is
    changed. Raises InputError if they do not fit together."""
    path = folder.path
    saved, refused = checkpoint.latest(folder.checkpoints)
    try:
        started = stored(saved.config) if saved else read_config(path)
    except ValueError as error:
        raise InputError(
            f"{path} was written by another version of golfgpt: {error}; resume it with that version"
        ) from None
    if not saved and folder.artifact.exists():
        reasons = f" ({'; '.join(refused.values())})" if refused else ""
        raise InputError(
            f"{path} has no intact checkpoint{reasons}, and training from step 0 would replace its model.golf, which "
            "golfgpt eval scores as it is; to train again, start a new run under another --name"
        )
    changed = [d for d in differences(started, config) if not d.startswith(RESUMABLE)]
    if changed:
        what = "; ".join(changed)
        followed = any(d.startswith("schedule.") for d in changed)
        raise InputError(
            f"the run in {path} has another config ({what})"
            f"{': its learning rate follows that schedule from the first step' if followed else ''}; drop the "
            f"change, or start a new run with it: the command of this one is in {path / 'env.json'}, give it "
            "another --name"
        )
    if saved and not saved.dataset:
        raise InputError(f"{path} was imported: there is no training to continue; use golfgpt eval, sample or export")
    if saved and saved.dataset != dataset.digest:
        raise InputError(
            f"{config.data.path} has changed since the checkpoint was written: its digest is "
            f"{dataset.digest[:16]}, expected {saved.dataset[:16]}; set --data.path to the original data"
        )
    return Found(saved, refused)


class Saver:
    """Saves and restores a run: completed steps, parameters, optimizers, average, clocks. All ranks must call it
    together, because shards are gathered. Only rank 0 has the folder; it writes and reads."""

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        dataset: Dataset,
        step: TrainStep,
        ledger: Ledger,
        folder: RunFolder | None,
        reporter: Reporter,
        signals: Signals,
    ):
        self.config, self.path, self.dataset, self.step, self.ledger = config, path, dataset, step, ledger
        self.folder, self.reporter, self.signals = folder, reporter, signals
        self.projection = ""
        """Forecast of the size of the artifact at the last checkpoint."""
        self._saved_at = time.monotonic()

    def start(self) -> None:
        """Start the interval until the first checkpoint. Called when training begins."""
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        every = self.config.runtime.checkpoint_seconds
        return bool(every) and time.monotonic() - self._saved_at >= every

    def save(self, done: int, finished: bool) -> bool:
        """Write a checkpoint after `done` steps. The time is not counted as training time. Returns whether the state is
        on disk.

        If the disk is full, a warning is printed and training continues. A state that is not finite is not written, so
        the last good checkpoint stays.
        """
        with self.ledger.phase("checkpoint"):
            optimizers = self.step.optimizers.state()
            self._saved_at = time.monotonic()
            if not self.folder:
                return True
            state = checkpoint.Checkpoint(
                step=done,
                finished=finished,
                seconds=dict(self.ledger.seconds),
                config=to_dict(self.config),
                dataset=self.dataset.digest,
                model=self.step.model.state_dict(),
                optimizers=optimizers,
                average=self.step.average.state(),
                clock=self.step.pace.seconds_at(max(done - 1, 0)),
            )
            try:
                self.step.check_finite()
                checkpoint.save(self.folder.checkpoints, state)
            except (OSError, NonFiniteError) as error:
                self.reporter.line(f"warning: no checkpoint at step {done}: {error}")
                return False
            self.signals.saved = f"state saved at step {done}"
            projected = None
            with contextlib.suppress(InputError):  # weights that the format cannot store; the export reports them
                projected = Quantizer(self.config.model, self.config.quant).projected_bytes(state.model)
                self.projection = f"model.golf about {projected:,} bytes"
            self.reporter.metric("checkpoint", step=done, projected_artifact_bytes=projected)
            return True

    def restore(self, found: Found | None) -> tuple[int, bool]:
        """Load the checkpoint that rank 0 has `found` on every rank, and rename damaged ones to .damaged. Returns its
        number of completed steps, and whether training was over. Without a checkpoint, the run starts from step 0."""
        with self.step.ranks.raise_on_any():
            if found:
                for path, reason in found.refused.items():
                    self.reporter.line(f"warning: {reason}")
                    path.rename(path.with_suffix(".damaged"))
                self.folder.checkpoints.mkdir(exist_ok=True)  # a run that was copied may lack it
                write_config(self.path, self.config)
        saved = self.step.ranks.broadcast_object(found and found.saved)
        if saved is None:
            self.reporter.line(f"no checkpoint in {self.path}: starting from step 0")
            return 0, False
        self.step.model.load_state_dict(saved.model)
        self.step.optimizers.load_state(saved.optimizers)
        self.step.average.load_state(saved.average)
        self.step.pace.sync(max(saved.step - 1, 0), saved.clock)
        self.step.prepare(saved.step)
        self.ledger.seconds.update(saved.seconds)
        self.signals.saved = f"step {saved.step} is saved"
        self.reporter.line(f"resumed at step {saved.step:,}, after {saved.seconds['train']:.1f} s of training")
        self.reporter.metric("resume", step=saved.step)
        return saved.step, saved.finished
