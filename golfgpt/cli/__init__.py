"""The command line. Three rules hold for every command:

    the run, file or folder to work on comes first     golfgpt eval runs/first
    --recipe NAME is the configuration to start from   golfgpt train --recipe small
    --section.field VALUE overrides one field          --data.path data/books --model.num-layers 6

A run remembers its configuration, so `eval` starts from it. `--json` prints one JSON object on standard output and
everything else on standard error. Exit codes are those of golfgpt.errors. This package is the only one that imports
tyro; each command imports torch when it needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import tyro

from golfgpt import recipes
from golfgpt.cli import compare, data, info, models, report, runs, submit, sweep, train
from golfgpt.cli.common import RUNS, stored_config
from golfgpt.cli.parse import option, parse
from golfgpt.config import RunConfig
from golfgpt.errors import GolfError, InputError, Interrupted, PeerError, Terminated, UsageError
from golfgpt.sweep.attempt import read_loop
from golfgpt.sweep.space import read_spec, with_values


@dataclass(frozen=True)
class Command:
    """The arguments of a command, the function that runs it, and the function that finds the config to override."""

    args: type
    run: Callable[[Any], int]
    start: Callable[[list[str]], RunConfig] | None = None


def _recipe_config(argv: list[str]) -> RunConfig:
    return recipes.get(option(argv, "--recipe") or "baseline").config


def _train_config(argv: list[str]) -> RunConfig:
    resume = option(argv, "--resume")
    return stored_config(_alone(Path(resume), argv)) if resume else _recipe_config(argv)


def _run_config(argv: list[str]) -> RunConfig:
    """The config of the run that is the first argument."""
    if not argv or argv[0].startswith("-"):
        return RunConfig()
    return stored_config(Path(argv[0]))


def _export_config(argv: list[str]) -> RunConfig:
    """The config of the run, or the defaults for a .golf file outside a run folder."""
    alone = argv and Path(argv[0]).is_file() and not (Path(argv[0]).parent / "config.json").exists()
    return RunConfig() if alone else _run_config(argv)


def _budget_config(argv: list[str]) -> RunConfig:
    if argv and not argv[0].startswith("-"):
        if argv[0] in recipes.RECIPES and not Path(argv[0]).exists():
            raise InputError(f"there is no run {argv[0]}; did you mean golfgpt budget --recipe {argv[0]}?")
        return _run_config(argv) if _alone(Path(argv[0]), argv).is_dir() else RunConfig()
    return _recipe_config(argv)


def _sweep_config(argv: list[str]) -> RunConfig:
    """The recipe of --recipe or SPEC.toml, with what SPEC.toml fixes."""
    if not argv or argv[0].startswith("-"):
        return _recipe_config(argv)
    spec = read_spec(Path(argv[0]))
    recipe = option(argv, "--recipe") or str(spec.values.get("recipe", "baseline"))
    return with_values(recipes.get(recipe).config, spec.fixed)


def _try_config(argv: list[str]) -> RunConfig:
    """The config of the incumbent; for the first try under a name, that of the run or recipe that becomes it."""
    loop = read_loop(RUNS / (option(argv, "--name") or "try"))
    if loop:
        return loop.config
    if argv and not argv[0].startswith("-"):
        return stored_config(_alone(Path(argv[0]), argv))
    return _recipe_config(argv)


def _alone(run: Path, argv: list[str]) -> Path:
    if recipe := option(argv, "--recipe"):
        raise InputError(
            f"{run} has its own configuration; expected {run} or --recipe {recipe}, not both: drop one of them"
        )
    return run


COMMANDS = {
    "demo": Command(train.Demo, train.demo, lambda argv: recipes.get("demo").config),
    "data prepare": Command(data.DataPrepare, data.data_prepare),
    "data download": Command(data.DataDownload, data.data_download),
    "data verify": Command(data.DataVerify, data.data_verify),
    "train": Command(train.Train, train.train, _train_config),
    "preflight": Command(train.Preflight, train.preflight, _recipe_config),
    "eval": Command(train.Eval, train.evaluate, _run_config),
    "sample": Command(train.Sample, train.sample),
    "budget": Command(models.Budget, models.budget, _budget_config),
    "inspect": Command(models.Inspect, models.inspect),
    "export": Command(models.Export, models.export, _export_config),
    "import": Command(models.Import, models.import_file, _recipe_config),
    "watch": Command(report.Watch, report.watch),
    "report": Command(report.Report, report.report),
    "sweep": Command(sweep.Sweep, sweep.sweep, _sweep_config),
    "try": Command(sweep.Try, sweep.try_change, _try_config),
    "recipes": Command(info.Recipes, info.show_recipes),
    "runs": Command(runs.ListRuns, runs.list_all),
    "runs show": Command(runs.ShowRun, runs.show),
    "runs diff": Command(runs.DiffRuns, runs.diff),
    "compare": Command(compare.Compare, compare.compare_runs),
    "submit pack": Command(submit.SubmitPack, submit.pack),
    "submit check": Command(submit.SubmitCheck, submit.check),
    "doctor": Command(info.Doctor, info.doctor),
}


def main(argv: list[str]) -> int:
    """Run one command and return the exit code of the process."""
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    first, both = argv[0] if argv else "", " ".join(argv[:2])
    group = first if first not in COMMANDS and any(name.startswith(f"{first} ") for name in COMMANDS) else ""
    name = both if group or both in COMMANDS else first
    try:
        if name in COMMANDS:
            with _sigterm():
                return _dispatch(name, argv[len(name.split()) :])
        asked = argv[bool(group) :][:1]
        if asked in ([], ["-h"], ["--help"], ["help"]):
            print(_overview(group))
            return 0 if asked else 2
        if name in ("--version", "-V", "version"):
            from golfgpt import __version__

            print(f"golfgpt {__version__}")
            return 0
        print("golfgpt --help lists all commands", file=sys.stderr)
        if name.startswith("-"):
            raise UsageError(f"expected a command first, got {name}: golfgpt COMMAND {name} …")
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(f"unknown command {name!r}{f'; did you mean {close[0]}?' if close else ''}")
    except PeerError as error:
        return error.exit_code
    except Interrupted as error:
        return _fail(str(error), error.exit_code) if int(os.environ.get("RANK", 0)) == 0 else error.exit_code
    except GolfError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 3)
    except MemoryError as error:
        return _fail(f"out of memory ({error}); lower --data.microbatch-tokens or --eval.batch-tokens", 3)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated in the block, unless the command handles it itself or this process ignores it. Raises
    Interrupted after it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return

    def terminate(signum: int, frame: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Terminated:
        raise Interrupted("stopped by SIGTERM", signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    with contextlib.suppress(OSError):  # its reader may be gone
        print(f"golfgpt: {'' if rank == 0 else f'rank {rank}: '}{message}", file=sys.stderr, flush=True)
    return code


def _dispatch(name: str, argv: list[str]) -> int:
    command = COMMANDS[name]
    if name == "recipes" and argv and argv[0] not in ("list", "show") and not argv[0].startswith("-"):
        argv = ["show", *argv]
    change: tuple[str, ...] = ()
    if command.args is sweep.Try and "--" in argv:  # tyro does not take arguments in two places
        at = argv.index("--")
        argv, change = argv[:at], tuple(argv[at + 1 :])
    config = command.start(argv) if command.start else None
    args = _parse(command.args, name, argv, config)
    args = replace(args, change=change) if change else args
    run = getattr(args, "run", None) or getattr(args, "spec", None)
    if command.start and run is not None and Path(argv[0]) != run:
        raise InputError(
            f"the first argument of golfgpt {name} is {argv[0]}; expected the run: golfgpt {name} "
            f"{shlex.quote(str(run))} … (the options override its config)"
        )
    return command.run(args)


def _parse(cls: type, name: str, argv: list[str], config: RunConfig | None) -> Any:
    if config is None:
        default = tyro.MISSING_NONPROP
    elif cls is models.Import:
        default = cls(file=tyro.MISSING, tokenizer=tyro.MISSING, config=config)
    elif cls is models.Export:
        default = cls(run=tyro.MISSING, quant=config.quant)
    elif cls is train.Eval:
        path = train.DataPath(path=config.data.path)
        read = {field.name: getattr(config.runtime, field.name) for field in fields(train.EvalRuntime)}
        default = cls(run=tyro.MISSING, data=path, eval=config.eval, runtime=train.EvalRuntime(**read))
    else:
        default = cls(config=config)
    return parse(cls, name, argv, default)


def _overview(group: str) -> str:
    """Of all commands, or of those that begin with `group`."""
    lines = ["golfgpt: train the best language model that fits a byte budget, and prove the score.", ""]
    for name, command in COMMANDS.items():
        if not name.startswith(group):
            continue
        sentence = command.args.__doc__.split(". ")[0].rstrip(".")
        lines.append(f"  golfgpt {name:<13} {sentence}.")
    lines += ["", "`golfgpt COMMAND --help` lists every option with its default."]
    return "\n".join(lines)
