"""`golfgpt sweep` and `try`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_type_hints

from tyro.conf import Positional, Suppress

from golfgpt.cli.common import RUNS, Config, print_json, run_name, stored_config
from golfgpt.cli.parse import parse
from golfgpt.config import RunConfig, differences
from golfgpt.errors import InputError, VerificationError
from golfgpt.files import from_json
from golfgpt.recipes import RECIPES
from golfgpt.runs import read_env, recipe_name
from golfgpt.sweep.space import SPEC_KEYS, Spec, SpecFile, parse_grid, read_spec, with_values
from golfgpt.tables import table

if TYPE_CHECKING:  # Optuna is imported when a sweep runs
    from golfgpt.sweep.run import Estimate, Row


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train a recipe at many points of a space. The same command continues a sweep that was killed, and joins it from
    other processes and machines."""

    spec: Positional[Path | None] = None
    """SPEC.toml with recipe, fixed, space, sampler, trials, seeds, jobs, max_bytes, max_seconds, noise; options win."""
    config: Config
    grid: tuple[str, ...] = ()
    """Fields to vary, each section.field=value,value; instead of the space of SPEC.toml."""
    recipe: str | None = None
    """Configuration that all runs start from."""
    name: str | None = None
    """Study and run folders are in runs/NAME; None: the name of SPEC.toml, else sweep."""
    sampler: Literal["grid", "random", "tpe"] | None = None
    """Which points: all of a grid (default), or --trials random ones, or those of Optuna's TPE sampler."""
    trials: int | None = None
    """Number of points for random and tpe."""
    seeds: int | None = None
    """Runs of each point, with seeds counted up from --seed; the score is their mean. Default: 1."""
    jobs: int | None = None
    """Runs at once, which share the CPU's threads. Default: 1."""
    max_bytes: int | None = None
    """Limit of artifact and code in bytes; a trial over it cannot be the best. Default: budget.artifact_bytes."""
    max_seconds: float | None = None
    """Limit of the measured training time in seconds; a trial over it cannot be the best. Default: no limit."""
    noise: float | None = None
    """Standard deviation of a score over seeds, in bits per byte. Trials that are worse than the best one by more than
    3 sqrt(2) times this are pruned. Default: measured, once the seeds of complete trials have 2 degrees of freedom."""
    dry_run: bool = False
    """Check all points and estimate the hours; without finished runs, a run of ten steps is timed."""
    json: bool = False
    """Print all trials as JSON."""


def sweep(args: Sweep) -> int:
    from golfgpt.sweep.children import Children, share_of_threads
    from golfgpt.sweep.run import estimate, sweep
    from golfgpt.sweep.study import Study

    spec, jobs, folder = _plan(args)
    children = Children(share_of_threads(jobs) if jobs > 1 and "runtime.threads" not in spec.space else 0)
    if args.dry_run:
        study = Study(folder, spec) if (folder / "study.journal").exists() else None
        cost = estimate(folder, spec, jobs, children, study)
        if args.json:
            print_json(asdict(cost))
        else:
            print(_estimate_table(folder, cost, jobs))
        return 0
    study = Study(folder, spec)
    rows = sweep(study, jobs, children, _say(args.json))
    best = study.best
    if args.json:
        values = {"folder": str(folder), "best": best and best.number, "noise": study.noise}
        print_json(values | {"trials": [asdict(row) for row in rows]})
    else:
        print("\n".join([_table(rows, study.noise), *_next(spec, rows)]))
    if best is None:
        raise InputError(f"no trial of {folder} has a score within the limits; the table has the reasons")
    return 0


def _estimate_table(folder: Path, cost: Estimate, jobs: int) -> str:
    seconds = 3600 * cost.hours
    whole = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes" if seconds < 6000 else ""
    rows = [
        ("folder", str(folder)),
        ("runs to train", f"{cost.runs}, {jobs} at once"),
        ("each", f"{cost.seconds_per_run:.1f} s, estimated from {cost.source}"),
        ("all", whole or f"{cost.hours:.1f} hours"),
    ]
    what = "trains them" if cost.runs else "lists the finished ones"
    return f"{table(('estimate', ''), rows)}\nnothing was started; the same command without --dry-run {what}"


def _say(json: bool) -> Callable[[str], None]:
    """Prints a line, in one piece: several threads do."""
    return lambda text: print(f"{text}\n", end="", file=sys.stderr if json else sys.stdout, flush=True)


def _plan(args: Sweep) -> tuple[Spec, int, Path]:
    """The sweep, its jobs and its folder, from SPEC.toml and the options."""
    file = read_spec(args.spec) if args.spec else SpecFile()
    hints, values = get_type_hints(Sweep), {}
    for key in SPEC_KEYS:
        try:
            given = from_json(hints[key], file.values.get(key), key)
        except ValueError as error:
            raise InputError(f"{args.spec}: {error}") from error
        option = getattr(args, key)
        if (value := given if option is None else option) is not None:
            values[key] = value
    if "recipe" not in values:
        raise InputError("expected a recipe to start from: --recipe small, or recipe in SPEC.toml")
    jobs = values.pop("jobs", 1)
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; expected at least 1")
    space = parse_grid(args.grid) if args.grid else file.space
    name = run_name((args.spec.stem if args.spec else "sweep") if args.name is None else args.name, "")
    spec = Spec(config=args.config, space=space, **values)
    _check_data(spec)
    return spec, jobs, RUNS / name


def _check_data(spec: Spec) -> None:
    """Raises InputError if there are no data, or if they fit no point; whether they fit those of random and tpe is not
    known where the space changes what must fit."""
    from golfgpt.score.evaluate import fitting_dataset, named_dataset

    if spec.sampler != "grid" and any(name.startswith(("data.", "model.", "eval.")) for name in spec.space):
        if "data.path" not in spec.space:
            named_dataset(spec.config)
        return
    faults = []
    for point in spec.points if spec.sampler == "grid" else ({},):
        try:
            fitting_dataset(with_values(spec.config, point))
            return
        except (InputError, VerificationError) as error:
            faults.append(error)
    raise faults[0]


def _table(rows: list[Row], noise: float | None) -> str:
    names = list(rows[0].values)
    labels = dict.fromkeys(row.label for row in rows if row.score is not None)
    head = ["trial", *names, " | ".join(labels) or "val_bpb", "seeds", "steps", "bytes", "seconds", "state"]
    cells = []
    for row in rows:
        score = "" if row.score is None else f"{row.score:.4f}"
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        state = f"{row.state}: {row.message}" if row.message else row.state
        values = [str(row.values.get(name, "")) for name in names]
        bytes_ = "" if row.bytes is None else f"{row.bytes:,}"
        steps = " to ".join(f"{count:,}" for count in sorted({min(row.steps), max(row.steps)})) if row.steps else ""
        cells.append([row.number, *values, score, len(row.scores), steps, bytes_, seconds, state])
    spread = "not known (one seed, no noise)" if noise is None else f"{noise:.4f} bits per byte"
    return f"{table(head, cells)}\nstandard deviation over seeds: {spread}"


def _next(spec: Spec, rows: list[Row]) -> list[str]:
    """The best trial, and the command that tests whether it is better than the second best."""
    complete = [row for row in rows if row.state == "complete"]
    lines = [f"best: trial {row.number}, {shlex.join(row.runs)}" for row in complete[:1]]
    rules = ("eval.", "data.seq_len") if spec.config.eval.window is None else ("eval.",)  # of the score
    tested = all(len(row.scores) > 1 for row in complete[:2]) and not any(name.startswith(rules) for name in spec.space)
    if len(complete) > 1 and spec.seeds == 1:
        lines.append("one seed does not tell better from noise; to know, sweep again with --seeds 3 and a new --name")
    if len(complete) > 1 and tested:
        best, second = (shlex.join(row.runs) for row in complete[:2])
        kind = "" if spec.config.eval.ttt.kind == "off" else " --score adapted"
        lines.append(
            f"next, whether it is better than trial {complete[1].number}: golfgpt compare {best} --against "
            f"{second}{kind}"
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class Try:
    """Test one change at a fixed budget against the best configuration so far (the incumbent): keep or discard it. A
    kept change is the next incumbent. Every try appends a line to runs/NAME/results.tsv.

    The options that make the change come last, after --, as in golfgpt try --recipe small --data.path DIR --budget 120s
    -- --optim.matrix-lr 0.03
    """

    run: Positional[Path | None] = None
    """For the first try under a name: the run whose config is the incumbent (or use --recipe)."""
    config: Config
    recipe: str | None = None
    """For the first try under a name: the recipe that is the incumbent."""
    budget: str | None = None
    """Training time of every run, 120s, 2m or 1h; fixed by the first try under a name."""
    steps: int | None = None
    """Steps of every run, in place of a time: the same scores on a busy machine."""
    looks: tuple[int, ...] | None = None
    """Numbers of seeds at which the test is made, fixed by the first try under a name. Default: 3 5 8."""
    name: str = "try"
    """Incumbent, runs and results are in runs/NAME."""
    json: bool = False
    """Print the decision as JSON."""
    change: Suppress[tuple[str, ...]] = ()
    """The options after --, which the command line takes off before it parses the others."""


def try_change(args: Try) -> int:
    from golfgpt.sweep.attempt import Loop, as_json, attempt, read_loop, summary, tried
    from golfgpt.sweep.children import Children
    from golfgpt.sweep.decide import LOOKS, under_null

    folder = RUNS / run_name(args.name, "")
    config, looks = _at_budget(args), args.looks
    loop = read_loop(folder)
    if loop is None:
        if not (args.run or args.recipe):
            raise InputError(f"{folder} has no incumbent yet; expected a run as first argument, or --recipe")
        if not (args.budget or args.steps):
            raise InputError("expected the budget of every run: --budget 120s, or --steps 500")
        try:
            under_null(looks or LOOKS)
        except ValueError as error:
            raise InputError(f"--looks: {error}") from error
        recipe = args.recipe or recipe_name(read_env(args.run))
        loop = Loop(recipe=recipe if recipe in RECIPES else "baseline", config=config, looks=looks or LOOKS)
        changed = _changed(config, args.change)
        tried(loop, changed)  # a change that is refused makes no folder
        folder.mkdir(parents=True, exist_ok=True)
    else:
        other = differences(loop.config, config)
        if args.run and not other:
            other = differences(loop.config, _at_budget(replace(args, config=stored_config(args.run))))
        if other or args.recipe not in (None, loop.recipe) or looks not in (None, loop.looks):
            what = "; ".join(other) or (f"--looks {looks}" if args.recipe in (None, loop.recipe) else args.recipe)
            raise InputError(
                f"{folder} has an incumbent, a budget and looks {loop.looks} already, got {what}; give only the "
                "change, after --, or choose another --name"
            )
        changed = _changed(loop.config, args.change)
    result = attempt(folder, loop, changed, Children(), _say(args.json))
    if args.json:
        print_json(as_json(result))
    else:
        print(f"{summary(result)}\n{folder / 'results.tsv'}")
    return 0


def _at_budget(args: Try) -> RunConfig:
    """The config with the budget that is given."""
    schedule = args.config.schedule
    if args.budget and args.steps:
        raise InputError(f"expected --budget or --steps, got --budget {args.budget} and --steps {args.steps}")
    try:
        if args.steps is not None:
            schedule = replace(schedule, max_steps=args.steps, max_seconds=None)
        if args.budget:
            schedule = replace(schedule, max_seconds=_seconds(args.budget))
    except ValueError as error:
        raise InputError(str(error)) from error
    return replace(args.config, schedule=schedule)


def _seconds(text: str) -> float:
    number, unit = (text[:-1], text[-1]) if text[-1] in "smh" else (text, "s")
    try:
        return float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        raise InputError(f"--budget is {text!r}; expected a time such as 120s, 2m or 1h") from None


@dataclass(frozen=True, kw_only=True)
class Change:
    """The options after --."""

    config: Config


def _changed(config: RunConfig, options: tuple[str, ...]) -> RunConfig:
    if not options:
        raise InputError("there is no change to try; expected options after --, such as -- --optim.matrix-lr 0.03")
    return parse(Change, "try", list(options), Change(config=config)).config
