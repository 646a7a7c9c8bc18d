"""From the bytes of a published file to what torch.save stored in it.

    one stream     a torch.save file, bare or as one zlib, zstd, xz or brotli stream
    byte shuffle   a stream may hold "BSHF", a byte s, and then the bytes 0, s, 2 s, ... of the torch.save file, those
                   from 1 on and so forth (2026-03-31 to 2026-04-29 with brotli)
    per group      "PGRP", the number 9, nine lengths, nine streams; numbers are uint32, little endian (2026-04-27)

The streams per group are the int8 codes of the seven groups in `_GROUPS`, then a torch.save file {"r": other tensors,
"m": how each is stored, "s": group -> shapes of its matrices}, then permutations. A group holds its matrices
transposed, layer by layer. Of a sorted group the rows were put in another order first, and their numbers in the
original are uint16 in the last stream.

A stream is told by its first bytes; brotli has none, and is tried last. A group whose stream has as many bytes as its
codes is not compressed. Published files have their groups in lrzip's format, for which there is no Python package.
Nothing here trusts a length: a decoder makes no more than was asked for, and all streams together no more than `limit`.

Only here golfgpt meets a pickle. torch.load reads it with weights_only=True, which runs no code of the file.
"""

from __future__ import annotations

import io
import lzma
import math
import re
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.published.names import listed
from golfgpt.quant.codecs import CODECS, MAX_WINDOW_BYTES, whole_stream, zstd_frame

_SHUFFLED = b"BSHF"
_PER_GROUP = b"PGRP"
_LRZIP = b"LRZI"

_GROUPS = {
    "_tok_emb.weight.q": True,
    "attn.c_k.weight.q": False,
    "attn.c_q.weight.q": True,
    "attn.c_v.weight.q": False,
    "attn.proj.weight.q": False,
    "mlp.fc.weight.q": True,
    "mlp.proj.weight.q": False,
}
"""Groups in the order of their streams, and whether their rows were sorted."""

_MAX_LAYERS = 1000
"""Of a group. Far more than any model has; bounds the tensors that a small file can ask for."""


class Unpacked(NamedTuple):
    content: Any
    """What torch.save stored; {"w": tensors, "m": how each is stored} of a per-group file."""
    compressor: str | None
    """"zlib", "zstd", "xz", "brotli", "pergroup", or None for a bare torch.save file."""
    nbytes: int
    """Bytes of all streams, decompressed: an honest file has no more in its tensors."""


def unpack(blob: bytes, limit: int) -> Unpacked:
    """What the file `blob` holds, of at most `limit` bytes once decompressed.

    Raises InputError for a file of another kind, a damaged or longer one, a group in lrzip's format, and a stream whose
    package is missing (zstandard, brotli).
    """
    if blob.startswith(_PER_GROUP):
        return _per_group(blob, limit)
    compressor, content = _decompress(blob, limit)
    return Unpacked(load(unshuffled(content)), compressor, len(content))


# Streams


def _xz(blob: bytes, limit: int) -> bytes:
    return whole_stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES), blob, limit)


def _zlib(blob: bytes, limit: int) -> bytes:
    return whole_stream(zlib.decompressobj(), blob, limit)


def _bare(blob: bytes, limit: int) -> bytes:
    if len(blob) > limit:
        raise InputError(f"it holds more than {limit} bytes")
    return blob


_DECODERS: dict[bytes, tuple[str | None, Callable[[bytes, int], bytes]]] = {
    b"PK\x03\x04": (None, _bare),
    b"\x28\xb5\x2f\xfd": ("zstd", zstd_frame),
    b"\xfd7zXZ\x00": ("xz", _xz),
    **{bytes((0x78, level)): ("zlib", _zlib) for level in (0x01, 0x5E, 0x9C, 0xDA)},
}


def _decompress(blob: bytes, limit: int) -> tuple[str | None, bytes]:
    """(compressor, content) of one stream."""
    for magic, (compressor, decode) in _DECODERS.items():
        if blob.startswith(magic):
            try:
                return compressor, decode(blob, limit)
            except InputError:
                raise
            except Exception as error:  # each library has its own type of exception
                raise InputError(f"bad {compressor} stream: {error}") from None
    try:
        return "brotli", b"".join(CODECS["brotli"].decompress(memoryview(blob), limit))
    except Exception as error:
        raise InputError(
            f"it starts with the bytes {blob[:6].hex(' ')!r}, expected a zlib, zstd or xz stream or a torch.save file; "
            f"read as a brotli stream, which starts with no fixed bytes: {error}"
        ) from None


def unshuffled(content: bytes) -> bytes:
    """The bytes in their order before the byte shuffle. Content without its mark is returned as it is; InputError if
    the mark has no stride."""
    if not content.startswith(_SHUFFLED):
        return content
    if len(content) <= len(_SHUFFLED) or not (stride := content[len(_SHUFFLED)]):
        raise InputError("its bytes are shuffled by a stride of 0")
    values = np.frombuffer(content, np.uint8, offset=len(_SHUFFLED) + 1)
    out, taken = np.empty_like(values), 0
    for first in range(min(stride, len(values))):
        part = out[first::stride]
        part[:] = values[taken : taken + len(part)]
        taken += len(part)
    return out.tobytes()


def load(content: bytes) -> Any:
    """torch.load of a torch.save file whose entries take no more memory than the file; InputError for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
        # In bytes that precede or follow the archive, torch may find another one than zipfile.
        if content[-22:-18] != b"PK\x05\x06" or min((entry.header_offset for entry in entries), default=0):
            raise InputError("bytes precede or follow the archive")
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > len(content):
            raise InputError("its entries are compressed, or claim more bytes than the file holds")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign parsers meet hostile bytes with any type of exception
        text = str(error) or type(error).__name__
        reason = re.search(r"WeightsUnpickler error: ([^.\n]*)", text) or re.match(r"(.*)", text)
        raise InputError(f"not a torch.save file of plain tensors ({ascii(reason[1])[1:-1][:300]})") from None


def check_table(what: str, value: Any) -> None:
    """Raise InputError unless `value` is a dict whose keys are printable."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isprintable() for name in value):
        raise InputError(f"{what} is not a table of names")


# Streams per group


def _per_group(blob: bytes, limit: int) -> Unpacked:
    *groups, remainder, permutations = _split(blob)
    _, saved = _decompress(remainder, limit)
    content = load(unshuffled(saved))
    check_table("the remainder", content)
    if content.keys() != {"r", "m", "s"}:
        raise InputError(f"the remainder's tables are {listed(content)}, expected m, r, s")
    check_table("r", content["r"])
    check_table("s", content["s"])
    if unknown := content["s"].keys() - _GROUPS.keys():
        raise InputError(f"unexpected groups: {listed(unknown)}")
    shapes = {group: _shapes(group, content["s"].get(group, ())) for group in _GROUPS}
    sizes = {group: sum(map(math.prod, of)) for group, of in shapes.items()}
    rows = sum(shape[0] for group, of in shapes.items() if _GROUPS[group] for shape in of)
    nbytes = len(saved) + sum(sizes.values()) + 2 * rows
    if nbytes > limit:
        raise InputError(f"it holds more than {limit} bytes: its shapes claim {nbytes}")
    order = np.frombuffer(_sized("the stream of permutations", permutations, 2 * rows), "<u2")
    tensors = dict(content["r"])
    for group, stream in zip(_GROUPS, groups, strict=True):
        codes, taken = np.frombuffer(_sized(group, stream, sizes[group]), np.int8), 0
        for layer, shape in enumerate(shapes[group]):
            # Published readers number the matrices of a group from 0 as well: a layer may be missing at the end only.
            name = group[1:] if group.startswith("_") else f"blocks.{layer}.{group}"
            if name in tensors:
                raise InputError(f"{name} is stored twice, in its group and among the other tensors")
            size, count = math.prod(shape), shape[0] if _GROUPS[group] else 0
            matrix = codes[taken : taken + size].reshape(shape[::-1]).T
            tensors[name] = _sorted_back(name, matrix, order[:count] if _GROUPS[group] else None)
            taken, order = taken + size, order[count:]
    return Unpacked({"w": tensors, "m": content["m"]}, "pergroup", nbytes)


def _split(blob: bytes) -> list[bytes]:
    count = len(_GROUPS) + 2
    head = struct.Struct(f"<{count + 1}I")
    if len(blob) < 4 + head.size:
        raise InputError("it ends within the lengths of its groups")
    found, *lengths = head.unpack_from(blob, 4)
    at = 4 + head.size
    if found != count or sum(lengths) != len(blob) - at:
        raise InputError(
            f"it claims {found} streams of {sum(lengths)} bytes per group, expected {count} of {len(blob) - at}"
        )
    streams = []
    for length in lengths:
        streams.append(blob[at : at + length])
        at += length
    return streams


def _shapes(group: str, shapes: Any) -> list[tuple[int, int]]:
    """Shapes of the group's matrices, checked."""
    most = 1 if group.startswith("_") else _MAX_LAYERS
    if not isinstance(shapes, list | tuple) or len(shapes) > most:
        raise InputError(f"the shapes of {group} are no list of at most {most}")
    for shape in shapes:
        rows = 2**16 if _GROUPS[group] else 2**31  # uint16 number the rows of a sorted group
        if not isinstance(shape, list | tuple) or not all(type(n) is int and 0 < n <= 2**31 for n in shape):
            raise InputError(f"a shape of {group} is not of positive sizes")
        if len(shape) != 2 or shape[0] > rows:
            raise InputError(f"{group} has a matrix of {reprlib.repr(shape)}, expected two sizes, at most {rows} rows")
    return [tuple(shape) for shape in shapes]


def _sized(what: str, stream: bytes, size: int) -> bytes:
    """The `size` bytes that `stream` holds."""
    if stream.startswith(_LRZIP):
        raise InputError(
            f"{what} is an lrzip stream, which golfgpt does not decode: run lrzip -d on each such stream and write the "
            "file again with the decoded streams and their lengths, or export the model as one brotli stream "
            "(COMPRESSOR=brotli in the published scripts), or import its final_model.pt"
        )
    if len(stream) == size:
        return stream
    try:
        _, content = _decompress(stream, size)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    if len(content) != size:
        raise InputError(f"{what} has {len(content)} bytes, its shapes take {size}")
    return content


def _sorted_back(name: str, matrix: np.ndarray, order: np.ndarray | None) -> Tensor:
    """`matrix` with row i at order[i], contiguous."""
    if order is None:
        return torch.from_numpy(np.array(matrix, order="C"))
    if not np.array_equal(np.sort(order), np.arange(len(matrix))):
        raise InputError(f"the order of the rows of {name} is not a permutation")
    out = np.empty(matrix.shape, np.int8)
    out[order] = matrix
    return torch.from_numpy(out)
