"""Files that are either whole or absent: write beside the target, fsync, rename, fsync the folder; and strict JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` on success and vanishes on any failure.

    The previous content of `path` stays whole until the new content is on disk, also when the disk
    is full. Raises OSError as the file system reports it, with the name of the file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder, a file was to be written", str(path))
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's 0600 would hide runs from a team
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # of a write or an fsync
            error.filename = str(path)
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def from_json(hint: Any, value: Any, path: str = "") -> Any:
    """Rebuild a value of type `hint` from parsed JSON: a dataclass, tuple[X, ...], X | None, Literal or a plain type.

    An object must have exactly the fields of its dataclass, and nothing is converted but lists to tuples and int to
    float. Raises ValueError that names the keys leading to the fault (after `path`) and what was expected.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{path or 'root'}: expected an object, got {value!r}")
        hints, prefix = typing.get_type_hints(hint), f"{path}." if path else ""
        for key in value:
            if key not in hints:
                close = difflib.get_close_matches(key, hints, n=1)
                advice = f"; did you mean {prefix}{close[0]}?" if close else ""
                raise ValueError(f"unknown key {prefix}{ascii(key)[1:-1][:80]}{advice}")
        if missing := [name for name in hints if name not in value]:
            raise ValueError(f"missing key {prefix}{missing[0]}")
        return hint(**{key: from_json(hints[key], item, prefix + key) for key, item in value.items()})
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(from_json(args[0], item, path) for item in value)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return from_json(next(arg for arg in args if arg is not type(None)), value, path)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint or (origin is typing.Literal and value in args):
        return value
    raise ValueError(f"{path or 'root'} = {value!r}, expected {getattr(hint, '__name__', hint)}")


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()
