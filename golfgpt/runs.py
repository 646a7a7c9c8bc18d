"""Run folders, read without torch: their config, environment, result and metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golfgpt.config import RunConfig, from_dict, to_dict
from golfgpt.errors import InputError
from golfgpt.files import write_json

RUNS = Path("runs")
"""Where new run folders are made, under the working directory."""
FORMAT = 4
"""Of config.json; runs without one count as 1. A release with new or changed fields of RunConfig raises it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run folder say. `result` is None until the run has a score."""

    path: Path
    config: RunConfig
    env: dict[str, Any]
    result: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.path.name

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The objects of this kind in metrics.jsonl, in order; a last line that is being written is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
        return [value for value in map(json.loads, lines) if value["kind"] == kind]


def read_run(path: Path) -> Run:
    """The run in `path`. Raises InputError if there is none, or if a file of it cannot be read."""
    config = read_config(path)
    return Run(path=path, config=config, env=_read(path / "env.json") or {}, result=_read(path / "result.json"))


def read_result(path: Path) -> Run:
    """The run in `path`, with its result. Raises InputError as `read_run`, and if the run has no result yet."""
    run = read_run(path)
    if run.result is None:
        raise InputError(f"{path} has no result.json; finish it with golfgpt train --resume {path}")
    return run


def _read(file: Path) -> dict[str, Any] | None:
    """A file's JSON object, or None if there is no file."""
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds {type(value).__name__}, expected an object")
    return value


def write_config(path: Path, config: RunConfig) -> None:
    write_json(path / "config.json", {"format": FORMAT, **to_dict(config)})


def read_config(path: Path) -> RunConfig:
    """The resolved config of the run in `path`. Raises InputError if it is missing, of another format or not valid."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(
            f"{path} holds no run: there is no {file}; expected a folder that golfgpt train or import created"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = values.pop("format", 1) if isinstance(values, dict) else FORMAT
        if found != FORMAT:
            raise ValueError(
                f"the run has format {found!r}, expected {FORMAT}: use the version of golfgpt that wrote it (env.json)"
            )
        return from_dict(RunConfig, values)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from error


def artifact_file(path: Path) -> Path:
    """The artifact of a run folder, or `path` itself if it is a file. Raises InputError if there is none."""
    file = path / "model.golf" if path.is_dir() else path
    if not file.is_file():
        finish = f"; finish the run with golfgpt train --resume {path}"
        hint = finish if (path / "config.json").exists() else "; expected a run folder or a .golf file"
        raise InputError(f"there is no {file}{hint}")
    return file
