"""The ops at the trainer's shapes, with random inputs and costs: what is checked, timed and tuned, on any machine.

A case is one op at one shape and direction. CASES are the shapes of a step; SMALL the same in the sizes of a
CPU; QUICK one case of each op that impl="auto" asks about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import accumulate_dtype
from .fake_quant import (
    RowQuant,
    fake_quant_linear,
    fake_quant_linear_cost,
    fake_quantize_banks,
    quantize_rows,
    quantize_rows_cost,
)
from .muon import (
    muon_momentum_,
    muon_momentum_cost,
    muon_momentum_ref_,
    muon_update_,
    muon_update_cost,
    muon_update_ref_,
    square_parts,
)
from .newton_schulz import newton_schulz, newton_schulz_cost
from .relu2_mlp import linear_relu2, linear_relu2_cost, relu2_mlp, relu2_mlp_backward_cost, relu2_mlp_cost
from .softcap_logprobs import softcap_cross_entropy, softcap_logprobs_cost, token_logprobs

COLUMNS = ("eager", "compile", "triton")
INT6 = RowQuant(bits=6)
Inputs = dict[str, Tensor]


class Random:
    """Draws for one set of inputs, on the device: a 65,536 x 1536 matrix takes seconds to draw on a CPU."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def weight(self, n: int, k: int) -> Tensor:
        """A fp32 master under which products of normal activations stay normal."""
        return self.normal(n, k, scale=k**-0.5, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Case:
    op: str  # the name by which impl="auto" looks measurements up
    rows: int
    shape: tuple[int, ...]
    draw: Callable[[Random, int], Inputs]  # random inputs with that many rows
    call: Callable[[Inputs, str], Tensor | tuple[Tensor, ...]]  # the op with impl, on those inputs
    cost: tuple[int, int]  # (flops, bytes)
    leaves: tuple[str, ...] = ()  # inputs that get gradients, of the output times inputs["dy"]; none: forward only
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False  # the kernel equals eager bit for bit
    columns: tuple[str, ...] = COLUMNS
    checked_as: Case | None = None  # where the result that is timed says too little to check

    @property
    def direction(self) -> str:
        return "forward+backward" if self.leaves else "forward"

    @property
    def name(self) -> str:
        return f"{self.op} {' x '.join(map(str, self.shape))} {self.direction}"

    def make(self, device: torch.device, seed: int, rows: int | None = None) -> Inputs:
        inputs = self.draw(Random(device, seed), rows or self.rows)
        for name in self.leaves:
            inputs[name].requires_grad_()
        return inputs

    def run(self, inputs: Inputs, impl: str = "eager", call: Callable | None = None) -> dict[str, Tensor]:
        """{name: tensor} of the outputs and, for each leaf, of its gradient."""
        call = call or partial(self.call, impl=impl)
        if not self.leaves:
            with torch.no_grad():
                out = call(inputs)
            return {f"out{i}": value for i, value in enumerate(out if isinstance(out, tuple) else (out,))}
        out = call(inputs)
        grads = torch.autograd.grad(out, [inputs[name] for name in self.leaves], inputs["dy"])
        return {"out0": out.detach()} | {f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}


def _linear_backward_cost(rows: int, k: int, n: int) -> tuple[int, int]:
    """dx = dz w and dw = dzᵀ x: dz read twice, w and x once, dx written in 16 bits, dw in fp32."""
    return 4 * rows * k * n, 2 * (2 * rows * n + 2 * rows * k + n * k) + 4 * n * k


def _sum(*costs: tuple[int, int]) -> tuple[int, int]:
    flops, traffic = zip(*costs, strict=True)
    return sum(flops), sum(traffic)


def relu2_mlp_case(rows: int, k: int, hidden: int, backward: bool) -> Case:
    cost = relu2_mlp_cost(rows, k, hidden, k)
    return Case(
        op="relu2_mlp", rows=rows, shape=(rows, k, hidden),
        draw=lambda r, m: {
            "x": r.normal(m, k), "w_fc": r.weight(hidden, k), "w_proj": r.weight(k, hidden), "dy": r.normal(m, k)
        },
        call=lambda i, impl: relu2_mlp(i["x"], i["w_fc"], i["w_proj"], impl=impl),
        cost=_sum(cost, relu2_mlp_backward_cost(rows, k, hidden, k)) if backward else cost,
        leaves=("x", "w_fc", "w_proj") if backward else (),
    )  # fmt: skip


def linear_inputs(k: int, n: int) -> Callable[[Random, int], Inputs]:
    return lambda r, m: {"x": r.normal(m, k), "w": r.weight(n, k), "dy": r.normal(m, n)}


def _linear_case(op: str, call: Callable, rows: int, k: int, n: int, backward: bool, cost: tuple, **options) -> Case:
    return Case(
        op=op, rows=rows, shape=(rows, k, n), call=call, draw=linear_inputs(k, n),
        cost=_sum(cost, _linear_backward_cost(rows, k, n)) if backward else cost,
        leaves=("x", "w") if backward else (), **options,
    )  # fmt: skip


def linear_relu2_case(rows: int, k: int, n: int, backward: bool) -> Case:
    def call(i: Inputs, impl: str) -> Tensor:
        return linear_relu2(i["x"], i["w"], impl=impl)

    # Backward first turns dh into dz: dh and h read, dz written.
    cost = _sum(linear_relu2_cost(rows, k, n), (0, 6 * rows * n if backward else 0))
    return _linear_case("linear_relu2", call, rows, k, n, backward, cost)


def fake_quant_linear_case(rows: int, k: int, n: int, backward: bool) -> Case:
    """The form that decodes the weight once and multiplies."""

    def call(i: Inputs, impl: str) -> Tensor:
        return fake_quant_linear(i["x"], i["w"], INT6, form="shadow", impl=impl)

    cost = fake_quant_linear_cost(rows, n, k)
    return _linear_case("fake_quant_linear", call, rows, k, n, backward, cost)


def codes_linear_case(rows: int, k: int, n: int, backward: bool) -> Case:
    """The form with codes in the matmul and the scale in its epilogue; it must beat the other form's kernel too."""

    def call(i: Inputs, impl: str) -> Tensor:
        form = "codes" if impl == "triton" else "shadow"
        impl = "triton" if impl == "shadow" else impl
        return fake_quant_linear(i["x"], i["w"], INT6, form=form, impl=impl)

    cost = fake_quant_linear_cost(rows, n, k)
    return _linear_case("codes_linear", call, rows, k, n, backward, cost, columns=(*COLUMNS, "shadow"))


def linear_case(rows: int, k: int, n: int, backward: bool) -> Case:
    """The plain bf16 linear layer, for comparison: no kernel of ours."""
    cost = 2 * rows * k * n, 2 * (rows * k + n * k + rows * n)
    return Case(
        op="linear", rows=rows, shape=(rows, k, n), call=lambda i, impl: F.linear(i["x"], i["w"]),
        draw=lambda r, m: {"x": r.normal(m, k), "w": r.weight(n, k).bfloat16(), "dy": r.normal(m, n)},
        cost=_sum(cost, _linear_backward_cost(rows, k, n)) if backward else cost,
        leaves=("x", "w") if backward else (), columns=("eager", "compile"),
    )  # fmt: skip


def fake_quantize_case(*banks: tuple[int, int, int]) -> Case:
    """All matrices of a model, banks of (layers, rows, columns), from fp32 masters into bf16 shadows."""
    weights = sum(math.prod(bank) for bank in banks)

    def draw(random: Random, _rows: int) -> Inputs:
        masters = {f"w{i}": random.normal(*bank, dtype=torch.float32) for i, bank in enumerate(banks)}
        unwritten = {
            f"s{i}": torch.full_like(w, math.nan, dtype=torch.bfloat16) for i, w in enumerate(masters.values())
        }
        return masters | unwritten

    def call(i: Inputs, impl: str) -> tuple[Tensor, ...]:
        shadows = _named(i, "s")
        fake_quantize_banks(_named(i, "w"), shadows, INT6, impl=impl)
        return tuple(shadows)

    return Case(
        op="fake_quantize_rows", rows=sum(layers * n for layers, n, _ in banks),
        shape=(sum(bank[0] for bank in banks), weights), draw=draw, call=call,
        cost=(5 * weights, 6 * weights), dtype=torch.float32, exact=True,
    )  # fmt: skip


def quantize_rows_case(layers: int, n: int, k: int) -> Case:
    return Case(
        op="quantize_rows", rows=layers * n, shape=(layers, n, k),
        draw=lambda r, m: {"w": r.normal(m // n, n, k, dtype=torch.float32)},
        call=lambda i, impl: quantize_rows(i["w"], INT6, impl=impl),
        cost=quantize_rows_cost(layers * n, k), dtype=torch.float32, exact=True,
    )  # fmt: skip


def muon_momentum_case(*banks: tuple[int, int, int]) -> Case:
    """fp32 gradients and buffers, bf16 out and its sums of squares, as the optimizer has them."""

    def call(i: Inputs, impl: str) -> tuple[Tensor, ...]:
        g, b, u = (_named(i, name) for name in "gbu")
        sums = [t.new_empty(len(t), square_parts(*t.shape[1:]), dtype=accumulate_dtype(t.dtype)) for t in u]
        if impl == "eager":  # the op itself would refuse the oracle's float64 scalar
            muon_momentum_ref_(g, b, u, i["momentum"], square_sums=sums)
        else:
            muon_momentum_(g, b, u, i["momentum"], square_sums=sums, impl=impl)
        return *b, *u, *sums

    return _muon_case("muon_momentum_", banks, ("g", "b"), "u", "momentum", 0.95, call, muon_momentum_cost)


def muon_update_case(*banks: tuple[int, int, int], spec: RowQuant | None = None) -> Case:
    """fp32 weights, bf16 updates and shadows, as the optimizer has them; with `spec` the shadows are quantized."""
    scales = [max(1.0, n / k) ** 0.5 for _, n, k in banks]

    def call(i: Inputs, impl: str) -> tuple[Tensor, ...]:
        w, o, s = (_named(i, name) for name in "wos")
        reference = impl == "eager" and spec is None  # which takes the oracle's float64 scalar
        update, options = (muon_update_ref_, {}) if reference else (muon_update_, {"impl": impl, "specs": spec})
        update(w, o, i["lr"], scales=scales, weight_decay=0.01, shadows=s, **options)
        return *w, *s

    op = "muon_update_" if spec is None else "muon_update_rows_"
    return _muon_case(op, banks, ("w",), "os", "lr", 0.02, call, muon_update_cost, exact=spec is not None)


def _muon_case(
    op: str, banks: tuple, wide: Sequence[str], narrow: Sequence[str], scalar: str, value: float, call: Callable,
    cost: Callable, exact: bool = False,
) -> Case:  # fmt: skip
    """Random fp32 banks `wide`, bf16 banks `narrow`, and a 0-d fp32 scalar."""

    def draw(random: Random, _rows: int) -> Inputs:
        inputs = {scalar: torch.full((), value, device=random.device)}
        for names, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
            inputs |= {f"{n}{i}": random.normal(*bank, dtype=dtype) for n in names for i, bank in enumerate(banks)}
        return inputs

    weights = sum(math.prod(bank) for bank in banks)
    return Case(
        op=op, rows=sum(layers * n for layers, n, _ in banks), shape=(sum(bank[0] for bank in banks), weights),
        draw=draw, call=call, cost=cost(weights), dtype=torch.float32, exact=exact,
    )  # fmt: skip


def _named(inputs: Inputs, letter: str) -> list[Tensor]:
    """The banks of one name."""
    return [value for name, value in inputs.items() if name[0] == letter and name[1:].isdigit()]


def newton_schulz_case(batch: int, m: int, n: int) -> Case:
    """bf16 as the optimizer has it; in float64 for the oracle's float64 input."""

    def call(i: Inputs, impl: str) -> Tensor:
        return newton_schulz(i["x"], dtype=i["x"].dtype, impl=impl)

    return Case(
        op="newton_schulz", rows=batch * m, shape=(batch, m, n), call=call,
        draw=lambda r, rows: {"x": r.normal(max(1, rows // m), m, n)},
        cost=newton_schulz_cost(batch, m, n, io_itemsize=2, symmetric=True),
    )  # fmt: skip


def softcap_cross_entropy_case(rows: int, k: int, vocab: int, backward: bool, reduction: str = "mean") -> Case:
    """Timed as the mean that a trainer takes; checked token by token, for errors cancel in a mean."""
    cost = softcap_logprobs_cost(rows, k, vocab)
    # The least: dh = du W and dW = duᵀ h, hidden and W read, both gradients written. The kernel computes the logits
    # again, which a forward that keeps du need not.
    more = 4 * rows * k * vocab, 2 * (2 * rows * k + vocab * k) + 4 * vocab * k
    return Case(
        op="softcap_cross_entropy", rows=rows, shape=(rows, k, vocab),
        draw=lambda r, m: {
            "h": r.normal(m, k), "w": r.weight(vocab, k), "targets": r.below(vocab, m),
            "dy": r.normal(*(() if reduction == "mean" else (m,)), dtype=torch.float32),
        },
        call=lambda i, impl: softcap_cross_entropy(
            i["h"], i["w"], i["targets"], reduction=reduction, impl=impl
        ),
        cost=_sum(cost, more) if backward else cost, leaves=("h", "w") if backward else (),
        checked_as=softcap_cross_entropy_case(rows, k, vocab, backward, "none") if reduction == "mean" else None,
    )  # fmt: skip


def token_logprobs_case(rows: int, k: int, vocab: int) -> Case:
    return Case(
        op="token_logprobs", rows=rows, shape=(rows, k, vocab),
        draw=lambda r, m: {"h": r.normal(m, k), "w": r.weight(vocab, k), "targets": r.below(vocab, m)},
        call=lambda i, impl: token_logprobs(i["h"], i["w"], i["targets"], impl=impl),
        cost=softcap_logprobs_cost(rows, k, vocab),
    )  # fmt: skip


def _cases(rows: int, k: int, hiddens: tuple[int, ...], vocabs: tuple[int, ...], layers: int) -> tuple[Case, ...]:
    """Every op at a model of width k with half as many key and value channels, matrices as wide as the last hidden."""
    wide = hiddens[-1]
    banks = (2 * layers, k, k), (2 * layers, k // 2, k), (layers, wide, k), (layers, k, wide)
    linears = relu2_mlp_case, linear_relu2_case, linear_case, fake_quant_linear_case, codes_linear_case
    return (
        *(case(rows, k, hidden, backward) for case in linears for hidden in hiddens for backward in (False, True)),
        fake_quantize_case(*banks),
        quantize_rows_case(layers, wide, k),
        *(softcap_cross_entropy_case(rows, k, vocab, backward) for vocab in vocabs for backward in (False, True)),
        *(token_logprobs_case(rows, k, vocab) for vocab in vocabs),
        *(newton_schulz_case(*bank) for bank in (banks[0], banks[2])),
        muon_momentum_case(*banks),
        muon_update_case(*banks),
        muon_update_case(*banks, spec=INT6),
    )


def _one_of_each(cases: tuple[Case, ...], *ops: str) -> tuple[Case, ...]:
    """The first of each op, with its backward if it has one."""
    return tuple(max((case for case in cases if case.op == op), key=lambda case: bool(case.leaves)) for op in ops)


# 65,536 rows are one of eight GPUs' share of a step of 524,288 tokens; the banks are the 54 matrices of 9 layers.
CASES = _cases(65_536, 512, (1024, 1536), (1024, 8192), 9)

# What "auto" asks about, what a step spends most in first.
QUICK = _one_of_each(
    CASES,
    "relu2_mlp",
    "softcap_cross_entropy",
    "newton_schulz",
    "fake_quantize_rows",
    "codes_linear",
    "token_logprobs",
    "muon_momentum_",
    "muon_update_",
    "muon_update_rows_",
    "linear_relu2",
    "quantize_rows",
)
SMALL = _one_of_each(_cases(512, 64, (128,), (256,), 2), "linear", "fake_quant_linear", *(case.op for case in QUICK))
