"""From text files to a data folder: read, train a tokenizer or take a given one, encode in processes, split, write.

    inputs -> documents -> mixed -> batches of about 1 MB -> workers: encode, count bytes, check, split by hash
           -> in that order -> shards, sidecars -> manifest -> rename the folder into place

Training reads the shards front to back, so the order of the documents matters: files in the order of their
names put similar text together, and a short run would see only the first of them. Documents are therefore
mixed, by their hash, inside stretches of 64 MB; val keeps its order.

Memory is bounded: one stretch, two batches per worker and one shard per split (200 MB at the default size).
The result does not depend on the number of workers. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import multiprocessing
import os
import shutil
import socket
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golfgpt import __version__
from golfgpt.bpb import ByteCounts
from golfgpt.data import caseops
from golfgpt.data.demo_text import demo_text
from golfgpt.data.documents import (
    LEAST_DOCUMENT_BYTES,
    Advance,
    PathLike,
    document_hash,
    find_inputs,
    read_documents,
    same_content,
    split_text,
)
from golfgpt.data.manifest import MANIFEST, Manifest, ShardFile, Split
from golfgpt.data.shards import TOKENIZER, Progress, write_shard
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer
from golfgpt.errors import InputError, VerificationError
from golfgpt.files import sha256_file, write_bytes, write_json

VAL_FRACTION = 0.05
"""Fraction of the documents that go to val when val has no inputs of its own."""
MAX_SHARDS = 10_000
"""Of a split. Published data have 80 or 195 of 100 million tokens; training maps each shard."""
_MIX_CHARS = 64_000_000
_BATCH_BYTES = 1 << 20
_BYTES_PER_WORKER = 2_000_000  # of input; starting a process costs as much as encoding about 1 MB


# 1 Order and batches


def val_limit(documents: Iterable[str], fraction: float) -> bytes:
    """The limit of hashes below which documents go to val. Normally `fraction` of all hashes; moved where a short text
    would leave val or train empty, so that each has a document. Reads until both have one. Raises InputError for a
    single document.
    """
    limit = min(round(fraction * 2**64), 2**64 - 1).to_bytes(8, "big")
    least, largest = b"\xff" * 9, b""
    for text in documents:
        digest = document_hash(text.encode())
        least, largest = min(least, digest), max(largest, digest)
        if least < limit <= largest:
            return limit
    if least == largest:
        raise InputError(
            "all of the text is one document, and validation needs another one: give more text (a .txt is cut at blank "
            f"lines, or at --document-separator, into documents of at least {LEAST_DOCUMENT_BYTES:,} bytes), or name "
            "text for it with --val"
        )
    return largest if largest < limit else (int.from_bytes(least, "big") + 1).to_bytes(8, "big")


def mix(documents: Iterable[str], val_below: bytes | None, chars: int = _MIX_CHARS) -> Iterator[str]:
    """Train documents sorted by hash inside stretches of about `chars` characters: deterministic and unrelated
    to the order of the input. Documents that go to val (hash below `val_below`) keep their order."""
    stretch: list[tuple[bytes, str]] = []
    size = 0
    for text in documents:
        digest = document_hash(text.encode())
        if val_below is not None and digest < val_below:
            yield text
            continue
        stretch.append((digest, text))
        size += len(text)
        if size >= chars:
            yield from (text for _, text in sorted(stretch))
            stretch, size = [], 0
    yield from (text for _, text in sorted(stretch))


def _batches(split: str | None, documents: Iterable[str]) -> Iterator[tuple[str | None, list[str]]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield split, batch
            batch, size = [], 0
    if batch:
        yield split, batch


# 2 Workers


@dataclass(frozen=True)
class _Encoded:
    """Documents of one split: their ids and the byte counts of these (uint16), and their totals as in `Split`."""

    split: str
    ids: np.ndarray
    counts: np.ndarray
    published: np.ndarray | None
    """Byte counts as published CaseOps sidecars have them (uint16), for val of a given CaseOps tokenizer."""
    hashes: list[bytes]
    totals: dict[str, int]


class _Encoder:
    """Encodes batches of documents; each worker process holds one."""

    def __init__(self, model_bytes: bytes, val_below: bytes | None, must_round_trip: bool):
        self._tokenizer = Tokenizer.from_bytes(model_bytes)
        self._table = ByteCounts(self._tokenizer)
        self._val_below, self._must_round_trip = val_below, must_round_trip

    def encode(self, batch: tuple[str | None, list[str]]) -> list[_Encoded]:
        """`batch`: split and documents; split None lets the hash of each document decide."""
        split, texts = batch
        out: dict[str, list[tuple[bytes, bytes, list[int]]]] = {}
        for text in texts:
            raw = text.encode()
            digest = document_hash(raw)
            name = split or ("val" if digest < self._val_below else "train")
            out.setdefault(name, []).append((digest, raw, self._tokenizer.encode(text)))
        return [self._pack(name, documents) for name, documents in out.items()]

    def _pack(self, split: str, documents: list[tuple[bytes, bytes, list[int]]]) -> _Encoded:
        tokenizer, bos_id = self._tokenizer, self._tokenizer.bos_id
        changed = 0
        for _, raw, ids in documents:
            decoded = b"".join(map(tokenizer.pieces.__getitem__, ids))
            if tokenizer.strips_leading_space and decoded[:1] == b" " and not tokenizer.is_byte(ids[0]):
                decoded = decoded[1:]
            if tokenizer.case_ops:
                decoded = caseops.decode(decoded.decode(), strict=self._must_round_trip).encode()
            changed += decoded != raw
            if self._must_round_trip and decoded != raw:
                at = next((i for i, (a, b) in enumerate(zip(decoded, raw, strict=False)) if a != b), 0)
                raise VerificationError(
                    f"the trained tokenizer changes a document at byte {at}: {raw[at : at + 40]!r} becomes "
                    f"{decoded[at : at + 40]!r}; this is a bug of golfgpt"
                )
        packed = array("H")  # four times as fast as numpy for lists of Python integers
        for _, _, ids in documents:
            packed.append(bos_id)
            packed.extend(array("H", ids))
        stream = np.frombuffer(packed, dtype=np.uint16)
        counts = self._table.count_stream(stream)
        published = None
        if split == "val" and tokenizer.counts_original_bytes and not self._must_round_trip:
            originals = [[0, *tokenizer.original_bytes(raw.decode())] for _, raw, _ in documents]
            published = np.concatenate(originals)
            if published.max() > 0xFFFF:
                raise InputError(
                    f"the tokenizer makes one piece of {published.max()} bytes of a val document; sidecars count to "
                    "65535: shorten its runs of white space, or use a tokenizer that keeps them"
                )
            published = published.astype(np.uint16)
        return _Encoded(
            split=split,
            ids=stream,
            counts=counts,
            published=published,
            hashes=[digest for digest, _, _ in documents],
            totals={
                "documents": len(documents),
                "raw_bytes": sum(len(raw) for _, raw, _ in documents),
                "decoded_bytes": int(counts.sum()),
                "changed_documents": changed,
            },
        )


_encoder: _Encoder | None = None


def _start_worker(*args) -> None:
    global _encoder
    _encoder = _Encoder(*args)


def _work(batch: tuple[str | None, list[str]]) -> list[_Encoded]:
    return _encoder.encode(batch)


def _map_in_order(batches: Iterable, workers: int, encoder_args: tuple) -> Iterator[list[_Encoded]]:
    """`_Encoder.encode` of each batch, in order; at most two batches per worker are in flight."""
    if workers == 1:
        yield from map(_Encoder(*encoder_args).encode, batches)
        return
    # Spawned, because a fork of a process in which torch started threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, encoder_args)
    try:
        in_flight: deque = deque()
        for batch in batches:
            in_flight.append(pool.submit(_work, batch))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died: too little memory, or prepare() was called from a script without "
            '`if __name__ == "__main__":`; free memory, add that line, or use workers=1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# 3 Writing


class _SplitWriter:
    """Collects the documents of one split and writes full shards; val shards have sidecars, and published ones where
    there are counts for them."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._ids, self._counts, self._published = bytearray(), bytearray(), bytearray()  # uint16, not written yet
        self._shards: list[ShardFile] = []
        self.published: list[ShardFile] = []
        self.totals = Counter(documents=0, raw_bytes=0, decoded_bytes=0, changed_documents=0)

    def add(self, part: _Encoded) -> None:
        self.totals.update(part.totals)
        self._ids += part.ids.tobytes()
        if self._split == "val":
            self._counts += part.counts.astype("<u2").tobytes()
        if part.published is not None:
            self._published += part.published.tobytes()
        while len(self._ids) >= 2 * self._shard_tokens:
            self._flush(self._shard_tokens)

    def _flush(self, tokens: int) -> None:
        if len(self._shards) == MAX_SHARDS:
            raise InputError(
                f"shards of {self._shard_tokens:,} tokens would be more than {MAX_SHARDS:,} files of {self._split}: "
                "leave --shard-tokens out, or give more"
            )
        path = self._folder / f"golf_{self._split}_{len(self._shards):06d}.bin"
        sidecar = path.with_suffix(".bytes")
        write_shard(path, np.frombuffer(self._ids, np.uint16, tokens))
        del self._ids[: 2 * tokens]
        if self._split == "val":
            write_bytes(sidecar, np.frombuffer(self._counts, np.uint8, 2 * tokens).data)
            del self._counts[: 2 * tokens]
        self._shards.append(
            ShardFile(
                file=path.name,
                tokens=tokens,
                sha256=sha256_file(path),
                sidecar_sha256=sha256_file(sidecar) if self._split == "val" else None,
            )
        )
        if self._published:
            path = self._folder / f"golf_val_bytes_{len(self.published):06d}.bin"
            write_shard(path, np.frombuffer(self._published, np.uint16, tokens))
            del self._published[: 2 * tokens]
            self.published.append(ShardFile(file=path.name, tokens=tokens, sha256=sha256_file(path)))

    def finish(self, inputs: Sequence[str]) -> Split:
        if self._ids:
            self._flush(len(self._ids) // 2)
        tokens = sum(shard.tokens for shard in self._shards)
        return Split(inputs=tuple(inputs), tokens=tokens, shards=tuple(self._shards), **self.totals)


@contextlib.contextmanager
def _staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place on success and vanishes on failure; after a kill, when this is called
    again. Between two renames the old data have another name; the next call puts back what a kill left there."""
    mine = f".{out.name}.golfgpt"
    replaced = out.with_name(f"{mine}.old")
    if (out / MANIFEST).exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists() and not out.exists():
        replaced.rename(out)
    here = f"{mine}.{socket.gethostname()}"  # on a shared disk, other machines may be at work
    for left in out.parent.glob(f"{glob.escape(here)}.*"):
        pid = left.name.removeprefix(f"{here}.")
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    old = out.is_dir() and any(out.iterdir())
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder to write to")
    if old and not (out / MANIFEST).exists():
        raise InputError(f"{out} holds files, but no {MANIFEST}, so it is not replaced; name another folder")
    if old and not overwrite:
        raise InputError(
            f"{out} is not empty: it holds data that were prepared before; name another folder, or replace it with "
            "--overwrite"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{here}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if old:
            out.rename(replaced)
            try:
                folder.rename(out)
            except BaseException:
                replaced.rename(out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            folder.rename(out)  # also onto an empty folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether a process of this machine has the number `pid`, which may be that of one that made a staging folder."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


# 4 The whole


def prepare(
    inputs: Sequence[PathLike] | None,
    out: PathLike,
    *,
    vocab_size: int = 1024,
    tokenizer: PathLike | Tokenizer | None = None,
    case_ops: bool = False,
    val: Sequence[PathLike] | None = None,
    val_fraction: float | None = None,
    separator: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Make the data folder `out` from `inputs` (see `read_documents`); None: the embedded corpus (`demo`).

    A tokenizer of `vocab_size` pieces is trained on the train inputs, unless `tokenizer` is given, which may
    be lossy. `case_ops` trains it on CaseOps text (`golfgpt.data.caseops`); a given one must then have the pieces of
    CaseOps, and one that has them is used so in any case. Val is `val`, inputs of its own, or `val_fraction` of the
    documents (default 0.05; at least one), chosen by document hash, so that identical documents fall on the same side.
    `progress(stage, done, total)` counts bytes of input files; `say` gets a line about inputs that name a file again
    and about files with the same bytes.

    Raises InputError for bad input, a single document without `val`, or documents that are in both `inputs` and `val`;
    VerificationError if a document does not survive a tokenizer that was trained here.
    """
    progress = progress or (lambda stage, done, total: None)
    if val is not None and val_fraction is not None:
        raise InputError("val inputs and a val fraction exclude each other; give one")
    fraction = VAL_FRACTION if val_fraction is None else val_fraction
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction is {fraction}; expected a number between 0 and 1")
    if not 1 <= shard_tokens < 1 << 31:
        raise InputError(f"shard_tokens {shard_tokens}, expected 1..2^31-1")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}, expected at least 1")
    train_source = _Source(inputs, separator, say)
    val_source = None if val is None else _Source(val, separator, say)
    if val_source and (both := train_source.files & val_source.files):
        raise InputError(f"{min(both)} is an input of both train and val; remove it from one")
    total = train_source.bytes + (val_source.bytes if val_source else 0)
    workers = workers or max(1, min(_cpus(), total // _BYTES_PER_WORKER))
    with _staging(Path(out).resolve(), overwrite) as folder:
        for source in filter(None, (train_source, val_source)):
            source.name_repeats(say)
        below = None if val_source else val_limit(train_source.documents(lambda count: None), fraction)
        must_round_trip = tokenizer is None
        if tokenizer is None:
            texts = train_source.documents(_meter(progress, "training the tokenizer", train_source.bytes))
            if below:  # nothing that is trained sees val
                texts = (text for text in texts if document_hash(text.encode()) >= below)
            tokenizer = Tokenizer.from_bytes(train_tokenizer(texts, vocab_size, case_ops=case_ops))
        elif not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_file(tokenizer)
        if case_ops and not tokenizer.case_ops:
            raise InputError(
                f"{tokenizer.name} cannot hold CaseOps text: expected U+E001 to U+E004 as pieces of their own "
                "(user_defined_symbols); leave --tokenizer out to train one, or --case-ops to keep the text as it is"
            )
        advance = _meter(progress, "encoding", total)
        batches = _batches(None if below else "train", mix(train_source.documents(advance), below))
        if val_source:
            batches = itertools.chain(_batches("val", val_source.documents(advance)), batches)
        writers = {name: _SplitWriter(folder, name, shard_tokens) for name in ("train", "val")}
        in_val: set[bytes] = set()
        shared = 0
        encoder_args = (tokenizer.model_bytes, below, must_round_trip)
        with contextlib.closing(_map_in_order(batches, workers, encoder_args)) as results:
            for part in itertools.chain.from_iterable(results):
                writers[part.split].add(part)
                if part.split == "train":
                    shared += sum(digest in in_val for digest in part.hashes)
                elif val_source:
                    in_val.update(part.hashes)
        documents = {name: writer.totals["documents"] for name, writer in writers.items()}
        if shared:
            raise InputError(
                f"{shared} of {documents['train']} train documents are also among the {documents['val']} val "
                "documents; remove them from one of the inputs, or leave --val out"
            )
        val_split = writers["val"].finish((val_source or train_source).names)
        train_split = writers["train"].finish(train_source.names)
        lossless = not (train_split.changed_documents or val_split.changed_documents)
        published = writers["val"].published
        if lossless:  # they would say what the sidecars say
            for item in published:
                (folder / item.file).unlink()
            published = []
        manifest = Manifest(
            golfgpt=__version__,
            tokenizer_sha256=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            lossless=lossless,
            val_below=below and below.hex(),
            separator=separator,
            train=train_split,
            val=val_split,
            text_codec="caseops" if tokenizer.case_ops else None,
            published_bytes=tuple(published),
        )
        write_bytes(folder / TOKENIZER, tokenizer.model_bytes)
        write_json(folder / MANIFEST, manifest.to_json())
    return manifest


class _Source:
    """Documents that can be read more than once, from files or from the embedded corpus, which is cut like a .txt."""

    def __init__(self, inputs: Sequence[PathLike] | None, separator: str | None, say: Callable[[str], None]):
        self._separator, self._files, self.files = separator, list[Path](), set[Path]()
        self._demo = demo_text() if inputs is None else None
        if self._demo:
            self.names = [self._demo.name]
            self.bytes = sum(map(len, self._demo.documents))
        else:
            self._files = find_inputs(inputs, say)
            self.files = {file.resolve() for file in self._files}
            self.names = [file.name for file in self._files]
            self.bytes = sum(file.stat().st_size for file in self._files)

    def name_repeats(self, say: Callable[[str], None]) -> None:
        """`say` gets a line about files that repeat another one."""
        if pairs := same_content(self._files):
            same = ", ".join(f"{later} is {first}" for first, later in pairs[:3]) + ", …" * (len(pairs) > 3)
            say(f"{len(pairs)} of {len(self._files)} files repeat another one, whose text counts again: {same}")

    def documents(self, advance: Advance) -> Iterator[str]:
        if not self._demo:
            yield from read_documents(self._files, self._separator, advance)
            return
        for text in self._demo.documents:
            data = text.encode()
            for start, end in split_text(data):
                yield data[start:end].decode()
            advance(len(text))


def _meter(progress: Progress, stage: str, total: int) -> Advance:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advance


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
