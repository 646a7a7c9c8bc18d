"""A BLAS that nobody has: matrix products that differ from this machine's in the last bit, place by place.

Under `other_blas()` every fp32 element that was rounded is an ulp above, an ulp below or as it was, by its place in a
result of that shape; 16-bit results are such fp32 ones, rounded. So a b is not (bᵀ aᵀ)ᵀ, a row of a batch is not that
row alone, and X Xᵀ is not symmetric; but the same product twice is the same, and what no BLAS rounds, such as products
of small integers and with the identity, stays exact. float64 stays as it is, for oracles.

It covers eager's products and numpy's, which Triton's interpreter makes of tl.dot. Not those inside one op, as
attention's are, nor what Inductor calls by other names.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

PRODUCTS = "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"


@functools.cache
def directions(shape: tuple[int, ...]) -> Tensor:
    """-inf: an ulp down, inf: an ulp up, NaN: stay."""
    draw = torch.randint(3, shape, generator=torch.Generator().manual_seed(hash(shape) % 2**32))
    return torch.tensor([-torch.inf, torch.nan, torch.inf])[draw]


def nudged(out: Tensor, exact: Tensor) -> Tensor:
    """fp32 `out`, with an ulp more or less where it is not `exact`, which is float64."""
    towards = directions(tuple(out.shape))
    stays = towards.isnan() | (out.double() == exact) | ~out.isfinite()
    return torch.where(stays, out, torch.nextafter(out, towards))


def _product(op: str):
    """The CPU's own kernel of `op`, and what replaces it."""
    kernel = torch.library.get_kernel(f"aten::{op}", "CPU")

    def product(keys, *args, **options):
        def of(dtype):
            return kernel.call_boxed(keys, *(a.to(dtype) if isinstance(a, Tensor) else a for a in args), **options)

        dtype = args[0].dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return of(dtype)
        return nudged(of(torch.float32), of(torch.float64)).to(dtype)

    return product


@contextmanager
def other_blas() -> Iterator[None]:
    library, matmul = torch.library.Library("aten", "IMPL"), np.matmul

    def numpy_matmul(a, b, dtype=None):
        out = matmul(a, b, dtype=dtype)
        if out.dtype != np.float32:
            return out
        return nudged(torch.from_numpy(out), torch.from_numpy(matmul(a, b, dtype=np.float64))).numpy()

    with mock.patch.object(np, "matmul", numpy_matmul), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*verrid")
        products = {op: _product(op) for op in PRODUCTS}
        for op, product in products.items():
            library.impl(op, product, "CPU", with_keyset=True)
        try:
            yield
        finally:
            library._destroy()
