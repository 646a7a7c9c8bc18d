"""What a training step launches and moves on an H100, counted without a GPU.

    python -m bench.step_counts RECIPE FORM     count one form, print it
    python -m bench.step_counts --all           every recipe and form that RESULTS lacks, then the table in docs/

One rank of 8: the forward and backward of its span, compiled, and its optimizer step. FORMS:

    published   bench/published.py: rank 0 of 8, which orthogonalizes every eighth matrix
    eager       golfgpt with runtime.kernels = eager; torch.compile fuses what it can
    triton      golfgpt with runtime.kernels = triton

Inductor lowers the compiled part for a GPU that is not there (fake_cuda.py). Its kernels are counted after fusion; the
optimizer's operations, and the kernels that our ops launch, one by one as they are called. Counts are exact for this
version of torch:

- bytes: what a kernel must read and write if it reads each address once. A view counts with its own size. What
  torch.compile keeps in registers is not counted.
- flops: of matrix products and attention. Attention is causal: half of the full product.

`ms` is a model, the sum over kernels of max(flops / rate, bytes / bandwidth) plus a launch, at the rates below. It knows
no L2 cache, no tuning of Inductor's choices, no overlap, no communication. It is good for differences between forms.
"""

from __future__ import annotations

import bench.fake_cuda as fake_cuda  # isort: skip  (before torch)

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
from golfgpt_kernels import _jit, set_implementation
from torch import Tensor, nn
from torch._inductor import dependencies, ir, scheduler
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import Identity
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from bench import published
from golfgpt.config import RunConfig
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.optim.flat import FlatGradients
from golfgpt.optim.optimizers import Optimizers
from golfgpt.quant.compute_copies import ComputeCopies
from golfgpt.quant.quantizer import Quantizer
from golfgpt.recipes import get
from golfgpt.train.compile_cache import compile_loss

RECIPES = ("baseline", "mixed-qat", "int5-int6-swa")
FORMS = ("published", "eager", "triton")
WORLD = 8
RESULTS = Path(__file__).parent / "results" / "step-counts.json"

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
WRITE_ONLY = {"copy_", "zero_", "fill_"}  # in-place ops that do not read what they write


class Count(TorchDispatchMode):
    """Calls `on_kernel` for every operation that launches a kernel. Our custom ops run their CUDA bodies."""

    def __init__(self, on_kernel: Callable[[Kernel], None]):
        super().__init__()
        self.on_kernel = on_kernel

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in OPDEFS:
            with self:
                OPDEFS[name]._init_fn(*args, **kwargs)
            return function(*args, **kwargs)
        short = name.split("::")[1]
        if short == "_fused_adamw_":  # FakeTensor cannot call it; one launch takes 36 tensors
            params, grads, *moments = args[:4]
            for _ in range(-(-len(params) // 36)):
                share = 2 * num_bytes(tensors(params, moments)) + num_bytes(grads)
                self.on_kernel(Kernel("elementwise", short, share // -(-len(params) // 36)))
            return None
        out = function(*args, **kwargs)
        on_device = any(t.is_cuda for t in tensors(args, kwargs, out))
        if function.is_view or short in NO_LAUNCH or short.startswith("_record_function") or not on_device:
            return out
        flops = flops_of(function, args, kwargs, out)
        kind = "matmul" if flops else "elementwise"
        if "flash_attention" in short:
            kind, flops = "attention backward" if "backward" in short else "attention", flops // 2
        written = tensors(out)
        if function._schema.is_mutable:
            written = [t for t, a in zip(args, function._schema.arguments, strict=False) if a.alias_info] or written
        read = tensors(args[1:] if short in WRITE_ONLY else args, kwargs)
        self.on_kernel(Kernel(kind, short, num_bytes(read) + num_bytes(tensors(written)), flops))
        return out


def flops_of(function, args: tuple, kwargs: dict, out: Any) -> int:
    if function is torch.ops.aten.linear.default:
        return 2 * out.numel() * args[0].shape[-1]
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


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


@contextmanager
def recorded_launches(on_kernel: Callable[[Kernel], None]):
    """Within it, launches of our kernels are counted and not made."""

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

    replaced = {_jit.launch: launch, _jit.descriptor: descriptor}
    found = [
        (module, name, by)
        for path, module in list(sys.modules.items())
        if path.startswith("golfgpt_kernels")
        for function, by in replaced.items()
        for name in [function.__name__]
        if getattr(module, name, None) is function
    ]
    former = [getattr(module, name) for module, name, _ in found]
    for module, name, by in found:
        setattr(module, name, by)
    try:
        yield
    finally:
        for (module, name, _), function in zip(found, former, strict=True):
            setattr(module, name, function)


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
    whole = int(V.graph.get_numel(name))
    if any(isinstance(dep, dependencies.StarDep) or dep.is_indirect() for dep in deps):
        return whole
    samples = [sample(str(dep.index), dep.index, dep.var_names, tuple(map(int, dep.size))) for dep in deps]
    reached = len(np.unique(np.concatenate([addresses for addresses, _ in samples])))
    parts = sum(len(addresses) for addresses, _ in samples) / sum(numel for _, numel in samples)
    return min(whole, round(reached / parts))


SAMPLE = 1 << 16
_samples: dict[tuple, tuple[np.ndarray, int]] = {}


def sample(text: str, index: sympy.Expr, names: tuple[sympy.Symbol, ...], size: tuple[int, ...]):
    """Addresses that an index reaches within the first SAMPLE iterations or more, and the number of all iterations.

    The loop with the largest stride is cut short, so that samples of several indices of a buffer are of one region."""
    if (text, size) not in _samples:
        used = [(name, n) for name, n in zip(names, size, strict=True) if name in index.free_symbols]
        functions = {"FloorDiv": lambda a, b: a // b, "ModularIndexing": lambda a, b, n: a // b % n}
        plain = index.replace(lambda part: isinstance(part, Identity), lambda part: part.args[0])
        at = sympy.lambdify([name for name, _ in used], plain, modules=[functions, "numpy"])
        strides = [abs(int(at(*(int(i == j) for j in range(len(used))))) - int(at(*[0] * len(used)))) for i in range(len(used))]
        numel = math.prod(n for _, n in used)
        cut = max(range(len(used)), key=lambda i: (strides[i], used[i][1]), default=0)
        counts = [n for _, n in used]
        if numel > SAMPLE:
            counts[cut] = max(1, min(counts[cut], SAMPLE * counts[cut] // numel))
        grid = np.meshgrid(*(np.arange(n) for n in counts), indexing="ij")
        addresses = np.broadcast_to(np.asarray(at(*grid)), counts).reshape(-1)
        _samples[text, size] = addresses, numel
    return _samples[text, size]


def called(kernel: ir.ExternKernel) -> torch.fx.Node:
    """The operation of the traced graph that an extern kernel is."""
    if isinstance(kernel, ir.FallbackKernel):  # its origins may include views
        return next(node for node in kernel.origins if node.target is kernel.op_overload)
    return kernel.get_origin_node()


FINAL_SUM = re.compile(r"= workspace_\d+\[.*\]\.view\((\d+), (\d+)\)\.sum\(dim=0\)(.*\.to\()?")


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
    for rows, columns, casts in FINAL_SUM.findall(code):
        partial, result = 4 * int(rows) * int(columns), 4 * int(columns)
        kernels.append(Kernel("reduction", "sum of partial sums", 2 * partial + result))  # written before, read here
        if casts:
            kernels.append(Kernel("elementwise", "cast of a sum", result + result // 2))
    return kernels


# ---- the forms


def fake(module: nn.Module) -> nn.Module:
    """The module with fake CUDA tensors in place of its parameters and buffers."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(p, device=fake_cuda.DEVICE))
        for name, buffer in part._buffers.items():
            part._buffers[name] = torch.empty_like(buffer, device=fake_cuda.DEVICE)
    return module


class ShardedRanks(Ranks):
    """Rank 0 of 8. Communication is not counted: it returns memory."""

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor[: len(tensor) // WORLD])

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(WORLD * len(tensor), *tensor.shape[1:])


class Recorder:
    """Kernels by the phase in which they ran."""

    def __init__(self) -> None:
        self.phases: dict[str, list[Kernel]] = {}
        self.phase = "rest"

    def add(self, kernel: Kernel) -> None:
        self.phases.setdefault(self.phase, []).append(kernel)

    def on_graph(self, graph: GraphLowering, code: str) -> Callable[[], None]:
        kernels = graph_kernels(graph, code)
        return lambda: [self.add(kernel) for kernel in kernels] and None

    @contextmanager
    def during(self, phase: str):
        self.phases.pop(phase, None)
        self.phase = phase
        yield
        self.phase = "rest"


def count(recipe: str, form: str) -> dict[str, list[Kernel]]:
    """Phase -> kernels, of one step of a form."""
    config, recorder = get(recipe).config, Recorder()
    fake_cuda.install(recorder.on_graph)
    torch.set_num_threads(1)
    real = published_model(config) if form == "published" else GPT(config.model, seed=0)
    set_implementation("eager" if form == "published" else form)
    with FakeTensorMode(allow_non_fake_inputs=True), recorded_launches(recorder.add):
        model = fake(real)
        rows = config.data.batch_tokens // WORLD // config.data.seq_len
        ids = torch.zeros(rows, config.data.seq_len, dtype=torch.int64, device=fake_cuda.DEVICE)
        steps = published_steps if form == "published" else golfgpt_steps
        loss, backward, optimizers = steps(model, config)
        with recorder.during("forward"):
            value = loss(ids, ids)
        with recorder.during("backward"), Count(recorder.add):
            backward(value)
        for phase, step in optimizers.items():
            for _ in range(2):  # the first makes the state
                with recorder.during(phase), Count(recorder.add):
                    step()
    return recorder.phases


def published_model(config: RunConfig) -> nn.Module:
    return published.Model(config.model, config.data.seq_len, config.quant.qat, torch.bfloat16)


def published_steps(model: nn.Module, config: RunConfig) -> tuple[Callable, dict[str, Callable]]:
    compiled = torch.compile(published.newton_schulz, dynamic=False)

    def orthogonalize(u: Tensor, *options) -> Tensor:
        with _disable_current_modes():
            return compiled(u, *options)

    optimizers = published.Optimizers(model, config.optim, torch.bfloat16, orthogonalize)

    def step(world: int) -> None:
        optimizers.muon.world = world
        optimizers.step(1.0, 0.95)

    loss = torch.compile(model, dynamic=False, fullgraph=True)
    return loss, Tensor.backward, {"optimizer, share of 8": lambda: step(WORLD), "optimizer": lambda: step(1)}


def golfgpt_steps(model: GPT, config: RunConfig) -> tuple[Callable, Callable, dict[str, Callable]]:
    fake_quant = Quantizer(config.model, config.quant).fake_quant()

    def parts(model: GPT, world: int) -> tuple[FlatGradients, ComputeCopies, Callable]:
        flat = FlatGradients(model, ShardedRanks(0, world, fake_cuda.DEVICE), sharded=world > 1, control=5)
        copies = ComputeCopies(model, fake_quant, torch.bfloat16)
        optimizers = Optimizers(model, config.optim, flat, copies)
        return flat, copies, lambda: optimizers.step(1.0, 0.95)

    flat, copies, replicated = parts(model, 1)
    *_, sharded = parts(fake(GPT(config.model, seed=0)), WORLD)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return model.loss(ids, targets, dtype=torch.bfloat16, stand_ins=copies.stand_ins())

    def backward(value: Tensor) -> None:
        flat.accumulate_(torch.autograd.grad(value, copies.leaves), first=True)

    return compile_loss(loss, fake_cuda.DEVICE), backward, {"optimizer, share of 8": sharded, "optimizer": replicated}


# ---- results


def summary(phases: Mapping[str, list[Kernel]]) -> dict[str, Any]:
    """Phase -> sums, by kind of kernel and in all."""

    def sums(kernels: list[Kernel]) -> dict[str, float]:
        return {
            "launches": len(kernels),
            "bytes": sum(kernel.bytes for kernel in kernels),
            "flops": sum(kernel.flops for kernel in kernels),
            "ms": round(1e3 * sum(kernel.seconds for kernel in kernels), 3),
        }

    out = {}
    for phase, kernels in phases.items():
        kinds: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in kernels:
            kinds[kernel.kind].append(kernel)
        out[phase] = sums(kernels) | {"kinds": {kind: sums(members) for kind, members in sorted(kinds.items())}}
    return out


def lines(entry: Mapping[str, Any]) -> str:
    out = []
    for phase, sums in entry.items():
        for kind, each in {"": sums, **sums["kinds"]}.items():
            figures = f"{each['launches']:5} launches {each['bytes'] / 1e9:8.3f} GB {each['flops'] / 1e9:9.1f} GF"
            out.append(f"{phase if not kind else '  ' + kind:24} {figures} {each['ms']:8.3f} ms")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("form", nargs="?", choices=FORMS)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="print every kernel")
    parser.add_argument("--json", type=Path, help="write the counts of one form to this file")
    options = parser.parse_args()
    phases = count(options.recipe, options.form)
    if options.kernels:
        for phase, kernels in phases.items():
            for kernel in kernels:
                print(f"{phase:12} {kernel.kind:18} {kernel.name:40} {kernel.bytes / 1e6:10.1f} MB {kernel.flops / 1e9:8.1f}")
    print(lines(summary(phases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
