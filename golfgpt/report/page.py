"""The page of a report: what the files of one or several runs say, in tables and figures. What a run lacks is listed,
and the rest is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from golfgpt import recipes
from golfgpt.compare import NO_EFFECT, compare
from golfgpt.config import to_dict
from golfgpt.errors import InputError
from golfgpt.report.figures import COLOURS, Series, curves, distribution
from golfgpt.runs import (
    CHOSEN,
    MEASURED,
    Run,
    artifact_file,
    as_configured,
    as_written,
    flatten,
    going_on,
    listed_run,
    read_run,
    recipe_name,
    start_config,
)
from golfgpt.train.clock import COUNTED


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_number(self, column: int) -> bool:
        """Whether a column holds figures, which stand to the right."""
        cells = [row[column] for row in self.rows]
        return column > 0 and all(re.fullmatch(r"–?|[-\d.,]+(e-\d+)?( %)?", cell) for cell in cells)


@dataclass
class View:
    """A run as the page shows it."""

    run: Run
    name: str
    colour: int
    missing: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    """With the training clock of their steps."""
    scores: list[str] = field(default_factory=list)
    """Cells of `SCORES`."""
    checks: list[Table] = field(default_factory=list)
    budget: dict[str, Any] | None = None
    tensors: dict[str, Any] | None = None

    @property
    def result(self) -> dict[str, Any]:
        return self.run.result or {}

    @property
    def score(self) -> dict[str, Any]:
        return self.result.get("score") or {}

    @property
    def adapted(self) -> dict[str, Any]:
        return self.result.get("adapted") or {}


def render(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """The page of the runs in `paths`, and what they lack. Raises InputError for a folder without a run."""
    import jinja2

    if not paths:
        raise InputError("expected a run to report, got none: golfgpt report RUN… -o FILE.html")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"a run stands twice in {' '.join(map(str, paths))}; expected each once")
    views = [_view(path, name, i) for i, (path, name) in enumerate(zip(paths, _names(paths), strict=True))]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(views) > 1
    page = environment.get_template("page.html").render(
        title=f"{len(views)} runs" if several else views[0].name,
        views=views,
        several=several,
        started=sorted({str(view.run.env["started"])[:10] for view in views if "started" in view.run.env}),
        missing=[(view.name, text) for view in views for text in view.missing],
        scores=_scores(views),
        figures=_figures(views),
        step_times=_step_times(views),
        ledger=_ledger(views),
        comparisons=_comparisons(views),
        scored=any(view.score for view in views),
        changed=_changed(views),
        config=_by_run("Every field of the configuration", views, lambda view: flatten(to_dict(view.run.config))),
        environment=_by_run("Where the run was started", views, lambda view: view.run.env),
    )
    return page, [f"{view.run.path}: {text}" for view in views for text in view.missing]


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths if two are alike."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _view(path: Path, name: str, index: int) -> View:
    view = View(read_run(path), name, index % COLOURS)
    with as_written(path):
        _fill(view)
    return view


def _fill(view: View) -> None:
    run = view.run
    view.steps = run.steps()
    clock = {row["step"]: row["train_seconds"] for row in view.steps}
    validations = {row["step"]: row for row in run.metrics("val") if row["step"] in clock}
    view.validations = [row | {"train_seconds": clock[step]} for step, row in validations.items()]
    view.scores = [cell(view) for cell in SCORES.values()]
    if view.score:
        view.checks, view.budget = _checks(view), _budget(view)
    if run.result is None:
        at = f"step {view.steps[-1]['step']}" if view.steps else "the start"
        running = listed_run(run.path).status == "running"
        now = f"it is training, at {at}" if running else f"it stopped at {at}; {going_on(run.path)}"
        view.missing.append(f"the score (there is no result.json): {now}")
    elif not view.score.get("checks"):
        view.missing.append("how the score was checked: result.json does not say")
    if not view.steps:
        view.missing.append("curves and step times: metrics.jsonl has no steps")
    elif "step_seconds" not in view.steps[0]:
        view.missing.append("step times: metrics.jsonl was written by an earlier version, which had some steps only")
    if reports := _tensor_reports(run, view.missing):
        view.tensors = _tensors(reports)
    if not run.env:
        view.missing.append("environment: there is no env.json")


def _tensor_reports(run: Run, missing: list[str]) -> list[dict[str, Any]]:
    """The tensors of model.golf, with the errors that the export measured."""
    if exports := run.metrics("tensors"):
        return exports[-1]["tensors"]
    try:
        file = artifact_file(run.path)
    except InputError:
        missing.append("tensors: there is no model.golf")
        return []
    from golfgpt.quant import artifact  # imports torch

    missing.append("quantization errors: metrics.jsonl has none, because the run is imported or of an earlier version")
    return [report._asdict() for report in artifact.inspect(file).table()]


# Tables


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


SCORES: dict[str, Callable[[View], str]] = {
    "bits per byte": lambda v: _number(v.score.get("val_bpb"), ".4f"),
    "with test-time training": lambda v: _number(v.adapted.get("val_bpb"), ".4f"),
    "part of the text": lambda v: (
        ", ".join(score["label"] for score in (v.score, v.adapted) if score.get("partial")) or "–"
    ),
    "nats per token": lambda v: _number(v.score.get("val_loss"), ".4f"),
    "total bytes": lambda v: _number(v.result.get("total_bytes"), ","),
    "bytes left": lambda v: _number(v.result.get("margin_bytes"), ","),
    "parameters": lambda v: _number(v.result.get("parameters"), ","),
    "steps": lambda v: _number(v.result.get("steps", v.steps[-1]["step"] if v.steps else None), ","),
    "seconds of training": lambda v: _number(v.steps[-1]["train_seconds"] if v.steps else None, ",.1f"),
    "seed": lambda v: str(v.run.config.seed),
}


def _scores(views: Sequence[View]) -> Table:
    """The columns that some run has."""
    columns = zip(SCORES, *(view.scores for view in views), strict=True)
    head, *cells = zip(*(column for column in columns if set(column[1:]) != {"–"}), strict=True)
    return Table("Scores", ["run", *head], [[view.name, *row] for view, row in zip(views, cells, strict=True)])


def _nats(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"at most {value:.1e} nats" if value else "nothing"


def _checks(view: View) -> list[Table]:
    """The compliance block: what a score is of, and how it was proved."""
    tables = []
    if score := view.score:
        rows = [
            ["label", score["label"]],
            ["tokens scored", f"{score['tokens']:,}" + (", a part of the text" if score["partial"] else "")],
            ["bytes of them", f"{score['bytes']:,}, counted by two paths that agree"],
            ["window, stride", f"{score['window']:,}, {score['stride']:,}; {score['dtype']}"],
        ]
        if c := score.get("checks"):
            rows += [
                ["probabilities sum to 1", f"within {c['probability_sum_error']:.1e}, on {c['windows']} windows"],
                ["later tokens change", f"{_nats(c['later_token_change'], '–')} ({c['comparisons']:,} comparisons)"],
                ["tokens outside the window change", _nats(c["outside_context_change"], "–")],
                ["other documents change", _nats(c["other_document_change"], "not tested: windows cross documents")],
                ["tokens of context", f"{c['min_context']:,} to {c['max_context']:,}"],
            ]
        for name in ("dataset", "artifact_sha256"):
            rows.append([name.replace("_", " "), view.result.get(name) or "–"])
        tables.append(Table("How the score was checked", ["check", "found"], rows))
    if adapted := view.adapted:
        c = adapted["compliance"]
        rows = [
            ["label", adapted["label"]],
            ["tokens scored", f"{adapted['tokens']:,}" + (", a part of the text" if adapted["partial"] else "")],
            ["seconds", f"{adapted['seconds']:.1f} of at most {adapted['max_seconds']:g}"],
            *([["stopped", adapted["stopped"]]] if adapted["stopped"] else []),
            ["probabilities sum to 1", f"within {c['probability_sum_error']:.1e}"],
            ["later tokens change", f"{_nats(c['later_token_change'], '–')} ({c['comparisons']:,} comparisons)"],
            ["other documents change", _nats(c["other_document_change"], "they may, or there is one only")],
            ["scored once, by the ledger", f"{c['scored_once']:,}"],
            ["learned after they were scored", f"{c['learned_after_scored']:,}"],
            ["documents independent", c["documents_independent"]],
            ["order", f"{c['order']}; {c['code_length']}"],
            ["ledger sha256", adapted["ledger_sha256"]],
        ]
        tables.append(Table("How the score with test-time training was checked", ["check", "found"], rows))
    return tables


def _timed(view: View) -> list[dict[str, Any]]:
    """Its steps with a duration, without the first, which has one-time work."""
    return [row for row in view.steps[1:] if "step_seconds" in row]


def _step_times(views: Sequence[View]) -> Table | None:
    rows = []
    for view in views:
        timed = _timed(view)
        if timed:
            ms = np.array([1000 * row["step_seconds"] for row in timed])
            half, high = np.percentile(ms, (50, 95))
            slowest = timed[int(ms.argmax())]["step"]
            tokens = view.run.config.data.batch_tokens * 1000 / ms.mean()
            cells = [f"{value:,.1f}" for value in (half, high, ms.max())]
            rows.append([view.name, f"{len(ms):,}", *cells, f"{slowest:,}", f"{tokens:,.0f}"])
    head = ["run", "steps", "median ms", "95 % below, ms", "slowest ms", "slowest step", "tokens per second"]
    return Table("Steps without the first, which has one-time work", head, rows) if rows else None


def _ledger(views: Sequence[View]) -> Table | None:
    with_result = [view for view in views if view.result.get("seconds")]
    if not with_result:
        return None
    rows = []
    for phase in with_result[0].result["seconds"]:
        seconds = [_number(view.result["seconds"].get(phase), ",.1f") for view in with_result]
        rows.append([phase, *seconds, "yes" if phase in COUNTED else "no"])
    return Table("Seconds by phase", ["phase", *(view.name for view in with_result), "in the budget"], rows)


def _budget(view: View) -> dict[str, Any]:
    """Shares of the limit, in percent, and the sentence below the bar."""
    r, limit = view.result, view.run.config.budget.artifact_bytes
    code = r.get("code_bytes", r.get("code_bytes_allowance")) or 0  # earlier runs had an allowance
    shares = {"model.golf": r["artifact_bytes"], "code": code}
    most = max(limit, r["total_bytes"])
    margin = f"{r['margin_bytes']:,} left" if r["margin_bytes"] >= 0 else f"over by {-r['margin_bytes']:,}"
    return {
        "parts": [(name, 100 * size / most) for name, size in shares.items()],
        "limit": 100 * limit / most,
        "over": r["margin_bytes"] < 0,
        "text": f"{r['total_bytes']:,} of {limit:,} bytes: model.golf {r['artifact_bytes']:,} ({r['compressor']}) and "
        f"{code:,} for code; {margin}",
    }


def _tensors(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows with two bars each, stored bytes and error, both as parts of the largest."""
    stored = [tensor["value_bytes"] + tensor["scale_bytes"] for tensor in reports]
    errors = [tensor["relative_rms_error"] for tensor in reports]
    largest = max((error for error in errors if error), default=1.0)
    rows = []
    for tensor, size, error in zip(reports, stored, errors, strict=True):
        decibels = "–" if error is None else "exact" if error == 0 else f"{-20 * math.log10(error):.1f}"
        rows.append(
            {
                "cells": [tensor["name"], tensor["format"], f"{tensor['elements']:,}", f"{size:,}"],
                "share": 100 * size / max(stored),
                "percent": f"{100 * size / sum(stored):.1f} %",
                "error": 100 * (error or 0.0) / largest,
                "error_cells": [_number(error, ".2e"), decibels],
            }
        )
    return {"rows": rows, "total": sum(stored)}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _by_run(caption: str, views: Sequence[View], values: Callable[[View], dict[str, Any]]) -> Table:
    found = [values(view) for view in views]
    keys = dict.fromkeys(key for each in found for key in each)
    rows = [[key, *(_text(each.get(key, "–")) for each in found)] for key in keys]
    return Table(caption, ["field", *(view.name for view in views)], rows)


def _changed(views: Sequence[View]) -> Table:
    """Fields in which the runs differ; of one run those that differ from its recipe, or from the defaults."""
    several = len(views) > 1
    fields = _by_run("", views, lambda v: flatten(to_dict(as_configured(v.run, MEASURED if several else CHOSEN))))
    if several:
        rows = [row for row in fields.rows if len(set(row[1:])) > 1]
        return Table("Fields in which the runs differ", fields.head, rows)
    recipe = recipes.RECIPES.get(recipe_name(views[0].run.env) or "")
    name = f"recipe {recipe.name}" if recipe else "defaults"
    start = flatten(to_dict(start_config(views[0].run.env)))
    rows = [[key, _text(start[key]), value] for key, value in fields.rows if value != _text(start[key])]
    return Table(f"Fields that are not those of the {name}", ["field", name, views[0].name], rows)


# Comparison


def _comparisons(views: Sequence[View]) -> list[dict[str, Any]]:
    """The first configuration, with all its seeds, against each of the others: what `golfgpt compare` prints."""
    sides: dict[str, list[View]] = {}
    for view in views:
        if view.score:
            values = flatten(to_dict(view.run.config)).items()
            kept = {name: value for name, value in values if not f"{name}:".startswith(NO_EFFECT)}
            sides.setdefault(str(kept), []).append(view)
    first, *others = sides.values() or [[]]
    found = []
    for other in others:
        names = [", ".join(view.name for view in side) for side in (first, other)]
        title = f"A: {names[0]}; B: {names[1]}"
        try:
            result = compare([view.run for view in first], [view.run for view in other])
        except InputError as error:  # such as scores of different texts
            found.append({"title": title, "table": None, "lines": [f"no comparison: {error}"]})
            continue
        rows = [[str(cell) for cell in row] for row in (*result.a.rows("A"), *result.b.rows("B"))]
        head = ["side", "run", "seed", "bits per byte", "nats per token", "steps"]
        lines = str(result).split("\n")[1 + len(rows) :]  # below its own table
        found.append({"title": title, "table": Table(title, head, rows), "lines": [line for line in lines if line]})
    return found


# Figures


def _figures(views: Sequence[View]) -> list[dict[str, str]]:
    trained = [view for view in views if view.steps]
    if not trained:
        return []
    in_bytes = all(view.steps[0].get("bpb_ema") is not None for view in trained)
    unit = "bits per byte" if in_bytes else "nats per token"
    mean, scored = ("bpb_ema", "val_bpb") if in_bytes else ("loss_ema", "val_loss")

    def series(x: str, y: str, scores: bool = False) -> list[Series]:
        out = []
        for view in trained:
            points = [(row[x], row[scored]) for row in view.validations] if scores else []
            end = (view.steps[-1][x], view.score[scored]) if scores and view.score else None
            out.append(Series(view.colour, [r[x] for r in view.steps], [r[y] for r in view.steps], points, end))
        return out

    loss = "Running mean of the training loss; circles are validations, the diamond is the score of model.golf."
    draw = partial(curves, y=unit)
    found = [
        ("Loss by step", loss, draw(series("step", mean, True), "Loss by step", "step")),
        ("Loss by time", loss, draw(series("train_seconds", mean, True), "Loss by time", "seconds of training")),
    ]
    times = [Series(v.colour, (), [1000 * row["step_seconds"] for row in _timed(v)]) for v in trained if _timed(v)]
    if times:
        figure = distribution(times, "Step times", "milliseconds per step")
        found.append(("Step times", "The last bin also has the slowest 1 % of the steps.", figure))
    rate = curves(series("step", "lr_multiplier"), "Learning rate", "step", "of its base", spikes=True)
    norm = curves(series("step", "grad_norm"), "Gradient norm", "step", "before clipping", spikes=True)
    found += [("Learning rate", "", rate), ("Gradient norm", "The largest of each stretch of steps.", norm)]
    return [{"title": title, "caption": caption, "svg": svg} for title, caption, svg in found]
