"""The published model files: `final_model.pt` and every `.ptz` of the published recipes and records.

Three contents, told apart by what they hold:

    state_dict             a state dict as trained, bfloat16 and float32: final_model.pt
    int8_clean_per_row_v1  {"quantized", "scales", "dtypes", "passthrough", ...}: R0 to R4 and PR #65
    mixed                  {"w": tensors, "m": how each is stored}: R4b, PRs #70, #162, #180, R5 and all records from
                           2026-03-22 on

A tensor NAME of a mixed file is stored, by what "m" says of it, as

    passthrough, ..._ctrl, ..._fp16, "passthrough (float16)"    NAME
    {"type": "int6"}, "gptq (int6)"    NAME.q codes, NAME.scale; 5, 7 and 8 bits likewise
    gate_int8_row                      NAME.gq codes of 8 bits, NAME.gs
    gptq (...)+awqgrpint8              besides, codes of 8 bits in columns a to a + NAME.awqg_size - 1 for each a in
                                       NAME.awqg_start, with the scales NAME.awqg_s_hi (PR #1908)
    gptq (...)+lqer_asym               besides, factors A (rows, r) and B (r, columns) whose product is added: codes
                                       NAME.lqA_a and NAME.lqB_a, scales NAME.lqAs_a and NAME.lqBs_a, each of as many
                                       codes in order; "+lqer" has the same without _a

`containers` reads the bytes.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.published.containers import Unpacked, check_table, unpack
from golfgpt.published.names import listed
from golfgpt.quant.codecs import most_bytes
from golfgpt.quant.formats import MAX_RANK, add_product

MAX_BYTES = 256 * 2**20
"""Largest file and largest decompressed content that is read."""

_PER_ROW = "int8_clean_per_row_v1"
_PER_ROW_TABLES = {"quantized", "scales", "dtypes", "passthrough"}
_PER_ROW_OPTIONAL = {"qmeta", "passthrough_orig_dtypes"}
# In the published models, which keep all else in float32; a mixed file does not record dtypes.
_BFLOAT16 = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GPTQ = re.compile(r"gptq \(int([2-8])\)(?:\+awqgrpint([2-8]))?(\+lqer(?:_asym)?)?")


@dataclass(frozen=True)
class Export:
    """A published model file, under the names in the file."""

    state: dict[str, Tensor]
    """Every weight as the published model has it after loading the file, widened to float32."""
    format: str
    """"state_dict", "int8_clean_per_row_v1" or "mixed"."""
    compressor: str | None
    """"zlib", "zstd", "xz", "brotli", "pergroup", or None for a bare torch.save file."""
    codes: dict[str, tuple[Tensor, Tensor]]
    """int8 codes and their scales, one per row or one in all, of each quantized tensor."""
    beside: dict[str, dict[str, Any]]
    """What quantized tensors have beside them, as fields of TensorFormat and QuantizedTensor: columns with codes of 8
    bits, and factors."""
    decoded: tuple[str, ...]
    """Quantized tensors that these fields cannot hold (several groups of columns; scales beside the rows' that are in
    other numbers, of another dtype or zero), and that are therefore not in `codes`."""
    passthrough: dict[str, Tensor]
    """Every other tensor, as stored."""
    dtypes: dict[str, str]
    """dtype of each tensor in the published model, to which `state` is rounded."""

    @property
    def quantized(self) -> bool:
        return bool(self.codes or self.decoded)


def read_export(path: str | Path) -> Export:
    """Read a final_model.pt or .ptz file.

    A quantized weight is its int8 code times its float32-widened scale, in float32, rounded to the dtype that the
    tensor has in the published model: the recorded one, or in a mixed file bfloat16 for the embeddings of tokens, pairs
    and values and float32 for all others. Passthrough tensors are rounded to that dtype likewise.

    Raises InputError for anything malformed, after reading at most MAX_BYTES however much the file claims to hold, for
    groups in lrzip's format, and if the package of its stream is missing (zstandard, brotli).
    """
    try:
        with open(path, "rb") as file:
            blob = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    try:
        if len(blob) > MAX_BYTES:
            raise InputError(f"it holds more than {MAX_BYTES} bytes")
        return _decode(unpack(blob, min(MAX_BYTES, most_bytes(len(blob)))))
    except InputError as error:
        raise InputError(f"{path} is not a readable published model: {error}") from None


# Contents. Each gives the quantized tensors, the passthrough tensors and the dtypes it records.


class _Coded(NamedTuple):
    """A quantized tensor of the file, its parts not checked yet."""

    codes: Any
    scale: Any
    bits: int
    columns: tuple[Any, ...] = ()
    """First columns, how many from each on, and scales of those with `column_bits`."""
    column_bits: int = 8
    factors: tuple[Any, ...] = ()
    """Codes and scales of A and of B."""

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.codes, self.scale, *self.columns, *self.factors


Contents = tuple[dict[str, _Coded], dict[str, Any], dict[str, Any]]


def _decode(file: Unpacked) -> Export:
    """Check and dequantize what a file held."""
    content = file.content
    check_table("the file", content)
    if "__quant_format__" in content:
        format, (coded, passthrough, recorded) = _PER_ROW, _per_row(content)
    elif content.keys() == {"w", "m"}:
        format, (coded, passthrough, recorded) = "mixed", _mixed(content["w"], content["m"])
    else:
        format, (coded, passthrough, recorded) = "state_dict", ({}, content, {})

    stored = [(name, tensor) for name, found in coded.items() for tensor in found.parts] + [*passthrough.items()]
    for name, tensor in stored:
        if not _is_plain(tensor):
            raise InputError(f"{name} is missing or not a plain contiguous tensor")
    # Views can show one stored byte many times; real exports hold every byte of each tensor.
    if sum(tensor.nbytes for _, tensor in stored) > file.nbytes:
        raise InputError("its tensors have more bytes than the file")

    state, dtypes = {}, {}
    for name, value in ({name: _product(name, found) for name, found in coded.items()} | passthrough).items():
        dtype = recorded.get(name, str(value.dtype).removeprefix("torch."))
        if not isinstance(dtype, str) or dtype not in _DTYPES or not value.is_floating_point():
            found = f"{value.dtype} for {reprlib.repr(dtype)}"
            raise InputError(f"{name} is {found}, expected one of {', '.join(_DTYPES)}")
        state[name], dtypes[name] = value.to(_DTYPES[dtype]).float(), dtype
        if not state[name].isfinite().all():
            raise InputError(f"{name} is not finite")
    beside = {name: _beside(found) for name, found in coded.items()}
    codes = {name: (found.codes, found.scale) for name, found in coded.items() if beside[name] is not None}
    decoded = tuple(name for name in coded if name not in codes)
    beside = {name: fields for name, fields in beside.items() if fields}
    return Export(state, format, file.compressor, codes, beside, decoded, dict(passthrough), dtypes)


def _beside(coded: _Coded) -> dict[str, Any] | None:
    """Fields for `Export.beside`; None: they cannot hold the tensor."""
    fields: dict[str, Any] = {}
    if coded.columns:
        starts, size, scale = coded.columns
        if len(starts) != 1 or coded.column_bits != 8 or scale.dtype != coded.scale.dtype:
            return None
        fields |= {"wide": int(starts), "wide_columns": int(size), "wide_scale": scale}
    if coded.factors:
        left, left_scale, right, right_scale = coded.factors
        by_row = (left_scale.numel(), right_scale.numel()) == (len(left), len(right))
        fits = left_scale.dtype == right_scale.dtype == coded.scale.dtype and len(right) <= MAX_RANK
        fits = fits and (by_row or left_scale.numel() == 1)
        if not fits or not all((x > 0).all() for x in (left_scale, right_scale)):
            return None
        group = None if by_row else right.numel() // right_scale.numel()
        fields |= {"rank": len(right), "rank_group": group, "left": left, "right": right}
        fields |= {"left_scale": left_scale.flatten(), "right_scale": right_scale.flatten()}
    return fields


def _is_plain(tensor: Any) -> bool:
    """Whether the elements of this tensor are its stored bytes, in order."""
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.requires_grad or tensor.is_neg() or tensor.is_conj():
        return False
    return tensor.is_contiguous()


def _product(name: str, coded: _Coded) -> Tensor:
    """fp32 weights."""
    codes, scale = coded.codes, coded.scale
    if codes.dtype != torch.int8 or codes.ndim == 0 or not scale.is_floating_point():
        raise InputError(f"{name} has codes of {codes.dtype} with scales of {scale.dtype}")
    if scale.shape not in (codes.shape[:1], torch.Size([])):  # the published per-tensor form has one scale
        raise InputError(f"{name} has codes {tuple(codes.shape)} with scales {tuple(scale.shape)}")
    if not (scale > 0).all():
        raise InputError(f"{name} has scales that are not positive numbers")
    weights = codes.float() * scale.float().reshape(-1, *[1] * (codes.ndim - 1))
    bits = torch.full(codes.shape[-1:], coded.bits)
    for columns, scales in _columns(name, coded):
        weights[:, columns], bits[columns] = codes[:, columns].float() * scales, coded.column_bits
    largest = (2 ** (bits - 1) - 1).to(torch.int8)
    if ((codes < -largest - 1) | (codes > largest)).any():
        raise InputError(f"{name} has codes outside int{coded.bits}")
    if coded.factors:
        add_product(weights, *_factors(name, codes.shape, *coded.factors))
    return weights


def _columns(name: str, coded: _Coded) -> list[tuple[slice, Tensor]]:
    """Columns with scales of their own, and these (rows, 1)."""
    if not coded.columns:
        return []
    starts, size, scale = coded.columns
    if starts.dtype != torch.int16 or size.dtype != torch.int16 or not scale.is_floating_point():
        raise InputError(f"{name} has groups of columns of {starts.dtype}, {size.dtype} and {scale.dtype}")
    rows, columns = coded.codes.shape if coded.codes.ndim == 2 else (0, 0)
    if starts.ndim != 1 or size.numel() != 1 or scale.shape != (rows,):
        shapes = ", ".join(str(tuple(part.shape)) for part in coded.columns)
        raise InputError(f"{name} has groups of columns of shapes {shapes}, in {columns} columns of {rows} rows")
    width = int(size)
    inside = ((starts >= 0) & (starts.long() + width <= columns)).all()
    if width < 1 or not inside or len(starts) * width > columns:
        raise InputError(f"{name} has {len(starts)} groups of {width} columns, which do not fit in its {columns}")
    if not (scale > 0).all():
        raise InputError(f"{name} has scales of columns that are not positive numbers")
    return [(slice(first, first + width), scale.float()[:, None]) for first in starts.tolist()]


def _factors(name: str, shape: torch.Size, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Iterator[Tensor]:
    """A and B in fp32. Every scale is of equally many codes in order: a row's, a group's, or all."""
    for codes, scale in ((a, a_scale), (b, b_scale)):
        if codes.dtype != torch.int8 or not scale.is_floating_point() or not 0 < scale.numel() <= codes.numel():
            raise InputError(f"{name} has factors of {codes.dtype} with {scale.numel()} scales of {scale.dtype}")
    fit = len(shape) == a.ndim == b.ndim == 2 and (*a.shape, *b.shape) == (shape[0], len(b), len(b), shape[1])
    if not fit or len(b) > min(shape):
        raise InputError(f"{name} {tuple(shape)} has factors {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() % a_scale.numel() or b.numel() % b_scale.numel():
        raise InputError(f"{name} has factors whose scales are not of equally many codes")
    for codes, scale in ((a, a_scale), (b, b_scale)):
        yield (codes.float().reshape(scale.numel(), -1) * scale.float().reshape(-1, 1)).reshape(codes.shape)


def _per_row(content: dict[str, Any]) -> Contents:
    tables = {key: table for key, table in content.items() if key != "__quant_format__"}
    if content["__quant_format__"] != _PER_ROW:
        raise InputError(f"its format is {reprlib.repr(content['__quant_format__'])}, expected {_PER_ROW}")
    if not _PER_ROW_TABLES <= tables.keys() <= _PER_ROW_TABLES | _PER_ROW_OPTIONAL:
        raise InputError(f"its tables are {listed(tables)}, expected {listed(_PER_ROW_TABLES)}")
    for key, table in tables.items():
        check_table(key, table)
    codes, scales, dtypes, passthrough = (tables[key] for key in ("quantized", "scales", "dtypes", "passthrough"))
    if not codes.keys() == scales.keys() == dtypes.keys():
        raise InputError("quantized, scales and dtypes name different tensors")
    if both := codes.keys() & passthrough.keys():
        raise InputError(f"both quantized and passed through: {listed(both)}")
    # R3 and R4 store codes of 6 bits here as well, without saying so.
    coded = {name: _Coded(q, scales[name], 8) for name, q in codes.items()}
    return coded, passthrough, tables.get("passthrough_orig_dtypes", {}) | dtypes


def _mixed(tensors: Any, how: Any) -> Contents:
    check_table("w", tensors)
    check_table("m", how)
    coded, passthrough, left = {}, {}, dict(tensors)

    def take(name: str, *keys: str) -> tuple[Any, ...]:
        return tuple(left.pop(f"{name}.{key}", None) for key in keys)

    for name, kind in how.items():
        match kind:
            case "passthrough" | "passthrough_ctrl" | "passthrough_fp16" | "passthrough (float16)":
                passthrough[name] = left.pop(name, None)
            case "gate_int8_row":
                coded[name] = _Coded(*take(name, "gq", "gs"), 8)
            # "method" says how a record found the codes.
            case {"type": "int5" | "int6" | "int8" as type, **rest} if not rest or rest.keys() == {"method"}:
                coded[name] = _Coded(*take(name, "q", "scale"), int(type[3:]))
            case str() if found := _GPTQ.fullmatch(kind):
                bits, column_bits, factors = found.groups()
                suffix = "_a" if factors == "+lqer_asym" else ""
                coded[name] = _Coded(
                    *take(name, "q", "scale"),
                    int(bits),
                    take(name, "awqg_start", "awqg_size", "awqg_s_hi") if column_bits else (),
                    int(column_bits or bits),
                    take(name, *(f"{part}{suffix}" for part in ("lqA", "lqAs", "lqB", "lqBs"))) if factors else (),
                )
            case _:
                raise InputError(
                    f"{name} is stored as {reprlib.repr(kind)}, expected passthrough, int5, int6 or int8, gptq (intN), "
                    "with +awqgrpintN, +lqer or +lqer_asym, or gate_int8_row"
                )
    if left:
        raise InputError(f"unexpected tensors: {listed(left)}")
    return coded, passthrough, {name: "bfloat16" if name in _BFLOAT16 else "float32" for name in how}
