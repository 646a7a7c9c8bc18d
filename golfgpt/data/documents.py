"""Documents from text files: .txt cut at separators, .jsonl and .jsonl.zst with one {"text": ...} a line."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import mmap
import os
import re
import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from golfgpt.data.manifest import MANIFEST
from golfgpt.errors import InputError
from golfgpt.files import sha256_file

PathLike = str | os.PathLike
Advance = Callable[[int], None]
"""Called with the number of file bytes that have been consumed since the last call."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
LEAST_DOCUMENT_BYTES = 2000
"""A .txt is cut at a separator only once the document has this many bytes."""
SHOWN_FAULTS = 10
"""Faulty files that an error names."""
_ZSTD_WINDOW = 1 << 27  # `zstd --long` up to 27, 128 MiB


def find_inputs(inputs: Sequence[PathLike], say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Files named by `inputs`: files, folders (searched below, sorted) and globs; each file once. `say` gets a line
    about those that are named again, and about files of other kinds in a folder.

    Raises InputError for what is missing, of another kind, or names no file.
    """
    found: list[Path] = []
    for item in map(os.fspath, inputs):
        path = Path(item)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files = [file for file in inside if file.name.endswith(SUFFIXES)]
            if files and (others := [str(file) for file in inside if not file.name.endswith(SUFFIXES)]):
                names = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
                say(f"{len(others)} of {len(inside)} files in {item} are left out, of other kinds: {names}")
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(item, recursive=True) if Path(name).is_file())
        if not files:
            what = "holds no" if path.is_dir() else "is no file and no folder, and as a pattern matches no"
            advice = "check the path"
            if (path / MANIFEST).exists():
                advice = f"it holds prepared data already: golfgpt train --recipe small --data.path {shlex.quote(item)}"
            raise InputError(f"input {item} {what} {', '.join(SUFFIXES)}; {advice}")
        found += files
    if not found:
        raise InputError("no input is named: give files, folders or globs")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            kinds = ", ".join(SUFFIXES)
            raise InputError(f"{file}: cannot read this kind of file; expected {kinds}: copy plain text to NAME.txt")
    once: dict[Path, Path] = {}
    again = [file for file in found if once.setdefault(file.resolve(), file) is not file]
    if again:
        names = ", ".join(map(str, again[:3])) + (", …" if len(again) > 3 else "")
        say(f"each file is read once; named again by {len(again)} of {len(found)} inputs: {names}")
    return list(once.values())


def same_content(files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pairs of an earlier and a later file of `files` with the same bytes, empty ones aside. Raises InputError for a
    file that cannot be read."""
    pairs, once = [], dict[str, Path]()
    try:
        sizes = {file: file.stat().st_size for file in files}
        count = Counter(sizes.values())
        for file in files:
            if sizes[file] and count[sizes[file]] > 1:
                first = once.setdefault(sha256_file(file), file)
                pairs += [(first, file)] if first is not file else []
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    return pairs


def read_documents(
    inputs: Sequence[PathLike], separator: str | None = None, advance: Advance = lambda count: None
) -> Iterator[str]:
    """Documents of `inputs` (see `find_inputs`) in order; those without any text are left out.

    .txt is cut after `separator` (default: blank lines) wherever that leaves at least 2 kB on both sides; the
    pieces, separators included, join to the file's text. .jsonl and .jsonl.zst hold {"text": ...} a line.
    Raises InputError naming file and place for bytes that are not UTF-8, bad JSON, a missing "text", lone
    surrogates, truncated zstd and files without text; it names the first files that have one of these.
    """
    if separator == "":
        raise InputError("the document separator is empty; leave it out to cut at blank lines")
    files = find_inputs(inputs)
    for index, path in enumerate(files):
        try:
            yield from _read_file(path, separator, advance)
        except InputError as error:
            rest = itertools.islice(_faults(files[index + 1 :], separator, advance), SHOWN_FAULTS)
            *faults, last = [str(error), *rest]
            faults.append(last if len(faults) < SHOWN_FAULTS else "… and more files")
            raise InputError("\n  ".join(faults)) from error


def _faults(files: Sequence[Path], separator: str | None, advance: Advance) -> Iterator[str]:
    """What is wrong with `files`, at most one fault of each."""
    for path in files:
        try:
            deque(_read_file(path, separator, advance), maxlen=0)
        except InputError as error:
            yield str(error)


def _read_file(path: Path, separator: str | None, advance: Advance) -> Iterator[str]:
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
    start, cut = 0, 0  # [start, cut) is long enough, but waits: text too short for a document may follow
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


def _read_txt(path: Path, separator: str | None, advance: Advance) -> Iterator[str]:
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
            advance(end - start)


def _read_jsonl(path: Path, advance: Advance) -> Iterator[str]:
    for number, line in enumerate(_lines(path, advance), 1):
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


def _lines(path: Path, advance: Advance) -> Iterator[bytes]:
    """Lines of a file, decompressed if it is .zst; the bytes after the last newline are one too."""
    line = bytearray()
    done = 0
    with open(path, "rb") as file:
        for piece in _pieces(file, path):
            line += piece
            if b"\n" in piece:
                *lines, rest = line.split(b"\n")
                yield from map(bytes, lines)
                line = rest
            advance(file.tell() - done)
            done = file.tell()
    yield bytes(line)


def _pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Content of a file, decompressed if it is .zst. Frame by frame, because zstandard's `stream_reader`, which reads
    across frames, ends without an error where the last frame is cut off."""
    import zstandard  # which data.shards, that imports SUFFIXES from here, does not need

    frame = None
    while piece := file.read(1 << 17):
        if path.suffix != ".zst":
            yield piece
            continue
        while piece:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            try:
                yield frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise InputError(f"{path}: damaged zstd data: {error}; fetch the file again") from None
            piece = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise InputError(f"{path}: the zstd data are cut off; fetch the file again")


def document_hash(data: bytes) -> bytes:
    """8 bytes of BLAKE2b over a document's UTF-8: its place between train and val, and its identity."""
    return hashlib.blake2b(data, digest_size=8).digest()
