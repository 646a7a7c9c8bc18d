"""`golfgpt recipes` and `doctor`."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from tyro.conf import Positional

from golfgpt import recipes
from golfgpt.cli.common import print_json
from golfgpt.config import to_dict
from golfgpt.errors import InputError

SOURCE = "PR #N is a pull request of github.com/openai/parameter-golf; a date is that of a record there."


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes, or show one with its complete configuration."""

    action: Positional[Literal["list", "show"]] = "list"
    name: Positional[str | None] = None
    """Recipe to show."""
    json: bool = False
    """Print the recipes as JSON."""


def show_recipes(args: Recipes) -> int:
    if args.action == "list" and args.name is not None:
        raise InputError(
            f"golfgpt recipes list expected no name, got {args.name}; to show it: golfgpt recipes show {args.name}"
        )
    if args.action == "show":
        if args.name is None:
            raise InputError(f"golfgpt recipes show got no name; expected one of {', '.join(recipes.RECIPES)}")
        recipe = recipes.get(args.name)
        if args.json:
            facts = {"name": recipe.name, "summary": recipe.summary, "notes": recipe.notes}
            print_json(facts | {"config": to_dict(recipe.config)})
        else:
            fill = partial(textwrap.fill, width=100, break_on_hyphens=False)
            print(fill(f"{recipe.name}: {recipe.summary}"))
            for note in recipe.notes:
                print(fill(note, initial_indent="- ", subsequent_indent="  "))
            print(f"\n{SOURCE}\n\n{json.dumps(to_dict(recipe.config), indent=2)}")
    elif args.json:
        print_json({name: recipe.summary for name, recipe in recipes.RECIPES.items()})
    else:
        for name, recipe in recipes.RECIPES.items():
            print(
                textwrap.fill(f"{name:<18} {recipe.summary}", 110, subsequent_indent=" " * 19, break_on_hyphens=False)
            )
        print(
            f"\n{SOURCE}\ngolfgpt recipes show NAME explains one; golfgpt train --recipe NAME --data.path DIR trains it"
        )
    return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine in a minute: GPUs, links, disk, versions, kernels, speed. The lines below the table say what
    is wrong and what to do. The exit code is 3 if a run could not work."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Like runtime.device of a run; cuda requires a GPU."""
    processes: int | None = None
    """Local processes for the all-reduce check, on GPUs if there are enough, else on the CPU; None: one per GPU."""
    tune: bool = False
    """Also check and time the kernels (50 seconds more) and store what impl="auto" reads on this machine."""
    json: bool = False
    """Print the rows as JSON."""


def doctor(args: Doctor) -> int:
    from golfgpt.doctor import diagnose, exit_code, text

    say = sys.stderr if args.json else sys.stdout

    def progress(name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name} …", end="", file=sys.stderr, flush=True)

    rows = diagnose(
        args.device,
        processes=args.processes,
        retune=args.tune,
        say=lambda line: print(line, file=say, flush=True),
        progress=progress,
    )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if args.json:
        print_json({"rows": [asdict(row) for row in rows], "exit_code": exit_code(rows)})
    else:
        print(text(rows))
    return exit_code(rows)
