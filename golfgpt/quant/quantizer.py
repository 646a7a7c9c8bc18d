"""How a model's weights become the numbers of an artifact: one quantizer for training, probes and export.

Formats, decided for each published tensor (a layer of a bank) by the first that applies:

    a rule of QuantConfig.rules           what the rule says: float32, float16, or int2 to int8
    control tensors, any size             float32 (QuantConfig.control_dtype)
    matrices up to keep_numel elements    float16
    other matrices                        codes int8 in -m-1..m, m = 2^(bits-1) - 1, and one scale per row
                                          or per `group` columns

Neighbouring layers of one format are one layer group, which the artifact stores as one tensor: "c_k", or "c_k[0:7]" and
"c_k[7:9]" if the last two layers are stored in float16. Tensors in float32 and float16 are passed through.

A decoded weight is fp32(code) * fp32(stored scale). With qat="export" training computes the same product from
the same codes, and rounds passthrough tensors to float16 as the artifact will, so what was trained is what ships.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from golfgpt_kernels import RowQuant, dequantize_rows, quantize_rows
from torch import Tensor

from golfgpt.config import ModelConfig, QuantConfig, QuantRule
from golfgpt.errors import InputError
from golfgpt.model.parameters import Param, parameter_shapes, parameter_table
from golfgpt.published.names import check_state
from golfgpt.published.quirks import export_quirks, published_fake_quant
from golfgpt.quant.gptq import solve

DTYPES = {"float32": torch.float32, "float16": torch.float16} | {f"int{bits}": torch.int8 for bits in range(2, 9)}

PRUNED_NUMEL = 65_536
"""Published pruning leaves matrices of at most this many elements alone."""

Rounding = RowQuant | torch.dtype | None
"""What training rounds a weight to: codes and scales, a dtype, or nothing."""

FakeQuant = Mapping[str, Sequence[tuple[int, Rounding]]]
"""Bank -> (number of layers, rounding) of each of its layer groups."""


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

    def __post_init__(self) -> None:
        if self.format not in DTYPES:
            raise InputError(f"tensor format {self.format!r}, expected one of {', '.join(DTYPES)}")
        if not self.quantized:
            if (self.scale, self.group) != (None, None):
                raise InputError(f"format {self.format} has no scales, got {self.scale!r} for {self.group!r} columns")
            return
        if self.scale not in ("float16", "float32"):
            raise InputError(f"format {self.format} with scales of {self.scale!r}, expected float16 or float32")
        if len(self.shape) < 2:
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
        """Bytes of the codes, or of the passthrough values."""
        return self.elements * DTYPES[self.format].itemsize

    @property
    def scale_bytes(self) -> int:
        return math.prod(self.scale_shape) * DTYPES[self.scale].itemsize if self.quantized else 0


@dataclass(frozen=True)
class QuantizedTensor:
    """One layer group in its format: codes (..., rows, columns) int8 and their scales (format.scale_shape), or
    passthrough values."""

    format: TensorFormat
    values: Tensor
    scale: Tensor | None = None

    def decode(self) -> Tensor:
        """fp32 weights (format.shape)."""
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


def decode(encoded: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """fp32 banks of their layer groups, which are in order: the weights that the artifact's reader gets."""
    banks: dict[str, list[Tensor]] = {}
    for name, tensor in encoded.items():
        banks.setdefault(parse_layer_group(name)[0], []).append(tensor.decode())
    return {bank: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for bank, tensors in banks.items()}


def layers_of(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The layer group `name` of the banks in `state`."""
    bank, layers = parse_layer_group(name)
    return state[bank][layers] if state[bank].ndim else state[bank]


def plan_formats(table: Mapping[str, Param], config: QuantConfig) -> dict[str, TensorFormat]:
    """Format of each layer group of the parameters in `table`, in the same order.

    Raises InputError for a rule that decides nothing, or that asks for what a tensor's shape does not have.
    """
    return {name: format for name, (format, _) in _plan(table, config).items()}


def _plan(table: Mapping[str, Param], config: QuantConfig) -> dict[str, tuple[TensorFormat, float]]:
    """Layer group -> its format, and its clip in standard deviations, 0 with another clip."""
    rules = [QuantRule.parse(text) for text in config.rules]
    formats, deciding = {}, set()
    for bank, param in table.items():
        names = param.published_names
        first = [next((r for r in rules if matches(r.pattern, name, len(names))), None) for name in names]
        deciding.update(first)
        kinds = [_kind(param, rule, config) for rule in first]
        for group, shape, members, kind in layer_groups(bank, param, kinds):
            try:
                formats[group] = TensorFormat(shape, *kind[:-1]), kind[-1]
            except InputError as error:
                raise InputError(f"quant.rules: {members[0]} ({group}): {error}") from None
    if idle := [rule.pattern for rule in rules if rule not in deciding]:
        some = ", ".join(param.published_names[0] for param in table.values())
        raise InputError(
            f"quant.rules: {idle[0]!r} decides nothing: it matches no tensor of this model, or rules before it "
            f"match the same ones (the first that matches decides). Names are like {some}"
        )
    return formats


def matches(pattern: str, name: str, num_layers: int) -> bool:
    """Whether the glob fits a published name or, if it begins with blocks.-, that with the layer counted from the
    end."""
    if pattern.startswith("blocks.-"):
        name = re.sub(r"^blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) - num_layers}.", name)
    return fnmatchcase(name, pattern)


def _kind(param: Param, rule: QuantRule | None, config: QuantConfig) -> tuple[str, str | None, int | None, float]:
    """(format, scale dtype, columns per scale, deviations) of a published tensor."""
    if rule is not None and rule.format.startswith("int"):
        return rule.format, config.scale_dtype, rule.group, rule.deviations or config.deviations
    if rule is not None:
        return rule.format, None, None, 0.0
    if param.kind == "control":
        return config.control_dtype, None, None, 0.0
    if math.prod(param.shape[param.layered :]) <= config.keep_numel:
        return "float16", None, None, 0.0
    return f"int{config.bits}", config.scale_dtype, None, config.deviations


# Pruning


def prune_threshold(w: Tensor, fraction: float) -> float:
    """The quantile `fraction` of |w|, over all elements (any number: torch.quantile ends at 2^24), interpolated."""
    return float(np.quantile(w.detach().abs().float().cpu().numpy(), fraction))


def pruned(param: Param, w: Tensor, fraction: float) -> Tensor:
    """w, some layers of `param` or all of it, with the smallest `fraction` of the magnitudes of each published matrix
    above PRUNED_NUMEL set to zero."""
    if fraction == 0 or param.kind == "control":
        return w
    matrices = [
        m.masked_fill(m.abs() < prune_threshold(m, fraction), 0.0) if m.numel() > PRUNED_NUMEL else m
        for m in (w if param.layered else [w])
    ]
    return torch.stack(matrices).view_as(w)


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
        """Layer group -> format, known before any training. Raises InputError as `plan_formats`."""
        return {name: format for name, (format, _) in self._plan.items()}

    @cached_property
    def _plan(self) -> dict[str, tuple[TensorFormat, float]]:
        return _plan(self.parameters, self.config)

    @property
    def payload_bytes(self) -> int:
        """Exact bytes of all codes, scales and passthrough values before compression."""
        return payload_bytes(self.formats)

    @property
    def label(self) -> str:
        """The integer formats, as int8 or int5/int6; float16 if there is none."""
        return "/".join(sorted({f.format for f in self.formats.values() if f.quantized})) or "float16"

    def spec(self, name: str) -> RowQuant:
        """How a quantized layer group becomes codes and scales."""
        c, (format, deviations) = self.config, self._plan[name]
        spec = RowQuant(
            bits=format.bits,
            clip=c.clip,
            deviations=deviations,
            code_range=c.code_range,
            scale_dtype=DTYPES[format.scale],
            scale_floor=c.scale_floor,
            group_size=format.group,
        )
        return export_quirks(spec, c)

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
        for name, format in self.formats.items():
            num_layers = format.shape[0] if format.shape else 1
            banks.setdefault(parse_layer_group(name)[0], []).append((num_layers, self._rounding(name, format)))
        banks = {bank: groups for bank, groups in banks.items() if any(rounding for _, rounding in groups)}
        if not banks:
            raise InputError(
                f"quant.qat {self.config.qat} changes no weight: with this quant.bits, rules and keep_numel, none of "
                "the matrices that it quantizes is stored as integers"
            )
        return banks

    def _rounding(self, name: str, format: TensorFormat) -> Rounding:
        if self.config.qat == "export":
            if format.quantized:
                return self.spec(name)
            return None if format.format == "float32" else DTYPES[format.format]
        if not format.quantized:
            return None
        return published_fake_quant(self.config.qat, self.parameters[parse_layer_group(name)[0]], format.bits)

    def encode(
        self, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor] | None = None
    ) -> dict[str, QuantizedTensor]:
        """Prune and quantize the model's banks (any float dtype, any device); layer group -> tensor. Groups that have
        `hessians` (golfgpt.quant.calibration) get their codes from GPTQ, all others are rounded.

        Raises InputError naming a tensor that is missing, unexpected, mis-shaped or not finite, whose float16
        passthrough values exceed it, or whose Hessian is not positive definite.
        """
        check_state(state, parameter_shapes(self.model))
        encoded = {}
        for name, format in self.formats.items():
            w = layers_of(state, name).detach().float()
            if not w.isfinite().all():
                raise InputError(f"tensor {name} has {int((~w.isfinite()).sum())} non-finite weights")
            w = pruned(self.parameters[parse_layer_group(name)[0]], w, self.config.prune)
            if format.quantized:  # eager, also for CPU tensors of a run with runtime.kernels triton
                codes, scale = quantize_rows(w, self.spec(name), impl="eager")
                if hessians and name in hessians:
                    codes = self._solve(name, w, scale, hessians[name])
                encoded[name] = QuantizedTensor(format, codes, scale)
                continue
            encoded[name] = QuantizedTensor(format, w.to(DTYPES[format.format]))
            if not encoded[name].values.isfinite().all():
                raise InputError(f"tensor {name} has magnitudes up to {w.abs().max():.3g}: float16 ends at 65504")
        return encoded

    def _solve(self, name: str, w: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
        """GPTQ's codes of a layer group for its scales."""
        spec = self.spec(name)
        scale, group = scale.float(), spec.group_size
        columns = scale[..., None] if group is None else scale.repeat_interleave(group, -1)
        matrices, columns = (x.reshape(len(hessian), -1, x.size(-1)) for x in (w, columns))
        try:
            codes = solve(
                matrices,
                hessian.to(w.device),
                columns,
                spec.qmax,
                least=-spec.qmax - (spec.code_range == "full"),
                damping=self.config.damping,
            )
        except InputError as error:
            raise InputError(f"tensor {name}: {error}") from None
        return codes.view_as(w)

    def projected_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Forecast of the compressed payload: the order-0 entropy of the codes of each tensor, scales and
        passthrough values at full size. Compressors end within about two percent of it on trained weights."""
        bits = 0.0
        for tensor in self.encode(state).values():
            if tensor.scale is None:
                bits += 8 * tensor.format.value_bytes
            else:
                bits += 8 * tensor.format.scale_bytes + tensor.format.elements * code_entropy(tensor.values)
        return math.ceil(bits / 8)

    def table(
        self, state: Mapping[str, Tensor] | None = None, encoded: Mapping[str, QuantizedTensor] | None = None
    ) -> list[TensorReport]:
        """One report per layer group; with `state`, the error that pruning and quantizing it makes, or that of
        `encoded`, which was made from it."""
        if state is None:
            return [tensor_report(name, format) for name, format in self.formats.items()]
        return [
            tensor_report(name, tensor.format, _relative_error(layers_of(state, name).cpu(), tensor.decode().cpu()))
            for name, tensor in (encoded or self.encode(state)).items()
        ]


def code_entropy(codes: Tensor) -> float:
    """Order-0 entropy of int8 codes, bits per code."""
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256).double()
    frequencies = counts[counts > 0] / counts.sum()
    return -(frequencies * frequencies.log2()).sum().item()


def payload_bytes(formats: Mapping[str, TensorFormat]) -> int:
    return sum(format.value_bytes + format.scale_bytes for format in formats.values())


def tensor_report(name: str, format: TensorFormat, error: float | None = None) -> TensorReport:
    snr = None if error is None else math.inf if error == 0 else -20 * math.log10(error)
    return TensorReport(name, format.format, format.elements, format.value_bytes, format.scale_bytes, error, snr)


def _relative_error(w: Tensor, decoded: Tensor) -> float:
    error, norm = (decoded - w).double().norm().item(), w.double().norm().item()
    return error / norm if norm else 0.0 if error == 0 else math.inf
