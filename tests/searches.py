"""What the records' quantizers do around GPTQ, for the conformance vectors; no config reaches it. For each: what it is
truly worth, from their own logs.

R is the largest code, w a float32 matrix (rows, cols), H its Hessian. Sources: the published scripts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golfgpt.quant.gptq import solve

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def _percentile_scales(w: Tensor, largest: int) -> list[Tensor]:
    """float16 (rows,), one for each of PERCENTILES of a row's magnitudes, with the published floor 1/R."""
    clips = [w.abs().amax(1) if p == 1 else torch.quantile(w.abs(), p, dim=1) for p in PERCENTILES]
    return [(clip / largest).clamp_min(1 / largest).half() for clip in clips]


def clip_search(w: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes and float16 scales of 2026-03-22's "GPTQ-lite": of five percentiles the one with the least squared error,
    one for the whole matrix. It knows no Hessian. Worth nothing for rows whose maximum is below 1, where the floor sets
    every scale; no run isolates the rest."""
    best = None
    for scale in _percentile_scales(w, largest):
        s = scale.float()[:, None]
        codes = (w / s).round().clamp(-largest, largest)
        error = (w - codes * s).square().mean()
        if best is None or error < best[0]:
            best = error, codes.to(torch.int8), scale
    return best[1:]


def gptq_clip_search(w: Tensor, hessian: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """GPTQ for each of the percentiles, and of the results the one with the least squared error (2026-03-25 to
    2026-04-04). That error is not what GPTQ makes small: its feedback raises it, so the choice leans to less feedback.
    Dropped for scales by deviation, which were better and need one solve."""
    dead = hessian.diagonal() == 0
    live, best = w.masked_fill(dead, 0.0), None
    for scale in _percentile_scales(w, largest):
        codes = solve(w[None], hessian[None], scale.float()[None, :, None], largest)[0]
        error = (live - codes * scale.float()[:, None]).square().mean()
        if best is None or error < best[0]:
            best = error, codes, scale
    return best[1:]


def damped_twice(hessian: Tensor) -> Tensor:
    """What 2026-03-25 and 2026-03-29 give their solver, which damps again. It then knows no zero input."""
    return hessian + 0.01 * hessian.diagonal().mean().clamp_min(1e-6) * torch.eye(len(hessian))


def hessian_aware_scales(w: Tensor, hessian: Tensor, largest: int, deviations: float, weight: float) -> Tensor:
    """float16 scales by deviation, changed by how much a row's weights meet large inputs (PR #1412, weight 0.175). The
    author's own check across seeds finds that importance correlated at 0.12: noise. No later record has it."""
    diagonal = hessian.diagonal()
    diagonal = diagonal + (diagonal == 0)
    diagonal = (diagonal + 0.01 * diagonal.mean()).clamp_min(1e-8)
    rho = (w.abs() * (diagonal / diagonal.mean())).mean(1)
    factor = 1 + weight * (rho / rho.mean() - 1)
    return (deviations * w.std(1) * factor / largest).clamp_min(1e-10).half()


def group_scores(w: Tensor, input_rms: Tensor, group: int) -> Tensor:
    """Score of each group of neighbouring columns for AWQ-lite (PR #1908): how large inputs times weights are in it.
    The one best group of a model is stored in int8; in nine of nine logs it is one of the embedding. Worth 0.0003 at
    most together with what came with it."""
    columns = input_rms * w.abs().mean(0)
    return columns[: len(columns) // group * group].view(-1, group).sum(1)
