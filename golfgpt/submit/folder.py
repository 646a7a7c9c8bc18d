"""The folder of a submission, from the runs of one configuration.

    README.md  submission.json  requirements.txt  train_seed42.log …  result_seed42.json …
    train_gpt.py             the counted program
    train_gpt_readable.py    what it was packed from; nothing executes it
    model.golf               the artifact of the best seed

val_bpb is the mean over the seeds. bytes_total is train_gpt.py with the largest artifact of the seeds, so that all of
them fit the cap if it does. Every number comes from the runs; `golfgpt submit check` compares them again.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from golfgpt.compare import Side, check_one_configuration, one_side, scored_whole
from golfgpt.config import RunConfig, differences
from golfgpt.errors import BudgetError, InputError, VerificationError
from golfgpt.files import sha256_file, write_json
from golfgpt.runs import MEASURED, Run, artifact_file, as_configured, read_result, recipe_name, start_config
from golfgpt.submit.pack import imports, packed

PROGRAM, READABLE, ARTIFACT = "train_gpt.py", "train_gpt_readable.py", "model.golf"
SEEDS = 3
"""Of a record."""
SCHEMA = Path(__file__).with_name("submission.schema.json")
PACKAGES = {"torch", "numpy", "sentencepiece", "brotli", "zstandard", "triton"}
"""What a packed program may import beside the standard library."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What only the author knows."""

    author: str
    github_id: str
    name: str
    blurb: str
    track: str


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A folder that was written."""

    submission: dict[str, Any]
    readable_bytes: int
    cap: int
    counted_bytes: int | None
    """What the best run counted as code when it started."""
    notes: list[str]
    """What a reader of the folder should know."""


def pack(paths: Sequence[Path], out: Path, about: About, *, kernels: bool = False, overwrite: bool = False) -> Packed:
    """Write the folder `out`. It appears whole or not at all, and the runs are only read. With `kernels` the program
    has the Triton kernels that the best run used.

    Raises InputError for what `about` lacks, for runs without a score of the whole text or of more than one
    configuration, for too few seeds of a record, for `kernels` of a run without and for an existing `out` (a former
    submission is replaced with `overwrite`), VerificationError for an artifact that its result.json does not describe,
    BudgetError over the cap, ImportError without python-minifier.
    """
    if not paths:
        raise InputError("expected the runs of the submission, got none: golfgpt submit pack RUN… --out DIR")
    for name in ("author", "github_id", "name"):
        if not getattr(about, name).strip():
            raise InputError(f"--{name.replace('_', '-')} is empty; a submission needs it")
    if not about.track.startswith("track_"):
        raise InputError(f"--track is {about.track}; expected track_10min_16mb for a record, or track_non_record_16mb")
    _may_write(out, overwrite)
    runs = sorted(map(read_result, paths), key=lambda run: run.config.seed)
    kind = "plain" if runs[0].config.eval.ttt.kind == "off" else "adapted"
    notes = []
    if kind == "plain":
        notes = [_left_out(run) for run in runs if run.result.get("adapted")]
        runs = [replace(run, result=run.result | {"adapted": None}) for run in runs]
    check_one_configuration(runs)
    _check_whole(runs)
    side = one_side(runs, kind)
    if is_record(about.track) and len(side.seeds) < SEEDS:
        raise InputError(
            f"{_seeds(side)} for the track {about.track}, which needs {SEEDS}: train more, or leave out --track"
        )
    for run in runs:
        _check_artifact(run)
    best = min(side.seeds, key=lambda seed: seed.val_bpb).seed
    shown = next(run for run in runs if run.config.seed == best)

    from golfgpt.submit.bundle import source

    readable = source(_program_config(shown, kernels))
    program = packed(readable)
    submission = _submission(side, runs, shown, about, len(program))
    cap = shown.config.budget.artifact_bytes
    if submission["bytes_total"] > cap:
        most = submission["bytes_total"] - len(program)
        raise BudgetError(
            f"{submission['bytes_total']:,} bytes = {PROGRAM} {len(program):,} + largest artifact {most:,}; the cap "
            f"budget.artifact_bytes is {cap:,}: nothing was written"
        )
    notes += _notes(side, shown, kernels)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    beside.chmod(0o755)
    try:
        (beside / PROGRAM).write_bytes(program)
        (beside / READABLE).write_text(readable, encoding="utf-8")
        for run in runs:
            shutil.copyfile(run.path / "train.log", beside / f"train_seed{run.config.seed}.log")
            write_json(beside / f"result_seed{run.config.seed}.json", run.result)
        shutil.copyfile(artifact_file(shown.path), beside / ARTIFACT)
        write_json(beside / "submission.json", submission)
        (beside / "requirements.txt").write_text(_requirements(readable, shown), encoding="utf-8")
        (beside / "README.md").write_text(_readme(submission, shown, notes), encoding="utf-8")
        _put(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    measured = as_configured(shown, MEASURED).budget.code_bytes is None
    counted = shown.result.get("code_bytes") if measured else None
    size = len(readable.encode())
    return Packed(submission=submission, readable_bytes=size, cap=cap, counted_bytes=counted, notes=notes)


def is_record(track: str) -> bool:
    """Whether a submission to this track must have what a record needs."""
    return not re.search(r"non.?record|unlimited", track, re.IGNORECASE)


def score_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The score of a submission in the result.json of a seed: with test-time training if it is there. Runs without
    test-time training are packed without such a score, which `golfgpt eval` may have added."""
    return result.get("adapted") or result.get("score") or {}


def _left_out(run: Run) -> str:
    return (
        f"{run.path} has the score {run.result['adapted']['label']} of golfgpt eval, which is left out: the program "
        "does as the run did, with eval.ttt.kind off"
    )


def _check_whole(runs: Sequence[Run]) -> None:
    """Raise InputError for scores of a part of the text, which `golfgpt submit check` lets fail."""
    partial = [run for run in runs if score_of(run.result).get("partial")]
    if not partial:
        return
    scores = ", ".join(f"{run.path} is {score_of(run.result)['label']}" for run in partial)
    commands = "; ".join(scored_whole(run) for run in partial)
    raise InputError(
        f"the score of {scores}, of a part of the validation text; a submission needs that of all of it: {commands} "
        "(scores again, trains nothing)"
    )


def _seeds(side: Side) -> str:
    return f"{len(side.seeds)} seed{'s' * (len(side.seeds) > 1)}"


def _may_write(out: Path, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise InputError(f"{out} exists; choose another --out, or replace it with --overwrite")
    if out.is_symlink() or not (out / "submission.json").is_file():
        raise InputError(f"{out} is no folder of a submission (no submission.json), so --overwrite leaves it alone")


def _put(beside: Path, out: Path) -> None:
    """Rename `beside` to `out`; a former submission there is deleted once the new one stands."""
    former = Path(f"{beside}.former")
    if out.exists():
        out.rename(former)
    try:
        beside.rename(out)
    except OSError:
        if former.exists():
            former.rename(out)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _check_artifact(run: Run) -> None:
    file = artifact_file(run.path)
    if not (run.path / "train.log").is_file():
        raise InputError(f"there is no {run.path / 'train.log'}; a submission needs the log of every seed")
    digest, wanted = sha256_file(file), run.result.get("artifact_sha256")
    if digest != wanted:
        raise VerificationError(
            f"{file} has the SHA-256 {digest[:16]}…, its result.json is about {str(wanted)[:16]}…: the file has "
            f"changed since it was scored; train the run again, or restore the file"
        )


def _program_config(run: Run, kernels: bool) -> RunConfig:
    """The configuration of a run as its program has it."""
    config, runtime = run.config, run.config.runtime
    if kernels and runtime.kernels in ("auto", "eager"):
        raise InputError(f"{run.path} used no kernels (runtime.kernels is {runtime.kernels}); leave out --kernels")
    chosen = replace(
        runtime,
        kernels=runtime.kernels if kernels else "eager",
        dtype=run.result["score"]["dtype"] if runtime.dtype == "auto" else runtime.dtype,
    )
    path = f"data/{Path(config.data.path or 'data').name}"  # DATA_PATH says where it is; no path of this machine
    return replace(config, runtime=chosen, data=replace(config.data, path=path))


def _submission(side: Side, runs: Sequence[Run], shown: Run, about: About, code: int) -> dict[str, Any]:
    results = {}
    for seed, run in zip(side.seeds, runs, strict=True):
        seconds = run.result["seconds"]
        results[str(seed.seed)] = {
            "val_bpb": seed.val_bpb,
            "val_loss": seed.val_loss,
            "artifact_bytes": run.result["artifact_bytes"],
            "artifact_sha256": run.result["artifact_sha256"],
            "steps": run.result["steps"],
            "train_time_s": round(seconds["train"] + seconds["calibrate"], 3),
            "eval_time_s": seconds["eval"],
        }
    scores = [seed.val_bpb for seed in side.seeds]
    return {
        "author": about.author,
        "github_id": about.github_id,
        "name": about.name,
        **({"blurb": about.blurb} if about.blurb else {}),
        "date": max(str(run.env.get("started", "")) for run in runs)[:10],
        "track": about.track,
        "hardware": _hardware(shown.env),
        "val_bpb": side.mean_bpb,
        "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "val_loss": side.mean_loss,
        "score": score_of(shown.result)["label"],
        "bytes_total": code + max(result["artifact_bytes"] for result in results.values()),
        "bytes_code": code,
        "artifact_seed": shown.config.seed,
        "dataset": shown.result["dataset"],
        "seeds": [seed.seed for seed in side.seeds],
        "seed_results": results,
    }


def _hardware(env: dict[str, Any]) -> str:
    if gpus := env.get("gpus"):
        return f"{min(env['world_size'], len(gpus))}x {gpus[0]}"
    return f"CPU, {env.get('cpus')} cores, {env.get('world_size')} process{'es' * (env.get('world_size', 1) > 1)}"


def _notes(side: Side, shown: Run, kernels: bool) -> list[str]:
    notes = [f"{run} has this configuration too and is not part of the submission" for run in side.left_out]
    if side.varied:
        notes.append(f"the runs also differ in {', '.join(side.varied)}")
    if len(side.seeds) < SEEDS:
        notes.append(f"{_seeds(side)}: a record needs {SEEDS}")
    if (used := shown.config.runtime.kernels) not in ("auto", "eager") and not kernels:  # auto: nothing was chosen
        notes.append(f"the runs used the kernels {used}; the program has PyTorch's ops, which round differently")
    return notes


def _requirements(source: str, run: Run) -> str:
    names = sorted(PACKAGES & imports(source) - {"triton"})  # torch brings the version that it needs
    versions = {name: metadata.version(name) for name in names}
    versions["torch"] = str(run.env.get("torch", versions.get("torch")))
    return "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in versions.items())


def _readme(submission: dict[str, Any], run: Run, notes: Sequence[str]) -> str:
    s, recipe = submission, recipe_name(run.env)
    label, std = s["score"], s["val_bpb_std"]
    spread = "" if std is None else f", standard deviation {std:.6f}"
    ignored = ("seed:", "runtime.", "budget.", "data.path:")
    changed = differences(start_config(run.env), as_configured(run))
    changes = [change for change in changed if not change.startswith(ignored)]
    rows = [
        f"| {seed} | {r['steps']} | {r['val_loss']:.8f} | {r['val_bpb']:.8f} | {r['train_time_s']:.3f} | "
        f"{r['eval_time_s']:.3f} | {r['artifact_bytes']} |"
        for seed, r in s["seed_results"].items()
    ]
    lines = [
        f"# {s['name']}",
        "",
        *([s["blurb"], ""] if "blurb" in s else []),
        f"{label} **{s['val_bpb']:.8f}**, mean of {len(rows)} seed{'s' * (len(rows) > 1)}{spread}. "
        f"{s['bytes_total']} bytes: `{PROGRAM}` {s['bytes_code']}, largest artifact "
        f"{s['bytes_total'] - s['bytes_code']}. Hardware: {s['hardware']}.",
        "",
        "| seed | steps | val_loss | val_bpb | train s | eval s | artifact bytes |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"`{ARTIFACT}` is that of seed {s['artifact_seed']}. Data: digest {s['dataset'][:16]}.",
        "",
        *([*[f"- {note}" for note in notes], ""] if notes else []),
        "## Run",
        "",
        "```",
        "pip install -r requirements.txt",
        f"DATA_PATH=… torchrun --standalone --nproc-per-node {run.env.get('world_size', 1)} {PROGRAM}   "
        f"# trains seed {s['artifact_seed']} and scores it; SEED=… trains another",
        f"DATA_PATH=… python {PROGRAM} {ARTIFACT}   # scores the artifact",
        "```",
        "",
        f"`{PROGRAM}` unpacks itself and reads no other code; `{READABLE}` is the same program before it was packed.",
        "",
        "## Configuration",
        "",
        f"Recipe {recipe} of golfgpt {run.env.get('golfgpt')}, with:" if recipe else "Changes of golfgpt's defaults:",
        "",
        *([f"- {change}" for change in changes] or ["- nothing changed"]),
        "",
    ]
    return "\n".join(re.sub(r"[\r\n]+", " ", line) for line in lines)
