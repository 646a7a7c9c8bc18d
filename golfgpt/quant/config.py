"""Config of the quantization and of the byte budget. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from golfgpt.fields import (
    Count,
    CountOrZero,
    Fraction,
    FractionAboveZero,
    FractionBelowOne,
    Limit,
    NotNegative,
    Positive,
    Section,
)

Compressor = Literal["smallest", "zlib", "zstd", "lzma", "brotli"]
LEVELS = {"zlib": (1, 9), "zstd": (1, 22), "lzma": (0, 9), "brotli": (0, 11)}
Floor = Annotated[NotNegative, Limit("<", 1024)]


@dataclass(frozen=True)
class QuantRule:
    """One entry of `QuantConfig.rules`, parsed."""

    pattern: str
    """Glob pattern for published tensor names."""
    format: str
    """float32, float16 or int2 to int8."""
    group: int | None = None
    """Columns per scale; None: one scale per row."""
    clip: str | float | None = None
    """max, quantile, search, or a number of standard deviations; None: quant.clip."""

    @classmethod
    def parse(cls, text: str) -> QuantRule:
        """Parse PATTERN=FORMAT[/GROUP][@CLIP]. Raises ValueError for other text."""
        number, clips = r"[1-9][0-9]{0,5}", "max|quantile|search"
        clip = rf"(?:@({clips}|{number}(?:\.[0-9]+)?))?"
        match = re.fullmatch(rf"([^=]+)=(float32|float16|int[2-8])(?:/({number}))?{clip}", text)
        if not match or ((match[3] or match[4]) and not match[2].startswith("int")):
            raise ValueError(
                f"quant.rules: got {text!r}; expected PATTERN=FORMAT with float32, float16 or int2 to int8, such as "
                "'tok_emb.weight=float16', '*.mlp.*=int5', '*.attn.*=int6/64' (64 columns per scale), "
                "'tok_emb.weight=int8@20' (clipped at 20 standard deviations) or 'tok_emb.weight=int8@max'"
            )
        clip = match[4] and (match[4] if match[4] in clips else float(match[4]))
        return cls(match[1], match[2], int(match[3]) if match[3] else None, clip)


@dataclass(frozen=True, kw_only=True)
class QuantConfig(Section):
    """Quantization of the exported weights, and fake quantization in training. Matrices are stored as integers with one
    scale per row, small tensors as floats."""

    bits: Annotated[int, Limit(">=", 2), Limit("<=", 8)] = 8
    """Bits per matrix code, 2 to 8. Each code is stored as one byte; packing is left to the compressor."""
    rules: tuple[str, ...] = ()
    """Formats of single tensors, PATTERN=FORMAT[/GROUP][@CLIP], for example "*.mlp.*=int5" or
    "tok_emb.weight=float16". The first rule that matches applies. Patterns are globs over published names
    (blocks.3.attn.c_q.weight); layers can also be counted from the end (blocks.-1.). GROUP is the number of columns per
    scale; CLIP is max, quantile, search or a number of standard deviations, in place of quant.clip."""
    clip: Literal["max", "quantile", "deviation", "search"] = "max"
    """Clip of a row. max: its largest magnitude; quantile: the 0.9999984 quantile of its magnitudes, as published until
    2026-04-04; deviation: a number of its standard deviations (SDClip, from 2026-04-05 on), which makes the codes'
    entropy, and with it the file, as small as one likes; search: of five clips the one with the least squared error,
    for a whole matrix (published 2026-03-22 to 2026-04-04)."""
    deviations: NotNegative = 0.0
    """That number, for clip "deviation". More is a coarser grid: int6 with 12.85 takes about 3.3 bits a weight."""
    hessian_clip: Fraction = 0.0
    """Weight of a row's inputs in its clip by deviation, with gptq (published in parameter-golf PR #1412: 0.175; worth
    nothing)."""
    wide_columns: CountOrZero = 0
    """With gptq: neighbouring columns to store in int8, those of the model that matter most (published as AWQ-lite,
    parameter-golf PR #1908, with 64: worth 0.0003). 0: none."""
    low_rank: Annotated[CountOrZero, Limit("<=", 64)] = 0
    """Rank of corrections to the matrices with the largest errors (published as LQER, parameter-golf PR #1797, with 4:
    worth 0.0003). 0: none."""
    low_rank_tensors: Count = 3
    """Number of these matrices."""
    low_rank_group: CountOrZero = 64
    """Codes of a correction's right factor that share a scale, 4 bits each; the left one has 2 bits and one scale. 0,
    or where it does not divide the factor: 4 bits and a scale for each row of both."""
    clip_floor: Floor = 0.0
    """Smallest clip of a row. Recipes baseline to int6-qat-4096 have 1, which wastes levels on rows with a maximum
    below 1."""
    scale_floor: Floor = 0.0
    """Smallest scale of a row. Recipe int5-int6-swa has 2^-14, the smallest normal float16."""
    code_range: Literal["symmetric", "full"] = "symmetric"
    """Range of the codes, with m = 2^(bits-1) - 1. symmetric: -m..m; full: -m-1..m, as in recipes int6-qat-4096 and
    int5-int6-swa, although rounding a row never gives -m-1."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """Dtype in which row scales are stored."""
    codes_from: Literal["stored_scale", "float32_scale"] = "stored_scale"
    """Scale from which the codes are computed: the stored scale (correct), or the scale before rounding (recipe
    baseline)."""
    method: Literal["rtn", "gptq"] = "rtn"
    """How codes are chosen. rtn: each weight is rounded to the nearest; gptq: so that the products with the inputs of
    training text err least (golfgpt.quant.gptq). What was trained through fake quantization ships unchanged with rtn
    only."""
    calibration: Literal["train", "samples"] = "train"
    """Text whose inputs gptq sees. train: the first training tokens, in the order of training; samples: the model's
    own, at temperature 0.8 from a random token on, which touches no data but takes longer (published 2026-03-25)."""
    calibration_tokens: Count = 262_144
    """Tokens of it: whole steps of training text, or whole batches of samples. Published runs take 1.6 to 6.3 million
    of training text, 131,072 of samples."""
    damping: Positive = 0.01
    """For gptq: this part of a Hessian's mean diagonal is added to its diagonal."""
    embed_damping: Positive = 0.1
    """The same for a tied embedding, whose Hessian knows its use as head only. Published runs have 0.01, which is worse
    than rounding at 4 bits (LOG.md)."""
    keep_numel: CountOrZero = 65_536
    """Matrices with at most this many elements are stored in float16."""
    control_dtype: Literal["float32", "float16"] = "float32"
    """Dtype in which gains, scales, mixes and gates are stored."""
    prune: FractionBelowOne = 0.0
    """Fraction of each large matrix to set to zero before quantization, smallest magnitudes first (recipe
    int5-int6-swa: 0.05)."""
    qat: Literal["off", "export", "r4", "r5"] = "off"
    """Fake quantization in training. export: every tensor as the artifact will hold it. r4, r5: as published, linear
    layers only, with scales that are not rounded and have no floor; r4 with the quantile clip, r5 with codes down to
    -m-1."""
    qat_start: FractionBelowOne = 0.0
    """Fraction of the training budget after which fake quantization is on; 0: from the first step."""
    qat_below_lr: FractionAboveZero = 1.0
    """Fake quantization is on only while the learning-rate multiplier is at most this."""
    compressor: Compressor = "smallest"
    """Compressor of the payload. smallest: try all at their highest level."""
    level: int | None = None
    """Level of the compressor: zlib 1-9, zstd 1-22, lzma 0-9, brotli 0-11; None: the highest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = [QuantRule.parse(rule) for rule in self.rules]
        if (self.clip == "deviation") != (self.deviations > 0):
            raise ValueError(
                f"quant.clip is {self.clip} and quant.deviations is {self.deviations:g}; expected a positive number "
                "with clip deviation, 12.85 say, and 0 with any other"
            )
        if (self.hessian_clip or self.wide_columns) and self.method != "gptq":
            raise ValueError(
                f"quant.hessian_clip {self.hessian_clip:g} and quant.wide_columns {self.wide_columns} expected "
                f"quant.method gptq, whose Hessians they read; got {self.method}"
            )
        if self.hessian_clip and not (self.deviations or any(isinstance(rule.clip, float) for rule in rules)):
            raise ValueError(f"quant.hessian_clip {self.hessian_clip:g} expected a clip by deviation; got {self.clip}")
        searched = "search" in (self.clip, *(rule.clip for rule in rules))
        if self.codes_from != "stored_scale" and (self.method == "gptq" or searched):
            raise ValueError(
                f"quant.codes_from is {self.codes_from}; expected stored_scale with quant.method gptq or clip search"
            )
        if self.qat != "off" and (self.wide_columns or self.low_rank or searched):
            raise ValueError(
                f"quant.qat is {self.qat}; expected off with quant.wide_columns, low_rank or a clip that is searched: "
                "training does not see what they change"
            )
        if self.qat == "off" and (self.qat_start, self.qat_below_lr) != (0, 1):
            raise ValueError(
                f"quant.qat_start {self.qat_start:g} and quant.qat_below_lr {self.qat_below_lr:g} have no effect while "
                "quant.qat is off; expected quant.qat export, r4 or r5"
            )
        if self.level is None:
            return
        if self.compressor not in LEVELS:
            raise ValueError(
                f"quant.level {self.level} expected one quant.compressor ({', '.join(LEVELS)}), got {self.compressor}, "
                "which uses the highest level of each"
            )
        low, high = LEVELS[self.compressor]
        if not low <= self.level <= high:
            raise ValueError(f"quant.level is {self.level}; expected {low} to {high} for {self.compressor}")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(Section):
    """The byte budget, in decimal bytes."""

    artifact_bytes: Count = 16_000_000
    """Maximum of the size of model.golf plus code_bytes."""
    code_bytes: CountOrZero | None = None
    """Bytes of the code that ships with the model. None: those of the train_gpt.py that `golfgpt submit pack` makes of
    this configuration, measured before the run starts (published scripts: 47,642 to 57,201)."""
    fit: Literal["off", "mlp_hidden"] = "off"
    """mlp_hidden: before training, replace model.mlp_hidden by the largest multiple of 16 for which the forecast size
    of model.golf is at least reserve_bytes under the budget."""
    reserve_bytes: CountOrZero = 200_000
    """Bytes that `fit` leaves free. The forecast assumes Gaussian weights; others can compress less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        left = self.artifact_bytes - (self.code_bytes or 0)
        if left <= 0:
            raise ValueError(
                f"budget.code_bytes {self.code_bytes} leaves nothing of budget.artifact_bytes {self.artifact_bytes}; "
                "expected code_bytes below artifact_bytes"
            )
        if self.fit != "off" and left <= self.reserve_bytes:
            raise ValueError(
                f"budget.reserve_bytes {self.reserve_bytes} leaves nothing for the model; expected less than "
                f"budget.artifact_bytes - budget.code_bytes = {left}"
            )
