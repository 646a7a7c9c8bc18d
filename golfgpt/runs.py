"""Run folders, read without torch: their config, environment, result and metrics; and lists of them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import json
import operator
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from golfgpt import recipes
from golfgpt.config import RunConfig, from_dict, to_dict
from golfgpt.errors import GolfError, InputError
from golfgpt.files import parse_json, read_json, write_json

RUNS = Path("runs")
"""Where new run folders are made, under the working directory."""
FORMAT = 4
"""Of config.json; runs without one count as 1. A release with new or changed fields of RunConfig raises it."""

_ADDED = {"runtime": {"tracker": "none", "val_tokens": None, "peer_seconds": 600.0}, "eval": {"compile": "auto"}}
"""Fields that a config of this format may lack, since they are newer than it, with the value that runs had then (a CPU
also compiled scores where runtime.compile was on, which may round otherwise)."""


class StoredScore(TypedDict, total=False):
    """A score in result.json, by the fields that are read from it."""

    val_bpb: float
    val_loss: float
    tokens: int
    bytes: int
    window: int
    stride: int
    label: str
    dtype: str
    partial: bool
    document_aware: bool
    seconds: float


class Result(TypedDict, total=False):
    """What result.json holds; not all of it until scoring ends."""

    score: StoredScore
    adapted: StoredScore | None
    artifact_bytes: int
    artifact_sha256: str
    code_bytes: int | None
    total_bytes: int
    margin_bytes: int
    compressor: str
    quantized_again: bool
    parameters: int
    steps: int
    seconds: dict[str, float]
    dataset: str
    compressors_bpb: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run folder say. `result` is None until the run has a score."""

    path: Path
    config: RunConfig
    env: dict[str, Any]
    result: Result | None

    @property
    def name(self) -> str:
        return self.path.name

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The objects of this kind in metrics.jsonl, in order, without lines that are not whole (`metric`)."""
        return [value for value in self._metrics if value["kind"] == kind]

    def steps(self) -> list[dict[str, Any]]:
        """The objects of kind train that count in the end: a resume takes back the steps after its checkpoint."""
        rows: list[dict[str, Any]] = []
        for value in self._metrics:
            if value["kind"] == "resume":
                rows = [row for row in rows if row["step"] <= value["step"]]
            elif value["kind"] == "train":
                rows.append(value)
        return rows

    @functools.cached_property
    def _metrics(self) -> list[dict[str, Any]]:
        """As they were when they were first asked for: 20,000 steps take a second."""
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        return list(filter(None, map(metric, lines)))


def read_run(path: str | os.PathLike) -> Run:
    """The run in `path`. Raises InputError if there is none, or if a file of it cannot be read."""
    path = Path(path)
    config = read_config(path)
    return Run(path=path, config=config, env=read_env(path), result=read_stored_result(path))


def read_result(path: Path) -> Run:
    """The run in `path`, with its result. Raises InputError as `read_run`, and if the run has no result yet."""
    run = read_run(path)
    if run.result is None:
        raise InputError(f"{path} has no result.json: {going_on(path)}")
    return run


def read_env(path: Path) -> dict[str, Any]:
    """env.json of the run in `path`; empty if there is none. Raises InputError if it is no object."""
    return _read(path / "env.json") or {}


def read_stored_result(path: Path) -> Result | None:
    """result.json of the run in `path`; None if there is none. Raises InputError if it is not as golfgpt writes it."""
    return _read(path / "result.json", Result)


def _read(file: Path, hint: Any = dict) -> Any:
    """A file's JSON object, or None if there is no file."""
    try:
        return read_json(file, hint)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{file}: {error}; restore the file as golfgpt wrote it") from error


def metric(line: bytes) -> dict[str, Any] | None:
    """The object in a line of metrics.jsonl; None for a line that a full disk or a kill cut off, or no run writes."""
    try:
        value = parse_json(line, dict, allow_nan=True)
    except ValueError:
        return None
    return value if "kind" in value and all(type(value.get(name, 0)) in of for name, of in _NUMBERS.items()) else None


_NUMBERS = {"step": (int,)} | dict.fromkeys(("loss", "loss_ema", "train_seconds", "step_seconds"), (int, float))


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Work with values of result.json and metrics.jsonl of the run in `path`. Raises InputError if they do not allow
    it."""
    try:
        yield
    except GolfError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"result.json or metrics.jsonl of {path} is not as golfgpt writes it ({error!r:.300}); restore the files"
        ) from error


def last_step(path: Path) -> dict[str, Any] | None:
    """The last object of kind train in metrics.jsonl of the run in `path`, as `Run.steps` has it; None before the first
    step. Only the last lines are parsed: a list of many runs needs it."""
    file, most = path / "metrics.jsonl", None
    for line in reversed(file.read_bytes().split(b"\n")[:-1] if file.is_file() else []):
        value = metric(line) or {}
        if value.get("kind") == "resume":
            most = value["step"] if most is None else min(most, value["step"])
        elif value.get("kind") == "train" and (most is None or value["step"] <= most):
            return value
    return None


def add_metric(path: Path, kind: str, **values: Any) -> None:
    """Append one object to metrics.jsonl of the run in `path`, which no process needs to hold: a line is one write."""
    line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values})
    with open(path / "metrics.jsonl", "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def torchrun_id() -> str | None:
    """The id of the rendezvous, which all workers of a torchrun share, restarted ones too; None without torchrun, or if
    it has none."""
    found = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if found == "none" else found


def launcher() -> str:
    """How to start golfgpt with as many processes as this torchrun has on its one node."""
    world = os.environ.get("WORLD_SIZE", "1")
    several = world != "1" and world == os.environ.get("LOCAL_WORLD_SIZE")
    return f"torchrun --standalone --nproc-per-node {world} -m golfgpt" if several else "golfgpt"


def resume_hint(path: Path) -> str:
    """The sentence that follows the reason why a run ended early; empty if the run has saved nothing."""
    return f" Resume with: {launcher()} train --resume {shlex.quote(str(path))}" if saved(path) else ""


def taken(path: Path) -> InputError:
    """The error of a new run whose folder holds a run."""
    hint = "" if _imported(path) or (path / "result.json").exists() else ", or continue it with --resume"
    return InputError(f"{path} already holds a run; choose another --name{hint}")


def saved(path: Path) -> bool:
    """Whether the run has a checkpoint."""
    return any((path / "checkpoints").glob("step_*.safetensors"))


def _imported(path: Path) -> bool:
    """Whether golfgpt import made the run."""
    words = read_env(path).get("command")
    return isinstance(words, list) and words[1:2] == ["import"]


def going_on(path: Path) -> str:
    """What to do with a run that has no result, and its command."""
    quoted = shlex.quote(str(path))
    if _imported(path):
        return f"golfgpt eval {quoted} --data.path DIR scores it"
    return f"golfgpt train --resume {quoted} continues it"


def write_config(path: Path, config: RunConfig) -> None:
    write_json(path / "config.json", {"format": FORMAT, **to_dict(config)})


def read_config(path: Path) -> RunConfig:
    """The resolved config of the run in `path`. Raises InputError if it is missing, of another format or not valid."""
    values = _read_config(path)
    try:
        return stored(values)
    except ValueError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The values of config.json, of which only the format is checked."""
    file = path / "config.json"
    values = _read(file)
    if values is None:
        raise InputError(f"{path} holds no run: {_instead(path)}")
    if (found := values.pop("format", 1)) != FORMAT:
        raise InputError(
            f"{file}: the run has format {found!r}, expected {FORMAT}: use the version of golfgpt that wrote it "
            "(env.json)"
        )
    return values


def _instead(path: Path) -> str:
    """What is at `path` in place of a run, and what to give or do."""
    quoted = shlex.quote(str(path))
    if (path / "submission.json").is_file():
        return f"it is a submission, which golfgpt submit check {quoted} checks; expected the folder of a run"
    if (path / "manifest.json").is_file():
        return "it is a prepared data folder; expected the folder of a run"
    if path.is_file():
        return "it is a file; expected the folder of a run"
    if any(path.glob("*/config.json")):
        command = "golfgpt runs" if path == RUNS else f"golfgpt runs {quoted}"
        return f"folders in it are runs ({command} lists them); expected one of these"
    meant = _meant(path, "expected a folder that golfgpt train or import created")
    return f"there is no {path / 'config.json'}; {meant}"


def _meant(path: Path, expected: str) -> str:
    """A hint for a path at which there is nothing: the same below RUNS, or a run of a similar name beside it; if there
    is neither, `expected`."""
    if path.exists():
        return expected
    if (RUNS / path).exists():
        return f"did you mean {RUNS / path}?"
    for parent in (path.parent, RUNS / path.parent):
        names = [file.parent.name for file in parent.glob("*/config.json")]
        if close := difflib.get_close_matches(path.name, names, n=1):
            return f"did you mean {parent / close[0]}?"
    return expected


def stored(values: dict[str, Any]) -> RunConfig:
    """The config that a run of this format stored as `values`. Raises ValueError like `from_dict`."""
    added = {name: new | values[name] for name, new in _ADDED.items() if isinstance(values.get(name), dict)}
    return from_dict(RunConfig, values | added)


def artifact_file(path: Path) -> Path:
    """The artifact of a run folder, or `path` itself if it is a file. Raises InputError if there is none."""
    file = path / "model.golf" if path.is_dir() else path
    if not file.is_file():
        quoted = shlex.quote(str(path))
        if (path / "result.json").exists():
            raise InputError(f"there is no {file} any more; to write it again: golfgpt train --resume {quoted}")
        if (path / "config.json").exists():
            export = f"; to make a file of what it has saved: golfgpt export {quoted} --to golf" * saved(path)
            end = "follow it: golfgpt watch" if locked(path) else "finish it: golfgpt train --resume"
            raise InputError(f"there is no {file} before the run has ended{export}; to {end} {quoted}")
        if (path / "model.safetensors").exists():
            raise InputError(f"{path} is an export for other programs; expected the run that it was made of")
        if path.is_dir():
            raise InputError(f"{path} holds no run: {_instead(path)}")
        raise InputError(f"there is no {file}; {_meant(path, 'expected a run folder or a .golf file')}")
    return file


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run as a list shows it. The values in its config are not checked."""

    path: Path
    status: Literal["finished", "running", "stopped", "broken"]
    """finished: it has a result. running: a process holds the folder. broken: a file cannot be read."""
    values: dict[str, Any]
    """What is in config.json, result.json and env.json, and run, status, recipe, val_bpb and val_loss; and the steps so
    far of a run without a result."""
    problem: str | None = None
    """What is broken."""

    def get(self, field: str) -> Any:
        """The value of a dotted name, such as model.num_layers or seconds.train; None if there is none."""
        value: Any = self.values
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def list_runs(folder: Path) -> list[ListedRun]:
    """All runs below `folder`, or `folder` itself if it is one; links are not followed. A broken run is listed as such.
    Raises InputError if there is no such folder."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; {_meant(folder, 'expected a run or a folder with runs below it')}"
        )
    found = []
    for path, folders, files in os.walk(folder):
        if "config.json" in files:
            found.append(listed_run(Path(path)))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def listed_run(path: Path) -> ListedRun:
    """The run in `path`, as `list_runs` has it."""
    try:
        config, env, result = _read_config(path), _read(path / "env.json") or {}, read_stored_result(path)
        with as_written(path):
            reached = (last_step(path) if result is None else None) or {}
            trained = {"steps": reached["step"]} if reached else {}
    except (InputError, OSError) as error:
        values = {"run": str(path), "status": "broken"}
        return ListedRun(path=path, status="broken", values=values, problem=str(error))
    status = "finished" if result is not None else "running" if locked(path) else "stopped"
    values = config | trained | (result or {}) | env | {"run": str(path), "status": status, "recipe": recipe_name(env)}
    run = ListedRun(path=path, status=status, values=values)
    values |= {name: run.get(f"score.{name}") for name in ("val_bpb", "val_loss")}
    return run


def locked(path: Path) -> bool:
    """Whether a process writes to the run. A shared lock, held for an instant, asks without creating the file."""
    import fcntl  # not on Windows

    try:
        with open(path / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, or a file system without locks
        return False
    return False


MEASURED = ("budget.code_bytes", "schedule.reserve_seconds")
"""Fields that a run measures where it is not told them."""
CHOSEN = (*MEASURED, *(f"runtime.{name}" for name in ("dtype", "kernels", "attention", "compile", "graph", "threads")))
"""Fields that a run fills in where it is not told them."""


def start_config(env: dict[str, Any]) -> RunConfig:
    """The recipe that a run started from, or the defaults."""
    recipe = recipes.RECIPES.get(recipe_name(env) or "")
    return recipe.config if recipe else RunConfig()


def as_configured(run: Run, fields: Sequence[str] = CHOSEN) -> RunConfig:
    """The config of a run, without what it filled in itself of `fields`: these are as its recipe has them unless its
    command sets them."""
    given = {str(word).partition("=")[0].replace("_", "-") for word in run.env.get("command", ())}
    started, config = start_config(run.env), run.config
    for name in fields:
        section, _, leaf = name.partition(".")
        before = getattr(getattr(started, section), leaf)
        if before in (None, "auto", 0) and f"--{name.replace('_', '-')}" not in given:
            config = replace(config, **{section: replace(getattr(config, section), **{leaf: before})})
    return config


def recipe_name(env: dict[str, Any]) -> str | None:
    """The recipe that a run started from, by the command in its env.json."""
    words = env.get("command")
    if not isinstance(words, list):
        return None
    for word, following in itertools.zip_longest(words, words[1:]):
        if word == "--recipe":
            return following
        if str(word).startswith("--recipe="):
            return word.removeprefix("--recipe=")
    return "demo" if words[1:2] == ["demo"] else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, by dotted names. Lists stay as they are."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


_OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """FIELD=VALUE, or with != < <= > >= in place of =."""

    field: str
    relation: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        found = re.fullmatch(r"([\w.]+)(!=|<=|>=|=|<|>)(.*)", text, re.DOTALL)
        if not found:
            raise InputError(f"--where {text!r} is no condition; expected FIELD=VALUE, or != < <= > >= in place of =")
        return cls(field=found[1], relation=found[2], value=found[3])

    def holds(self, run: ListedRun) -> bool:
        """Numbers are compared as numbers, text as text. A run without the field fulfils no < <= > >=.
        Raises InputError where a number would be ordered with text."""
        have = run.get(self.field)
        try:
            wanted = parse_json(self.value)
        except ValueError:
            wanted = {"True": True, "False": False, "None": None}.get(self.value, self.value)
        if isinstance(have, str):
            wanted = self.value
        if self.relation in ("=", "!="):
            return _OPERATORS[self.relation](have, wanted)
        if have is None:
            return False
        try:
            return _OPERATORS[self.relation](have, wanted)
        except TypeError:
            raise InputError(
                f"--where {self.field}{self.relation}{self.value}: {run.path} has {have!r} there, which has no order "
                f"with {self.value!r}"
            ) from None


def check_fields(names: Iterable[str], runs: Sequence[ListedRun]) -> None:
    """Raise InputError for a field that neither the configuration nor any of the runs has."""
    known = {"run", "status", "recipe", "val_bpb", "val_loss", "total_bytes", "steps", "started"}
    known |= flatten(to_dict(RunConfig())).keys()
    for name in names:
        if name in known or any(run.get(name) is not None for run in runs):
            continue
        known = known.union(*(flatten(run.values) for run in runs))
        if name in known:  # with the value null
            continue
        ends = sorted(field for field in known if field.endswith(f".{name}"))
        close = ends or difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"no run has a field {name}{hint} (golfgpt runs show RUN --json has all fields)")


def sort_runs(runs: Iterable[ListedRun], field: str, *, reverse: bool = False) -> list[ListedRun]:
    """By one field: numbers before text; runs without a value last, in any direction."""

    def key(run: ListedRun) -> tuple[bool, float, str]:
        value = run.get(field)
        number = isinstance(value, int | float)
        return (not number, value if number else 0.0, "" if number else str(value))

    runs = list(runs)
    having = [run for run in runs if run.get(field) is not None]
    return sorted(having, key=key, reverse=reverse) + [run for run in runs if run.get(field) is None]
