"""The error budget has teeth: the faults that kernels have, injected into correct results, are each caught."""

from __future__ import annotations

import pytest
import torch
from golfgpt_kernels.relu2_mlp import linear_relu2_ref
from golfgpt_kernels.testing import budget_violation, poisoned, randn, strided

pytestmark = pytest.mark.numeric

M, K, N = 48, 640, 64
X, W = randn(M, K, dtype=torch.bfloat16), randn(N, K, seed=1, scale=K**-0.5, dtype=torch.bfloat16)
ORACLE = linear_relu2_ref(X.double(), W.double())
EAGER = linear_relu2_ref(X, W)


def kernel(x=X, w=W):
    """A right result with other roundings than eager's: the square is taken in fp32."""
    return torch.relu(x.float() @ w.float().T).square().bfloat16()


def bf16_accumulator():
    z = torch.zeros(M, N, dtype=torch.bfloat16)
    for k in range(0, K, 16):
        z += (X[:, k : k + 16].float() @ W[:, k : k + 16].float().T).bfloat16()
    return torch.relu(z).square()


def one_row_wrong():
    y = kernel()
    y[17] = y[18]
    return y


def unwritten():
    y = kernel()
    y[-1, -1] = float("nan")
    return y


FAULTS = {
    "bf16 accumulator": bf16_accumulator,
    "output 1 % too large": lambda: (kernel().float() * 1.01).bfloat16(),
    "K tail dropped": lambda: kernel(X[:, : K - 32], W[:, : K - 32]),
    "all zeros": lambda: torch.zeros_like(EAGER),
    "one row wrong": one_row_wrong,
    "unwritten element": unwritten,
    "other dtype": lambda: kernel().float(),
    "transposed": lambda: kernel().T,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_caught(fault):
    assert budget_violation(fault(), EAGER, ORACLE) is not None


def test_correct_results_pass():
    assert budget_violation(kernel(), EAGER, ORACLE) is None
    assert budget_violation(EAGER, EAGER, ORACLE) is None
    assert budget_violation(EAGER[:0], EAGER[:0], ORACLE[:0]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_elements_do_not_need_the_luck_of_an_exact_rival(dtype):
    """One that is exact leaves one element two eps, four elements one of them, and thousands a part of one."""
    eps = torch.finfo(dtype).eps
    for n, passes, fails in ((1, 2, 3), (4, 1, 2), (4096, 0, 1)):
        exact = torch.ones(n, dtype=dtype)
        assert budget_violation(exact * (1 + passes * eps), exact, exact.double()) is None
        assert budget_violation(exact * (1 + fails * eps), exact, exact.double()) is not None
    off = torch.full((4096,), 1 + eps, dtype=dtype)
    assert budget_violation(off, torch.ones_like(off), torch.ones(4096).double(), independent=1) is None


def test_a_rival_that_is_not_finite_sets_no_budget():
    broken = EAGER.clone()
    broken[0, 0] = float("nan")
    assert "eager is not finite" in budget_violation(kernel(), broken, ORACLE)


def test_violation_names_the_place():
    y = kernel()
    y[3, 5] += 100
    assert "[3, 5]" in budget_violation(y, EAGER, ORACLE)


def test_poison_and_strides():
    with poisoned():
        assert torch.empty(4).isnan().all()
        assert (torch.empty(4, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()
    view = strided(X)
    assert torch.equal(view, X) and view.stride(-1) == 2
