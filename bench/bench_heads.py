"""Loss and scores from hidden states: softcapped cross entropy in training, token log probabilities in scoring.

Wanted at 65,536 x 512 x {1024, 8192}: the forward in at most 0.6 x the time of torch.compile, forward and backward in
at most 0.85 x.

Two libraries compute the same loss without all of the logits in memory and are timed as a user would call them, where
they are installed (extra "bench") and there is a CUDA device. Their rows have one column, eager. Both get the weight in
hidden's dtype, as their kernels want it; its fp32 gradient is a cast of theirs.
- cut-cross-entropy (Apple, arXiv:2411.09009) adds gradients under locks, so in no fixed order, and by default skips
  blocks of gradients that bf16 would hardly show (filter_eps).
- liger-kernel takes rows in chunks of logits, and the gradients in the forward already, if they are wanted.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from golfgpt_kernels._cases import Inputs
from golfgpt_kernels.tuning import Case, cases
from torch import Tensor

SOFTCAP = 30.0


def cut_cross_entropy(i: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(i["h"], i["w"].to(i["h"].dtype), i["targets"], softcap=SOFTCAP)


def liger_kernel(i: Inputs) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(softcap=SOFTCAP)(i["w"].to(i["h"].dtype), i["h"], i["targets"])


PEERS = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger_kernel}  # by module


def peer_case(case: Case, module: str) -> Case:
    """The same loss of the same inputs by a peer."""
    return replace(case, op=module, call=lambda i, impl: PEERS[module](i), columns=("eager",), checked_as=None)


def missing(module: str) -> str | None:
    """Why this peer cannot be timed here."""
    if not torch.cuda.is_available():
        return f"{module} needs a CUDA device"
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer may break on a torch or triton that it does not know
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


LOSSES = cases("softcap_cross_entropy")
CASES = (
    *LOSSES,
    *cases("token_logprobs"),
    *(peer_case(case, module) for module in PEERS for case in LOSSES),
)


def test_heads(case, column, timed):
    if case.op in PEERS and (why := missing(case.op)):
        pytest.skip(why)
    timed(case, column)
