"""Upstream's model files: `final_model.pt` and every `.ptz` of the published recipes.

Three contents, told apart by what they hold:

    state_dict             a state dict as trained, bfloat16 and float32: final_model.pt
    int8_clean_per_row_v1  {"quantized", "scales", "dtypes", "passthrough", ...}: R0 to R4 and PR #65
    mixed                  {"w": tensors, "m": how each is stored}: R4b, PRs #70, #162, #180 and R5

each a torch.save file, as it is or as one zlib, zstd or xz stream, told apart by its first bytes.

This is the only place where golfgpt meets a pickle. The pickle is scanned before it is loaded: it may only
rebuild plain tensors from stored bytes, so neither code nor an allocation can hide in it.
"""

from __future__ import annotations

import io
import lzma
import pickletools
import reprlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.published.names import listed

MAX_PTZ_BYTES = 256 * 2**20
"""Largest file and largest decompressed content that is read."""

_MAX_WINDOW_BYTES = 256 * 2**20  # a decoder's memory: xz -9 asks for 2^26, zstd -22 for at most 2^27
_MAX_PICKLE_BYTES = 10**6  # scanning a megabyte takes 0.4 s; a three-layer export has 5 kB

_PER_ROW = "int8_clean_per_row_v1"
_PER_ROW_KEYS = {"__quant_format__", "quantized", "scales", "dtypes", "passthrough"}
_PER_ROW_OPTIONAL_KEYS = {"qmeta", "passthrough_orig_dtypes"}
_MIXED_KEPT = ("passthrough", "passthrough_ctrl", "passthrough_fp16")
_MIXED_BITS = {"int5": 5, "int6": 6, "int8": 8}
_BFLOAT16 = ("tok_emb.weight", "bigram.embed.weight")  # in upstream's models; a mixed file does not record dtypes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLE_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET"),
    *("LONG_BINGET", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE"),
    *("NEWTRUE", "NEWFALSE"),
}
"""What pickle's protocol 2 writes for dicts, lists, strings, numbers and tensors."""
_PICKLE_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch CharStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch FloatStorage",
}


@dataclass(frozen=True)
class Export:
    """A model file of upstream's, under the names in the file."""

    state: dict[str, Tensor]
    """Every weight as upstream's model has it after loading the file, widened to float32."""
    format: str
    """"state_dict", "int8_clean_per_row_v1" or "mixed"."""
    compressor: str | None
    """"zlib", "zstd", "xz", or None for a bare torch.save file."""
    codes: dict[str, tuple[Tensor, Tensor]]
    """int8 codes and their scales, one a row or one in all, of each quantized tensor."""
    kept: dict[str, Tensor]
    """Every other tensor, as stored."""
    dtypes: dict[str, str]
    """dtype of each tensor in upstream's model: `state` is codes * scale, or the kept tensor, rounded to it."""


def read_ptz(path: str | Path) -> dict[str, Tensor]:
    """Per-layer float32 tensors under upstream's names: the `state` of `read_export`."""
    return read_export(path).state


def read_export(path: str | Path) -> Export:
    """Read a final_model.pt or .ptz file.

    A quantized weight is its int8 code times its float32-widened scale, in float32, rounded to the dtype that the
    tensor has in upstream's model: the recorded one, or in a mixed file bfloat16 for the embedding and the pair
    table and float32 for all others. Kept tensors are rounded to that dtype likewise.

    Raises InputError for anything malformed, after reading at most MAX_PTZ_BYTES however much the file claims to
    hold, and where zstd is needed and the package zstandard is missing.
    """
    try:
        with open(path, "rb") as file:
            blob = file.read(MAX_PTZ_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    try:
        if len(blob) > MAX_PTZ_BYTES:
            raise InputError(f"the file is larger than {MAX_PTZ_BYTES} bytes")
        compressor, decompress = _decoder(blob)
        content = decompress(blob)
        return _decode(_load_plain_tensors(content), compressor, len(content))
    except InputError as error:
        raise InputError(f"{path} is not a readable upstream model: {error}") from None


# Compressors


def _zlib(blob: bytes) -> bytes:
    return _one_stream(zlib.decompressobj(), blob)


def _xz(blob: bytes) -> bytes:
    return _one_stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_WINDOW_BYTES), blob)


def _one_stream(stream: Any, blob: bytes) -> bytes:
    try:
        content = stream.decompress(blob, MAX_PTZ_BYTES + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise InputError(f"bad compressed stream ({error})") from None
    if len(content) > MAX_PTZ_BYTES:
        raise InputError(f"the content is larger than {MAX_PTZ_BYTES} bytes")
    if not stream.eof:
        raise InputError("the compressed stream is truncated")
    if stream.unused_data:
        raise InputError(f"{len(stream.unused_data)} bytes follow the compressed stream")
    return content


def _zstd(blob: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise InputError("zstd needs the package zstandard: install it") from None
    try:
        # max_output_size is ignored for a frame that declares its size, so the declaration is checked first.
        if zstandard.frame_content_size(blob) > MAX_PTZ_BYTES:
            raise InputError(f"the content is larger than {MAX_PTZ_BYTES} bytes")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        return decompressor.decompress(blob, max_output_size=MAX_PTZ_BYTES, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InputError(f"bad compressed stream ({error})") from None


_DECODERS: dict[bytes, tuple[str | None, Callable[[bytes], bytes]]] = {
    b"PK\x03\x04": (None, bytes),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"\xfd7zXZ\x00": ("xz", _xz),
    **{bytes((0x78, level)): ("zlib", _zlib) for level in (0x01, 0x5E, 0x9C, 0xDA)},
}


def _decoder(blob: bytes) -> tuple[str | None, Callable[[bytes], bytes]]:
    for magic, decoder in _DECODERS.items():
        if blob.startswith(magic):
            return decoder
    seen = f"starts with the bytes {blob[:6].hex(' ')}" if blob else "is empty"
    raise InputError(f"it {seen}: neither a zlib, zstd or xz stream nor a torch.save file")


# The pickle


def _load_plain_tensors(content: bytes) -> Any:
    """torch.load of a torch.save file that holds nothing but containers and stored tensors."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # What is scanned must be what torch finds: it looks for archives in other places than zipfile does, and
            # ignores the case of names.
            entries = archive.infolist()
            if content[-22:-18] != b"PK\x05\x06" or min((entry.header_offset for entry in entries), default=0):
                raise InputError("bytes precede or follow the archive")
            if len({entry.filename.casefold() for entry in entries}) < len(entries):
                raise InputError("two of its entries have one name")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > len(content):
                raise InputError("its entries claim more bytes than the file holds")
            programs = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(programs) != 1:
                raise InputError(f"it has {len(programs)} pickles")
            if programs[0].file_size > _MAX_PICKLE_BYTES:
                raise InputError(f"its pickle of {programs[0].file_size} bytes holds more than tensors")
            _check_pickle(archive.read(programs[0]))
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign parsers meet hostile bytes with any type of exception
        raise InputError(f"not a torch.save file of plain tensors ({_first_line(error)})") from None


def _check_pickle(program: bytes) -> None:
    """Only what torch.save writes for containers of tensors, and no tuple twice: a few hundred bytes nest 2^60 of them,
    which hashing them as a key would visit one by one."""
    tuples, previous = set(), ""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in _PICKLE_OPCODES or (opcode.name == "GLOBAL" and argument not in _PICKLE_GLOBALS):
            raise InputError(f"it refers to {opcode.name} {argument!a:.80}, which no tensor needs")
        if opcode.name.endswith("BINPUT") and previous.startswith("TUPLE"):
            tuples.add(argument)
        if opcode.name.endswith("BINGET") and argument in tuples:
            raise InputError("it refers to one tuple several times, which no tensor needs")
        previous = opcode.name


def _first_line(error: Exception) -> str:
    return ascii((str(error) or type(error).__name__).splitlines()[0])[1:-1][:300]


# The formats. Each gives (codes, scale, bits) of quantized tensors, the kept tensors and the dtypes it records.

Parts = tuple[dict[str, tuple[Any, Any, int]], dict[str, Any], dict[str, Any]]


def _decode(content: Any, compressor: str | None, nbytes: int) -> Export:
    """Check and dequantize what a file of `nbytes` bytes held."""
    _check_table("the file", content)
    if "__quant_format__" in content:
        format, (coded, kept, recorded) = _PER_ROW, _per_row_parts(content)
    elif content.keys() == {"w", "m"}:
        format, (coded, kept, recorded) = "mixed", _mixed_parts(content)
    else:
        format, (coded, kept, recorded) = "state_dict", ({}, content, {})

    tensors = [(name, tensor) for name, (*pair, _) in coded.items() for tensor in pair] + [*kept.items()]
    for name, tensor in tensors:
        plain = isinstance(tensor, Tensor) and tensor.is_contiguous() and not tensor.requires_grad
        if not plain or tensor.is_neg() or tensor.is_conj():
            raise InputError(f"{name} is not a plain contiguous tensor")
    # Views can show one stored byte many times; real exports hold every byte of each tensor.
    if sum(tensor.nbytes for _, tensor in tensors) > nbytes:
        raise InputError("its tensors have more bytes than the file")

    values = {name: _product(name, *parts) for name, parts in coded.items()} | kept
    state, dtypes = {}, {}
    for name, value in values.items():
        if not value.is_floating_point():
            raise InputError(f"{name} is {value.dtype}, not a floating-point tensor")
        dtype = recorded.get(name, str(value.dtype).removeprefix("torch."))
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise InputError(f"{name} has the unknown dtype {reprlib.repr(dtype)}")
        state[name], dtypes[name] = value.to(_DTYPES[dtype]).float(), dtype
        if not state[name].isfinite().all():
            raise InputError(f"{name} is not finite")
    return Export(state, format, compressor, {name: parts[:2] for name, parts in coded.items()}, dict(kept), dtypes)


def _product(name: str, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    if codes.dtype != torch.int8 or codes.ndim == 0 or not scale.is_floating_point():
        raise InputError(f"{name} has codes of {codes.dtype} with scales of {scale.dtype}")
    if scale.shape not in (codes.shape[:1], torch.Size([])):  # upstream's per-tensor form has one scale
        raise InputError(f"{name} has codes {tuple(codes.shape)} with scales {tuple(scale.shape)}")
    if not (scale > 0).all():
        raise InputError(f"{name} has scales that are not positive numbers")
    limit = 2 ** (bits - 1)
    if ((codes < -limit) | (codes > limit - 1)).any():
        raise InputError(f"{name} has codes outside int{bits}")
    return codes.float() * scale.float().reshape(-1, *[1] * (codes.ndim - 1))


def _per_row_parts(content: dict[str, Any]) -> Parts:
    if content["__quant_format__"] != _PER_ROW:
        raise InputError(f"its format is {reprlib.repr(content['__quant_format__'])}, not {_PER_ROW}")
    _check_names("keys", content, _PER_ROW_KEYS, _PER_ROW_OPTIONAL_KEYS)
    for key in content.keys() - {"__quant_format__"}:
        _check_table(key, content[key])
    codes, scales, dtypes, kept = (content[key] for key in ("quantized", "scales", "dtypes", "passthrough"))
    if not codes.keys() == scales.keys() == dtypes.keys():
        raise InputError("quantized, scales and dtypes name different tensors")
    if both := codes.keys() & kept.keys():
        raise InputError(f"both quantized and passed through: {listed(both)}")
    # R3 and R4 store codes of 6 bits here as well, without saying so.
    coded = {name: (q, scales[name], 8) for name, q in codes.items()}
    return coded, kept, content.get("passthrough_orig_dtypes", {}) | dtypes


def _mixed_parts(content: dict[str, Any]) -> Parts:
    tensors, how = content["w"], content["m"]
    _check_table("w", tensors)
    _check_table("m", how)
    coded, kept, stored = {}, {}, []
    for name, kind in how.items():
        type = kind.get("type") if isinstance(kind, dict) and len(kind) == 1 else None
        if isinstance(kind, str) and kind in _MIXED_KEPT:
            stored.append(name)
            kept[name] = tensors.get(name)
        elif isinstance(type, str) and type in _MIXED_BITS:
            parts = f"{name}.q", f"{name}.scale"
            stored += parts
            coded[name] = (*(tensors.get(part) for part in parts), _MIXED_BITS[type])
        else:
            raise InputError(f"{name} is stored as {reprlib.repr(kind)}, which is unknown")
    if twice := [name for name, count in Counter(stored).items() if count > 1]:
        raise InputError(f"two tensors are stored as: {listed(twice)}")
    _check_names("tensors", tensors, set(stored))
    return coded, kept, {name: "bfloat16" if name in _BFLOAT16 else "float32" for name in how}


def _check_table(what: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isprintable() for name in value):
        raise InputError(f"{what} is not a table of names")


def _check_names(what: str, table: dict[str, Any], required: set[str], optional: Set[str] = frozenset()) -> None:
    if missing := required - table.keys():
        raise InputError(f"missing {what}: {listed(missing)}")
    if unexpected := table.keys() - required - optional:
        raise InputError(f"unexpected {what}: {listed(unexpected)}")
