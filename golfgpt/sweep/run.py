"""A sweep: workers that take trials from the study and train their runs."""

from __future__ import annotations

import contextlib
import shutil
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from golfgpt.config import RunConfig
from golfgpt.errors import InputError
from golfgpt.runs import Run
from golfgpt.sweep.children import Children, finished
from golfgpt.sweep.space import Spec, with_seed, with_values
from golfgpt.sweep.study import Claim, Study

PROBE_STEPS = 10
"""Steps of the run that a dry run times."""
SEED_STRIDE = 10**9
"""Optuna's step of a score is that of the run plus this for each seed before it; the end of a run is the last one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial, for tables and --json."""

    number: int
    values: dict[str, Any]
    state: str
    """complete, over the limits, pruned, diverged, failed or running."""
    score: float | None
    """Mean over the seeds, bits per byte."""
    label: str
    """What the score is of."""
    scores: dict[str, float]
    """By seed."""
    bytes: int | None
    """Artifact and code, the largest of the seeds."""
    seconds: float | None
    """Training time, the longest of the seeds."""
    steps: list[int]
    """Of each seed."""
    message: str
    runs: list[str]


def sweep(study: Study, jobs: int, children: Children, say: Callable[[str], None]) -> list[Row]:
    """Train all trials that are left, `jobs` at once. Returns all trials of the study, best first."""
    with children.forwarding(), ThreadPoolExecutor(jobs) as pool:
        for worker in as_completed([pool.submit(_work, study, children, say) for _ in range(jobs)]):
            worker.result()
    return rows(study)


def _work(study: Study, children: Children, say: Callable[[str], None]) -> None:
    while not children.signum:
        with study.claim() as claim:
            if claim is None:
                return
            _try_out(study, claim, children, say)


def _try_out(study: Study, claim: Claim, children: Children, say: Callable[[str], None]) -> None:
    """Train a trial's seeds one after another, and tell the study how it ended; nothing if a signal ended it."""
    trial, scores, results, walls = claim.trial, {}, [], []
    label = f"trial {trial.number} ({', '.join(f'{name}={value}' for name, value in claim.values.items())})"
    state, message = TrialState.COMPLETE, ""
    try:
        config = study.config(claim.values)
    except InputError as error:  # values that random or tpe drew and that do not fit together
        _tell(study, trial, TrialState.FAIL, str(error))
        say(f"{label}: failed: {error}")
        return
    for index in range(study.spec.seeds):
        seeded = with_seed(config, index)
        path = study.folder / f"{trial.number:04d}-s{seeded.seed}"
        run = Run(path=path, config=seeded, env={}, result=None)
        say(f"{label}: {path}")
        outcome = children.train(path, study.spec.recipe, seeded, lambda run=run, i=index: _worse(trial, run, i))
        children.check()
        if outcome is None:
            state, message = TrialState.PRUNED, f"seed {seeded.seed}: worse than the best trial at the same step"
            break
        if outcome.score is None:  # Optuna counts pruned trials without a score as the worst, and ignores failures
            state = TrialState.PRUNED if outcome.diverged else TrialState.FAIL
            trial.set_user_attr("diverged", outcome.diverged)
            message = f"seed {seeded.seed}: exit code {outcome.code}: {outcome.message}"
            break
        scores[str(seeded.seed)] = outcome.score
        trial.set_user_attr("label", outcome.label)
        results.append(outcome.result)
        walls += [] if outcome.wall is None else [outcome.wall]
        trial.set_user_attr("scores", scores)
        limits = _excess(study.spec, seeded, results)
        _report(trial, outcome.score, (index + 1) * SEED_STRIDE - 1)
        if max(limits.values()) <= 0 and index + 1 < study.spec.seeds and trial.should_prune():
            state, message = TrialState.PRUNED, f"seed {seeded.seed}: worse than the best trial at its end"
            break
    if results:
        trial.set_user_attr("bytes", max(result["total_bytes"] for result in results))
        trial.set_user_attr("seconds", max(result["seconds"]["train"] for result in results))
        trial.set_user_attr("steps", [result["steps"] for result in results])
    trial.set_user_attr("walls", walls)
    if state == TrialState.COMPLETE:
        for name in limits.keys() - trial.constraints.keys():  # a killed process may have told them
            trial.set_constraint(name, limits[name])
    _tell(study, trial, state, message, statistics.fmean(scores.values()) if scores else None)
    say(f"{label}: {_sentence(_row(study, study.trials[trial.number]))}")


def _tell(study: Study, trial: optuna.Trial, state: TrialState, message: str, value: float | None = None) -> None:
    trial.set_user_attr("message", message)
    study.study.tell(trial, value if state == TrialState.COMPLETE else None, state)


def _worse(trial: optuna.Trial, run: Run, index: int) -> bool:
    """Whether a new validation of the run prunes the trial."""
    for row in run.metrics("val"):
        score = row["val_bpb"] if row["probe_bpb"] is None else row["probe_bpb"]
        if _report(trial, score, index * SEED_STRIDE + row["step"]) and trial.should_prune():
            return True
    return False


def _report(trial: optuna.Trial, score: float, step: int) -> bool:
    """Tell the study a score. Whether it is new."""
    if step in trial.storage.get_trial(trial._trial_id).intermediate_values:
        return False
    trial.report(score, step)
    return True


def _excess(spec: Spec, config: RunConfig, results: list[dict[str, Any]]) -> dict[str, float]:
    """By how much the worst of the runs exceeds each limit; at most 0 within it."""
    limit = config.budget.artifact_bytes if spec.max_bytes is None else spec.max_bytes
    out = {"bytes": max(result["total_bytes"] for result in results) - limit}
    if spec.max_seconds is not None:
        out["seconds"] = max(result["seconds"]["train"] for result in results) - spec.max_seconds
    return out


def _sentence(row: Row) -> str:
    score = "" if row.score is None else f" {row.label} {row.score:.4f}"
    return f"{row.state}{score}{f' ({row.message})' if row.message else ''}"


def rows(study: Study) -> list[Row]:
    """All trials: those within the limits by score, then the others."""
    order = ("complete", "over the limits", "pruned", "running", "diverged", "failed")
    out = [_row(study, trial) for trial in study.trials if trial.state != TrialState.WAITING]
    return sorted(out, key=lambda row: (order.index(row.state), row.score or 0.0, row.number))


def _row(study: Study, trial: FrozenTrial) -> Row:
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    state = states.get(trial.state, "running")
    if state == "complete" and any(excess > 0 for excess in trial.constraints.values()):
        state = "over the limits"
    attrs, scores = trial.user_attrs, trial.user_attrs.get("scores", {})
    if attrs.get("diverged"):
        state = "diverged"
    return Row(
        number=trial.number,
        values=trial.params,
        state=state,
        score=statistics.fmean(scores.values()) if scores else None,
        label=attrs.get("label", "val_bpb"),
        scores=scores,
        bytes=attrs.get("bytes"),
        seconds=attrs.get("seconds"),
        steps=attrs.get("steps", []),
        message="; ".join(filter(None, (attrs.get("message"), *_scored_again(study, trial.number, scores)))),
        runs=[str(path) for path in sorted(study.folder.glob(f"{trial.number:04d}-s*")) if path.is_dir()],
    )


def _scored_again(study: Study, number: int, scores: dict[str, float]) -> Iterator[str]:
    """The scores of a trial's runs that are newer than those of the study, as golfgpt train --resume makes them."""
    for seed, score in scores.items():
        again = finished(study.folder / f"{number:04d}-s{seed}")
        if again and again.score not in (None, score):
            yield f"seed {seed} was scored again: {again.label} {again.score:.4f}, not counted here"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a sweep would cost."""

    runs: int
    """Runs that are left."""
    seconds_per_run: float
    hours: float
    source: str
    """What was measured."""


def estimate(folder: Path, spec: Spec, jobs: int, children: Children, study: Study | None) -> Estimate:
    """Hours of what is left of a sweep, from its finished runs, else from a run of PROBE_STEPS steps, which is deleted
    again. Raises InputError if that run fails."""
    done = [trial for trial in study.trials if trial.state.is_finished()] if study else []
    total = len(spec.points) if spec.sampler == "grid" else spec.trials
    runs = max(0, total - len(done)) * spec.seeds
    if walls := [wall for trial in done for wall in trial.user_attrs.get("walls", ())]:
        seconds, source = statistics.fmean(walls), f"{len(walls)} finished runs"
    else:
        with children.forwarding("nothing was started, and the run that was timed is deleted"):
            seconds, source = _time_a_probe(folder, spec, children)
    return Estimate(runs=runs, seconds_per_run=seconds, hours=runs * seconds / jobs / 3600, source=source)


def _time_a_probe(folder: Path, spec: Spec, children: Children) -> tuple[float, str]:
    """Seconds of one whole run, and how they are known."""
    config = with_values(spec.config, spec.points[0] if spec.sampler == "grid" else {})
    steps, every = config.schedule.max_steps, config.runtime.val_every
    few = min(steps, PROBE_STEPS)
    probe = replace(
        config,
        schedule=replace(config.schedule, max_steps=few),
        runtime=replace(config.runtime, val_every=min(every, few)),
    )
    path, log = folder / ".dry-run", folder / ".dry-run.log"  # no glob over the runs finds them
    shutil.rmtree(path, ignore_errors=True)  # of a dry run that was killed
    log.unlink(missing_ok=True)
    outcome = None
    try:
        outcome = children.train(path, spec.recipe, probe)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        (folder / f".{path.name}.lock").unlink(missing_ok=True)
        if outcome is None or outcome.score is not None:
            log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a sweep is in it
            folder.rmdir()
    if outcome.score is None:
        raise InputError(f"the run that was to be timed failed: {outcome.message} ({log})")
    seconds, did = outcome.result["seconds"], outcome.result["steps"]
    train = seconds["train"] / did * steps
    if config.schedule.max_seconds is not None:
        train = min(train, config.schedule.max_seconds)
    validate = 0.0
    if every and did >= probe.runtime.val_every:
        validate = seconds["validate"] / (did // probe.runtime.val_every) * (train / seconds["train"] * did // every)
    rest = outcome.wall - seconds["train"] - seconds.get("validate", 0.0)
    which = "the first point" if spec.sampler == "grid" else "the config that the points change"
    return rest + train + validate, f"a run of {did} steps of {which}"
