"""The study of a sweep: an Optuna journal that any number of processes and machines append to."""

from __future__ import annotations

import json
import math
import os
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from golfgpt.config import RunConfig
from golfgpt.errors import InputError
from golfgpt.files import parse_json
from golfgpt.sweep.space import Range, Spec, with_values

VERSION = 1
"""Of the study; another one is refused."""
FLOOR = 3 * math.sqrt(2)
"""A trial is pruned where it is worse than the best one by this many standard deviations of a score over seeds: three
of the difference of two runs."""

ADVICE = "restore it from a copy, or choose another --name; the run folders are as they were"


class NoiseFloor(optuna.pruners.BasePruner):
    """Prunes a trial whose newest score is worse than the best trial's at the same step by more than the noise."""

    def __init__(self, noise: float | None):
        self.noise = noise

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        noise = self.noise if self.noise is not None else measured_noise(study)
        try:
            best = study.best_trial
        except ValueError:  # none is complete and feasible
            return False
        step = trial.last_step
        if noise is None or step not in best.intermediate_values:
            return False
        return trial.intermediate_values[step] - best.intermediate_values[step] > FLOOR * noise


def measured_noise(study: optuna.Study) -> float | None:
    """Standard deviation of a score over seeds, pooled over the complete trials; None with less than 2 degrees of
    freedom."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    scores = [list(trial.user_attrs["scores"].values()) for trial in trials]
    freedom = sum(len(of_one) - 1 for of_one in scores)
    if freedom < 2:
        return None
    return math.sqrt(sum(statistics.variance(s) * (len(s) - 1) for s in scores if len(s) > 1) / freedom)


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on, and its point."""

    trial: optuna.Trial
    values: dict[str, Any]


class Study:
    """The study in `folder`, made or opened. Raises InputError for one of another version or of another sweep, and for
    a damaged journal."""

    def __init__(self, folder: Path, spec: Spec):
        self.folder, self.spec = folder, spec
        self.file = folder / "study.journal"
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._alone():
            # Optuna's own lock files outlive a killed process for 30 s; the kernel's locks do not.
            lock = filelock.FileLock(folder / ".journal.lock")
            mend(self.file, lock)
            try:
                storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.file), lock_obj=lock))
                begin = optuna.load_study if self.file.stat().st_size else optuna.create_study
                self.study = begin(study_name="sweep", storage=storage, pruner=NoiseFloor(spec.noise))
                self._check()
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{self.file} cannot be read ({error!r}); {ADVICE}") from error
            if spec.sampler == "grid":
                for point in spec.points[len(self.study.trials) :]:
                    self.study.enqueue_trial({name: _stored(value) for name, value in point.items()})

    def _check(self) -> None:
        ours = {"version": VERSION, **self.spec.definition()}
        theirs = self.study.user_attrs.get("golfgpt")
        if theirs is None and not self.study.trials:
            self.study.set_user_attr("golfgpt", ours)
            return
        if not isinstance(theirs, dict) or theirs.get("version") != VERSION:
            found = theirs.get("version") if isinstance(theirs, dict) else "no golfgpt version"
            raise InputError(
                f"{self.file} has version {found!r}, expected {VERSION}: use the version of golfgpt that wrote it, or "
                "choose another --name"
            )
        different = [
            f"{key}: {ours.get(key, 'not given')} here, {theirs.get(key, 'not given')} in the study"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        if different:
            raise InputError(
                f"{self.file} is the study of another sweep ({'; '.join(different)}); choose another --name, or give "
                "what the study has"
            )

    @contextmanager
    def _alone(self):
        """One process at a time opens the study or draws a trial: two would draw the same."""
        with filelock.FileLock(self.folder / ".claim.lock"):
            yield

    @contextmanager
    def claim(self):
        """Yields the next trial for this thread, first those that a killed process left, or None if none is left."""
        with self._alone():
            lock, trial = self._next()
        try:
            yield trial and Claim(trial, self.values(trial))
        finally:
            if lock:
                lock.release()

    def _next(self) -> tuple[filelock.FileLock | None, optuna.Trial | None]:
        trials = self.study.get_trials(deepcopy=False)
        for left in trials:
            if left.state == TrialState.RUNNING and (lock := self._hold(left.number)):
                if self.trials[left.number].state == TrialState.RUNNING:  # it may have ended since
                    return lock, optuna.Trial(self.study, left._trial_id)
                lock.release()
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not waiting and (self.spec.sampler == "grid" or len(trials) >= self.spec.trials):
            return None, None
        self.study.sampler = self._sampler(len(trials))
        trial = self.study.ask()
        return self._hold(trial.number), trial

    def _hold(self, number: int) -> filelock.FileLock | None:
        """The lock of a trial, which the kernel releases when its process ends; None if another one holds it."""
        lock = filelock.FileLock(self.folder / f".{number:04d}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        return lock

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """The sampler of trial `number`. Its seed is the number, so that no other process draws the same."""
        kind = optuna.samplers.TPESampler if self.spec.sampler == "tpe" else optuna.samplers.RandomSampler
        return kind(seed=self.spec.config.seed % 2**31 + number)

    def values(self, trial: optuna.Trial) -> dict[str, Any]:
        """The point of a trial: values by field name."""
        out = {}
        for name, axis in self.spec.space.items():
            if not isinstance(axis, Range):
                stored = trial.suggest_categorical(name, [_stored(value) for value in axis])
                out[name] = next(value for value in axis if _stored(value) == stored)
            elif isinstance(axis.low, int) and isinstance(axis.high, int):
                out[name] = trial.suggest_int(name, axis.low, axis.high, log=axis.log)
            else:
                out[name] = trial.suggest_float(name, axis.low, axis.high, log=axis.log)
        return out

    def config(self, values: dict[str, Any]) -> RunConfig:
        return with_values(self.spec.config, values)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @property
    def best(self) -> FrozenTrial | None:
        """The complete trial with the lowest mean score of those within the limits."""
        try:
            return self.study.best_trial
        except ValueError:
            return None

    @property
    def noise(self) -> float | None:
        return self.spec.noise if self.spec.noise is not None else measured_noise(self.study)


def _stored(value: Any) -> Any:
    """A choice as Optuna can keep it."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def mend(file: Path, lock: filelock.FileLock) -> None:
    """Cut off a last record that a killed process or a full disk left unfinished. Its trial runs on from its folders.
    Raises InputError for a damaged record before it."""
    if not file.exists():
        return
    with lock:
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                parse_json(line, dict)
            except ValueError as error:
                raise InputError(f"{file} line {number} is not a record ({error}); {ADVICE}") from error
        if whole < len(data):
            os.truncate(file, whole)
