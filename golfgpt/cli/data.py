"""`golfgpt data prepare`, `data download` and `data verify`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from golfgpt import recipes
from golfgpt.cli.common import print_json, progress_bars
from golfgpt.errors import InputError
from golfgpt.tables import plural, table


@dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Turn text into token shards with byte counts and a manifest."""

    inputs: Positional[tuple[str, ...]] = ()
    """Files (.txt, .jsonl, .jsonl.zst), folders of them, or globs; none: the source of Python's standard library."""
    out: Path
    """Folder to write to."""
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer to train, in tokens; None: 1024."""
    tokenizer: Path | None = None
    """Use this SentencePiece model instead of training one."""
    case_ops: bool = False
    """CaseOps: tokenize text in lower case, with operators for its capitals; decoding restores them."""
    val: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Separate input for validation; repeat the flag for each input."""
    val_fraction: float | None = None
    """Fraction of the documents used for validation if --val is not given, at least one; None: 0.05."""
    document_separator: str | None = None
    """Text between documents in .txt files, which are packed to at least 2 kB each; None: blank lines."""
    shard_tokens: int | None = None
    """Tokens in a shard; None: 100,000,000, as published. --data.order shuffled needs a shard for each span."""
    workers: int | None = None
    """Worker processes; None: one per core."""
    overwrite: bool = False
    """Replace an earlier prepared folder."""
    json: bool = False
    """Print the manifest as JSON."""


def data_prepare(args: DataPrepare) -> int:
    manifest = prepare_folder(args)
    if args.json:
        print_json(manifest.to_json())
    else:
        print(_next("small", args.out, manifest.vocab_size, manifest.val.tokens))
    return 0


def _next(recipe: str, out: Path, vocab_size: int, val_tokens: int) -> str:
    """What follows the preparation of `out`: the command that trains on it, or what it lacks for that."""
    window = recipes.get(recipe).config.window
    if val_tokens <= window:
        return (
            f"warning: val has only {plural(val_tokens, 'token')}, and recipe {recipe} scores windows of {window}: "
            "prepare more text with --overwrite, or train with a smaller --eval.window"
        )
    vocabulary = (
        "" if vocab_size == recipes.get(recipe).config.model.vocab_size else f" --model.vocab-size {vocab_size}"
    )
    return f"next: golfgpt train --recipe {recipe} --data.path {shlex.quote(str(out))}{vocabulary}"


def prepare_folder(args: DataPrepare) -> Any:
    from golfgpt.data.demo_text import demo_text
    from golfgpt.data.prepare import prepare

    say = sys.stderr if args.json else sys.stdout
    if args.vocab_size is not None and args.tokenizer is not None:
        raise InputError(
            f"--vocab-size {args.vocab_size} trains a tokenizer and --tokenizer {args.tokenizer} uses an existing one; "
            "expected one of the two options: drop the other"
        )
    if not args.inputs and (args.val or args.document_separator):
        raise InputError(
            "--val and --document-separator need inputs to train on, got none; name them first: golfgpt data prepare "
            "FILES …"
        )
    if not args.inputs:
        text = demo_text()
        skipped = ", ".join(f"{count} {reason}" for reason, count in text.skipped.items())
        print(f"corpus: {text.name}; skipped: {skipped or 'none'}", file=say)
    with progress_bars(say) as progress:
        manifest = prepare(
            args.inputs or None,
            args.out,
            vocab_size=1024 if args.vocab_size is None else args.vocab_size,
            tokenizer=args.tokenizer,
            case_ops=args.case_ops,
            val=args.val or None,
            val_fraction=args.val_fraction,
            separator=args.document_separator,
            **({} if args.shard_tokens is None else {"shard_tokens": args.shard_tokens}),
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
            say=lambda line: print(line, file=say),
        )
    splits = (("train", manifest.train), ("val", manifest.val))
    rows = [(name, s.documents, s.raw_bytes, s.tokens, round(s.decoded_bytes / s.tokens, 3)) for name, s in splits]
    print(table(("split", "documents", "bytes", "tokens", "bytes/token"), rows), file=say)
    if not manifest.lossless:
        for name, s in splits:
            print(
                f"the tokenizer changes {s.changed_documents:,} of {s.documents:,} {name} documents "
                f"({s.raw_bytes - s.decoded_bytes:,} bytes fewer): scores will refer to the normalized text",
                file=say,
            )
    print(f"{args.out}: digest {manifest.digest[:16]}", file=say)
    return manifest


@dataclass(frozen=True, kw_only=True)
class DataDownload:
    """Download the published token shards; continues an interrupted download and checks a finished one."""

    out: Path | None = None
    """Folder to write to; None: data/fineweb10B_VARIANT."""
    variant: str = "sp1024"
    """Tokenizer: sp followed by its vocabulary size."""
    train_shards: int = 80
    """Train shards to download, each 100 million tokens and 200 MB; the validation split is always whole."""
    revision: str | None = None
    """Commit, branch or tag of the dataset; None: the commit of the folder, or a pinned one for a new folder."""
    workers: int = 4
    """Files to download at the same time."""
    json: bool = False
    """Print the report as JSON."""


def data_download(args: DataDownload) -> int:
    from golfgpt.data.download import download

    out = args.out or Path("data") / f"fineweb10B_{args.variant}"
    with progress_bars(sys.stderr if args.json else sys.stdout) as progress:
        report = download(
            out,
            variant=args.variant,
            train_shards=args.train_shards,
            revision=args.revision,
            workers=args.workers,
            progress=progress,
        )
    for damaged in report.damaged:
        print(f"damaged, downloaded again: {damaged}", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print_json(asdict(report))
    else:
        print(
            f"{out}: {report.variant} of {report.repo} at {report.revision}\n"
            f"{plural(report.train_shards, 'train shard')}, {report.train_tokens:,} tokens; "
            f"{plural(report.val_shards, 'val shard')}, {report.val_tokens:,} tokens\n"
            f"downloaded {report.fetched_files} of {report.files} files, {report.fetched_bytes:,} of {report.bytes:,} "
            "bytes; the SHA-256 of every file matches the record\n"
            + _next("baseline", out, int(args.variant.removeprefix("sp")), report.val_tokens)
        )
    return 0


@dataclass(frozen=True, kw_only=True)
class DataVerify:
    """Check digests, token ids and split overlap, and count the bytes a second time in the decoded text."""

    path: Positional[Path]
    """Prepared folder."""
    json: bool = False
    """Print the report as JSON."""


def data_verify(args: DataVerify) -> int:
    from golfgpt.data.shards import verify

    with progress_bars(sys.stderr if args.json else sys.stdout) as progress:
        report = asdict(verify(args.path, progress=progress))
    if args.json:
        print_json(report)
    else:
        shown = {key: f"{v:,}" if type(v) is int else str(v) for key, v in report.items() if v is not None}
        print(table(("checked", ""), [*shown.items()]))
        but = ", but published_bytes, which the sidecar states" if "published_bytes" in shown else ""
        print(f"verified: every count was made twice, independently{but}")
    return 0
