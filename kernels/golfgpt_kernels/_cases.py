"""The ops that impl="auto" chooses for, at the sizes of a model, with random inputs, and the check of their kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .fake_quant import RowQuant, fake_quant_linear, fake_quantize_banks, quantize_rows
from .muon import muon_momentum_, muon_momentum_ref_, muon_update_, muon_update_ref_, square_parts
from .newton_schulz import newton_schulz
from .relu2_mlp import linear_relu2, relu2_mlp
from .softcap_logprobs import softcap_cross_entropy, token_logprobs
from .testing import budget_violation, poisoned

COLUMNS = ("eager", "compile", "triton")
FP32, BF16 = torch.float32, torch.bfloat16
INT6 = RowQuant(bits=6)


class Random:
    """Draws on the device: a 65,536 x 1536 matrix takes seconds to draw on a CPU."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def weight(self, n: int, k: int) -> Tensor:
        """A fp32 master under which products of normal activations stay normal."""
        return self.normal(n, k, dtype=FP32) * k**-0.5

    def targets(self, vocab: int, count: int) -> Tensor:
        return torch.randint(vocab, (count,), generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op at one shape; with `backward` also its gradients, for half the sum of squares of the result."""

    op: str  # the name by which impl="auto" looks measurements up
    rows: int
    shape: tuple[int, ...]
    draw: Callable[[Random, int], tuple[Tensor, ...]]  # random inputs with that many rows
    call: Callable  # call(*inputs, impl=impl) -> a tensor or a tuple of tensors
    backward: bool = False
    dtype: torch.dtype = BF16
    exact: bool = False  # the kernel equals eager bit for bit
    columns: tuple[str, ...] = COLUMNS

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        return f"{self.op} {' x '.join(map(str, self.shape))} {self.direction}"

    def make(
        self, device: torch.device, seed: int, rows: int | None = None, double: bool = False
    ) -> tuple[Tensor, ...]:
        inputs = self.draw(Random(device, seed), rows or self.rows)
        floats = [x.is_floating_point() for x in inputs]
        inputs = [x.double() if double and float else x for x, float in zip(inputs, floats, strict=True)]
        return tuple(x.requires_grad_(self.backward and float) for x, float in zip(inputs, floats, strict=True))

    def run(self, inputs: tuple[Tensor, ...], impl: str = "eager", call: Callable | None = None) -> dict[str, Tensor]:
        """{name: tensor} of the results and gradients."""
        call = call or partial(self.call, impl=impl)
        if not self.backward:
            with torch.no_grad():
                out = call(*inputs)
            return {f"out{i}": value for i, value in enumerate(out if isinstance(out, tuple) else (out,))}
        out = call(*inputs)
        grads = torch.autograd.grad(out, [x for x in inputs if x.requires_grad], out.detach())
        return {"out0": out.detach()} | {f"gradient{i}": grad for i, grad in enumerate(grads)}


def op_cases(
    rows: int,
    k: int,
    hidden: int,
    vocab: int,
    layers: int,
    *,
    kv: int | None = None,
    dtype: torch.dtype = BF16,
    slope: float = 0.0,
    softcap: float | None = 30.0,
) -> dict[str, Case]:
    """A case of each op, those in which a training step spends most first. The banks are those of a model with `kv` key
    channels (None: half of `k`); `dtype` is that of activations and compute copies, `slope` the activation's."""
    banks = (2 * layers, k, k), (2 * layers, kv or k // 2, k), (layers, hidden, k), (layers, k, hidden)
    count, numel = sum(bank[0] for bank in banks), sum(map(math.prod, banks))
    scales = [max(1.0, n / k) ** 0.5 for _, n, k in banks]

    def draw_banks(*dtypes):
        return lambda r, _rows: tuple(r.normal(*bank, dtype=dtype) for dtype in dtypes for bank in banks)

    def codes_linear(x, w, impl):
        """Against eager, and against the kernel of the other form."""
        form = "codes" if impl == "triton" else "compute_copy"
        return fake_quant_linear(x, w, INT6, form=form, impl="triton" if impl == "compute_copy" else impl)

    def fake_quantize(*ws, impl):
        copies = [torch.empty_like(w, dtype=dtype) for w in ws]
        fake_quantize_banks(ws, copies, INT6, impl=impl)
        return tuple(copies)

    # The reference stands for eager in both, since the op would refuse the float64 scalar that goes with float64 input.

    def momentum(*gs_and_bs, impl):
        g, b = gs_and_bs[: len(banks)], gs_and_bs[len(banks) :]
        u = [torch.empty_like(t, dtype=dtype if t.dtype == FP32 else t.dtype) for t in g]
        sums = [t.new_empty(len(t), square_parts(*t.shape[1:])) for t in g]
        op = muon_momentum_ref_ if impl == "eager" else partial(muon_momentum_, impl=impl)
        op(g, b, u, g[0].new_full((), 0.95), square_sums=sums)
        return *b, *u, *sums

    def update(*ws_and_os, impl, spec=None):
        w, o = ws_and_os[: len(banks)], ws_and_os[len(banks) :]
        copies = [torch.empty_like(t) for t in o]
        op = muon_update_ref_ if impl == "eager" and spec is None else partial(muon_update_, specs=spec, impl=impl)
        op(w, o, w[0].new_full((), 0.02), scales=scales, weight_decay=0.01, compute_copies=copies)
        return *w, *copies

    def mlp(r, m):
        return r.normal(m, k, dtype=dtype), r.weight(hidden, k), r.weight(k, hidden)

    def linear(r, m):
        return r.normal(m, k, dtype=dtype), r.weight(hidden, k)

    def head(r, m):
        return r.normal(m, k, dtype=dtype), r.weight(vocab, k), r.targets(vocab, m)

    def square(r, m):
        return (r.normal(max(1, m // k), k, k, dtype=dtype),)

    def wide(r, m):
        return (r.normal(m // hidden, hidden, k, dtype=FP32),)

    model = sum(layers * n for layers, n, _ in banks), (count, numel)
    cross_entropy = partial(
        softcap_cross_entropy, softcap=softcap, reduction="none"
    )  # of each token: errors would cancel in a mean
    cases = (
        Case("relu2_mlp", rows, (rows, k, hidden), mlp, partial(relu2_mlp, negative_slope=slope), True, dtype),
        Case("softcap_cross_entropy", rows, (rows, k, vocab), head, cross_entropy, True, dtype),
        Case(
            "newton_schulz",
            2 * layers * k,
            banks[0],
            square,
            lambda x, impl: newton_schulz(x, dtype=x.dtype, impl=impl),
            dtype=dtype,
        ),
        Case("fake_quantize_rows", *model, draw_banks(FP32), fake_quantize, dtype=FP32, exact=True),
        Case(
            "codes_linear",
            rows,
            (rows, k, hidden),
            linear,
            codes_linear,
            True,
            dtype,
            columns=(*COLUMNS, "compute_copy"),
        ),
        Case("token_logprobs", rows, (rows, k, vocab), head, partial(token_logprobs, softcap=softcap), dtype=dtype),
        Case("muon_momentum_", *model, draw_banks(FP32, FP32), momentum, dtype=FP32),
        Case("muon_update_", *model, draw_banks(FP32, dtype), update, dtype=FP32),
        Case("muon_update_rows_", *model, draw_banks(FP32, dtype), partial(update, spec=INT6), dtype=FP32, exact=True),
        Case("linear_relu2", rows, (rows, k, hidden), linear, partial(linear_relu2, negative_slope=slope), True, dtype),
        Case(
            "quantize_rows",
            layers * hidden,
            (layers, hidden, k),
            wide,
            partial(quantize_rows, spec=INT6),
            dtype=FP32,
            exact=True,
        ),
    )
    return {case.op: case for case in cases}


# 65,536 rows are one of eight GPUs' part of a step of 524,288 tokens; the banks are the 54 matrices of 9 layers.
QUICK = tuple(op_cases(65_536, 512, 1024, 1024, 9).values())


def input_sets(case: Case, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Sets of random inputs, more than four times L2 together and two at least."""
    first, count = case.make(device, 0), 2
    if device.type == "cuda":
        size = sum(value.numel() * value.element_size() for value in first)
        count = max(2, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / size))
    return [first, *(case.make(device, seed) for seed in range(1, count))]


def column_function(case: Case, column: str) -> Callable[[tuple[Tensor, ...]], object]:
    """What `column` times. Compiled anew, so that recompilation limits do not add up over cases."""
    if column != "compile":
        return partial(case.run, impl=column)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: case.call(*inputs, impl="eager"), fullgraph=True, dynamic=False)
    return partial(case.run, call=compiled)


# ---- check


def check(case: Case, device: torch.device, rows: int = 4096, impl: str = "triton") -> str | None:
    """Why that kernel of `case` is wrong on `device`, or None. One that is not exact keeps the error budget against
    float64 on `rows` rows, and differs from eager at full size by no more than is allowed."""
    if not case.exact:
        ours, eager, oracle = (outputs(case, device, rows, *way) for way in ((impl,), ("eager",), ("eager", True)))
        for name, actual in ours.items():
            if violation := budget_violation(actual, eager[name], oracle[name]):
                return f"{name} at {min(rows, case.rows)} rows: {violation}"
        del ours, eager, oracle, actual
    actual, eager = (outputs(case, device, case.rows, way) for way in (impl, "eager"))
    return disagreement(actual, eager, allowed_difference(case, device, rows))


def allowed_difference(case: Case, device: torch.device, rows: int = 4096) -> dict[str, float]:
    """Between two good results, relative in the 2-norm: 4 times eager's own error on `rows` rows."""
    if case.exact:
        return {}
    eager, oracle = (outputs(case, device, rows, "eager", double) for double in (False, True))
    return {name: 4 * relative(out, oracle[name]) + torch.finfo(out.dtype).eps for name, out in eager.items()}


def outputs(case: Case, device: torch.device, rows: int, impl: str, double: bool = False) -> dict[str, Tensor]:
    """Of new inputs each time, since some ops change theirs."""
    inputs = case.make(device, 1, min(rows, case.rows), double)
    with poisoned() if impl != "eager" else contextlib.nullcontext():
        return case.run(inputs, impl)


def disagreement(actual: dict[str, Tensor], eager: dict[str, Tensor], allowed: dict[str, float]) -> str | None:
    """Why they differ too much; where nothing is allowed they must be equal."""
    for name, value in actual.items():
        if torch.equal(value, eager[name]):
            continue
        if name not in allowed:
            return f"{name}: {(value != eager[name]).sum().item()} of {value.numel()} values differ from eager's"
        if not (difference := relative(value, eager[name])) <= allowed[name]:
            return f"{name}: differs from eager by {difference:.2e}, expected at most {allowed[name]:.2e}"
    return None


def relative(value: Tensor, reference: Tensor) -> float:
    reference = reference.to(torch.promote_types(reference.dtype, torch.float32))
    return ((value - reference).norm() / reference.norm()).item()
