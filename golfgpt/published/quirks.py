"""What published quantizers do that costs bits. Each is a field of the configuration, off by default; the quantizer
calls the two functions below.

quant.clip_floor      R0 to R4b clip rows at 1 or more, so rows whose largest weight is smaller lose levels
quant.codes_from      R0 divides by the scale before its rounding to float16, and decodes with the rounded one
quant.qat r4, r5      training rounds to other grids than the export: scales in float32 and hardly a floor, linear
                      layers only, R4 and R4b with the quantile clip, R5 with codes to -m-1
"""

from __future__ import annotations

from dataclasses import replace

import torch
from golfgpt_kernels import RowQuant

from golfgpt.config import QuantConfig
from golfgpt.model.parameters import Param

_QAT = {
    "r4": RowQuant(bits=8, scale_dtype=torch.float32, clip="quantile"),
    "r5": RowQuant(bits=8, scale_dtype=torch.float32, code_range="full"),
}
_SMALLEST_CLIP = {"r4": 1e-8, "r5": 1e-12}


def export_quirks(spec: RowQuant, config: QuantConfig) -> RowQuant:
    """`spec` of a stored tensor, with quant.clip_floor and quant.codes_from."""
    floor = max(spec.scale_floor, config.clip_floor / spec.qmax)
    return replace(spec, scale_floor=floor, codes_from=config.codes_from)


def published_fake_quant(qat: str, param: Param, bits: int) -> RowQuant | None:
    """Fake quantization of a parameter with qat="r4" or "r5"; None if the published script does not quantize it: R4 and
    R4b quantize the layers' matrices, R5 every matrix."""
    if param.kind != "matrix" or (qat == "r4" and not param.layered):
        return None
    spec = replace(_QAT[qat], bits=bits)
    return replace(spec, scale_floor=_SMALLEST_CLIP[qat] / spec.qmax)
