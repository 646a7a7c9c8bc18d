"""`golfgpt runs`, `runs show` and `runs diff`."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from golfgpt import recipes
from golfgpt.cli.common import RUNS, print_json
from golfgpt.config import differences, to_dict
from golfgpt.errors import InputError
from golfgpt.runs import (
    Condition,
    ListedRun,
    as_configured,
    check_fields,
    flatten,
    going_on,
    list_runs,
    listed_run,
    read_run,
    recipe_name,
    sort_runs,
    start_config,
)
from golfgpt.tables import table

COLUMNS = ("run", "recipe", "seed", "val_bpb", "total_bytes", "steps", "status", "started")
SHOWN = 5
"""Values of a field that are named where no run matches."""


@dataclass(frozen=True, kw_only=True)
class ListRuns:
    """List the runs below a folder, newest first. A field is one of config.json, result.json or env.json by its dotted
    name, such as model.num_layers. golfgpt runs show RUN and golfgpt runs diff A B show more."""

    folder: Positional[Path] = RUNS
    """Folder to search."""
    where: tuple[str, ...] = ()
    """Show only runs for which all of these hold: FIELD=VALUE, or with != '<' '<=' '>' '>='. Each field becomes a
    column."""
    sort: str | None = None
    """Field to sort by, smallest first."""
    reverse: bool = False
    """Sort the other way."""
    limit: int | None = None
    """Show at most this many runs."""
    json: bool = False
    """Print the columns and score.label as JSON."""


def list_all(args: ListRuns) -> int:
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1")
    conditions = [Condition.parse(text) for text in args.where]
    found = list_runs(args.folder)
    used = [condition.field for condition in conditions] + ([args.sort] if args.sort else [])
    check_fields(used, found)
    broken = [run for run in found if run.status == "broken"]
    matching = [run for run in found if run.status != "broken" and all(c.holds(run) for c in conditions)]
    reverse = args.reverse if args.sort else not args.reverse  # the newest first
    shown = sort_runs(matching, args.sort or "started", reverse=reverse)[: args.limit]
    columns = tuple(dict.fromkeys((*COLUMNS, *used)))
    if args.json:
        rows = [{name: run.get(name) for name in (*columns, "score.label")} for run in shown]
        problems = [{"run": str(run.path), "problem": run.problem} for run in broken]
        print_json({"runs": rows, "broken": problems, "matching": len(matching), "found": len(found)})
        return 0
    if shown:
        print(table(columns, [[_cell(run, name) for name in columns] for run in shown]))
    if any(_marked(run) for run in shown):
        print("* not the score of all of the text by the plain rule: score.label, in golfgpt runs show RUN, says what")
    for run in broken:
        print(f"broken: {run.problem}")
    print(f"{len(shown):,} of {len(found):,} runs below {args.folder}")
    if found and not matching:
        for field in dict.fromkeys(condition.field for condition in conditions):
            values = sorted({str(run.get(field)) for run in found})
            print(f"{field} is {', '.join(values[:SHOWN])}{', …' if len(values) > SHOWN else ''} in these runs")
    return 0


def _marked(run: ListedRun) -> bool:
    return run.get("score.label") not in (None, "val_bpb")


def _cell(run: ListedRun, name: str) -> object:
    value = run.get(name)
    if name == "val_bpb" and value is not None:
        return f"{value:.4f}{'*' if _marked(run) else ''}"
    if name == "seed" or isinstance(value, float | bool | list | dict):
        return str(value)
    return "" if value is None else value


@dataclass(frozen=True, kw_only=True)
class ShowRun:
    """Show a run: its score, its sizes, every golfgpt eval of it, and what it changed in its recipe."""

    run: Positional[Path]
    """Run folder."""
    json: bool = False
    """Print config, environment, result and evals as JSON."""


def show(args: ShowRun) -> int:
    run, status = read_run(args.run), listed_run(args.run).status
    evals, steps = run.metrics("eval"), run.steps()
    reached = {name: steps[-1].get(name) for name in REACHED} if steps and run.result is None else {}
    if args.json:
        facts = {"run": str(args.run), "status": status, "recipe": recipe_name(run.env)}
        facts |= reached | {"config": to_dict(run.config), "env": run.env, "result": run.result, "evals": evals}
        print_json(facts)
        return 0
    result = run.result or {}
    values = reached | flatten(result) | flatten(run.env)
    values["command"] = shlex.join(run.env.get("command", ()))
    score, size = result.get("score", {}), result.get("total_bytes")
    head = [status, f"seed {run.config.seed}"]
    head += [f"{score['label']} {score['val_bpb']:.4f}"] if score.keys() >= {"label", "val_bpb"} else []
    head += [f"{size:,} bytes in all"] if size else []
    print(f"{args.run}: {', '.join(head)}\n")
    shown = [(name, _shown(name, value)) for name, value in values.items() if value is not None]
    print(table(("field", "value"), shown))
    if evals:
        print(f"\n{_eval_table(evals)}")
    recipe = recipe_name(run.env)
    changed = differences(start_config(run.env), as_configured(run))
    print(f"\nchanged from {f'recipe {recipe}' if recipe in recipes.RECIPES else 'the defaults'}:")
    print("\n".join(f"  {line}" for line in changed) or "  nothing")
    if status == "stopped":
        print(f"\nnext: {going_on(args.run)}")
    return 0


REACHED = ("step", "train_seconds", "loss", "loss_ema")
"""What `runs show` says of the last step of a run without a result."""


def _shown(name: str, value: Any) -> str:
    """A value for a reader; --json has all its digits."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if "bpb" in name or name.endswith("val_loss"):
        return f"{value:.4f}"
    return f"{value:,.1f}" if "seconds" in name else f"{value:g}"


def _eval_table(evals: list[dict[str, Any]]) -> str:
    """A row for each score of golfgpt eval, the oldest first; one with test-time training has two."""
    rows = []
    for line in evals:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(line["time"]))
        for score in filter(None, (line, line["adapted"])):
            shown = score["window"], score["stride"], f"{score['val_bpb']:.4f}", score["label"]
            rows.append((when, line["artifact"], str(line["data"]), *shown))
    return table(("eval", "of", "data", "window", "stride", "score", "label"), rows)


@dataclass(frozen=True, kw_only=True)
class DiffRuns:
    """List the fields in which the configurations of two runs differ, what the runs chose or measured differently, and
    their results."""

    a: Positional[Path]
    """Run folder."""
    b: Positional[Path]
    """Run folder to compare it with."""
    json: bool = False
    """Print the fields as JSON."""


RESULTS = ("steps", "score.label", "score.val_bpb", "total_bytes")
"""What `runs diff` shows of two results."""


def diff(args: DiffRuns) -> int:
    a, b = read_run(args.a), read_run(args.b)
    given = _differing(to_dict(as_configured(a)), to_dict(as_configured(b)))
    chosen = {
        name: pair for name, pair in _differing(to_dict(a.config), to_dict(b.config)).items() if name not in given
    }
    scored = _differing(a.result or {}, b.result or {})
    results = {name: scored[name] for name in RESULTS if name in scored}
    if args.json:
        found = {"differences": given, "chosen": chosen, "results": results}
        print_json({"a": str(args.a), "b": str(args.b), **found})
        return 0
    print("\n".join(f"{name}: {x!r} -> {y!r}" for name, (x, y) in given.items()) or "the configurations are equal")
    results = {name: [round(x, 4) if isinstance(x, float) else x for x in pair] for name, pair in results.items()}
    for title, pairs in (("chosen or measured by the runs, or given at a resume", chosen), ("results", results)):
        if pairs:
            print("\n".join((f"{title}:", *(f"  {name}: {x!r} -> {y!r}" for name, (x, y) in pairs.items()))))
    return 0


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    x, y = flatten(a), flatten(b)
    return {name: [x.get(name), y.get(name)] for name in x | y if x.get(name) != y.get(name)}
