"""How the tensors of an artifact are stored: formats, codes with scales, layer groups."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from golfgpt_kernels import dequantize_rows
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.model.parameters import Param

DTYPES = {"float32": torch.float32, "float16": torch.float16} | {f"int{bits}": torch.int8 for bits in range(2, 9)}


PIECE = 2**20
"""Codes that are decoded at a time: 4 MB of weights."""
MAX_RANK = 64
"""Of a correction: decoding takes a pass over the matrix for each."""


@dataclass(frozen=True)
class TensorFormat:
    """Storage of one layer group."""

    shape: tuple[int, ...]
    format: str
    """float32, float16, or int2 to int8 (a byte per code)."""
    scale: str | None = None
    """dtype of the scales, float16 or float32, of an integer format."""
    group: int | None = None
    """Columns that share a scale; None: the row."""
    wide: int | None = None
    """First of `wide_columns` columns whose codes are int8, with scales of their own, one per row (AWQ-lite)."""
    wide_columns: int | None = None
    rank: int | None = None
    """Rank of a correction that is added to codes times scales (LQER)."""
    rank_group: int | None = None
    """Its scales. None: one per row of each factor; else one for the left factor, and one for so many neighbouring
    codes of the right one."""

    def __post_init__(self) -> None:
        if self.format not in DTYPES:
            raise InputError(f"tensor format {self.format!r}, expected one of {', '.join(DTYPES)}")
        numbers = {name: getattr(self, name) for name in ("group", "wide", "wide_columns", "rank", "rank_group")}
        if not self.quantized:
            if self.scale is not None or set(numbers.values()) != {None}:
                raise InputError(f"format {self.format} has no scales, got {self.scale!r} and {numbers}")
            return
        if self.scale not in ("float16", "float32"):
            raise InputError(f"format {self.format} with scales of {self.scale!r}, expected float16 or float32")
        if len(self.shape) < 2:
            raise InputError(f"format {self.format} needs rows, got a tensor of shape {self.shape}")
        for name, value in numbers.items():
            if value is not None and (type(value) is not int or value < (name != "wide")):
                raise InputError(f"{name} of format {self.format} is {value!r}, expected an integer from 1 up")
        rows, columns = self.shape[-2:]
        if self.group is not None and columns % self.group:
            raise InputError(f"groups of {self.group} columns do not divide the {columns} of {self.shape}")
        wide = self.wide, self.wide_columns
        if wide != (None, None) and (None in wide or self.group is not None or sum(wide) > columns):
            raise InputError(f"{wide[1]} wide columns from {wide[0]} on in {self.shape}, groups {self.group}")
        if self.rank is not None and self.rank > min(rows, columns, MAX_RANK):
            raise InputError(f"a correction of rank {self.rank} for a tensor of shape {self.shape}")
        if self.rank_group is not None and (self.rank is None or self.rank * columns % self.rank_group):
            raise InputError(f"groups of {self.rank_group} codes in {self.rank} rows of {columns}")

    @property
    def quantized(self) -> bool:
        return self.format.startswith("int")

    @property
    def bits(self) -> int:
        return int(self.format.removeprefix("int"))

    @property
    def max_code(self) -> int:
        """Largest code, for example 31 for int6; the least is -max_code - 1."""
        return 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        """As tables show it: int6, int6/64, int7 +64 wide, int6 +rank 4."""
        group = f"/{self.group}" if self.group else ""
        wide = f" +{self.wide_columns} wide" if self.wide is not None else ""
        return self.format + group + wide + (f" +rank {self.rank}" if self.rank else "")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.group is None else (*self.shape[:-1], self.shape[-1] // self.group)

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Field of QuantizedTensor -> (format of its numbers, shape), for each array that is stored."""
        if not self.quantized:
            return {"values": (self.format, self.shape)}
        *layers, rows, columns = self.shape
        found = {"values": ("int8", self.shape), "scale": (self.scale, self.scale_shape)}
        if self.wide is not None:
            found["wide_scale"] = self.scale, (*layers, rows)
        if self.rank is not None:
            groups = None if self.rank_group is None else self.rank * columns // self.rank_group
            found["left"] = "int8", (*layers, rows, self.rank)
            found["left_scale"] = self.scale, (*layers, rows if groups is None else 1)
            found["right"] = "int8", (*layers, self.rank, columns)
            found["right_scale"] = self.scale, (*layers, groups or self.rank)
        return found

    @property
    def value_bytes(self) -> int:
        """Bytes of the codes, or of the passthrough values."""
        return self.elements * DTYPES[self.format].itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of everything beside them."""
        arrays = [array for field, array in self.arrays.items() if field != "values"]
        return sum(math.prod(shape) * DTYPES[number].itemsize for number, shape in arrays)


@dataclass(frozen=True)
class QuantizedTensor:
    """One layer group in its format: passthrough values, or codes (..., rows, columns) int8, their scales, and what the
    format has beside them. Shapes and dtypes are those of `format.arrays`."""

    format: TensorFormat
    values: Tensor
    scale: Tensor | None = None
    wide_scale: Tensor | None = None
    left: Tensor | None = None
    left_scale: Tensor | None = None
    right: Tensor | None = None
    right_scale: Tensor | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The stored tensors by their fields."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def pieces(self) -> Iterator[tuple[tuple[int | slice, ...], QuantizedTensor]]:
        """(index, tensor) of some rows of one layer at a time, at most PIECE codes or one row, so that decoding needs
        no memory for temporary copies of a whole tensor. `format` stays that of the whole."""
        if self.values.ndim > 2:
            for i in range(len(self.values)):
                layer = replace(self, **{name: tensor[i] for name, tensor in self.arrays.items()})
                yield from (((i, *index), piece) for index, piece in layer.pieces())
            return
        rows, columns = self.values.shape
        by_row = {name: x for name, x in self.arrays.items() if not name.startswith("right") and len(x) == rows}
        step = max(1, PIECE // max(1, columns))
        for start in range(0, rows, step):
            index = (slice(start, start + step),)
            yield index, replace(self, **{name: tensor[index] for name, tensor in by_row.items()})

    def decode_into(self, out: Tensor) -> None:
        """Write the weights to `out` (format.shape, any float dtype)."""
        if self.scale is None:
            out.copy_(self.values)
            return
        for index, piece in self.pieces():
            out[index] = piece.dequantize()

    def dequantize(self) -> Tensor:
        """fp32 weights (format.shape)."""
        if self.scale is None:
            return self.values.float()
        w = dequantize_rows(self.values, self.scale, group_size=self.format.group)
        if self.wide_scale is not None:
            columns = slice(self.format.wide, self.format.wide + self.format.wide_columns)
            w[..., columns] = self.values[..., columns].float() * self.wide_scale[..., None].float()
        if self.left is not None:
            left = self.left.float() * self.left_scale[..., None].float()
            right = self.right.float().flatten(-2).unflatten(-1, (self.right_scale.size(-1), -1))
            right = (right * self.right_scale[..., None].float()).view(self.right.shape)
            add_product(w, left, right)
        return w


def add_product(w: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (..., rows, rank) times right (..., rank, columns) to w in place, all float32, with the same bits on
    every machine, as no matrix product has."""
    for k in range(left.size(-1)):
        w += left[..., k : k + 1] * right[..., k : k + 1, :]


class TensorReport(NamedTuple):
    """One line of the per-tensor table; bytes before compression, errors None unless weights were given."""

    name: str
    format: str
    elements: int
    value_bytes: int
    scale_bytes: int
    relative_rms_error: float | None
    """sqrt(sum (decoded - w)² / sum w²)."""
    snr_db: float | None
    """-20 log10 of it; inf if decoding is exact."""


# Layer groups


def layer_group_name(bank: str, start: int, stop: int, num_layers: int) -> str:
    return bank if (start, stop) == (0, num_layers) else f"{bank}[{start}:{stop}]"


def parse_layer_group(name: str) -> tuple[str, slice]:
    """Bank of the layer group `name`, and the layers that it holds. Raises InputError."""
    match = re.fullmatch(r"(\w+)(?:\[(\d{1,5}):(\d{1,5})\])?", name, re.ASCII)
    if not match or (match[2] and int(match[2]) >= int(match[3])):
        raise InputError(f"layer group {name!a}, expected a bank or some of its layers, such as c_k or c_k[0:7]")
    return match[1], slice(int(match[2]), int(match[3])) if match[2] else slice(None)


def layer_groups(
    bank: str, param: Param, kinds: Sequence[Any]
) -> Iterator[tuple[str, tuple[int, ...], list[str], Any]]:
    """Name, shape, published names and kind of each run of equal neighbours in `kinds`, which has one entry for each
    published tensor of the bank."""
    start = 0
    for kind, run in itertools.groupby(kinds):
        stop = start + len(list(run))
        shape = (stop - start, *param.shape[1:]) if param.layered else param.shape
        yield layer_group_name(bank, start, stop, len(kinds)), shape, param.published_names[start:stop], kind
        start = stop


def decode(encoded: Mapping[str, QuantizedTensor], banks: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
    """The weights that the artifact's reader gets: `banks`, or new ones in fp32, filled from their layer groups."""
    if banks is None:
        groups: dict[str, list[Tensor]] = {}
        for name, tensor in encoded.items():
            groups.setdefault(parse_layer_group(name)[0], []).append(tensor.values)
        banks = {}
        for bank, (first, *more) in groups.items():
            layers = [len(first) + sum(map(len, more))] if first.ndim else []
            banks[bank] = first.new_empty((*layers, *first.shape[1:]), dtype=torch.float32)
    for name, tensor in encoded.items():
        tensor.decode_into(layers_of(banks, name))
    return banks


def layers_of(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The layer group `name` of the banks in `state`."""
    bank, layers = parse_layer_group(name)
    return state[bank][layers] if state[bank].ndim else state[bank]


def payload_bytes(formats: Mapping[str, TensorFormat]) -> int:
    return sum(format.value_bytes + format.scale_bytes for format in formats.values())


def tensor_report(name: str, format: TensorFormat, error: float | None = None) -> TensorReport:
    snr = None if error is None else math.inf if error == 0 else -20 * math.log10(error)
    return TensorReport(name, str(format), format.elements, format.value_bytes, format.scale_bytes, error, snr)
