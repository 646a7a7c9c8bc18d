"""The published model files: `final_model.pt` and every `.ptz` of the published recipes.

Three contents, told apart by what they hold:

    state_dict             a state dict as trained, bfloat16 and float32: final_model.pt
    int8_clean_per_row_v1  {"quantized", "scales", "dtypes", "passthrough", ...}: R0 to R4 and PR #65
    mixed                  {"w": tensors, "m": how each is stored}: R4b, PRs #70, #162, #180 and R5

each a torch.save file, bare or as one zlib, zstd or xz stream, told apart by its first bytes.

Only here golfgpt meets a pickle. torch.load reads it with weights_only=True, which runs no code of
the file.
"""

from __future__ import annotations

import io
import lzma
import re
import reprlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.published.names import listed
from golfgpt.quant.codecs import MAX_WINDOW_BYTES, whole_stream, zstd_frame

MAX_BYTES = 256 * 2**20
"""Largest file and largest decompressed content that is read."""

_PER_ROW = "int8_clean_per_row_v1"
_PER_ROW_TABLES = {"quantized", "scales", "dtypes", "passthrough"}
_PER_ROW_OPTIONAL = {"qmeta", "passthrough_orig_dtypes"}
_BFLOAT16 = ("tok_emb.weight", "bigram.embed.weight")  # in the published models; a mixed file does not record dtypes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Export:
    """A published model file, under the names in the file."""

    state: dict[str, Tensor]
    """Every weight as the published model has it after loading the file, widened to float32."""
    format: str
    """"state_dict", "int8_clean_per_row_v1" or "mixed"."""
    compressor: str | None
    """"zlib", "zstd", "xz", or None for a bare torch.save file."""
    codes: dict[str, tuple[Tensor, Tensor]]
    """int8 codes and their scales, one per row or one in all, of each quantized tensor."""
    passthrough: dict[str, Tensor]
    """Every other tensor, as stored."""
    dtypes: dict[str, str]
    """dtype of each tensor in the published model, to which `state` is rounded."""


def read_export(path: str | Path) -> Export:
    """Read a final_model.pt or .ptz file.

    A quantized weight is its int8 code times its float32-widened scale, in float32, rounded to the dtype that the
    tensor has in the published model: the recorded one, or in a mixed file bfloat16 for the embedding and the pair
    table and float32 for all others. Passthrough tensors are rounded to that dtype likewise.

    Raises InputError for anything malformed, after reading at most MAX_BYTES however much the file claims to hold, and
    if it is a zstd frame and the package zstandard is missing.
    """
    try:
        with open(path, "rb") as file:
            blob = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    try:
        if len(blob) > MAX_BYTES:
            raise InputError(f"it holds more than {MAX_BYTES} bytes")
        compressor, content = _decompress(blob)
        return _decode(_load(content), compressor, len(content))
    except InputError as error:
        raise InputError(f"{path} is not a readable published model: {error}") from None


# Containers


def _xz(blob: bytes, limit: int) -> bytes:
    return whole_stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES), blob, limit)


def _zlib(blob: bytes, limit: int) -> bytes:
    return whole_stream(zlib.decompressobj(), blob, limit)


_CONTAINERS: dict[bytes, tuple[str | None, Callable[[bytes, int], bytes]]] = {
    b"PK\x03\x04": (None, lambda blob, limit: blob),
    b"\x28\xb5\x2f\xfd": ("zstd", zstd_frame),
    b"\xfd7zXZ\x00": ("xz", _xz),
    **{bytes((0x78, level)): ("zlib", _zlib) for level in (0x01, 0x5E, 0x9C, 0xDA)},
}


def _decompress(blob: bytes) -> tuple[str | None, bytes]:
    """(compressor, content) of a file."""
    for magic, (compressor, decode) in _CONTAINERS.items():
        if blob.startswith(magic):
            try:
                return compressor, decode(blob, MAX_BYTES)
            except InputError:
                raise
            except Exception as error:  # each library has its own type of exception
                raise InputError(f"bad {compressor} stream: {error}") from None
    start = blob[:6].hex(" ")
    raise InputError(f"it starts with the bytes {start!r}, expected a zlib, zstd or xz stream or a torch.save file")


def _load(content: bytes) -> Any:
    """torch.load of a torch.save file whose entries take no more memory than the file."""
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


# Contents. Each gives (codes, scale, bits) of quantized tensors, the passthrough tensors and the dtypes it records.

Contents = tuple[dict[str, tuple[Any, Any, int]], dict[str, Any], dict[str, Any]]


def _decode(content: Any, compressor: str | None, nbytes: int) -> Export:
    """Check and dequantize what a file of `nbytes` bytes held."""
    _check_table("the file", content)
    if "__quant_format__" in content:
        format, (coded, passthrough, recorded) = _PER_ROW, _per_row(content)
    elif content.keys() == {"w", "m"}:
        format, (coded, passthrough, recorded) = "mixed", _mixed(content["w"], content["m"])
    else:
        format, (coded, passthrough, recorded) = "state_dict", ({}, content, {})

    stored = [(name, tensor) for name, (*pair, _) in coded.items() for tensor in pair] + [*passthrough.items()]
    for name, tensor in stored:
        if not _is_plain(tensor):
            raise InputError(f"{name} is missing or not a plain contiguous tensor")
    # Views can show one stored byte many times; real exports hold every byte of each tensor.
    if sum(tensor.nbytes for _, tensor in stored) > nbytes:
        raise InputError("its tensors have more bytes than the file")

    state, dtypes = {}, {}
    for name, value in ({name: _product(name, *parts) for name, parts in coded.items()} | passthrough).items():
        dtype = recorded.get(name, str(value.dtype).removeprefix("torch."))
        if not isinstance(dtype, str) or dtype not in _DTYPES or not value.is_floating_point():
            found = f"{value.dtype} for {reprlib.repr(dtype)}"
            raise InputError(f"{name} is {found}, expected one of {', '.join(_DTYPES)}")
        state[name], dtypes[name] = value.to(_DTYPES[dtype]).float(), dtype
        if not state[name].isfinite().all():
            raise InputError(f"{name} is not finite")
    codes = {name: (q, scale) for name, (q, scale, _) in coded.items()}
    return Export(state, format, compressor, codes, dict(passthrough), dtypes)


def _is_plain(tensor: Any) -> bool:
    """Whether the elements of this tensor are its stored bytes, in order."""
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.requires_grad or tensor.is_neg() or tensor.is_conj():
        return False
    return tensor.is_contiguous()


def _product(name: str, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    if codes.dtype != torch.int8 or codes.ndim == 0 or not scale.is_floating_point():
        raise InputError(f"{name} has codes of {codes.dtype} with scales of {scale.dtype}")
    if scale.shape not in (codes.shape[:1], torch.Size([])):  # the published per-tensor form has one scale
        raise InputError(f"{name} has codes {tuple(codes.shape)} with scales {tuple(scale.shape)}")
    if not (scale > 0).all():
        raise InputError(f"{name} has scales that are not positive numbers")
    limit = 2 ** (bits - 1)
    if ((codes < -limit) | (codes > limit - 1)).any():
        raise InputError(f"{name} has codes outside int{bits}")
    return codes.float() * scale.float().reshape(-1, *[1] * (codes.ndim - 1))


def _per_row(content: dict[str, Any]) -> Contents:
    tables = {key: table for key, table in content.items() if key != "__quant_format__"}
    if content["__quant_format__"] != _PER_ROW:
        raise InputError(f"its format is {reprlib.repr(content['__quant_format__'])}, expected {_PER_ROW}")
    if not _PER_ROW_TABLES <= tables.keys() <= _PER_ROW_TABLES | _PER_ROW_OPTIONAL:
        raise InputError(f"its tables are {listed(tables)}, expected {listed(_PER_ROW_TABLES)}")
    for key, table in tables.items():
        _check_table(key, table)
    codes, scales, dtypes, passthrough = (tables[key] for key in ("quantized", "scales", "dtypes", "passthrough"))
    if not codes.keys() == scales.keys() == dtypes.keys():
        raise InputError("quantized, scales and dtypes name different tensors")
    if both := codes.keys() & passthrough.keys():
        raise InputError(f"both quantized and passed through: {listed(both)}")
    # R3 and R4 store codes of 6 bits here as well, without saying so.
    coded = {name: (q, scales[name], 8) for name, q in codes.items()}
    return coded, passthrough, tables.get("passthrough_orig_dtypes", {}) | dtypes


def _mixed(tensors: Any, how: Any) -> Contents:
    _check_table("w", tensors)
    _check_table("m", how)
    coded, passthrough, left = {}, {}, dict(tensors)
    for name, kind in how.items():
        match kind:
            case "passthrough" | "passthrough_ctrl" | "passthrough_fp16":
                passthrough[name] = left.pop(name, None)
            case {"type": "int5" | "int6" | "int8" as type} if len(kind) == 1:
                coded[name] = left.pop(f"{name}.q", None), left.pop(f"{name}.scale", None), int(type[3:])
            case _:
                raise InputError(f"{name} is stored as {reprlib.repr(kind)}, expected passthrough, int5, int6 or int8")
    if left:
        raise InputError(f"unexpected tensors: {listed(left)}")
    return coded, passthrough, {name: "bfloat16" if name in _BFLOAT16 else "float32" for name in how}


def _check_table(what: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isprintable() for name in value):
        raise InputError(f"{what} is not a table of names")
