"""How a model's weights become the numbers of an artifact: one quantizer for training, probes and export.

Formats, decided for each published tensor (a layer of a bank) by the first that applies:

    a rule of QuantConfig.rules           what the rule says: float32, float16, or int2 to int8
    control tensors, any size             float32 (QuantConfig.control_dtype)
    matrices up to keep_numel elements    float16
    other matrices                        codes int8 in -m-1..m, m = 2^(bits-1) - 1, and one scale per row
                                          or per `group` columns

Neighbouring layers of one format are one part of the artifact: "c_k", or "c_k[0:7]" and "c_k[7:9]" where the last two
layers are kept in float16.

A decoded weight is fp32(code) * fp32(stored scale). With qat="export" training computes the same product from
the same codes, and rounds kept tensors to float16 as the artifact will, so what was trained is what ships.
Codes take a byte each whatever their bits; the entropy coder of the artifact earns the difference.

Left out on purpose: bit packing, which costs the compressor more than it saves.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from golfgpt_kernels import RowQuant, dequantize_rows, quantize_rows
from torch import Tensor

from golfgpt.config import ModelConfig, QuantConfig, QuantRule
from golfgpt.errors import InputError
from golfgpt.model.parameters import Param, parameter_shapes, parameter_table
from golfgpt.published import check_state

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
DTYPES = {"float32": torch.float32, "float16": torch.float16} | {f"int{bits}": torch.int8 for bits in range(2, 9)}

PRUNED_NUMEL = 65_536
"""Published pruning leaves matrices of at most this many elements alone."""

_PUBLISHED_QAT = {
    "r4": ({"clip": "quantile", "code_range": "symmetric"}, 1e-8),
    "r5": ({"clip": "max", "code_range": "full"}, 1e-12),
}
"""Options and smallest row clip of the published fake quantizations (recipes R4, R4b; R5) of matrices; R4 and R4b have
none but the layers'."""

Rounding = RowQuant | torch.dtype | None
"""What training rounds a weight to: codes and scales, a dtype, or nothing."""

FakeQuant = Mapping[str, Sequence[tuple[int, Rounding]]]
"""Bank -> (layers, rounding) of its consecutive parts."""


@dataclass(frozen=True)
class TensorFormat:
    """Storage of one part."""

    shape: tuple[int, ...]
    format: str
    """float32, float16, or int2 to int8 (a byte a code)."""
    scale: str | None = None
    """dtype of the scales, float16 or float32, of an integer format."""
    group: int | None = None
    """Columns that share a scale; None: the row."""

    def __post_init__(self) -> None:
        if self.format not in DTYPES:
            raise InputError(f"unknown tensor format {self.format!r}")
        if not self.quantized and (self.scale, self.group) != (None, None):
            raise InputError(f"format {self.format} has no scales, got {self.scale!r} in groups of {self.group!r}")
        if self.quantized and self.scale not in SCALE_DTYPES:
            raise InputError(f"unknown scale dtype {self.scale!r} of format {self.format}")
        if self.quantized and len(self.shape) < 2:
            raise InputError(f"format {self.format} needs rows, got a tensor of shape {self.shape}")
        if self.group is not None and (type(self.group) is not int or self.group < 1 or self.shape[-1] % self.group):
            raise InputError(f"groups of {self.group!r} columns do not divide the {self.shape[-1]} of {self.shape}")

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

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.group is None else (*self.shape[:-1], self.shape[-1] // self.group)

    @property
    def value_bytes(self) -> int:
        """Bytes of the codes, or of the kept values."""
        return self.elements * DTYPES[self.format].itemsize

    @property
    def scale_bytes(self) -> int:
        return math.prod(self.scale_shape) * DTYPES[self.scale].itemsize if self.quantized else 0


@dataclass(frozen=True)
class QuantizedTensor:
    """One part in its format: codes (..., rows, columns) int8 and their scale (format.scale_shape), or kept values."""

    format: TensorFormat
    values: Tensor
    scale: Tensor | None = None

    def decode(self) -> Tensor:
        """fp32 weights (shape of the part)."""
        if self.scale is None:
            return self.values.float()
        return dequantize_rows(self.values, self.scale, group_size=self.format.group)


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
    """-20 log10 of it; inf where decoding is exact."""


def group_name(bank: str, start: int, stop: int, layers: int) -> str:
    return bank if (start, stop) == (0, layers) else f"{bank}[{start}:{stop}]"


def parse_group(name: str) -> tuple[str, slice]:
    """Bank of the layer group `name`, and the layers that it holds. Raises InputError."""
    match = re.fullmatch(r"(\w+)(?:\[(\d{1,5}):(\d{1,5})\])?", name, re.ASCII)
    if not match or (match[2] and int(match[2]) >= int(match[3])):
        raise InputError(f"{name!a} is not the name of a bank or of some of its layers, as c_k[0:7]")
    return match[1], slice(int(match[2]), int(match[3])) if match[2] else slice(None)


def plan_formats(table: Mapping[str, Param], config: QuantConfig) -> dict[str, TensorFormat]:
    """Format of each part of the parameters in `table`, in the same order.

    Raises InputError for a rule that matches no tensor, or that asks for what a tensor's shape does not have.
    """
    rules = [QuantRule.parse(text) for text in config.rules]
    formats, unused, shadowed = {}, set(rules), set()
    for bank, param in table.items():
        names, shape = param.published_names, param.shape
        kinds = []
        for name in names:
            matching = [rule for rule in rules if matches(rule.pattern, name, len(names))]
            unused.difference_update(matching[:1])
            shadowed.update(matching[1:])
            kinds.append(_kind(param, matching, config))
        start = 0
        for kind, run in itertools.groupby(kinds):
            stop = start + len(list(run))
            part = group_name(bank, start, stop, len(kinds))
            try:
                formats[part] = TensorFormat((stop - start, *shape[1:]) if param.layered else shape, *kind)
            except InputError as error:
                raise InputError(f"quant.rules: {names[start]} ({part}): {error}") from None
            start = stop
    if unused:
        first = next(rule for rule in rules if rule in unused)
        if first in shadowed:
            raise InputError(
                f"quant.rules: {first.pattern!r} decides nothing, for rules before it match the same tensors: put it "
                "before them (the first that matches decides)"
            )
        some = ", ".join(param.published_names[0] for param in table.values())
        raise InputError(f"quant.rules: {first.pattern!r} matches no tensor of this model; its names are like {some}")
    return formats


def matches(pattern: str, name: str, layers: int) -> bool:
    """Whether the glob fits a published name, or, where it begins with blocks.-, that with the layer counted from the
    end."""
    if pattern.startswith("blocks.-"):
        name = re.sub(r"^blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) - layers}.", name)
    return fnmatchcase(name, pattern)


def _kind(param: Param, rules: list[QuantRule], config: QuantConfig) -> tuple[str, str | None, int | None]:
    """(format, scale dtype, group) of a published tensor."""
    if rules:
        return rules[0].format, config.scale_dtype if rules[0].format.startswith("int") else None, rules[0].group
    if param.kind == "control":
        return config.control_dtype, None, None
    if math.prod(param.shape[param.layered :]) <= config.keep_numel:
        return "float16", None, None
    return f"int{config.bits}", config.scale_dtype, None


def join(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Banks of their parts, which are in order."""
    banks: dict[str, list[Tensor]] = {}
    for part, tensor in parts.items():
        banks.setdefault(parse_group(part)[0], []).append(tensor)
    return {bank: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for bank, tensors in banks.items()}


def prune_threshold(w: Tensor, fraction: float) -> float:
    """The quantile `fraction` of |w|, over all elements (any number: torch.quantile ends at 2^24), interpolated."""
    return float(np.quantile(w.detach().abs().float().cpu().numpy(), fraction))


def pruned(param: Param, w: Tensor, fraction: float) -> Tensor:
    """w, some layers of `param` or all of it, with the smallest `fraction` of the magnitudes of each published matrix
    above PRUNED_NUMEL set to zero."""
    if fraction == 0 or param.kind == "control":
        return w
    matrices = w if param.layered else [w]
    kept = [
        m.masked_fill(m.abs() < prune_threshold(m, fraction), 0.0) if m.numel() > PRUNED_NUMEL else m for m in matrices
    ]
    return torch.stack(kept).view_as(w)


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of one model under one QuantConfig."""

    model: ModelConfig
    config: QuantConfig

    @cached_property
    def parameters(self) -> dict[str, Param]:
        """The model's parameter table."""
        return parameter_table(self.model)

    @cached_property
    def formats(self) -> dict[str, TensorFormat]:
        """Part name -> format, known before any training. Raises InputError as `plan_formats`."""
        return plan_formats(self.parameters, self.config)

    @property
    def payload_bytes(self) -> int:
        """Exact bytes of all codes, scales and kept values before compression."""
        return payload_bytes(self.formats)

    @property
    def label(self) -> str:
        """The integer formats, as int8 or int5/int6; float16 where there is none."""
        return "/".join(sorted({f.format for f in self.formats.values() if f.quantized})) or "float16"

    def spec(self, part: str) -> RowQuant:
        """How a quantized part becomes codes and scales."""
        c, format = self.config, self.formats[part]
        return RowQuant(
            bits=format.bits,
            clip=c.clip,
            code_range=c.code_range,
            scale_dtype=DTYPES[format.scale],
            scale_floor=max(c.scale_floor, c.clip_floor / format.max_code),
            codes_from=c.codes_from,
            group_size=format.group,
        )

    def fake_quant(self) -> FakeQuant:
        """What the banks go through in quantization-aware training; those that it leaves alone are not in it.

        Raises InputError for qat that changes nothing, and for qat="export" with pruning: the artifact would hold zeros
        that training never saw.
        """
        if self.config.qat == "off":
            return {}
        if self.config.qat == "export" and self.config.prune:
            raise InputError(
                f"quant.qat export trains with the weights that the artifact will hold, and quant.prune "
                f"{self.config.prune:g} changes them afterwards; prune without it, or export a pruned copy later"
            )
        banks: dict[str, list[tuple[int, Rounding]]] = {}
        for part, format in self.formats.items():
            layers = format.shape[0] if format.shape else 1
            banks.setdefault(parse_group(part)[0], []).append((layers, self._rounding(part, format)))
        banks = {bank: parts for bank, parts in banks.items() if any(rounding for _, rounding in parts)}
        if not banks:
            raise InputError(
                f"quant.qat {self.config.qat} changes no weight: quant.bits, rules and keep_numel give no matrix that "
                "it quantizes an integer format"
            )
        return banks

    def _rounding(self, part: str, format: TensorFormat) -> Rounding:
        qat, param = self.config.qat, self.parameters[parse_group(part)[0]]
        if qat == "export":
            if format.quantized:
                return self.spec(part)
            return None if format.format == "float32" else DTYPES[format.format]
        if not format.quantized or param.kind != "matrix" or (qat == "r4" and not param.layered):
            return None
        options, clip_floor = _PUBLISHED_QAT[qat]
        floor = clip_floor / format.max_code
        return RowQuant(bits=format.bits, scale_dtype=torch.float32, scale_floor=floor, **options)

    def encode(self, state: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        """Prune and quantize the model's banks (any float dtype, any device); part name -> tensor.

        Raises InputError naming a tensor that is missing, unexpected, mis-shaped or not finite, or that is
        kept in float16 and exceeds it.
        """
        return dict(self._encode(state))

    def _encode(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, QuantizedTensor]]:
        check_state(state, parameter_shapes(self.model))
        for part, format in self.formats.items():
            bank, layers = parse_group(part)
            w = state[bank].detach().float()
            w = w[layers] if w.ndim else w
            if not w.isfinite().all():
                raise InputError(f"tensor {part} has {int((~w.isfinite()).sum())} non-finite weights")
            w = pruned(self.parameters[bank], w, self.config.prune)
            if format.quantized:
                yield part, QuantizedTensor(format, *quantize_rows(w, self.spec(part)))
                continue
            values = w.to(DTYPES[format.format])
            if not values.isfinite().all():
                raise InputError(f"tensor {part} has magnitudes up to {w.abs().max():.3g}: float16 ends at 65504")
            yield part, QuantizedTensor(format, values)

    def decode(self, encoded: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
        """fp32 banks: the weights that the artifact's reader gets."""
        return join({part: tensor.decode() for part, tensor in encoded.items()})

    def projected_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Forecast of the compressed payload: the order-0 entropy of the codes of each tensor, scales and
        kept values at full size. Compressors end within about two percent of it on trained weights."""
        bits = 0.0
        for tensor in self.encode(state).values():
            if tensor.scale is None:
                bits += 8 * tensor.format.value_bytes
                continue
            bits += 8 * tensor.format.scale_bytes + tensor.format.elements * code_entropy(tensor.values)
        return math.ceil(bits / 8)

    def table(self, state: Mapping[str, Tensor] | None = None) -> list[TensorReport]:
        """One report per part; with `state`, the error that pruning and quantizing it makes."""
        encoded = self.encode(state) if state is not None else {}
        reports = []
        for part, format in self.formats.items():
            bank, layers = parse_group(part)
            error = None
            if encoded:
                w = state[bank].cpu() if state[bank].ndim == 0 else state[bank][layers].cpu()
                error = _relative_error(w, encoded[part].decode().cpu())
            reports.append(tensor_report(part, format, error))
        return reports


def code_entropy(codes: Tensor) -> float:
    """Order-0 entropy of int8 codes, bits a code."""
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log2()).sum().item()


def payload_bytes(formats: Mapping[str, TensorFormat]) -> int:
    return sum(format.value_bytes + format.scale_bytes for format in formats.values())


def tensor_report(name: str, format: TensorFormat, error: float | None = None) -> TensorReport:
    snr = None if error is None else math.inf if error == 0 else -20 * math.log10(error)
    return TensorReport(name, format.format, format.elements, format.value_bytes, format.scale_bytes, error, snr)


def _relative_error(w: Tensor, decoded: Tensor) -> float:
    error, norm = (decoded - w).double().norm().item(), w.double().norm().item()
    return error / norm if norm else 0.0 if error == 0 else math.inf
