"""impl="gluon" without a GPU: who may ask for it, and the kernel's own source run by threads over a model of shared
memory, mbarriers and TMA. That its machine code is good is tests/test_offline.py's."""

from __future__ import annotations

import importlib
import inspect
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels import __main__
from golfgpt_kernels._versions import gluon_untried
from golfgpt_kernels.testing import randn

pytest.importorskip("triton")

from golfgpt_kernels import _relu2_mlp_gluon

relu2_mlp = importlib.import_module("golfgpt_kernels.relu2_mlp")  # the package's attribute is the function
CUDA = torch.device("cuda", 0)
X, W, W2 = randn(6, 8), randn(16, 8, seed=1), randn(8, 16, seed=2)


# ---- who may ask for it


@pytest.mark.parametrize("op", [gk.linear_relu2, gk.relu2_mlp])
def test_it_never_falls_back(op):
    args = (X, W, W2) if op is gk.relu2_mlp else (X, W)
    with pytest.raises(RuntimeError, match=r"impl='gluon' cannot run: .*tensors are on cpu.*; impl='eager' can"):
        op(*args, impl="gluon")


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, None),
        ((9, 0), torch.float16, None),
        ((8, 0), torch.bfloat16, "it is for sm_90, and GPU is sm_80"),
        ((10, 0), torch.bfloat16, "it is for sm_90, and GPU is sm_100"),
        ((9, 0), torch.float32, "it computes in torch.float16 and torch.bfloat16, not in torch.float32"),
    ],
)
def test_where_it_runs(capability, dtype, reason, monkeypatch):
    monkeypatch.setattr(relu2_mlp, "GLUON_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert relu2_mlp.gluon_cannot_run(CUDA, dtype) == reason
    monkeypatch.setattr(relu2_mlp, "GLUON_MISSING", "triton is not installed")
    assert relu2_mlp.gluon_cannot_run(CUDA, dtype) == "; ".join(filter(None, ["triton is not installed", reason]))


def test_with_which_triton_it_runs():
    for version in ("3.6.0", "3.7.1", "3.9.2"):
        assert gluon_untried(version) is None
    for version in ("3.5.1", "3.10.0", "4.0.0"):
        assert gluon_untried(version) == f"it was compiled with triton 3.6 to 3.9 only, found {version}"


def test_it_is_no_meaning_of_auto():
    with pytest.raises(ValueError, match="'gluon'; expected 'auto', 'eager' or 'triton'"):
        gk.set_implementation("gluon")
    with pytest.raises(ValueError, match="'gluon' for newton_schulz; expected 'auto', 'eager' or 'triton'"):
        gk.set_implementation("eager", {"newton_schulz": "gluon"})
    assert torch.equal(gk.relu2_mlp(X, W, W2), gk.relu2_mlp(X, W, W2, impl="eager"))


def test_a_run_can_choose_it_for_its_two_ops():
    with gk.set_implementation("eager", {"relu2_mlp": "gluon", "linear_relu2": "gluon"}):
        assert gk.implementation("relu2_mlp", CUDA, torch.bfloat16) == ("gluon", "set_implementation('gluon')")
        for op, args in ((gk.linear_relu2, (X, W)), (gk.relu2_mlp, (X, W, W2))):
            with pytest.raises(RuntimeError, match="impl='gluon' cannot run"):
                op(*args)
            op(*args, impl="eager")
        assert gk.implementation("newton_schulz", CUDA, torch.bfloat16)[0] == "eager"
    gk.relu2_mlp(X, W, W2)


def test_check_can_check_it(capsys):
    options = ["check", "relu2_mlp", "newton_schulz", "--impl", "gluon", "--device", "cpu", "--rows", "8"]
    assert __main__.main([*options, "--dim", "16", "--hidden", "16", "--vocab", "16", "--layers", "1"]) == 1
    mlp, newton_schulz = capsys.readouterr().out.splitlines()
    assert mlp.startswith("relu2_mlp: ") and "impl='gluon' cannot run" in mlp
    assert newton_schulz.startswith("newton_schulz: ") and "impl='gluon'; expected" in newton_schulz


@pytest.mark.parametrize(
    "op",
    [
        lambda impl: gk.newton_schulz(X, impl=impl),
        lambda impl: gk.quantize_rows(X, gk.RowQuant(bits=6), impl=impl),
        lambda impl: gk.fake_quant_linear(X, W, gk.RowQuant(bits=6), impl=impl),
        lambda impl: gk.softcap_cross_entropy(X, W, torch.zeros(6, dtype=torch.int64), impl=impl),
        lambda impl: gk.muon_momentum_([X], [X.clone()], [X.clone()], torch.tensor(0.9), impl=impl),
    ],
    ids=["newton_schulz", "quantize_rows", "fake_quant_linear", "softcap_cross_entropy", "muon_momentum_"],
)
def test_other_ops_do_not_know_it(op):
    with pytest.raises(ValueError, match="impl='gluon'; expected 'auto', 'triton' or 'eager'"):
        op("gluon")


def test_backward_takes_the_form_of_the_forward(monkeypatch):
    """And its weight gradients are those of "triton"."""
    calls = []

    def other(name):
        monkeypatch.setattr(_relu2_mlp_gluon, name, lambda *args: calls.append(name) or getattr(relu2_mlp, name)(*args))

    other("linear_relu2_fwd"), other("relu2_mlp_dz")
    monkeypatch.setattr(relu2_mlp, "gluon_cannot_run", lambda device, dtype: None)
    grads = {}
    for impl in ("gluon", "triton"):
        leaves = [t.clone().requires_grad_() for t in (X, W, W2)]
        gk.relu2_mlp(*leaves, impl=impl).sum().backward()
        grads[impl] = [t.grad for t in leaves]
    assert calls == ["linear_relu2_fwd", "relu2_mlp_dz"]
    assert all(torch.equal(*pair) for pair in zip(*grads.values(), strict=True))
    gk.linear_relu2(X, W, impl="gluon")
    assert calls[2:] == ["linear_relu2_fwd"]


# ---- the kernel's source, run by threads


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, announced: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += announced
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == self.bytes == 0:
                self.phase += 1
                self.pending = self.count
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, timeout=2), "deadlock"


class Memory:
    """Shared memory of `shape`, or a part of it."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def index(self, i: int) -> Memory:
        return Memory(self.values[i])

    def permute(self, order) -> Memory:
        return Memory(self.values.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Memory:
        return Memory(self.values.narrow(dim, start, length))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def load(self, _layout) -> torch.Tensor:
        return self.values.clone()

    def store(self, values: torch.Tensor) -> None:
        self.values.copy_(values)


class Barriers(list):
    index = list.__getitem__


class Descriptor:
    def __init__(self, tensor: torch.Tensor, block: tuple[int, int]):
        self.tensor, self.dtype = tensor, tensor.dtype
        self.block_type = SimpleNamespace(shape=list(block), nbytes=block[0] * block[1] * tensor.itemsize)

    def inside(self, start: list[int]) -> tuple[torch.Tensor, tuple[slice, slice]]:
        """The part of the tensor under the block at `start`, and where it lies in the block."""
        ends = [
            max(0, min(b, size - s)) for b, size, s in zip(self.block_type.shape, self.tensor.shape, start, strict=True)
        ]
        part = self.tensor[start[0] : start[0] + ends[0], start[1] : start[1] + ends[1]]
        return part, (slice(ends[0]), slice(ends[1]))


class Machine:
    """What the kernel's source calls, for one program after another. Copies take a while, as long as they like."""

    def __init__(self, source: str, seed: int = 0):
        self.random, self.pool, self.stores = random.Random(seed), ThreadPoolExecutor(8), threading.local()
        gl = SimpleNamespace(
            cdiv=lambda a, b: -(-a // b),
            static_range=range,
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            float32=torch.float32,
            int64=torch.int64,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            convert_layout=lambda value, layout, assert_trivial: value,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
        )
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: vars(barrier).update(count=count, pending=count),
            wait=lambda barrier, parity: barrier.wait(parity),
            expect=lambda barrier, announced: barrier.change(1, announced),
            arrive=lambda barrier, count: barrier.change(count, 0),
        )
        names = {
            "jit": lambda function: function, "gl": gl, "mbarrier": mbarrier,
            "tma": SimpleNamespace(store_wait=self.store_wait), "tma_load": self.load, "tma_store": self.store,
            "fence_async_shared": lambda: None,
            "warpgroup_mma": lambda a, b, acc: acc + a.values.float() @ b.values.float(),
            "activate": lambda z, slope, dtype, leaky: z.relu().square().to(dtype),
            "activation_grad": lambda h, slope, leaky: 2 * h.float().sqrt(),
            "halves": lambda sums, rows, columns: sums.chunk(2, dim=1),
            "ROWS": 4, "BLOCK_N": 8, "BLOCK_K": 4, "SLOTS": 3, "SHARED": None, "SUMS": None,
            "HALF_SUMS": None,
        }  # fmt: skip
        exec(compile("from __future__ import annotations\n" + source, "_relu2_mlp_gluon.py", "exec"), names)
        self.kernel = names["_relu2_mlp_gluon_kernel"]

    def run(self, a: torch.Tensor, b: torch.Tensor, h: torch.Tensor | None, programs: int) -> torch.Tensor:
        (m, k), n, grad = a.shape, b.shape[1 if h is not None else 0], h is not None
        out = torch.full((m, n), torch.nan, dtype=a.dtype)
        self.programs = programs
        b_block = (4, 8) if grad else (8, 4)
        operands = Descriptor(a, (4, 4)), Descriptor(b, b_block), Descriptor(h if grad else out, (4, 8))
        for self.program in range(programs):
            self.kernel(*operands, Descriptor(out, (4, 8)), 0.0, m, n, k, grad, False)
        return out

    def allocate(self, dtype, shape, _layout):
        if dtype == torch.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Memory(torch.full(shape, torch.nan, dtype=dtype))

    def specialize(self, partitions, _warps, _registers) -> None:
        with ThreadPoolExecutor(len(partitions)) as pool:
            running = [pool.submit(function, *args) for function, args in partitions]
        for each in running:
            each.result()

    def later(self, copy):
        delay = self.random.choice([0.0, 0.0, 0.002])
        return self.pool.submit(lambda: (time.sleep(delay), copy()))

    def load(self, desc, start, barrier, memory) -> None:
        memory.values.fill_(torch.nan)  # while it comes

        def copy():
            part, where = desc.inside(start)
            memory.values.zero_()
            memory.values[where] = part
            barrier.change(0, -desc.block_type.nbytes)

        self.later(copy)

    def store(self, desc, start, memory) -> None:
        def copy():
            part, where = desc.inside(start)
            part.copy_(memory.values[where])

        self.stores.__dict__.setdefault("running", []).append(self.later(copy))

    def store_wait(self, _pending: int) -> None:
        wait(self.stores.__dict__.get("running", []))


FUNCTIONS = ("_produce", "_multiply_grad", "_consume", "_relu2_mlp_gluon_kernel")
SOURCE = "\n".join(inspect.getsource(getattr(_relu2_mlp_gluon, name).fn) for name in FUNCTIONS)


def differences(source: str, m: int, n: int, k: int, programs: int, grad: bool, seed: int = 0) -> int:
    """How many values of the kernel's output are wrong. Integers: sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-2, 3, (m, k), generator=generator).float()
    b = torch.randint(-2, 3, (k, n) if grad else (n, k), generator=generator).float()
    h = torch.randint(0, 4, (m, n), generator=generator).float().square() if grad else None
    expected = (a @ b) * 2 * h.sqrt() if grad else (a @ b.T).relu().square()
    return (Machine(source, seed).run(a, b, h, programs) != expected).sum().item()


@pytest.mark.parametrize("grad", [False, True], ids=["up", "dz"])
@pytest.mark.parametrize(
    ("m", "n", "k", "programs"),
    [(16, 16, 16, 1), (8, 8, 4, 1), (41, 21, 18, 3), (25, 30, 3, 5), (3, 40, 29, 2), (33, 9, 8, 4)],
)
def test_the_source_computes_it(m, n, k, programs, grad):
    """Whole and cut tiles, one step of K and many, programs that get more tiles than others."""
    assert differences(SOURCE, m, n, k, programs, grad) == 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(step // SLOTS + 1) & 1", "step // SLOTS & 1"),
        ("count=2", "count=1"),
        ("h_free.index(half), turn & 1", "h_free.index(half), (turn + 1) & 1"),
        ("h_full.index(half), turn & 1", "h_full.index(half), (turn + 1) & 1"),
        ("tma.store_wait(0)", "pass"),
        ("tile // gl.num_programs(0)", "tile // gl.num_programs(0) // 2"),
        ("m + ROWS, k", "m, k"),
    ],
)
def test_the_model_has_teeth(right, wrong):
    assert right in SOURCE
    try:
        found = sum(differences(SOURCE.replace(right, wrong), 41, 21, 18, 2, True, seed) for seed in range(3))
    except AssertionError:
        return
    assert found
