"""The choice of a run's dtype: from given times, and one real measurement."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from models import SMALL, lively
from torch.utils._python_dispatch import TorchDispatchMode

from golfgpt.config import DataConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.runs import read_config
from golfgpt.train import compute_dtype
from golfgpt.train.compute_dtype import DtypeChoice, select_dtype
from golfgpt.train.step import TrainStep
from golfgpt.train.train import train

CPU = Ranks(0, 1, torch.device("cpu"))
DATA = DataConfig(batch_tokens=2048, seq_len=128, spans=2, microbatch_tokens=512)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def clock(monkeypatch):
    """Give every forward and backward a time: seconds a token by dtype, times noise(its number in that dtype)."""

    def give(noise=lambda call: 1.0, **per_token: float) -> list[tuple[str, tuple[int, int]]]:
        calls: list[tuple[str, tuple[int, int]]] = []

        def seconds(model, ids, dtype) -> float:
            name = str(dtype).removeprefix("torch.")
            calls.append((name, tuple(ids.shape)))
            return per_token[name] * ids.numel() * noise(sum(called == name for called, _ in calls))

        monkeypatch.setattr(compute_dtype, "_seconds", seconds)
        return calls

    return give


def choose(choice: str = "auto", ranks: Ranks = CPU) -> DtypeChoice:
    return select_dtype(choice, lively(), DATA, ranks)


def kept(choice: DtypeChoice) -> bool:
    return choice.why.endswith("measured in an earlier run")


@pytest.mark.parametrize(
    "bfloat16, expected",
    [(3e-6, "bfloat16"), (50e-6, "float32"), (5e-6, "float32"), (4.7e-6, "float32")],
    ids=["faster", "slower", "tie", "not clearly"],
)
def test_bfloat16_has_to_win_clearly(clock, monkeypatch, bfloat16, expected):
    clock(bfloat16=bfloat16, float32=5e-6)
    choice = choose()
    assert choice.why == f"bfloat16 takes {bfloat16 / 5e-6:.2f} times as long as float32, measured now"
    assert str(choice) == f"{expected} ({choice.why})"
    monkeypatch.setattr(compute_dtype, "_seconds", None)  # nothing is timed again
    assert str(choose()) == str(choice).replace("now", "in an earlier run")
    assert str(choose("float32")) == "float32" and choose("bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "noise",
    [lambda call: 10.0 if call % compute_dtype.ROUNDS == 1 else 1.0, lambda call: 1e6 if call == 8 else 1.0],
    ids=["the first call at each size is slow", "interrupted at the third size"],
)
def test_a_slow_moment_decides_nothing(clock, noise):
    """The least of the rounds counts, and a size whose rounds were completed."""
    clock(bfloat16=3e-6, float32=5e-6, noise=noise)
    assert choose().why == "bfloat16 takes 0.60 times as long as float32, measured now"


def test_a_fast_machine_measures_a_microbatch_in_turn(clock):
    calls = clock(bfloat16=3e-6, float32=5e-6)
    choose()
    assert dict.fromkeys(shape for _, shape in calls) == dict.fromkeys([(1, 16), (1, 64), (2, 128), (4, 128)])
    assert [name for name, _ in calls] == ["bfloat16", "float32"] * (len(calls) // 2)
    assert set(Counter(calls).values()) == {compute_dtype.ROUNDS}


@pytest.mark.parametrize("us, largest", [(20, 256), (100, 64), (500, 16), (900, 16)])
def test_a_slow_machine_measures_less(clock, us, largest):
    calls = clock(bfloat16=10e-6 * us, float32=1e-6 * us)
    assert choose() == DtypeChoice(torch.float32, "bfloat16 takes 10.00 times as long as float32, measured now")
    assert max(math.prod(shape) for _, shape in calls) == largest


def test_a_machine_too_slow_or_busy_to_measure(clock):
    """One call is all it gets; nothing is kept, so that the next run tries again."""
    calls = clock(bfloat16=1.0, float32=50.0)
    assert str(choose()) == "float32 (no measurement within 0.5 s: the CPU is slow or busy)"
    assert len(calls) == 1
    clock(bfloat16=3e-6, float32=5e-6)
    assert choose().why.endswith("measured now") and choose().why.endswith("measured in an earlier run")


def test_other_questions_are_measured_anew(clock):
    clock(bfloat16=3e-6, float32=5e-6)
    choose()
    assert kept(choose())
    assert not kept(select_dtype("auto", lively(replace(SMALL, mlp_hidden=96)), DATA, CPU))
    assert not kept(select_dtype("auto", lively(), replace(DATA, microbatch_tokens=256), CPU))
    torch.set_num_threads(2)
    assert not kept(choose())


def test_a_cache_that_cannot_be_written(clock, tmp_path):
    clock(bfloat16=3e-6, float32=5e-6)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert [kept(choose()) for _ in range(2)] == [False, False]


def test_rank_0_decides(clock, monkeypatch):
    """This rank measures float32 as the faster, rank 0 found the opposite in an earlier run."""
    clock(bfloat16=9e-6, float32=5e-6)
    monkeypatch.setattr(Ranks, "broadcast_object", lambda self, value: ({"bfloat16": 3.0, "float32": 5.0}, True))
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensor: tensor)
    choice = choose(ranks=Ranks(1, 2, CPU.device))
    assert choice.dtype == torch.bfloat16 and kept(choice)


def test_a_gpu_takes_bfloat16_and_measures_nothing(monkeypatch):
    monkeypatch.setattr(compute_dtype, "_seconds", None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert str(choose(ranks=Ranks(0, 1, torch.device("cuda")))) == "bfloat16"


def test_a_real_measurement():
    """Which dtype wins does not matter. The model keeps its weights and gets no gradients."""
    model = lively()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    random = torch.get_rng_state()
    us = compute_dtype._measure(model, DATA)
    assert set(us) <= {"bfloat16", "float32"} and all(time > 0 for time in us.values())
    assert select_dtype("auto", model, DATA, CPU).dtype in (torch.bfloat16, torch.float32)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), random)


def test_a_run_keeps_the_dtype_that_it_was_started_with(clock, tiny, tmp_path):
    """Even if a measurement would now say the opposite."""
    auto = replace(tiny, runtime=replace(tiny.runtime, dtype="auto"), schedule=replace(tiny.schedule, max_steps=2))
    calls = clock(bfloat16=3e-6, float32=5e-6)
    train(auto, tmp_path / "run")
    assert calls and read_config(tmp_path / "run").runtime.dtype == "bfloat16"
    log = (tmp_path / "run" / "train.log").read_text()
    assert " dtype:bfloat16 (bfloat16 takes 0.60 times as long as float32, measured now) compile:" in log
    calls = clock(bfloat16=9e-6, float32=5e-6)
    result = train(read_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert not calls and result["score"]["dtype"] == "bfloat16"
    assert " dtype:bfloat16 compile:" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_every_matmul_of_a_step_takes_it(tiny, corpus, name):
    """Newton-Schulz's too: in bfloat16 it took three quarters of a step on a CPU that computes faster in float32."""
    config = replace(tiny, runtime=replace(tiny.runtime, dtype=name))
    step, found = TrainStep(config, Dataset.open(corpus), CPU), Counter()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
                found[args[-1].dtype] += 1
            return func(*args, **kwargs or {})

    with Seen():
        step.update(step.launch(0))
    assert found.keys() == {getattr(torch, name)}
