"""From text files to a data folder: read, train or take a tokenizer, encode in processes, split, write.

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
import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import re
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import zstandard

from golfgpt.bpb import ByteCounts
from golfgpt.data.demo_text import demo_text
from golfgpt.data.shards import MANIFEST, TOKENIZER, Manifest, Progress, ShardFile, Split, write_shard
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer
from golfgpt.errors import InputError, VerificationError
from golfgpt.files import sha256_file, write_bytes, write_json

PathLike = str | os.PathLike
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
VAL_FRACTION = 0.05
"""Fraction of the documents that go to val when val has no inputs of its own."""
LEAST_DOCUMENT_BYTES = 2000
"""A .txt is cut at a separator only once the document has this many bytes."""
_MIX_CHARS = 64_000_000
_BATCH_BYTES = 1 << 20
_BYTES_PER_WORKER = 2_000_000  # of input; starting a process costs as much as encoding about 1 MB
_ZSTD_WINDOW = 1 << 27  # `zstd --long` up to 27, 128 MiB


# 1 Documents


def find_inputs(inputs: Sequence[PathLike]) -> list[Path]:
    """Files named by `inputs`: files, folders (searched below, sorted) and globs; each file once.

    Raises InputError for what is missing, of another kind, or names no file.
    """
    found: list[Path] = []
    for item in map(os.fspath, inputs):
        path = Path(item)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(item, recursive=True) if Path(name).is_file())
        if not files:
            what = "holds no" if path.is_dir() else "is neither a file nor a folder, nor a pattern of"
            raise InputError(f"input {item} {what} {', '.join(SUFFIXES)}; check the path")
        found += files
    if not found:
        raise InputError("no input is named: give files, folders or globs")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"{file}: cannot read this kind of file; inputs are {', '.join(SUFFIXES)}")
    return list({file.resolve(): file for file in found}.values())


def read_documents(
    inputs: Sequence[PathLike], separator: str | None = None, advance: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Documents of `inputs` (see `find_inputs`) in order; those without any text are left out.

    .txt is cut after `separator` (default: blank lines) wherever that leaves at least 2 kB on both sides; the
    pieces, separators included, join to the file's text. .jsonl and .jsonl.zst hold {"text": ...} a line.
    `advance` is told file bytes as they are consumed. Raises InputError naming file and place for bytes that
    are not UTF-8, bad JSON, a missing "text", lone surrogates, truncated zstd and files without text.
    """
    if separator == "":
        raise InputError("the document separator is empty; leave it out to cut at blank lines")
    for path in find_inputs(inputs):
        documents = _read_txt(path, separator, advance) if path.suffix == ".txt" else _read_jsonl(path, advance)
        empty = True
        try:
            for text in documents:
                if text:
                    empty = False
                    yield text
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if empty:
            raise InputError(f"{path} holds no text; remove it from the inputs")


def split_text(data: bytes | mmap.mmap, separator: bytes | None = None) -> Iterator[tuple[int, int]]:
    """(start, end) of the documents of `data`; they cover it without gaps."""
    pattern = rb"\n(?:[ \t\r]*\n)+" if separator is None else b"(?:" + re.escape(separator) + b")+"
    start, cut = 0, 0  # [start, cut) is ready, but kept in case that too little text follows
    for match in re.finditer(pattern, data):
        if match.end() - cut >= LEAST_DOCUMENT_BYTES:
            if cut:
                yield start, cut
            start, cut = cut, match.end()
    if cut and len(data) - cut >= LEAST_DOCUMENT_BYTES:
        yield start, cut
        start = cut
    if start < len(data):
        yield start, len(data)


def _read_txt(path: Path, separator: str | None, advance: Callable[[int], None] | None) -> Iterator[str]:
    if not path.stat().st_size:  # mmap refuses an empty file
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start, end in split_text(data, separator.encode() if separator else None):
            try:
                yield data[start:end].decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: byte {start + error.start} (0x{error.object[error.start]:02x}) is not UTF-8 "
                    f"({error.reason}); convert the file to UTF-8"
                ) from None
            if advance:
                advance(end - start)


def _read_jsonl(path: Path, advance: Callable[[int], None] | None) -> Iterator[str]:
    for number, line in enumerate(_lines(_chunks(path, advance)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8 ({error.reason}); "
                "convert the file to UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{where}: expected an object with a string "text", got {line[:80]!r}')
        if b"\\u" in line:  # UTF-8 has no surrogates, an escape may
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: a lone surrogate \\u{ord(text[error.start]):04x} is at character {error.start} of the "
                    "text; remove or replace it"
                ) from None
        yield text


def _chunks(path: Path, advance: Callable[[int], None] | None) -> Iterator[bytes]:
    """Content of a file, decompressed if it is .zst, in pieces."""
    frame = None
    with open(path, "rb") as file:
        while chunk := file.read(1 << 17):
            if advance:
                advance(len(chunk))
            if path.suffix != ".zst":
                yield chunk
                continue
            while chunk:
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise InputError(f"{path}: damaged zstd data: {error}; fetch the file again") from None
                chunk = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise InputError(f"{path}: the zstd data are cut off; fetch the file again")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts = [rest[-1]]
    yield b"".join(parts)


def document_hash(data: bytes) -> bytes:
    """8 bytes of BLAKE2b over a document's UTF-8: its place between train and val, and its identity."""
    return hashlib.blake2b(data, digest_size=8).digest()


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


# 2 Workers


@dataclass(frozen=True)
class _Encoded:
    """Documents of one split: their ids and, for val, the byte counts (uint16), and their totals."""

    split: str
    ids: np.ndarray
    counts: np.ndarray | None
    hashes: list[bytes]
    raw_bytes: int
    decoded_bytes: int
    changed_documents: int


class _Encoder:
    """Encodes batches of documents; each worker process holds one."""

    def __init__(self, model_bytes: bytes, val_below: bytes | None, must_round_trip: bool):
        self._tokenizer = Tokenizer.from_bytes(model_bytes)
        self._table = ByteCounts(self._tokenizer)
        self._val_below, self._must_round_trip = val_below, must_round_trip

    def encode(self, batch: tuple[str, list[str]]) -> list[_Encoded]:
        """`batch`: ("train" | "val" | "hash", documents); "hash" lets the hash of each document decide."""
        split, texts = batch
        out: dict[str, list[tuple[bytes, bytes, list[int]]]] = {}
        for text in texts:
            raw = text.encode()
            digest = document_hash(raw)
            name = split if split != "hash" else "val" if digest < self._val_below else "train"
            out.setdefault(name, []).append((digest, raw, self._tokenizer.encode(text)))
        return [self._pack(name, documents) for name, documents in out.items()]

    def _pack(self, split: str, documents: list[tuple[bytes, bytes, list[int]]]) -> _Encoded:
        tokenizer, bos_id = self._tokenizer, self._tokenizer.bos_id
        changed = 0
        for _, raw, ids in documents:
            decoded = b"".join(map(tokenizer.pieces.__getitem__, ids))
            if tokenizer.strips_leading_space and decoded[:1] == b" " and not tokenizer.is_byte(ids[0]):
                decoded = decoded[1:]
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
        return _Encoded(
            split=split,
            ids=stream,
            counts=counts if split == "val" else None,
            hashes=[digest for digest, _, _ in documents],
            raw_bytes=sum(len(raw) for _, raw, _ in documents),
            decoded_bytes=int(counts.sum()),
            changed_documents=changed,
        )


_encoder: _Encoder | None = None


def _start_worker(*args) -> None:
    global _encoder
    _encoder = _Encoder(*args)


def _work(batch: tuple[str, list[str]]) -> list[_Encoded]:
    return _encoder.encode(batch)


def _map_in_order(batches: Iterable, workers: int, encoder_args: tuple) -> Iterator[list[_Encoded]]:
    """`_Encoder.encode` of each batch, in order; at most two batches per worker are under way."""
    if workers == 1:
        yield from map(_Encoder(*encoder_args).encode, batches)
        return
    # Spawned, because a fork of a process in which torch started threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, encoder_args)
    try:
        under_way: deque = deque()
        for batch in batches:
            under_way.append(pool.submit(_work, batch))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died: too little memory, or prepare() was called from a script without "
            '`if __name__ == "__main__":`; free memory, add that line, or use workers=1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(split: str, documents: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
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


# 3 Writing


class _SplitWriter:
    """Collects the documents of one split and writes full shards; val shards have sidecars."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self._folder, self._split = folder, split
        self._ids = np.empty(shard_tokens, dtype="<u2")  # the system gives memory as it is filled
        self._counts = np.empty(shard_tokens, dtype="<u2") if split == "val" else None
        self._filled = 0
        self._shards: list[ShardFile] = []
        self.documents = self.raw_bytes = self.decoded_bytes = self.changed_documents = 0

    def add(self, part: _Encoded) -> None:
        self.documents += len(part.hashes)
        self.raw_bytes += part.raw_bytes
        self.decoded_bytes += part.decoded_bytes
        self.changed_documents += part.changed_documents
        done = 0
        while done < len(part.ids):
            room = min(len(self._ids) - self._filled, len(part.ids) - done)
            to, of = slice(self._filled, self._filled + room), slice(done, done + room)
            self._ids[to] = part.ids[of]
            if self._counts is not None:
                self._counts[to] = part.counts[of]
            self._filled, done = self._filled + room, done + room
            if self._filled == len(self._ids):
                self._flush()

    def _flush(self) -> None:
        path = self._folder / f"golf_{self._split}_{len(self._shards):06d}.bin"
        write_shard(path, self._ids[: self._filled])
        sidecar = None
        if self._counts is not None:
            write_bytes(path.with_suffix(".bytes"), self._counts[: self._filled].data)
            sidecar = sha256_file(path.with_suffix(".bytes"))
        self._shards.append(
            ShardFile(file=path.name, tokens=self._filled, sha256=sha256_file(path), sidecar_sha256=sidecar)
        )
        self._filled = 0

    def finish(self, inputs: Sequence[str]) -> Split:
        if self._filled:
            self._flush()
        return Split(
            inputs=tuple(inputs),
            documents=self.documents,
            tokens=sum(shard.tokens for shard in self._shards),
            raw_bytes=self.raw_bytes,
            decoded_bytes=self.decoded_bytes,
            changed_documents=self.changed_documents,
            shards=tuple(self._shards),
        )


@contextlib.contextmanager
def _staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place on success and vanishes on failure."""
    old = out.is_dir() and any(out.iterdir())
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder to write to")
    if old and not overwrite:
        raise InputError(f"{out} is not empty; name another folder, remove it, or replace it with --overwrite")
    if old and not (out / MANIFEST).exists():
        raise InputError(f"{out} holds files, but no {MANIFEST}: not made by golfgpt, so not overwritten; remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if old:
            replaced = folder.with_name(folder.name + ".old")
            out.rename(replaced)
            folder.rename(out)
            shutil.rmtree(replaced)
        else:
            folder.rename(out)  # also onto an empty folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# 4 The whole


def prepare(
    inputs: Sequence[PathLike] | None,
    out: PathLike,
    *,
    vocab_size: int = 1024,
    tokenizer: PathLike | Tokenizer | None = None,
    val: Sequence[PathLike] | None = None,
    val_fraction: float | None = None,
    separator: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Make the data folder `out` from `inputs` (see `read_documents`); None: the embedded corpus (`demo`).

    A tokenizer of `vocab_size` pieces is trained on the train inputs, unless `tokenizer` is given, which may
    be lossy. Val is `val`, inputs of its own, or `val_fraction` of the documents (default 0.05), chosen by
    document hash, so that identical documents fall on the same side. `progress(stage, done, total)` counts
    bytes of input files.

    Raises InputError for bad input, an empty split, or documents that are in both `inputs` and `val`;
    VerificationError if a document does not survive a tokenizer that was trained here.
    """
    progress = progress or (lambda stage, done, total: None)
    if val is not None and val_fraction is not None:
        raise InputError("val inputs and a val fraction exclude each other; give one")
    fraction = VAL_FRACTION if val_fraction is None else val_fraction
    if not 0 < fraction < 1:
        raise InputError(f"val fraction {fraction} is not between 0 and 1")
    if not 1 <= shard_tokens < 1 << 31:
        raise InputError(f"shard_tokens {shard_tokens} is not in 1..2^31-1")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers} is not positive")
    train_source, val_source = _Source(inputs, separator), _Source(val, separator) if val is not None else None
    sources = [source for source in (val_source, train_source) if source]
    total = sum(source.bytes for source in sources)
    workers = workers or max(1, min(_cpus(), total // _BYTES_PER_WORKER))
    with _staging(Path(out).resolve(), overwrite) as folder:
        below = None if val_source else min(round(fraction * 2**64), 2**64 - 1).to_bytes(8, "big")
        must_round_trip = tokenizer is None
        if tokenizer is None:
            texts = train_source.documents(_meter(progress, "training the tokenizer", train_source.bytes))
            if below:  # nothing that is trained sees val
                texts = (text for text in texts if document_hash(text.encode()) >= below)
            tokenizer = Tokenizer.from_bytes(train_tokenizer(texts, vocab_size))
        elif not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_file(tokenizer)
        advance = _meter(progress, "encoding", total)
        batches = itertools.chain.from_iterable(
            _batches("val", source.documents(advance))
            if source is val_source
            else _batches("hash" if below else "train", mix(source.documents(advance), below))
            for source in sources
        )
        writers = {name: _SplitWriter(folder, name, shard_tokens) for name in ("train", "val")}
        in_val: set[bytes] = set()
        shared = 0
        encoder_args = (tokenizer.model_bytes, below, must_round_trip)
        with contextlib.closing(_map_in_order(batches, workers, encoder_args)) as results:
            for part in itertools.chain.from_iterable(results):
                if val_source and part.split == "val":
                    in_val.update(part.hashes)
                shared += sum(digest in in_val for digest in part.hashes) if part.split == "train" else 0
                writers[part.split].add(part)
        if shared:
            raise InputError(
                f"{shared} of {writers['train'].documents} train documents are also among the "
                f"{writers['val'].documents} val documents; remove them from one of the inputs, or leave --val out"
            )
        for name, writer in writers.items():
            if not writer.documents:
                both = sum(writer.documents for writer in writers.values())
                raise InputError(
                    f"the {name} split is empty: a val fraction of {fraction:g} gave it none of {both} documents; "
                    "change the fraction, give more documents, or name val inputs"
                )
        val_split = writers["val"].finish((val_source or train_source).names)
        train_split = writers["train"].finish(train_source.names)
        manifest = Manifest(
            golfgpt=_version(),
            tokenizer_sha256=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            lossless=not (train_split.changed_documents or val_split.changed_documents),
            val_below=below and below.hex(),
            separator=separator,
            train=train_split,
            val=val_split,
        )
        write_bytes(folder / TOKENIZER, tokenizer.model_bytes)
        write_json(folder / MANIFEST, manifest.to_json())
    return manifest


class _Source:
    """Documents that can be read again, from files or from the embedded corpus, which is cut as a .txt is."""

    def __init__(self, inputs: Sequence[PathLike] | None, separator: str | None):
        self._separator = separator
        self._demo = demo_text() if inputs is None else None
        if self._demo:
            self.names = [self._demo.name]
            self.bytes = sum(map(len, self._demo.documents))
        else:
            self._files = find_inputs(inputs)
            self.names = [file.name for file in self._files]
            self.bytes = sum(file.stat().st_size for file in self._files)

    def documents(self, advance: Callable[[int], None]) -> Iterator[str]:
        if not self._demo:
            yield from read_documents(self._files, self._separator, advance)
            return
        for text in self._demo.documents:
            data = text.encode()
            for start, end in split_text(data):
                yield data[start:end].decode()
            advance(len(text))


def _meter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advance


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version() -> str:
    try:
        return metadata.version("golfgpt")
    except metadata.PackageNotFoundError:
        return "not installed"
