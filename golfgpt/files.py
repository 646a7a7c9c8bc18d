"""Files that are either whole or absent: write beside the target, fsync, rename, fsync the folder; and strict JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import json
import math
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


MAX_JSON_BYTES = 4 * 2**20
"""Of a JSON text. The parsed objects take up to 28 times as much memory."""
MAX_JSON_DEPTH = 32


def read_json(path: str | os.PathLike, hint: Any = Any) -> Any:
    """`parse_json` of a file. Raises OSError as the file system reports it, and ValueError as `parse_json`."""
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), hint)


def parse_json(text: str | bytes, hint: Any = Any, *, allow_nan: bool = False) -> Any:
    """The JSON value `text`, rebuilt as `hint` by `from_json`.

    Raises ValueError that says what was found and what was expected: for text above MAX_JSON_BYTES that is not JSON or
    is nested deeper than MAX_JSON_DEPTH, for an integer outside int64, for NaN and infinite numbers unless `allow_nan`,
    for strings that are not text, and as `from_json`.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    finite = {} if allow_nan else {"parse_float": _finite, "parse_constant": _finite}
    try:
        value = json.loads(text, parse_int=_int64, **finite)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels") from None
    _check_nesting(value, MAX_JSON_DEPTH)
    return from_json(hint, value)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it holds {text[:40]}, expected finite numbers")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"it holds the integer {text[:40]}, expected -2^63 to 2^63 - 1")
    return int(text)


def _check_nesting(value: Any, depth: int) -> None:
    if isinstance(value, str):
        value.encode()  # a lone surrogate: UnicodeEncodeError, a ValueError
    elif isinstance(value, dict | list):
        if not depth:
            raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_nesting(item, depth - 1)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}


def from_json(hint: Any, value: Any, path: str = "") -> Any:
    """Rebuild a value of type `hint` from parsed JSON: a dataclass, tuple[X, ...], dict[str, X], X | None, Literal, a
    TypedDict, a plain type or Any.

    An object must have exactly the fields of its dataclass. One of a TypedDict may have further keys. Nothing is
    converted but lists to tuples and int to float. Raises ValueError that names the keys leading to the fault (after
    `path`) and what was expected.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    prefix = f"{path}." if path else ""
    if hint is Any:
        return value
    is_object = dict in (hint, origin) or typing.is_typeddict(hint) or dataclasses.is_dataclass(hint)
    if is_object and type(value) is not dict:
        raise ValueError(f"{path or 'root'}: expected an object, got {value!r:.200}")
    if origin is dict:
        return {key: from_json(args[1], item, f"{prefix}{_shown(key)}") for key, item in value.items()}
    if typing.is_typeddict(hint):
        hints = _hints(hint)
        if missing := sorted(hint.__required_keys__ - value.keys()):
            raise ValueError(f"missing key {prefix}{missing[0]}")
        return {key: from_json(hints.get(key, Any), item, prefix + key) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)
        for key in value:
            if key not in hints:
                close = difflib.get_close_matches(key, hints, n=1)
                advice = f"; did you mean {prefix}{close[0]}?" if close else ""
                raise ValueError(f"unknown key {prefix}{_shown(key)}{advice}")
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
    expected = f"one of {', '.join(map(repr, args))}" if origin is typing.Literal else _KINDS.get(origin or hint, hint)
    raise ValueError(f"{path or 'root'} = {value!r:.200}, expected {expected}")


_hints = functools.cache(typing.get_type_hints)  # of a RunConfig: 6 of the 7 ms that reading one takes


def _shown(key: str) -> str:
    return ascii(key)[1:-1][:80]


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()
