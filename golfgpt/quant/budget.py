"""The byte budget: the size of an artifact before anything is trained, the widest model that fits, and the verdict."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache

import torch
from golfgpt_kernels import RowQuant, quantize_rows
from torch import Tensor

from golfgpt.config import BudgetConfig, QuantRule, RunConfig
from golfgpt.errors import BudgetError
from golfgpt.quant import artifact
from golfgpt.quant.codecs import compress
from golfgpt.quant.quantizer import Quantizer, code_entropy, matches

_STEP = 16
"""Multiple that fitted widths are of, beside the groups of columns that share a scale: a tensor core's tile in bf16."""
_SAMPLE = 2**20
"""Codes drawn for each format."""
LEAST_FORECAST = 0.96
"""Of the size of a published file (`forecast_bytes`)."""


def forecast_bytes(quantizer: Quantizer) -> int:
    """Bytes of model.golf if its matrices were Gaussian: the order-0 entropy of such rows' codes times what the
    compressor makes of a sample beyond it, scales and passthrough values at full size, and the header. It does not see
    pruning.

    Of the published files, whose compressors differ a little from ours, it is 0.96 to 1.02 times the size
    (tests/test_recipes.py).
    """
    total = artifact.header_bytes(quantizer) + sum(quantizer.extra_bytes)
    for name, format in quantizer.formats.items():
        if not format.quantized:
            total += format.value_bytes
            continue
        spec = replace(quantizer.spec(name), scale_floor=0.0, group_size=None)
        codes = _gaussian_codes(format.group or format.shape[-1], spec)
        bits = code_entropy(codes) * _overhead(format.bits, quantizer.config.compressor, quantizer.config.level)
        total += format.elements * bits / 8 + format.scale_bytes
    return math.ceil(total)


@cache
def _gaussian_codes(columns: int, spec: RowQuant) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(max(_SAMPLE // columns, 1), columns, generator=generator)
    return quantize_rows(w, spec, impl="eager")[0]


@cache
def _overhead(bits: int, compressor: str, level: int | None) -> float:
    """Compressed bytes over entropy of a sample of Gaussian codes, at least 1."""
    codes = _gaussian_codes(512, RowQuant(bits=bits))
    compressed = compress(codes.numpy().tobytes(), compressor, level)[2]
    return max(8 * len(compressed) / (codes.numel() * code_entropy(codes)), 1.0)


def fitted(config: RunConfig) -> RunConfig:
    """`config` with the MLP width that budget.fit asks for.

    Raises BudgetError if even the narrowest model is forecast to be over the budget.
    """
    if config.budget.fit == "off":
        return config
    limit = config.budget.artifact_bytes - (config.budget.code_bytes or 0) - config.budget.reserve_bytes
    model, layers = config.model, config.model.num_layers
    names = [f"blocks.{i}.mlp.proj.weight" for i in range(layers)]  # the matrices whose rows get longer
    rules = [QuantRule.parse(text) for text in config.quant.rules]
    groups = [rule.group for rule in rules if rule.group and any(matches(rule.pattern, n, layers) for n in names)]
    step = math.lcm(_STEP, *groups)

    def size(steps: int) -> float:
        quantizer = Quantizer(replace(model, mlp_hidden=steps * step), config.quant)
        too_large = quantizer.payload_bytes > artifact.MAX_PAYLOAD_BYTES
        return math.inf if too_large else forecast_bytes(quantizer)

    # Wider is larger, but for one drop: matrices up to keep_numel elements are float16, wider ones integers.
    drop = config.quant.keep_numel // model.model_dim // step + 1
    most = artifact.MAX_PAYLOAD_BYTES // (2 * layers * model.model_dim * step) + 1
    for widths in (range(drop, max(drop, most) + 1), range(1, drop)):
        if fits := bisect_right(widths, limit, key=size):
            return replace(config, model=replace(model, mlp_hidden=widths[fits - 1] * step))
    artifact.check_payload_bytes(Quantizer(replace(model, mlp_hidden=step), config.quant).formats)
    raise BudgetError(
        f"budget.fit: with model.mlp_hidden {step} the forecast is {size(1):,} bytes, above the {limit:,} that "
        "budget.artifact_bytes, code_bytes and reserve_bytes leave; take fewer layers or bits, or a smaller vocabulary"
    )


@dataclass(frozen=True)
class BudgetReport:
    """The artifact against its budget, in decimal bytes."""

    file_bytes: int
    code_bytes: int | None
    """None: not counted."""
    limit_bytes: int
    """On both together."""

    @property
    def total_bytes(self) -> int:
        return self.file_bytes + (self.code_bytes or 0)

    @property
    def margin_bytes(self) -> int:
        """Bytes left under the limit; negative when over it."""
        return self.limit_bytes - self.total_bytes

    def __str__(self) -> str:
        code = "not counted" if self.code_bytes is None else f"{self.code_bytes:,}"
        return (
            f"{self.total_bytes:,} bytes = model {self.file_bytes:,} + code {code}; "
            f"limit {self.limit_bytes:,}, margin {self.margin_bytes:,}"
        )


def budget_report(file_bytes: int, budget: BudgetConfig) -> BudgetReport:
    return BudgetReport(file_bytes, budget.code_bytes, budget.artifact_bytes)


def check_budget(file_bytes: int, budget: BudgetConfig) -> BudgetReport:
    """The report of an artifact that fits. Raises BudgetError for one that is over by a byte or more."""
    report = budget_report(file_bytes, budget)
    if report.margin_bytes < 0:
        raise BudgetError(
            f"over budget: {report}. Take fewer bits (--quant.bits), a smaller model (--model.num-layers, "
            "--model.model-dim, --model.mlp-hidden, --model.vocab-size), or --quant.compressor smallest if it is not"
        )
    return report
