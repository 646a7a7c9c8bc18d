"""How trained weights become bytes, and how many there may be. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from golfgpt.fields import Count, CountOrZero, FractionAboveZero, FractionBelowOne, Limit, NotNegative, Section

Compressor = Literal["smallest", "zlib", "zstd", "lzma", "brotli"]
LEVELS = {"zlib": (1, 9), "zstd": (1, 22), "lzma": (0, 9), "brotli": (0, 11)}
Floor = Annotated[NotNegative, Limit("<", 1024)]


@dataclass(frozen=True)
class QuantRule:
    """What one entry of `QuantConfig.rules` says."""

    pattern: str
    """Glob over published tensor names."""
    format: str
    """float32, float16 or int2 to int8."""
    group: int | None = None
    """Columns that share a scale; None: the row."""

    @classmethod
    def parse(cls, text: str) -> QuantRule:
        """PATTERN=FORMAT or PATTERN=FORMAT/GROUP. Raises ValueError."""
        match = re.fullmatch(r"([^=]+)=(float32|float16|int[2-8])(?:/([1-9][0-9]{0,5}))?", text)
        if not match or (match[3] and not match[2].startswith("int")):
            raise ValueError(
                f"quant.rules: {text!r} is not PATTERN=FORMAT with float32, float16 or int2 to int8, such as "
                "'tok_emb.weight=float16', '*.mlp.*=int5' or '*.attn.*=int6/64' (64 columns a scale)"
            )
        return cls(match[1], match[2], int(match[3]) if match[3] else None)


@dataclass(frozen=True, kw_only=True)
class QuantConfig(Section):
    """How the trained weights become bytes, and whether training sees it. Small tensors are kept, matrices become
    integers with a scale a row."""

    bits: Annotated[int, Limit(">=", 2), Limit("<=", 8)] = 8
    """Bits per matrix code, 2 to 8; codes are stored as bytes and left to the compressor."""
    rules: tuple[str, ...] = ()
    """Formats of some tensors, PATTERN=FORMAT[/GROUP], for example "*.mlp.*=int5" or "tok_emb.weight=float16"; the
    first that matches decides. Patterns are globs over published names (blocks.3.attn.c_q.weight); layers also
    count from the end (blocks.-1.)."""
    clip: Literal["max", "quantile"] = "max"
    """Row clip: the largest magnitude, or upstream's 0.9999984 quantile of the magnitudes."""
    clip_floor: Floor = 0.0
    """Smallest row clip. Published R0 to R4b use 1, which wastes levels on rows whose maximum is below 1."""
    scale_floor: Floor = 0.0
    """Smallest row scale; published R5 uses 2^-14, the smallest normal float16."""
    code_range: Literal["symmetric", "full"] = "symmetric"
    """Codes -m..m, m = 2^(bits-1) - 1, or -m-1..m as in published R4b and R5; rounding a row never needs the last."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """Storage type of the row scales."""
    codes_from: Literal["stored_scale", "float32_scale"] = "stored_scale"
    """Scale that the codes are computed with: the stored one (right), or the one before rounding (upstream R0)."""
    keep_numel: CountOrZero = 65_536
    """Matrices with at most this many elements are kept in float16."""
    control_dtype: Literal["float32", "float16"] = "float32"
    """Storage type of gains, scales, mixes and gates."""
    prune: FractionBelowOne = 0.0
    """Share of each large matrix's smallest magnitudes that is set to zero before quantizing (published R5: 0.05)."""
    qat: Literal["off", "export", "r4", "r5"] = "off"
    """Fake quantization in training. export: every tensor as the artifact will hold it; r4, r5: as published, linear
    layers only, with unrounded scales without floors, r4 with the quantile clip and r5 with codes to -m-1."""
    qat_start: FractionBelowOne = 0.0
    """Fraction of the budget after which it is on; 0: from the first step."""
    qat_below_lr: FractionAboveZero = 1.0
    """It is on while the learning-rate multiplier is at most this."""
    compressor: Compressor = "smallest"
    """Compressor of the payload; smallest tries all at their highest level."""
    level: int | None = None
    """Level of the compressor: zlib 1-9, zstd 1-22, lzma 0-9, brotli 0-11; None: the highest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for rule in self.rules:
            QuantRule.parse(rule)
        if self.qat == "off" and (self.qat_start, self.qat_below_lr) != (0, 1):
            raise ValueError(
                "quant.qat_start and quant.qat_below_lr say when quant.qat is on: set it to export, r4 or r5"
            )
        if self.level is None:
            return
        if self.compressor not in LEVELS:
            raise ValueError(
                f"quant.level {self.level} needs one quant.compressor; {self.compressor} uses the highest of each"
            )
        low, high = LEVELS[self.compressor]
        if not low <= self.level <= high:
            raise ValueError(f"quant.level is {self.level}; {self.compressor} expects {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(Section):
    """The byte budget, in decimal bytes."""

    artifact_bytes: Count = 16_000_000
    """Largest total of model.golf and code_bytes."""
    code_bytes: CountOrZero = 60_000
    """Allowance for the code that ships with the model (published scripts: 47,642 to 57,201 bytes)."""
    fit: Literal["off", "mlp_hidden"] = "off"
    """mlp_hidden: before training, the widest MLP (a multiple of 16) whose forecast of model.golf lands reserve_bytes
    under the budget takes the place of model.mlp_hidden."""
    reserve_bytes: CountOrZero = 200_000
    """Bytes that fit leaves free: weights of other distributions than the forecast's compress less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        left = self.artifact_bytes - self.code_bytes
        if left <= 0:
            raise ValueError(
                f"budget.code_bytes {self.code_bytes} leaves nothing of budget.artifact_bytes {self.artifact_bytes}"
            )
        if self.fit != "off" and left <= self.reserve_bytes:
            raise ValueError(
                f"budget.reserve_bytes {self.reserve_bytes} leaves nothing of the {left} bytes that budget.code_bytes "
                "leaves of budget.artifact_bytes"
            )
