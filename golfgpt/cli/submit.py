"""`golfgpt submit pack` and `submit check`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from golfgpt.cli.common import print_json
from golfgpt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SubmitPack:
    """Write the folder of a submission: a train_gpt.py that works without golfgpt, artifact, logs, submission.json."""

    runs: Positional[tuple[Path, ...]]
    """Run folders: the seeds of one configuration, at least three for a record."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """The folder to write."""
    author: str
    """Your name."""
    github_id: str
    """Your GitHub user name."""
    name: str
    """Title of the submission."""
    blurb: str = ""
    """What it does, in a few sentences."""
    track: str = "track_non_record_16mb"
    """Use track_10min_16mb for a record (600 s on 8 H100)."""
    kernels: bool = False
    """Include the Triton kernels that the best run used (runtime.kernels); without, the program has PyTorch's ops."""
    overwrite: bool = False
    """Replace an earlier submission in --out."""
    json: bool = False
    """Print submission.json and the notes."""


def pack(args: SubmitPack) -> int:
    from golfgpt.submit.folder import PROGRAM, About, pack

    about = About(
        author=args.author, github_id=args.github_id, name=args.name, blurb=args.blurb, track=args.track
    )  # fmt: skip
    packed = pack(args.runs, args.out, about, kernels=args.kernels, overwrite=args.overwrite)
    s = packed.submission
    if args.json:
        print_json({"folder": str(args.out), "submission": s, "notes": packed.notes})
        return 0
    code, total = s["bytes_code"], s["bytes_total"]
    for note in packed.notes:
        print(f"note: {note}")
    print(f"{PROGRAM} {code:,} bytes, from {packed.readable_bytes:,} of readable source")
    if packed.counted_bytes not in (None, code):
        without = "without kernels and " if args.kernels else ""
        print(
            f"  (the run counted {packed.counted_bytes:,} {without}before it chose dtype, compilation and attention; "
            "this file has what it chose, and its seed)"
        )
    print(f"{total:,} bytes = code {code:,} + largest artifact {total - code:,}; {packed.cap - total:,} below the cap")
    print(f"{s['score']} {s['val_bpb']:.6f}, mean of {len(s['seeds'])}; artifact of seed {s['artifact_seed']}")
    print(f"{args.out}    next: golfgpt submit check {shlex.quote(str(args.out))}")
    return 0


@dataclass(frozen=True, kw_only=True)
class SubmitCheck:
    """Check the folder of a submission by reading it; nothing in it is executed without --run. Exit code 6 if a check
    fails."""

    folder: Positional[Path]
    """A folder with README.md, submission.json, train_gpt.py and logs."""
    cap: int = 16_000_000
    """Largest size of code and artifact together, in bytes."""
    run: bool = False
    """Run the folder's train_gpt.py WITH YOUR RIGHTS, in a copy and without network: a few steps, then the score of the
    artifact. Only for code that you would run anyway."""
    data: Path | None = None
    """The data folder for --run."""
    steps: int = 3
    """Steps that --run trains."""
    json: bool = False
    """Print the findings as JSON; everything else goes to standard error."""


def check(args: SubmitCheck) -> int:
    from golfgpt.submit.check import check, failures
    from golfgpt.tables import table

    if args.run and args.data is None:
        raise InputError(
            "--run trains and scores, and got no data: --data DIR, the folder that the runs were scored on"
        )
    findings = check(args.folder, cap=args.cap)
    if args.run:
        from golfgpt.submit.isolated import run

        print(f"running {args.folder}/train_gpt.py with your rights", file=sys.stderr, flush=True)
        findings += run(args.folder, args.data, steps=args.steps)
    failed = list(failures(findings))
    if args.json:
        print_json({"folder": str(args.folder), "ok": not failed, "findings": [f._asdict() for f in findings]})
    else:
        print(table(("check", "result", "detail"), findings))
        open_ = sum(finding.result == "not checked" for finding in findings)
        rest = f", {open_} not checked" if open_ else ""
        print(f"{len(failed)} of {len(findings)} checks failed{rest}" if failed else f"no check failed{rest}")
        if open_:
            print(
                "not checked: reading cannot decide these, so a reviewer must; that is no fault of the folder "
                "(docs/submission.md, golfgpt submit check)"
            )
    return 6 if failed else 0
