"""The launches of a program that runs on CUDA tensors without memory, one by one: `Kernel` records of what they move.

Operations that run one by one, and the bodies of our custom ops, are recorded by the mode `Count`; launches of our
Triton kernels after `record_launches`; `graph_kernels` lists what Inductor generates for a graph. step_counts.py
says what bytes, flops and seconds mean.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from golfgpt_kernels import _jit, _rows
from torch import Tensor
from torch._inductor import dependencies, ir, scheduler
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.functions import Identity
from torch.utils.flop_counter import flop_registry

from bench.offline import replace

BANDWIDTH = 2.9e12  # bytes/s that a copy reaches on an H100 SXM
MATMUL = 600e12  # flop/s of bf16 products at these shapes
ATTENTION = {"attention": 315e12, "attention backward": 242e12}  # from the published logs, kernels.md
LAUNCH = 1e-6


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    kind: str
    name: str
    bytes: int
    flops: int = 0

    @property
    def seconds(self) -> float:
        return max(self.flops / ATTENTION.get(self.kind, MATMUL), self.bytes / BANDWIDTH) + LAUNCH


def tensors(*values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def num_bytes(values: Iterable[Tensor]) -> int:
    """Bytes of the elements of these tensors. Elements that expand repeats count once, and so does a tensor."""
    distinct = {id(value): value for value in values}.values()
    numels = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in distinct)
    return sum(numel * t.element_size() for numel, t in zip(numels, distinct, strict=True))


# ---- what runs op by op: the optimizer, and the bodies of our custom ops


NO_LAUNCH = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "lift_fresh", "detach",
    "_unsafe_view", "device",
}  # fmt: skip
# Attention within segments -> its kind and matrix products: over T tokens with segments of `max_k`, T max_k / 2 pairs.
VARLEN = {
    "torch_attn::_varlen_attn": ("attention", 2),
    "torch_attn::_varlen_attn_backward": ("attention backward", 5),
}
WRITE_ONLY = {"copy_", "zero_", "fill_", "_foreach_copy_"}  # in-place ops that do not read what they write


class Count(TorchDispatchMode):
    """Calls `on_kernel` for every operation that launches a kernel. Our custom ops run their CUDA bodies."""

    def __init__(self, on_kernel: Callable[[Kernel], None]):
        super().__init__()
        self.on_kernel = on_kernel

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in VARLEN:
            out = function(*args, **kwargs)
            kind, products = VARLEN[name]
            named = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
            flops = products * named["query"].numel() * named["max_k"]
            self.on_kernel(Kernel(kind, name, num_bytes(tensors(args, kwargs, out)), flops))
            return out
        if name in OPDEFS:
            with self:
                OPDEFS[name]._init_fn(*args, **kwargs)
            return function(*args, **kwargs)
        namespace, short = name.split("::")
        if namespace == "aten":  # in the body of an op, composite operations arrive whole
            with self:
                decomposed = function.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        if short == "_fused_adamw_":  # FakeTensor cannot call it; a launch takes 36 tensors
            for i in range(0, len(args[0]), 36):
                params, grads, *moments = (each[i : i + 36] for each in args[:4])
                moved = 2 * num_bytes(tensors(params, moments)) + num_bytes(grads)
                self.on_kernel(Kernel("elementwise", short, moved))
            return None
        out = function(*args, **kwargs)
        on_device = any(t.is_cuda for t in tensors(args, kwargs, out))
        if function.is_view or short in NO_LAUNCH or short.startswith("_record_function") or not on_device:
            return out
        formula = flop_registry.get(function._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        kind = "matmul" if flops else "elementwise"
        if "flash_attention" in short:
            kind, flops = "attention backward" if "backward" in short else "attention", flops // 2
        written = tensors(out)
        if function._schema.is_mutable:
            schema = zip(args, function._schema.arguments, strict=False)
            written = [t for t, a in schema if a.alias_info is not None and a.alias_info.is_write]
        read = tensors(args[1:] if short in WRITE_ONLY else args, kwargs)
        self.on_kernel(Kernel(kind, short, num_bytes(read) + num_bytes(tensors(written)), flops))
        return out


# Tensors that a kernel of ours both reads and writes, by its arguments' names.
UPDATED = {"b_ptrs", "w_ptrs", "w_ptr"}


def launch_flops(name: str, a: Mapping[str, Any]) -> int:
    """Of a launch of our kernel `name` with these arguments."""
    if name in ("_linear_relu2_fwd_kernel", "_relu2_mlp_dz_kernel", "_weight_grad_kernel", "_codes_linear_kernel"):
        return 2 * a["M"] * a["N"] * a["K"]
    if name in ("_softcap_logprobs_fwd_kernel", "_softcap_logits_grad_kernel"):
        return 2 * a["M"] * a["V"] * a["D"]
    if name == "_symmetric_kernel":  # the lower triangle
        batch, size, _ = a["out_desc"].tensor.shape
        return batch * size * (size + a["BLOCK"]) * a["K"]
    if name == "_update_kernel" and "out_desc" in a:
        return 2 * a["out_desc"].tensor.numel() * a["K"]
    return 0


@dataclass(frozen=True, eq=False)
class Described:
    """In place of a TMA descriptor."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


def record_launches(on_kernel: Callable[[Kernel], None]) -> None:
    """From now on, launches of our kernels are counted and not made."""

    def launch(kernel, grid, device, *args, **options) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        plain = {
            name: tree_map_only(Described, lambda d: d.tensor, value, is_leaf=lambda v: isinstance(v, Described))
            for name, value in arguments.items()
        }
        moved = num_bytes(tensors(plain)) + num_bytes(tensors([plain[name] for name in UPDATED & plain.keys()]))
        name = kernel.fn.__name__
        on_kernel(Kernel("golfgpt", name, moved, launch_flops(name, arguments)))

    def descriptor(tensor: Tensor, block) -> Described:
        return Described(tensor)

    def addressable(tensor: Tensor) -> bool:
        return tensor.stride(-1) == 1

    def row_arguments(*args, original=_rows.row_arguments):
        with unset_fake_temporarily():  # it computes numbers with tensors of its own
            return original(*args)

    for function in (launch, descriptor, addressable):
        replace(getattr(_jit, function.__name__), function)
    replace(_rows.row_arguments, row_arguments)


# ---- what Inductor generates


def accessed_bytes(node: scheduler.BaseSchedulerNode) -> int:
    """Of a generated kernel: for each buffer that exists outside it, the distinct elements that its indices reach.

    Inductor's own estimate (get_read_write_buffers_sizes) charges a slice with its whole buffer."""
    inside = {
        name
        for part in node.get_nodes()
        for name in part.get_buffer_names()
        if all(user.node in node.get_nodes() for user in node.scheduler.name_to_buf[name].users)
    }
    by_buffer: dict[str, set[dependencies.Dep]] = defaultdict(set)
    for dep in (*node.read_writes.reads, *node.read_writes.writes):
        if not isinstance(dep, dependencies.WeakDep) and dep.name not in inside:
            by_buffer[dep.name].add(dep)
    return sum(elements(name, deps) * V.graph.get_dtype(name).itemsize for name, deps in by_buffer.items())


def elements(name: str, deps: Iterable[dependencies.Dep]) -> int:
    """Distinct elements of a buffer that these indices reach; all, where an index is data."""
    whole = int(V.graph.get_numel(name))
    if any(isinstance(dep, dependencies.StarDep) or dep.is_indirect() for dep in deps):
        return whole
    accesses = set()
    for dep in deps:
        loops = zip(dep.var_names, map(int, dep.size), strict=True)
        accesses.add((dep.index, tuple(loop for loop in loops if loop[0] in dep.index.free_symbols)))
    return min(whole, _distinct(frozenset(accesses)))


SAMPLE = 1 << 16  # iterations
Access = tuple[sympy.Expr, tuple[tuple[sympy.Symbol, int], ...]]  # an index and the loops that it runs through


@functools.cache
def _distinct(accesses: frozenset[Access]) -> int:
    """How many addresses the accesses reach: counted in a part of the iterations, and scaled up."""
    samples = [_sample(*access) for access in accesses]
    addresses = np.concatenate([reached for reached, _ in samples])
    return round(len(np.unique(addresses)) * sum(numel for _, numel in samples) / len(addresses))


def _sample(index: sympy.Expr, loops: tuple[tuple[sympy.Symbol, int], ...]) -> tuple[np.ndarray, int]:
    """Addresses that an index reaches in about SAMPLE iterations, and the number of all iterations.

    Loops are cut short, those with the largest strides first: samples of several indices then lie in one region."""
    functions = {"FloorDiv": lambda a, b: a // b, "ModularIndexing": lambda a, b, n: a // b % n}
    plain = index.replace(lambda part: isinstance(part, Identity), lambda part: part.args[0])
    at = sympy.lambdify([name for name, _ in loops], plain, modules=[functions, "numpy"])
    counts = [n for _, n in loops]
    numel = math.prod(counts)
    steps = np.eye(len(loops), dtype=int)
    strides = [abs(int(at(*step)) - int(at(*np.zeros_like(step)))) for step in steps]
    for i in sorted(range(len(loops)), key=lambda i: (strides[i], counts[i]), reverse=True):
        counts[i] = max(1, min(counts[i], SAMPLE * counts[i] // math.prod(counts)))
    grid = np.meshgrid(*map(np.arange, counts), indexing="ij")
    return np.broadcast_to(np.asarray(at(*grid)), counts).reshape(-1), numel


def called(kernel: ir.ExternKernel) -> torch.fx.Node:
    """The operation of the traced graph that an extern kernel is."""
    packet = getattr(kernel.op_overload, "_overloadpacket", None)  # sort becomes sort.stable
    for node in kernel.origins:  # which may include views
        if getattr(node.target, "_overloadpacket", node) is packet:
            return node
    return kernel.get_origin_node()


FINAL_SUM = re.compile(r"(\w+) = workspace_\d+\[.*\]\.view\((\d+), (\d+)\)\.sum\(dim=0\)(.*\.to\()?")


def graph_kernels(graph: GraphLowering, code: str) -> list[Kernel]:
    """The launches of a lowered graph. `code` is what Inductor generated for it."""
    kernels: list[Kernel] = []
    for node in graph.scheduler.nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
            continue
        if node.get_operation_names() <= graph.scheduler.removed_ops:
            continue
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            origin = called(node.node)
            args, kwargs = tree_map_only(torch.fx.Node, lambda n: n.meta["val"], (origin.args, origin.kwargs))
            with V.fake_mode, Count(kernels.append):
                origin.target(*args, **kwargs)
        else:
            reduces = any(part.is_reduction() for part in node.get_nodes())
            kind = "reduction" if reduces else "elementwise"
            kernels.append(Kernel(kind, f"{len(node.get_nodes())} fused", accessed_bytes(node)))
    # Column sums that share a kernel with row-wise work leave partial sums, which the wrapper adds and casts with aten.
    for name, rows, columns, casts in FINAL_SUM.findall(code):
        if isinstance(graph.get_buffer(name).get_output_spec(), ir.NonOwningLayout):
            raise RuntimeError(f"torch 2.13 loses {name}: a column sum that is concatenated as it is never gets there")
        partial, result = 4 * int(rows) * int(columns), 4 * int(columns)
        kernels.append(Kernel("reduction", "sum of partial sums", 2 * partial + result))  # written before, read here
        if casts:
            kernels.append(Kernel("elementwise", "cast of a sum", result + result // 2))
    return kernels
