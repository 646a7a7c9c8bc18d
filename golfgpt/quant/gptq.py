"""GPTQ: codes that make the products of a matrix with its inputs err least, column by column.

    H = Σ xᵀ x over inputs x of the matrix,  + damping * mean(diag H) on the diagonal
    U = the upper Cholesky factor of H⁻¹, columns in the order of falling diag H
    for each column j:  q_j = round(w_j / s),  e_j = (w_j - q_j s) / U_jj,  w_k <- w_k - e_j U_jk for k >= j

A column's rounding error moves into the columns that are still to come, in blocks of columns. Scales stay what they are
without it. Inputs that were always zero have no say: their columns become zero, and their rows of H the identity's.

Matrices of one shape are solved as a batch; a column then costs three small operations for all of them.

Source: Frantar et al., arXiv:2210.17323; order, damping and block as in the records from 2026-03-25 on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve(
    w: Tensor,
    hessian: Tensor,
    scale: Tensor,
    largest: Tensor | int,
    *,
    least: int | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Codes, int8 (n, rows, cols), of w (n, rows, cols) for scales (n, rows, 1 or cols), from `least` (None:
    -`largest`) to `largest`, which may differ by column, (cols,).

    `hessian` (n, cols, cols), float32 or float64, is also the dtype of the computation. Raises LinAlgError for one that
    is not finite or not positive definite after damping; the message has its number in the batch.
    """
    count, rows, cols = w.shape
    least = -largest if least is None else least
    low, high = (torch.as_tensor(x, device=w.device).expand(cols) for x in (least, largest))
    h = hessian.clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal += dead.to(h.dtype)
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    order = diagonal.argsort(-1, descending=True)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    factor = _cholesky(h, damping)
    upper = _cholesky(torch.cholesky_inverse(factor), damping, upper=True)

    # Columns as rows: a column is then contiguous, whatever the number of rows.
    def columns(x: Tensor) -> Tensor:
        return x.mT.gather(1, order[:, :, None].expand(count, cols, x.size(1)))

    left = columns(w.to(h.dtype).masked_fill(dead[:, None], 0.0))
    scales = columns(scale.to(h.dtype).expand(count, rows, cols))
    low, high = (x[order][..., None].to(h.dtype) for x in (low, high))
    codes = torch.empty_like(left)
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        part, errors = left[:, start:stop], torch.empty_like(left[:, start:stop])
        for j in range(stop - start):
            column, s, u = part[:, j], scales[:, start + j], upper[:, start + j]
            code = (column / s).round().clamp(low[:, start + j], high[:, start + j])
            codes[:, start + j] = code
            errors[:, j] = (column - code * s) / u[:, start + j, None]
            part[:, j:] -= u[:, start + j : stop, None] * errors[:, None, j]
        left[:, stop:] -= upper[:, start:stop, stop:].mT @ errors
    back = order.argsort(-1)[:, :, None].expand_as(codes)
    return codes.gather(1, back).mT.to(torch.int8)


def _cholesky(h: Tensor, damping: float, *, upper: bool = False) -> Tensor:
    """Factors of a Hessian or of its inverse; raises LinAlgError as `solve`."""
    factor, failed = torch.linalg.cholesky_ex(h, upper=upper)
    bad = failed.bool() | ~factor.isfinite().flatten(1).all(1)
    if bad.any():
        raise torch.linalg.LinAlgError(
            f"the Hessian of matrix {int(bad.nonzero()[0])} is not positive definite with damping {damping:g} times "
            "its mean diagonal: take more quant.calibration_tokens or a larger quant.damping"
        )
    return factor
