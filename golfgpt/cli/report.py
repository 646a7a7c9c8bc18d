"""`golfgpt report` and `watch`: a page about runs, and a run as it trains."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from golfgpt.cli.common import print_json
from golfgpt.errors import InputError
from golfgpt.files import write_bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about runs: scores and how they were checked, curves, bytes, configuration."""

    runs: Positional[tuple[Path, ...]]
    """Run folders. A run without a score is shown as far as it has been trained."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """The .html file to write; an existing one is replaced."""
    json: bool = False
    """Print the file, its bytes and what the runs lack as JSON."""


def report(args: Report) -> int:
    from golfgpt.report.page import render

    if args.out.suffix not in (".html", ".htm"):
        raise InputError(f"--out is {args.out}; expected a name that ends in .html, for a page replaces what is there")
    page, missing = render(args.runs)
    data = page.encode()
    write_bytes(args.out, data)
    if args.json:
        print_json({"file": str(args.out), "bytes": len(data), "missing": missing})
    else:
        for text in missing:
            print(f"missing: {text}")
        print(f"{args.out}: {len(data):,} bytes, {len(args.runs)} run{'s' if len(args.runs) > 1 else ''}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Follow a run that another process trains: loss, speed, time left, forecast size. Ends with the run, or at
    Ctrl-C."""

    run: Positional[Path]
    """Run folder."""
    once: bool = False
    """Show the state once and exit."""
    json: bool = False
    """Print the state as JSON when it ends; everything else goes to standard error."""


def watch(args: Watch) -> int:
    from golfgpt.watch import watch

    facts = watch(args.run, once=args.once, out=sys.stderr if args.json else sys.stdout)
    if args.json:
        print_json(facts)
    return 0
