"""Parses the arguments of a command with tyro, and rewrites its help as paragraphs and each of its errors as one
sentence that comes last."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import re
import shlex
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import docstring_parser
import tyro
from tyro.conf import Positional

from golfgpt import recipes
from golfgpt.config import RunConfig
from golfgpt.errors import InputError, UsageError


def option(argv: list[str], flag: str) -> str | None:
    """The last value of `flag` in argv. The defaults that tyro shows depend on some, before it parses."""
    for i in reversed(range(len(argv))):
        if argv[i].startswith(flag + "="):
            return argv[i].removeprefix(flag + "=")
        if argv[i] == flag and i + 1 < len(argv):
            return argv[i + 1]
    return None


def parse(cls: type, name: str, argv: list[str], default: Any) -> Any:
    """The arguments `cls` of `golfgpt name argv`; what argv lacks comes from `default`. Exits with 0 after --help.

    Raises UsageError for an option that is unknown or missing, InputError for a value that does not fit. Both follow
    two lines about the option on standard error.
    """
    _describe(cls)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, prog=f"golfgpt {name}", args=argv, default=default)
    except ValueError as error:  # fields that are valid alone but not together
        raise InputError(str(error)) from error
    except SystemExit as stop:
        if not stop.code:
            raise
        _reject(cls, name, argv, box.getvalue())


@functools.cache
def _describe(cls: type) -> None:
    """Give tyro the docstrings of all fields as paragraphs: it would keep the line breaks of the source."""
    texts = {param.arg_name: param.description for param in docstring_parser.parse_from_object(cls).params}
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if text := texts.get(field.name):
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(text.split())})
        if is_dataclass(hints[field.name]):
            _describe(hints[field.name])


_KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}


_ELSEWHERE = {
    "batch-size": ("data.batch-tokens",),
    "config": ("recipe",),
    "data-dir": ("data.path",),
    "epochs": ("schedule.max-seconds",),
    "learning-rate": ("optim.matrix-lr",),
    "n": ("name",),
    "out": ("name", "out"),
    "out-dir": ("name", "out"),
    "output": ("name", "out"),
    "output-dir": ("name", "out"),
    "runtime.compile": ("eval.compile",),
}
"""What other trainers call the options of ours that have no word in common with theirs; and what is another option
elsewhere."""


def _flags(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each option, without dashes, and its description."""
    for field in fields(cls):
        kind, name = typing.get_type_hints(cls)[field.name], field.name.replace("_", "-")
        if is_dataclass(kind):
            yield from _flags(kind, "" if name == "config" else f"{prefix}{name}.")
        else:
            yield prefix + name, field.metadata.get("help", "")


def _meant(cls: type, word: str) -> str | None:
    """The option that ends in `word`, or whose section it is: one of the "most used" first, then that of the fewest
    words, then the first."""
    used, flags = cls.__doc__ or "", [flag for flag, _ in _flags(cls)]
    if same := [flag for flag in _ELSEWHERE.get(word, ()) if flag in flags]:
        return same[0]
    ends = [flag for flag in flags if f".{flag}".endswith((f".{word}", f"-{word}"))]
    ends += [flag for flag in flags if flag.startswith(f"{word}.") and f"--{flag} " in used]
    section, _, leaf = word.rpartition(".")
    ends += [flag for flag in flags if section and flag.startswith(f"{section}.") and flag.endswith(f"-{leaf}")]
    return min(ends, key=lambda flag: (f"--{flag} " not in used, len(re.split("[.-]", flag))), default=None)


def _unknown(cls: type, argv: list[str]) -> str | None:
    """The first option in `argv` that the command does not have."""
    names = {name for flag, _ in _flags(cls) for name in (flag, ".no-".join(flag.rsplit(".", 1)), f"no-{flag}")}
    options = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return next((word for word in options if word[2:].replace("_", "-") not in names), None)


def _positional(cls: type) -> dict[str, Any]:
    """The fields that are given without an option, and their types."""
    (mark,) = typing.get_args(Positional[int])[1:]
    hints = typing.get_type_hints(cls, include_extras=True).items()
    return {name: typing.get_args(hint)[0] for name, hint in hints if mark in typing.get_args(hint)}


def _takes_many(cls: type) -> bool:
    """Whether the command has any number of arguments without an option."""
    return any(typing.get_origin(kind) is tuple for kind in _positional(cls).values())


def _placed(cls: type, word: str) -> str | None:
    """The option and its value, for a `word` that came without its option."""
    flag = "recipe" if word in recipes.RECIPES else "data.path" if Path(word).exists() else None
    flag = "resume" if Path(word, "config.json").exists() else flag
    return f"--{flag} {shlex.quote(word)}" if flag in dict(_flags(cls)) else None


def _missing(box: str) -> list[list[str]]:
    """The required options that tyro's message `box` names, each with the lines of its description, which are indented
    further."""
    found: list[list[str]] = []
    for line in box.splitlines():
        row = line.replace("│", " ").rstrip()  # tyro draws with spaces where there is no Unicode
        indent = len(row) - len(row.lstrip())
        if found and not row.strip(" ─-"):
            break
        if indent == 6:
            found.append([row.strip().rpartition(", ")[2]])
        elif indent > 6:
            found[-1].append(row.strip())
    return found


def _reject(cls: type, name: str, argv: list[str], box: str) -> NoReturn:
    """Raise the error in tyro's message `box`: the message, a line, and below it the options that it concerns. An
    unknown option in `argv` comes before one that is missing."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)
    rows = [line.strip("│╰╯ ") for line in box.splitlines()[1:]]  # without the title
    parts = [
        [*part] for rule, part in itertools.groupby(filter(None, rows), lambda row: not row.strip("─-")) if not rule
    ]
    message, about = " ".join(parts[0]) if parts else box, parts[1][1:] if len(parts) > 2 else []
    missing: list[list[str]] = []
    if re.match(r"Missing from|Missing value for argument '[^-]", message) and (unknown := _unknown(cls, argv)):
        message, about = f"Unrecognized options: {unknown}", []
    flag, _, kinds = about[0].partition(" ") if about else ("", "", "")
    error: type[InputError | UsageError] = InputError
    if found := re.match(r"Unrecognized options: (-?)([^,]+)", message):
        error = UsageError
        message = f"unknown option -{found[2]}" if found[1] else f"unexpected argument {found[2]}"
        if found[1] and about and parts[1][0] not in ("Perhaps you meant:", f"Arguments similar to -{found[2]}:"):
            flag, about = "", []  # which are about another unknown option
        if not found[1]:
            flag = _placed(cls, found[2]) or flag
            if not flag and _takes_many(cls):
                message += "; the files or runs to work on come before the options"
            elif not flag and Path(found[2], "config.json").exists():
                message += f"; golfgpt {name} takes {'two runs' if name == 'runs diff' else 'one run at a time'}"
        elif (word := found[2].lstrip("-").partition("=")[0]) in {*dict(_flags(RunConfig)), "recipe", "resume"}:
            of = "train and golfgpt eval" if word.startswith("eval.") else "train"
            about, message = [], f"--{word} is for golfgpt {of}; golfgpt {name} does not take it"
            flag = next((f"--{own}" for own in _ELSEWHERE.get(word, ()) if own in dict(_flags(cls))), "")
        elif (meant := _meant(cls, word)) and flag != f"--{meant}":
            flag, about = f"--{meant}", [f"--{meant}", dict(_flags(cls))[meant]]
        elif not flag:
            options = [own for own, _ in _flags(cls) if own not in _positional(cls)]
            flag = next((f"--{own}" for own in difflib.get_close_matches(word, options, 1, 0.75)), "")
        message += f"; did you mean {flag}?" if flag else ""
    elif message.startswith("Missing from"):
        missing = _missing(box)
        *first, last = (words[0] for words in missing)
        names = f"{', '.join(first)} and {last}" if first else last
        error, message = UsageError, f"expected {names}, got none"
    elif found := re.match(r"Missing value for argument [('\"]+(.+?)['\",)]", message):
        error, message = UsageError, f"{found[1]} has no value"
        if not found[1].startswith("-"):
            missing = [[found[1].upper(), dict(_flags(cls)).get(found[1], "")]]
            message = f"expected {missing[0][0]}, got none"
    elif found := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*?),?\)", message):
        message = f"{found[2]} got {found[1]}; expected one of {found[3]}".replace("'", "")
    elif flag and (found := re.search(r"(?<=\[)'.*?'(?=\])|'.*?'", message)):
        words = [_KINDS.get(kind, kind) for kind in reversed(re.findall(r"[^\[\]. |]+", kinds))]
        message = f"{flag} got {found[0]}; expected {' or '.join(dict.fromkeys(words))}".replace("'", "")
    else:
        message = re.sub(r"^Error parsing \S+: ", "", message)
    end = next((i for i, row in enumerate(about) if i and row.startswith("-")), len(about))
    shown = [f"{first}: {' '.join(words)}" for first, *words in ([about[:end]] if about else missing)]
    for line in (f"golfgpt {name} --help lists all options", *shown):
        print(textwrap.shorten(line, 160, placeholder=" …"), file=sys.stderr)
    raise error(message)
