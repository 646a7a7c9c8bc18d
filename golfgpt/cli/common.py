"""Helpers that several commands use."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from golfgpt.config import EvalConfig, RunConfig, differences
from golfgpt.errors import InputError
from golfgpt.runs import RUNS, artifact_file, read_config, read_run, torchrun_id
from golfgpt.score.config import TTT_READS

Config = Annotated[RunConfig, tyro.conf.arg(name="")]


def stored_config(path: Path) -> RunConfig:
    """The config that a run was started with."""
    if path.suffix == ".golf" and not path.exists():
        artifact_file(path)  # which raises
    return read_config(path.parent if path.is_file() else path)


def check_tokenizer(run: Path, sha256: str, data: str | None) -> None:
    """Raise InputError if `data` is text, or a folder that was prepared with another tokenizer than that of `run`,
    whose digest is `sha256`."""
    from golfgpt.data.shards import Dataset

    if data and (Path(data).is_file() or Dataset.open(data).need_tokenizer().digest != sha256):
        source = shlex.quote(data) if Path(data).is_file() else "FILES"
        model = (run.parent if run.is_file() else run) / "tokenizer.model"
        raise InputError(
            f"{data} was not prepared with the tokenizer of {run}: golfgpt data prepare {source} --tokenizer "
            f"{shlex.quote(str(model))} --out DIR, then use DIR"
        )


def check_ttt(before: EvalConfig, after: EvalConfig) -> None:
    """Raise InputError for a changed field of test-time training that its kind does not read."""
    kind = after.ttt.kind
    for change in differences(before.ttt, after.ttt):
        name = change.partition(":")[0]
        if name != "kind" and not name.startswith(TTT_READS[kind]):
            kinds = " or ".join(each for each, reads in TTT_READS.items() if name.startswith(reads))
            raise InputError(
                f"--eval.ttt.{name.replace('_', '-')} has no effect on eval.ttt.kind {kind}; drop it, or add "
                f"--eval.ttt.kind {kinds}"
            )


def begun_before(path: Path) -> bool:
    """Whether this worker is a torchrun restart that continues the run in `path`. Raises InputError, on the first start
    too, if a restarted worker could not recognize its run; on several nodes, whose counts of restarts can differ."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if not torchrun_id():
            raise InputError(
                "torchrun got --max-restarts without a run id, which restarted workers need to find their run; add "
                "--standalone or --rdzv-id NAME, or drop --max-restarts"
            )
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            raise InputError(
                "torchrun got --max-restarts on several nodes, which do not agree on what was restarted; drop it, and "
                "continue a run with golfgpt train --resume"
            )
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (path / "config.json").exists()
    return again and read_run(path).env.get("torchrun") == torchrun_id()


def run_name(name: str | None, recipe: str) -> str:
    """The name of a folder under runs/, perhaps FOLDER/NAME. Without `name` it ends with torchrun's id or the
    time. Raises InputError if it points outside runs/."""
    if name is None:
        name = f"{recipe}-{(torchrun_id() or time.strftime('%Y%m%d-%H%M%S'))[:15]}"
    if {"", ".", ".."} & set(name.split("/")) or any(c in name for c in "\\\0"):
        raise InputError(f"--name {name!r} is not a folder name; expected NAME or FOLDER/NAME, for {RUNS}/NAME")
    return name


@contextlib.contextmanager
def progress_bars(file: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """Yields progress(stage, done, total): it draws one bar per stage on a terminal, else prints one line per stage."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=file)
    stages: dict[str, Any] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total or None)
                if not console.is_terminal:
                    print(f"{stage} …", file=file, flush=True)
            bars.update(stages[stage], completed=done)

        yield report


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
