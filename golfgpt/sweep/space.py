"""What a sweep varies: named fields of RunConfig, their values, and the command line that trains one choice of them.

A field is named as on the command line without its dashes, `optim.matrix_lr` or `optim.matrix-lr`. Standard library
only (Python 3.10 reads TOML with tomli).
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from golfgpt.config import RunConfig, from_dict, to_dict
from golfgpt.errors import InputError
from golfgpt.files import parse_json
from golfgpt.recipes import get


@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers from low to high; whole ones if both ends are whole."""

    low: float
    high: float
    log: bool = False
    """Whether to draw the logarithm uniformly."""


Axis = tuple | Range
"""The values of one field: a tuple of choices, or a range."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sweep. Every point of the space is one trial, trained with `seeds` seeds."""

    recipe: str
    config: RunConfig
    """What all runs share. Its seed is the first seed."""
    space: dict[str, Axis]
    sampler: Literal["grid", "random", "tpe"] = "grid"
    trials: int | None = None
    """Number of points that random and tpe draw."""
    seeds: int = 1
    max_bytes: int | None = None
    """Limit of artifact and code in bytes; None: budget.artifact_bytes of the run's config."""
    max_seconds: float | None = None
    """Limit of the measured training time in seconds; None: no limit."""
    noise: float | None = None
    """Standard deviation of a score over seeds, for pruning; None: measured in the sweep."""

    def __post_init__(self) -> None:
        if not self.space:
            raise InputError(
                "the space is empty; expected a field to vary: --grid optim.matrix_lr=0.02,0.03 or [space]"
            )
        for name, axis in self.space.items():
            self._check(name, axis)
        if (self.sampler == "grid") != (self.trials is None):
            hint = "grid trains every point, so drop trials" if self.trials else "give the number of points: --trials"
            raise InputError(f"sampler {self.sampler} got trials {self.trials}; {hint}")
        for point in self.points if self.sampler == "grid" else ():
            with_values(self.config, point)
        for name, least in (("trials", 1), ("seeds", 1), ("max_bytes", 1), ("max_seconds", 0), ("noise", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} is {value}; expected at least {least}")

    def _check(self, name: str, axis: Axis) -> None:
        """Raises InputError for an axis without values, and for a field or a value that RunConfig rejects."""
        if name == "seed":
            raise InputError("seed is in the space; use seeds, the number of seeds of each point")
        if isinstance(axis, Range):
            if self.sampler == "grid":
                raise InputError(f"{name} is a range, and sampler grid expected a list; use random or tpe, or a list")
            if not axis.low < axis.high or (axis.log and axis.low <= 0):
                raise InputError(f"{name} is {asdict(axis)}; expected low < high, and low > 0 with log")
        elif not axis:
            raise InputError(f"{name} has no values, so the grid is empty; expected at least one")
        elif len(set(map(json.dumps, axis))) < len(axis):
            raise InputError(f"{name} has a value twice: {', '.join(map(json.dumps, axis))}")
        if self.sampler != "grid":  # a grid's points are checked as a whole: values may be valid only together
            for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
                with_values(self.config, {name: value}, alone=True)

    @property
    def points(self) -> list[dict[str, Any]]:
        """All points of a grid."""
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]

    def definition(self) -> dict[str, Any]:
        """What two processes on one study must agree on, as JSON has it: by dotted names."""
        fixed = changes(get(self.recipe).config, self.config)
        space = {name: asdict(axis) if isinstance(axis, Range) else axis for name, axis in self.space.items()}
        names = ("recipe", "sampler", "seeds", "max_bytes", "max_seconds")
        values = {name: getattr(self, name) for name in names}
        values |= {f"fixed.{name}": value for name, value in fixed.items()}
        values |= {f"space.{name}": axis for name, axis in space.items()}
        return json.loads(json.dumps(values))


def with_values(config: RunConfig, values: dict[str, Any], *, alone: bool = False) -> RunConfig:
    """`config` with other values of some fields. Raises InputError for an unknown field, with the closest known one,
    and for values that do not fit. `alone`: what only the whole config rejects is let pass."""
    tree = to_dict(config)
    for name, value in values.items():
        *path, leaf = name.replace("-", "_").split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(f"unknown field {name}: {part} is a field, not a section")
        node[leaf] = value
    try:
        return from_dict(RunConfig, tree)
    except ValueError as error:
        if alone and not any(str(error).startswith(start) for start in ("unknown key", *values)):
            return config
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        message = re.sub(r"^(unknown key ([^\s;]+)).*", lambda key: _meant(key[2], key[1]) or key[0], str(error))
        raise InputError(f"{message} (in {shown})") from error


def _meant(name: str, message: str) -> str | None:
    """`message` about an unknown field with the first three fields, of its section if there are any, that end in its
    last word; None if there are none."""
    section, _, leaf = name.rpartition(".")
    ends = [field for field in flat(to_dict(RunConfig())) if f".{field}".endswith((f".{leaf}", f"_{leaf}"))]
    ends = [field for field in ends if field.startswith(f"{section}.")] or ends
    return f"{message}; did you mean {' or '.join(ends[:3])}?" if ends else None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    out = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def changes(base: RunConfig, config: RunConfig) -> dict[str, Any]:
    """The fields in which `config` differs from `base`, by dotted names."""
    before = flat(to_dict(base))
    return {name: value for name, value in flat(to_dict(config)).items() if value != before[name]}


def flags(values: dict[str, Any]) -> list[str]:
    """The options of `golfgpt train` that set these fields."""
    out = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            section, dot, leaf = option[2:].rpartition(".")
            out.append(option if value else f"--{section}{dot}no-{leaf}")
        elif isinstance(value, list | tuple):
            out += [option, *map(str, value)]
        else:
            out.append(f"{option}={value}")
    return out


def parse_grid(items: Iterable[str]) -> dict[str, Axis]:
    """The space of `--grid`: each item is `section.field=value,value`, each value JSON or a plain word."""
    space = {}
    for item in items:
        name, equals, values = item.partition("=")
        if not (name and equals):
            raise InputError(f"--grid got {item!r}; expected section.field=value,value")
        space[name.replace("-", "_")] = tuple(_value(text) for text in values.split(",") if text)
    return space


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


SPEC_KEYS = ("recipe", "sampler", "trials", "seeds", "jobs", "max_bytes", "max_seconds", "noise")


@dataclass(frozen=True, kw_only=True)
class SpecFile:
    """The content of a SPEC.toml: values of SPEC_KEYS, `fixed`, the fields that all runs share, and the space."""

    values: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Axis] = field(default_factory=dict)


def read_spec(path: Path) -> SpecFile:
    """Read a SPEC.toml. Raises InputError if it is missing, not TOML, or has an unknown key."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    if (path / "study.journal").is_file():
        raise InputError(
            f"{path} is the folder of a sweep; expected a SPEC.toml, or --grid section.field=value,value: the command "
            f"that began this sweep continues it{_settings(path)}"
        )
    if not path.is_file():
        raise InputError(f"there is no {path}; expected a SPEC.toml, or --grid section.field=value,value")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    known = (*SPEC_KEYS, "fixed", "space")
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{path}: unknown key {key}{hint} (expected some of {', '.join(known)})")
    space, fixed = values.pop("space", {}), values.pop("fixed", {})
    if not (isinstance(space, dict) and isinstance(fixed, dict)):
        raise InputError(f"{path}: space and fixed expected a table each, got {space!r} and {fixed!r}")
    return SpecFile(values=values, fixed=flat(fixed), space=_axes(space, path))


def _settings(folder: Path) -> str:
    """What the journal of the sweep in `folder` says that it began with; empty if it cannot be read."""
    for line in (folder / "study.journal").read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, AttributeError):
            if found := parse_json(line, dict).get("user_attr", {}).get("golfgpt"):
                shown = [f"{name} {json.dumps(value)}" for name, value in found.items() if value is not None]
                return f" ({', '.join(words for words in shown if not words.startswith('version '))})"
    return ""


def _axes(values: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Axis]:
    out = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict) and "low" in value:
            try:
                out[name] = Range(**value)
            except TypeError as error:
                raise InputError(f"{path}: {name} is {value}; expected low, high and perhaps log") from error
        elif isinstance(value, dict):
            out |= _axes(value, path, f"{name}.")
        elif isinstance(value, list):
            out[name] = tuple(value)
        else:
            raise InputError(f"{path}: {name} is {value!r}; expected a list of values, or low and high")
    return out


def with_seed(config: RunConfig, index: int) -> RunConfig:
    """`config` with its seed number `index`: the first is its own, the next ones follow it."""
    return replace(config, seed=config.seed + index)
