"""Newton-Schulz orthogonalization of batches of matrices: the polar factor U Vᵀ of X = U S Vᵀ, approximately.

    X0 = X / (‖X‖_F + eps)      A = X Xᵀ      X ← a X + (b A + c A²) X      `steps` times

Each step maps every singular value σ to a σ + b σ³ + c σ⁵ and leaves U and V alone. Shapes: (..., M, N)
-> the same; a tall matrix (M > N) is iterated as its transpose, so that A has the smaller side.

coefficients "quintic": (3.4445, -4.7750, 2.0315) at every step, steepest at zero; singular values end in
about 0.68 to 1.2, not at 1. "polar_express": the published list, one triple per step, the last repeated;
singular values converge to 1. A tuple (a, b, c), or one triple per step, is taken as given.

Precision: the norm and the division in fp32 (float64 if X or `dtype` is), then the iteration in `dtype`,
every operation rounded to it, matmuls accumulated in fp32. The polynomial is b A + (c A) A, the order
that upstream rounds in: other orders differ by up to 3.5e-2 in bf16. The result has X's dtype, with
values rounded to `dtype`.

Backward: autograd through the iteration. With P = b A + c A², Y = a X + P X, both A and P symmetric, a step is
    dP = dY Xᵀ      dA = b dP + c (dP A + A dP)      dX = a dY + P dY + (dA + dAᵀ) X

A zero matrix stays zero. With ‖X‖_F below about 100 eps, X0 has visibly less than unit norm.

Sources: K. Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024; Amsel, Persson, Musco, Gower,
"The Polar Express", arXiv:2505.16932, appendix A.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._dispatch import FLOAT_DTYPES, Impl, accumulate_dtype, check_floats, check_impl

__all__ = [
    "POLAR_EXPRESS_COEFFICIENTS",
    "QUINTIC_COEFFICIENTS",
    "newton_schulz",
    "newton_schulz_cost",
    "newton_schulz_ref",
]

Triple = tuple[float, float, float]

QUINTIC_COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)

# Optimal for singular values in [1e-3, 1]. The paper's safety factor 1.01 (it lets rounding carry σ past 1) is
# folded into all but the last, the fixed point that further steps repeat.
POLAR_EXPRESS_COEFFICIENTS: tuple[Triple, ...] = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)

Coefficients = Literal["quintic", "polar_express"] | Triple | Sequence[Triple]


def newton_schulz_ref(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    u = (x.mT if tall else x).to(torch.promote_types(accumulate_dtype(x.dtype), dtype))
    u = (u / (torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True) + eps)).to(dtype)
    for a, b, c in _per_step(coefficients, steps):
        gram = u @ u.mT
        u = a * u + (b * gram + (c * gram) @ gram) @ u
    return (u.mT if tall else u).to(x.dtype)


def _per_step(coefficients: Coefficients, steps: int) -> list[Triple]:
    if coefficients == "quintic":
        return [QUINTIC_COEFFICIENTS] * steps
    if coefficients == "polar_express":
        last = len(POLAR_EXPRESS_COEFFICIENTS) - 1
        return [POLAR_EXPRESS_COEFFICIENTS[min(i, last)] for i in range(steps)]
    if isinstance(coefficients, str):
        raise ValueError(f"newton_schulz: coefficients={coefficients!r}; possible: 'quintic', 'polar_express', tuples")
    if all(isinstance(value, int | float) for value in coefficients):
        coefficients = [coefficients] * steps
    if len(coefficients) != steps or any(len(triple) != 3 for triple in coefficients):
        raise ValueError(
            f"newton_schulz: coefficients={coefficients!r}; possible: one (a, b, c), or steps={steps} of them"
        )
    return list(coefficients)


def newton_schulz_cost(
    batch: int, rows: int, cols: int, *, steps: int = 5, itemsize: int = 2, io_itemsize: int = 4
) -> tuple[int, int]:
    """(flops, bytes) of X Xᵀ, A A and P X per step, unsymmetric; operands read once, results written once."""
    m, n = sorted((rows, cols))
    flops = 2 * (2 * m * m * n + m * m * m)
    traffic = itemsize * ((m * n + m * m) + 2 * m * m + (2 * m * n + m * m))
    return batch * steps * flops, batch * (steps * traffic + 2 * io_itemsize * m * n)


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    impl: Impl = "auto",
) -> Tensor:
    """Approximately orthogonal x (..., M, N), in x's dtype; the iteration runs in `dtype`."""
    check_impl("newton_schulz", impl, x.device)
    check_floats("newton_schulz", x=x)
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x has shape {tuple(x.shape)}; possible: (..., M, N)")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"newton_schulz: dtype={dtype}; possible: {FLOAT_DTYPES}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"newton_schulz: steps={steps!r}; possible: an integer >= 1")
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps={eps}; possible: a positive number (zero matrices divide by it)")
    return newton_schulz_ref(x, steps=steps, coefficients=coefficients, dtype=dtype, eps=eps)
