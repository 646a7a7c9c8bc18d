"""How a model's weights become the numbers of an artifact: one quantizer for training, probes and export.

Formats, decided for each bank from the size of one layer's tensor (the rule of recipe R0):

    matrices above keep_numel elements    codes int8 in -m..m, m = 2^(bits-1) - 1, and one scale per row
    matrices up to keep_numel elements    float16
    control tensors, any size             float32

A decoded weight is fp32(code) * fp32(stored scale). Fake quantization in training computes the same product
from the same codes (`golfgpt_kernels.quantize_rows`, `dequantize_rows`), so what was trained is what ships.
Codes take a byte each whatever their bits; the entropy coder of the artifact earns the difference.

Left out on purpose: bit packing, which costs the compressor more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from golfgpt_kernels import dequantize_rows, quantize_rows
from torch import Tensor

from golfgpt.config import ModelConfig, QuantConfig
from golfgpt.errors import InputError
from golfgpt.upstream import check_state, parameter_shapes

CONTROL_TENSORS = frozenset(
    {"attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear_gate", "bigram_scale"}
)
_MODEL_MATRICES = frozenset({"tok_emb", "lm_head", "bigram_table", "bigram_proj"})  # other banks hold one a layer

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
DTYPES = {"float32": torch.float32, "float16": torch.float16} | {f"int{bits}": torch.int8 for bits in range(2, 9)}


@dataclass(frozen=True)
class TensorFormat:
    """Storage of one bank."""

    shape: tuple[int, ...]
    format: str
    """float32, float16, or int2 to int8 (per-row codes, a byte each)."""
    scale: str | None = None
    """dtype of the row scales, float16 or float32, of an integer format."""

    def __post_init__(self) -> None:
        if self.format not in DTYPES:
            raise InputError(f"unknown tensor format {self.format!r}")
        if self.quantized and self.scale not in SCALE_DTYPES:
            raise InputError(f"unknown scale dtype {self.scale!r} of format {self.format}")
        if not self.quantized and self.scale is not None:
            raise InputError(f"format {self.format} has no scales, got {self.scale!r}")

    @property
    def quantized(self) -> bool:
        return self.format.startswith("int")

    @property
    def max_code(self) -> int:
        """Largest magnitude of a code, for example 31 for int6."""
        return 2 ** (int(self.format.removeprefix("int")) - 1) - 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def value_bytes(self) -> int:
        """Bytes of the codes, or of the kept values."""
        return self.elements * DTYPES[self.format].itemsize

    @property
    def scale_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * DTYPES[self.scale].itemsize if self.quantized else 0


@dataclass(frozen=True)
class QuantizedTensor:
    """One bank in its format: codes (..., rows, columns) int8 and their scale (..., rows), or kept values."""

    format: TensorFormat
    values: Tensor
    scale: Tensor | None = None

    def decode(self) -> Tensor:
        """fp32 weights (shape of the bank)."""
        if self.scale is None:
            return self.values.float()
        return dequantize_rows(self.values, self.scale)


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


def plan(shapes: Mapping[str, tuple[int, ...]], config: QuantConfig) -> dict[str, TensorFormat]:
    """Format of each bank of `shapes` (name -> shape), in the same order."""
    formats = {}
    for name, shape in shapes.items():
        per_layer = math.prod(shape if name in _MODEL_MATRICES else shape[1:])
        if name in CONTROL_TENSORS:
            formats[name] = TensorFormat(shape, "float32")
        elif per_layer <= config.keep_numel:
            formats[name] = TensorFormat(shape, "float16")
        else:
            formats[name] = TensorFormat(shape, f"int{config.bits}", config.scale_dtype)
    return formats


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of one model under one QuantConfig."""

    model: ModelConfig
    config: QuantConfig

    @cached_property
    def formats(self) -> dict[str, TensorFormat]:
        """Bank name -> format, known before any training."""
        return plan(parameter_shapes(self.model), self.config)

    @property
    def payload_bytes(self) -> int:
        """Exact bytes of all codes, scales and kept values before compression."""
        return payload_bytes(self.formats)

    @property
    def row_options(self) -> dict[str, Any]:
        """Keywords of `golfgpt_kernels.quantize_rows` and its kin, for training to fake-quantize with."""
        return {
            "bits": self.config.bits,
            "clip": self.config.clip,
            "scale_dtype": DTYPES[self.config.scale_dtype],
            "scale_floor": self.config.scale_floor,
            "codes_from": self.config.codes_from,
        }

    def encode(self, state: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        """Quantize the model's banks (any float dtype, any device).

        Raises InputError naming a tensor that is missing, unexpected, mis-shaped or not finite, or that is
        kept in float16 and exceeds it.
        """
        check_state(state, parameter_shapes(self.model))
        return {name: self._encode(name, state[name].detach().float()) for name in self.formats}

    def _encode(self, name: str, w: Tensor) -> QuantizedTensor:
        format = self.formats[name]
        if not w.isfinite().all():
            raise InputError(f"tensor {name} has {int((~w.isfinite()).sum())} non-finite weights")
        if format.quantized:
            return QuantizedTensor(format, *quantize_rows(w, **self.row_options))
        values = w.to(DTYPES[format.format])
        if not values.isfinite().all():
            raise InputError(f"tensor {name} has magnitudes up to {w.abs().max():.3g}: float16 ends at 65504")
        return QuantizedTensor(format, values)

    def decode(self, encoded: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
        """fp32 banks: the weights that the artifact's reader gets."""
        return {name: tensor.decode() for name, tensor in encoded.items()}

    def projected_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Forecast of the compressed payload: the order-0 entropy of the codes of each tensor, scales and
        kept values at full size. Compressors end within about two percent of it on trained weights."""
        bits = 0.0
        for tensor in self.encode(state).values():
            if tensor.scale is None:
                bits += 8 * tensor.format.value_bytes
                continue
            counts = torch.bincount(tensor.values.flatten().int() + 128, minlength=256).double()
            bits += (
                8 * tensor.format.scale_bytes - (counts * (counts / counts.sum()).clamp_min(1e-300).log2()).sum().item()
            )
        return math.ceil(bits / 8)

    def table(self, state: Mapping[str, Tensor] | None = None) -> list[TensorReport]:
        """One report per bank; with `state`, the error that quantizing it makes."""
        encoded = self.encode(state) if state is not None else {}
        reports = []
        for name, format in self.formats.items():
            error = _relative_error(state[name], encoded[name].decode()) if encoded else None
            reports.append(tensor_report(name, format, error))
        return reports


def payload_bytes(formats: Mapping[str, TensorFormat]) -> int:
    return sum(format.value_bytes + format.scale_bytes for format in formats.values())


def tensor_report(name: str, format: TensorFormat, error: float | None = None) -> TensorReport:
    snr = None if error is None else math.inf if error == 0 else -20 * math.log10(error)
    return TensorReport(name, format.format, format.elements, format.value_bytes, format.scale_bytes, error, snr)


def _relative_error(w: Tensor, decoded: Tensor) -> float:
    error, norm = (decoded - w).double().norm().item(), w.double().norm().item()
    return error / norm if norm else 0.0 if error == 0 else math.inf
