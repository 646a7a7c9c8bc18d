"""Ops of small language models, eager and in Triton: `import golfgpt_kernels` needs torch only, and no GPU.

One file per family; the file's docstring has the equation, the shapes and where values are
rounded.
"""

import torch

from ._versions import too_old

if _reason := too_old("torch", torch.__version__):  # before anything that an older torch lacks
    raise ImportError(_reason, name=__name__)

from ._dispatch import cannot_run, implementation, set_implementation
from .fake_quant import (
    RowQuant,
    dequantize_rows,
    fake_quant_linear,
    fake_quantize_banks,
    fake_quantize_rows,
    quantize_rows,
    round_to_dtype,
    straight_through,
)
from .muon import muon_momentum_, muon_update_, square_parts
from .newton_schulz import newton_schulz, newton_schulz_
from .relu2_mlp import linear_relu2, relu2_mlp
from .softcap_logprobs import softcap_cross_entropy, token_logprobs

__all__ = [
    "RowQuant",
    "cannot_run",
    "dequantize_rows",
    "fake_quant_linear",
    "fake_quantize_banks",
    "fake_quantize_rows",
    "implementation",
    "linear_relu2",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "newton_schulz_",
    "quantize_rows",
    "relu2_mlp",
    "round_to_dtype",
    "set_implementation",
    "softcap_cross_entropy",
    "square_parts",
    "straight_through",
    "token_logprobs",
]
