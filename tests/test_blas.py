"""The BLAS that nobody has, and tests that once asked for one of their own: under it they pass, and find faults."""

from __future__ import annotations

import numpy as np
import pytest
import test_kernels
import test_newton_schulz_kernels as ns_tests
import torch
from blas import other_blas
from golfgpt_kernels.testing import randn

ns = ns_tests.ns


@pytest.fixture
def blas():
    with other_blas():
        yield


def gram(device):
    for shape in ns_tests.SHAPES.values():
        ns_tests.test_gram(shape, torch.float32, device)


def polynomial(device):
    for shape in ((2, 32), (2, 45)):
        ns_tests.test_polynomial(shape, torch.float32, device)


def loss(device):
    test_kernels.test_loss_and_logprobs_forward((1, 7, 3), 5.0)


TESTS = {"gram": gram, "polynomial": polynomial, "loss of one row": loss}


@pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
def test_passes_with_another_blas(test, blas, device):
    test(device)


def unmirrored(out):
    """One element on one side of the diagonal, an ulp off: in the ragged shapes it lies in a pair of tiles."""
    out[:, 0, -1] = torch.nextafter(out[:, 0, -1], out.new_tensor(torch.inf))
    return out


FAULTS = {"1e-5 too large": lambda out: out * (1 + 1e-5), "not mirrored": unmirrored}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("test", [gram, polynomial], ids=["gram", "polynomial"])
def test_a_symmetric_kernel_s_fault_is_found(test, fault, blas, device, monkeypatch):
    symmetric = ns._symmetric
    monkeypatch.setattr(ns, "_symmetric", lambda *args: fault(symmetric(*args)))
    with pytest.raises(AssertionError):
        test(device)


def test_a_loss_s_fault_is_found(blas, monkeypatch):
    cross_entropy = test_kernels.gk.softcap_cross_entropy
    monkeypatch.setattr(test_kernels.gk, "softcap_cross_entropy", lambda *a, **o: cross_entropy(*a, **o) * (1 + 3e-5))
    with pytest.raises(AssertionError):
        loss("cpu")


def test_products_are_rounded_otherwise_and_by_place():
    x, exact = randn(40, 50), torch.arange(-30.0, 30.0).view(12, 5)
    plain, in_float64, of_integers = x @ x.T, x.double() @ x.double().T, exact @ exact.T
    with other_blas():
        other, in_numpy = x @ x.T, torch.from_numpy(np.matmul(x.numpy(), x.numpy().T, dtype=np.float32))
        assert torch.equal(x @ x.T, other), "the same product twice"
        assert torch.equal(exact @ exact.T, of_integers) and torch.equal(torch.eye(40) @ x, x)
        assert not torch.equal(torch.nn.functional.linear(x[:1], x), other[:1]), "a row alone"
        assert torch.equal(x.double() @ x.double().T, in_float64)
    for result in (other, in_numpy):
        assert (result != result.T).float().mean() > 0.5
        torch.testing.assert_close(result, plain)
    assert torch.equal(x @ x.T, plain), "and afterwards all is as before"
