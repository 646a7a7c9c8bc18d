"""What kernel files need of Triton, and what makes its interpreter compute what a GPU computes.

Triton has no wheels for macOS. Where it is missing or too old `jit` returns the function as it is, `MISSING` says
why, and everything but impl="triton" works. Kernel files postpone annotations, so that `tl.constexpr` is never
evaluated there.

With TRITON_INTERPRET=1, read once when this file is imported, kernels run on CPU tensors. Three things differ from a
GPU (in triton 3.6 to 3.9). `dot` and `narrow` correct the first two, so that kernels are tested in bf16 too:
- bf16 arithmetic works on the bit patterns and is silently wrong: operands are upcast before a dot;
- the cast fp32 -> bf16 truncates: it is rounded half to even on the bits;
- `/` and `sqrt` are exact there and approximate on a GPU: use `tl.div_rn` where every bit counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ._versions import gluon_untried, too_old

try:
    import triton
except ImportError as error:
    MISSING = f"triton is not installed ({error}): pip install triton, which has wheels for Linux"
else:
    MISSING = too_old("triton", triton.__version__)
GLUON_MISSING = MISSING or gluon_untried(triton.__version__)  # why impl="gluon" does not run

if MISSING:
    INTERPRETING = False
    tl = None

    def jit(function: Callable) -> Callable:
        return function

else:
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor

    INTERPRETING = bool(triton.knobs.runtime.interpret)
    INTERPRET = tl.constexpr(INTERPRETING)


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. PRECISION concerns fp32 operands only: "ieee", "tf32" or "tf32x3"."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, rounded half to even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # the cast would flush subnormal numbers
    return x.to(DTYPE)


@jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) -> its left and right half, in registers."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as torch's own matmuls are told to (torch.set_float32_matmul_precision)."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel, grid: Sequence[int], device: torch.device, *args, **options) -> None:
    """kernel[grid](*args, **options) on `device`. All launches pass here: the offline gate compiles what it sees."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*args, **options)


def descriptor(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor of `tensor` for loads of `block`; reads beyond its edges are zero, writes there are dropped.

    TMA wants 16-byte aligned rows with unit stride. A tensor without them is copied into padded rows first, so
    ragged widths cost one pass over the operand and no second form of the kernel. Outputs must come aligned
    (`empty_rows`), because a copy would be written in their place.
    """
    if not addressable(tensor):
        padded = empty_rows(tensor.shape, tensor.dtype, tensor.device)
        tensor = padded.copy_(tensor)
    return TensorDescriptor.from_tensor(tensor, list(block))


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor that TMA can address: rows start at multiples of 16 bytes. What pads them is zero, since
    oneDNN's bf16 matmul reads beyond ragged rows (torch 2.13 on CPU) and NaN there times its zero is NaN."""
    align = 16 // dtype.itemsize
    width = ceil_div(shape[-1], align) * align
    rows = torch.empty((*shape[:-1], width), dtype=dtype, device=device)
    if width == shape[-1]:
        return rows
    if type(rows) is not Tensor:  # traced without memory
        return torch.empty_strided(shape, rows.stride(), dtype=dtype, device=device)
    rows[..., shape[-1] :] = 0
    # Not a slice: autograd refuses to change a view in place that a custom op returned.
    return torch.empty(0, dtype=dtype, device=device).set_(rows.untyped_storage(), 0, tuple(shape), rows.stride())


def addressable(tensor: Tensor) -> bool:
    outer = (stride * tensor.element_size() % 16 == 0 and stride > 0 for stride in tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(outer)


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: one per multiprocessor; interpreted 3, so that each takes several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
