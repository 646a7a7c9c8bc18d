"""How kernels are tested, here and by anyone who changes one.

The error budget: against a float64 oracle, a kernel may err at most twice as much as eager PyTorch does in
the same dtype, in the maximum and in the mean. Fixed tolerances hide bugs: a result that is 1 % too large
passes every allclose in use for bf16, and the maximum alone does not see it either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0, dtype=torch.float32, device="cpu", scale: float = 1.0) -> Tensor:
    """Normal values, drawn in float64 on the CPU, so that every dtype and device gets the same ones, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values in every second column of a wider buffer whose gaps are NaN."""
    wide = tensor.new_full((*tensor.shape, 2), float("nan"))
    wide[..., 0] = tensor
    return wide[..., 0]


def budget_violation(actual: Tensor, rival: Tensor, oracle: Tensor, *, independent: int | None = None) -> str | None:
    """Why `actual` breaks the error budget, or None. `rival` is eager's result in actual's dtype, `oracle` float64's.

    Both get some slack, for rivals that happen to be exact. The maximum gets one eps of the largest oracle value. The
    mean gets one eps of the oracle's root mean square, divided by √n, as the mean of n independent roundings is: for
    one element as much as the maximum gets, so that no luck of eager's decides, and for thousands next to nothing. A
    whole eps there would hide a 1 % scale error in bf16. n is the number of elements, or `independent` where fewer
    roundings decide them all, as that of a row's log-sum-exp does for the row's gradients.
    """
    if actual.shape != oracle.shape or actual.dtype != rival.dtype:
        return f"shape {tuple(actual.shape)}, {actual.dtype}; expected {tuple(oracle.shape)}, {rival.dtype}"
    if actual.numel() == 0:
        return None
    oracle = oracle.to(actual.device, torch.float64)
    ours, theirs = (actual.double() - oracle).abs(), (rival.double() - oracle).abs()
    if not ours.isfinite().all():
        return f"{(~ours.isfinite()).sum().item()} of {ours.numel()} values are not finite"
    if not (rival.isfinite() | ~oracle.isfinite().to(rival.device)).all():
        return "eager is not finite where the oracle is: it sets no budget there"
    eps = torch.finfo(actual.dtype).eps
    if ours.max() > 2 * (theirs.max() + eps * oracle.abs().max()):
        where = tuple(torch.unravel_index(ours.argmax(), ours.shape))
        at = ", ".join(str(int(i)) for i in where)
        return f"maximal error {ours.max():.3e} at [{at}], eager's is {theirs.max():.3e}"
    if ours.mean() > 2 * (theirs.mean() + eps * oracle.square().mean().sqrt() / (independent or oracle.numel()) ** 0.5):
        return f"mean error {ours.mean():.3e}, eager's is {theirs.mean():.3e}"
    return None


def assert_within_budget(
    actual: Tensor, rival: Tensor, oracle: Tensor, what: str = "result", *, independent: int | None = None
) -> None:
    violation = budget_violation(actual, rival, oracle, independent=independent)
    assert violation is None, f"{what}: {violation}"


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """{"out": function(**inputs), and for each floating-point input its gradient} for grad_output `grad`."""
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    out = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    return {"out": out.detach()} | dict(
        zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype)), strict=True)
    )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialized buffers are full of NaN (integers: their maximum), so that unwritten outputs show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
