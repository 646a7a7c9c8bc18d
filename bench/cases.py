"""What `python -m bench.kernels` times: the ops at the trainer's sizes, what they are compared with, and their costs.
report.py has the ratios that are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from golfgpt_kernels._cases import COLUMNS, INT6, Case, op_cases
from golfgpt_kernels.fake_quant import fake_quant_linear
from torch import Tensor

from bench.peers import PEERS

BOTH_WAYS = ("relu2_mlp", "linear_relu2", "linear", "fake_quant_linear", "codes_linear", "softcap_cross_entropy")


def linear(x: Tensor, w: Tensor, impl: str) -> Tensor:
    """The plain bf16 linear layer, for comparison: no kernel of ours."""
    return F.linear(x, w.to(x.dtype))


def bench_cases(rows: int, k: int, sizes: Sequence[tuple[int, int]], layers: int) -> Iterator[Case]:
    """All ops at each of `sizes`, (hidden, vocabulary), with and without backward; banks are those of the last one."""
    for hidden, vocab in sizes:
        ops = op_cases(rows, k, hidden, vocab, layers)
        quantized = partial(fake_quant_linear, spec=INT6, form="compute_copy")
        like = replace(ops["codes_linear"], columns=COLUMNS)
        ops["linear"] = replace(like, op="linear", call=linear, columns=("eager", "compile"))
        ops["fake_quant_linear"] = replace(like, op="fake_quant_linear", call=quantized)
        for op, case in ops.items():
            if op in BOTH_WAYS:
                yield replace(case, backward=False)
            if case.rows == rows or (hidden, vocab) == sizes[-1]:
                yield case
    wide = layers, hidden, k
    yield replace(ops["newton_schulz"], rows=layers * hidden, shape=wide, draw=lambda r, _: (r.normal(*wide),))


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes), the least that the op must compute and move: operands are read and results written once, in 16
    bits; fp32 are masters, their gradients, and what the quantizer and Muon read and write."""
    forward, backward = _COSTS[case.op]
    costs = [forward(*case.shape), *([backward(*case.shape)] if case.backward else [])]
    flops, traffic = zip(*costs, strict=True)
    return sum(flops), sum(traffic)


def _linear(m: int, k: int, n: int) -> tuple[int, int]:
    return 2 * m * k * n, 2 * (m * k + n * k + m * n)


def _linear_backward(m: int, k: int, n: int) -> tuple[int, int]:
    """dx = dz w and dw = dzᵀ x: dz is read twice."""
    return 4 * m * k * n, 2 * (2 * m * n + 2 * m * k + n * k) + 4 * n * k


def _linear_relu2_backward(m: int, k: int, n: int) -> tuple[int, int]:
    """It first turns dh into dz: dh and h read, dz written."""
    flops, traffic = _linear_backward(m, k, n)
    return flops, traffic + 6 * m * n


def _mlp(m: int, k: int, h: int) -> tuple[int, int]:
    """h is written by the first product and read by the second."""
    return 4 * m * k * h, 4 * (m * k + h * k + m * h)


def _mlp_backward(m: int, k: int, h: int) -> tuple[int, int]:
    """Four products; dz is written once and read twice, h read twice."""
    return 8 * m * k * h, 2 * m * (4 * k + 5 * h) + 12 * h * k


def _quantized_linear(m: int, k: int, n: int) -> tuple[int, int]:
    """ŵ is written and read once."""
    return 2 * m * k * n + 5 * n * k, 2 * (m * k + m * n + 2 * n * k) + 4 * n * k


def _logprobs(m: int, k: int, vocab: int) -> tuple[int, int]:
    """Logits stay on chip; int64 targets, fp32 results."""
    return 2 * m * k * vocab, 2 * k * (m + vocab) + 12 * m


def _loss_backward(m: int, k: int, vocab: int) -> tuple[int, int]:
    """dh = du W and dW = duᵀ h. The kernel computes the logits again, which a forward that keeps du need not."""
    return 4 * m * k * vocab, 2 * (2 * m * k + vocab * k) + 4 * vocab * k


def _newton_schulz(batch: int, rows: int, cols: int, steps: int = 5) -> tuple[int, int]:
    """X Xᵀ, A A and P X per step; of the first two, the half that determines the rest."""
    m, n = sorted((rows, cols))
    traffic = 2 * ((m * n + m * m) + 2 * m * m + (2 * m * n + m * m))
    return batch * steps * (3 * m * m * n + m**3), batch * (steps * traffic + 4 * m * n)


_LOSS, _QUANTIZED = (_logprobs, _loss_backward), (_quantized_linear, _linear_backward)
_COSTS = {
    "relu2_mlp": (_mlp, _mlp_backward),
    "linear_relu2": (_linear, _linear_relu2_backward),
    "linear": (_linear, _linear_backward),
    **dict.fromkeys(("fake_quant_linear", "codes_linear"), _QUANTIZED),
    **dict.fromkeys(("softcap_cross_entropy", *PEERS), _LOSS),
    "token_logprobs": (_logprobs, None),
    "newton_schulz": (_newton_schulz, None),
    "fake_quantize_rows": (lambda _, weights: (5 * weights, 6 * weights), None),
    "quantize_rows": (lambda layers, n, k: (5 * layers * n * k, layers * n * (5 * k + 2)), None),
    "muon_momentum_": (lambda _, weights: (4 * weights, 14 * weights), None),
    **dict.fromkeys(("muon_update_", "muon_update_rows_"), (lambda _, weights: (4 * weights, 12 * weights), None)),
}

# 65,536 rows are one of eight GPUs' part of a step of 524,288 tokens.
CASES = tuple(bench_cases(65_536, 512, ((1024, 1024), (1536, 8192)), 9))
PEER_CASES = tuple(
    replace(case, op=module, call=call, columns=("eager",))
    for module, call in PEERS.items()
    for case in CASES
    if case.op == "softcap_cross_entropy"
)
SMALL = tuple(bench_cases(512, 64, ((128, 256),), 2))


def cases() -> tuple[Case, ...]:
    """In the size that this machine is for."""
    return CASES + PEER_CASES if torch.cuda.is_available() else SMALL
