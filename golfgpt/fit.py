"""The size of an artifact before anything is trained, and the widest model that fits."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from golfgpt_kernels import quantize_rows
from torch import Tensor

from golfgpt import artifact
from golfgpt.config import RunConfig
from golfgpt.errors import BudgetError
from golfgpt.quant import Quantizer, code_entropy

_STEP = 16
"""Multiple that fitted widths are of: a tensor core's tile in bf16."""
_SAMPLE = 2**20
"""Codes drawn for each format."""


def forecast_bytes(quantizer: Quantizer) -> int:
    """Bytes of model.golf if its matrices were Gaussian: the order-0 entropy of such rows' codes times what the
    compressor makes of a sample beyond it, scales and kept values at full size, and the header. Pruning is not seen.
    """
    total = artifact.header_bytes(quantizer)
    for part, format in quantizer.formats.items():
        if not format.quantized:
            total += format.value_bytes
            continue
        options = quantizer.options(part) | {"scale_floor": 0.0}
        codes = _gaussian_codes(format.group or format.shape[-1], options)
        bits = code_entropy(codes) * _overhead(format.bits, quantizer.config.compressor, quantizer.config.level)
        total += format.elements * bits / 8 + format.scale_bytes
    return math.ceil(total)


@cache
def _gaussian_codes_of(columns: int, options: tuple[tuple[str, Any], ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(max(_SAMPLE // columns, 1), columns, generator=generator)
    return quantize_rows(w, **dict(options))[0]


def _gaussian_codes(columns: int, options: dict[str, Any]) -> Tensor:
    return _gaussian_codes_of(columns, tuple(sorted((options | {"group_size": None}).items())))


@cache
def _overhead(bits: int, compressor: str, level: int | None) -> float:
    """Compressed bytes over entropy of a sample of Gaussian codes, at least 1."""
    codes = _gaussian_codes(512, {"bits": bits})
    compressed = artifact.compress(codes.numpy().tobytes(), compressor, level)[2]
    return max(8 * len(compressed) / (codes.numel() * code_entropy(codes)), 1.0)


def fitted(config: RunConfig) -> RunConfig:
    """`config` with the MLP width that budget.fit asks for.

    Raises BudgetError where even the narrowest model is forecast to be over the budget.
    """
    if config.budget.fit == "off":
        return config
    limit = config.budget.artifact_bytes - config.budget.code_bytes - config.budget.reserve_bytes

    def size(width: int) -> int:
        return forecast_bytes(Quantizer(replace(config.model, mlp_hidden=width), config.quant))

    if size(_STEP) > limit:
        raise BudgetError(
            f"budget.fit: with model.mlp_hidden {_STEP} the forecast is {size(_STEP):,} bytes, above the {limit:,} "
            "that budget.artifact_bytes, code_bytes and reserve_bytes leave; take fewer layers, bits or tokens"
        )
    low, high = 1, 2
    while size(high * _STEP) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle * _STEP) <= limit else (low, middle)
    return replace(config, model=replace(config.model, mlp_hidden=low * _STEP))
