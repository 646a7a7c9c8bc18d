"""impl="auto" on a GPU, with torch's questions to CUDA answered by hand: eager, unless a measurement shows a win."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from golfgpt_kernels import RowQuant, _dispatch, fake_quant_linear, implementation, linear_relu2, set_implementation
from golfgpt_kernels._dispatch import runs_triton, tuned_file
from golfgpt_kernels._jit import INTERPRETING, MISSING

pytestmark = pytest.mark.skipif(MISSING is not None, reason="without triton auto is eager")
CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


class OnCuda:
    """As much of a tensor as dispatch looks at."""

    def __init__(self, dtype=BF16):
        self.device, self.dtype = CUDA, dtype


@pytest.fixture
def committed(monkeypatch, tmp_path):
    """A function that commits entries; nothing was measured on this machine, whose GPU is a GH of sm_90."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GH")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "_dispatch.py"))
    _dispatch.least_rows_cached.cache_clear()

    def write(*entries, file=tmp_path / "measured.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entries))
        _dispatch.least_rows_cached.cache_clear()

    yield write
    _dispatch.least_rows_cached.cache_clear()


def entry(triton, *, eager=100.0, compiled=80.0, **fields):
    return {
        "op": "relu2_mlp", "sm": 90, "gpu": "GH", "dtype": "bfloat16", "rows": 65536, "date": "2026-01-01",
        "us": {"eager": eager, "compile": compiled, "triton": triton}, "correct": True,
    } | fields  # fmt: skip


def auto(op="relu2_mlp", rows=65536, dtype=BF16) -> bool:
    return runs_triton(op, "auto", OnCuda(dtype), rows)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_the_choice_is_a_constant_of_a_compiled_graph(monkeypatch, tmp_path):
    """It reads files and logs, which no graph can do."""
    (tmp_path / "rows").write_text("7")
    monkeypatch.setattr(_dispatch, "least_rows_cached", lambda *_: int((tmp_path / "rows").read_text()))

    def program(x):
        return x + _dispatch._least_rows("relu2_mlp", x.device, x.dtype)

    compiled = torch.compile(program, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [8, 8]
    torch.compiler.reset()
    monkeypatch.delattr(_dispatch._least_rows, "_dynamo_marked_constant")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(program, fullgraph=True, backend="eager")(torch.ones(2))


def test_import_does_not_wait_for_the_compiler():
    """torch._dynamo takes as long to import as torch, and most commands compile nothing."""
    code = "import sys, golfgpt.train.train, golfgpt_kernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_implementation_takes_devices_as_torch_does():
    assert implementation("relu2_mlp", "cpu", BF16) == implementation("relu2_mlp", torch.device("cpu"), BF16)
    for arguments in (("relu2_mlp", "gpu", BF16), ("relu2_mlp", "cpu", "bfloat16"), ("relu", "cpu", BF16)):
        with pytest.raises(ValueError, match=r"implementation: .*; expected one of"):
            implementation(*arguments)


def test_eager_without_a_measurement_and_says_so(committed):
    assert not auto()
    chosen, why = implementation("relu2_mlp", CUDA, BF16)
    assert chosen == "eager"
    assert why == "the kernel was never measured on GH (sm_90); `python -m golfgpt_kernels tune` does"


def test_in_a_dtype_that_tune_does_not_measure_it_names_the_one_that_it_does(committed):
    never = "the kernel was never measured on GH (sm_90) in {}; `python -m golfgpt_kernels tune` measures {}"
    assert implementation("relu2_mlp", CUDA, torch.float16)[1] == never.format("float16", "bfloat16")
    assert implementation("muon_update_", CUDA, BF16)[1] == never.format("bfloat16", "float32")


def test_a_failed_check_is_told_with_its_reason_where_that_was_kept(committed):
    wrong = entry(10.0, correct=False)
    committed(wrong | {"failed": {"triton": "out0: differs"}}, wrong | {"op": "linear_relu2"})
    assert implementation("relu2_mlp", CUDA, BF16)[1] == "GH, 2026-01-01: the kernel failed its check: out0: differs"
    assert implementation("linear_relu2", CUDA, BF16)[1] == "GH, 2026-01-01: the kernel failed its check"


@pytest.mark.parametrize("meaning", ["auto", "triton"])
def test_an_op_that_auto_does_not_choose_for_is_refused(meaning):
    message = r"implementation: op='relu2_mpl'; expected one of relu2_mlp, .*quantize_rows"
    with set_implementation(meaning), pytest.raises(ValueError, match=message):
        implementation("relu2_mpl", CUDA, BF16)


@pytest.mark.parametrize(
    ("fields", "wins"),
    [
        ({"triton": 79.0}, True),
        ({"triton": 81.0}, False),  # faster than eager, slower than torch.compile
        ({"triton": 60.0, "eager": 50.0}, False),  # and the other way round
        ({"triton": 10.0, "correct": False}, False),
        ({"triton": 10.0, "sm": 80}, False),
        ({"triton": 10.0, "dtype": "float16"}, False),
        ({"triton": 10.0, "op": "linear_relu2"}, False),
    ],
)
def test_a_measured_win_of_a_correct_kernel_decides(committed, fields, wins):
    committed(entry(**fields))
    assert auto() is wins
    assert implementation("relu2_mlp", CUDA, BF16)[0] == ("triton" if wins else "eager")


def test_one_lost_shape_or_direction_is_enough_to_stay_eager(committed):
    committed(entry(10.0), entry(90.0, direction="forward"))
    assert not auto()


def test_few_rows_stay_eager(committed):
    committed(entry(10.0, rows=65536), entry(10.0, rows=8192))
    assert auto(rows=4096)
    assert not auto(rows=4095)


def test_what_was_measured_on_this_machine_overrides_what_is_committed(committed):
    committed(entry(10.0), entry(10.0, op="linear_relu2"))
    committed(entry(99.0), file=tuned_file(CUDA))
    assert not auto()
    assert auto("linear_relu2"), "this op was not measured here"


def test_says_once_per_op_and_dtype_what_it_chose(committed, caplog):
    committed(entry(40.0))
    with caplog.at_level(logging.INFO, "golfgpt_kernels"):
        for _ in range(3):
            auto()
    assert len(caplog.messages) == 1
    assert "relu2_mlp" in caplog.text and "triton" in caplog.text and "0.50" in caplog.text


def test_an_old_gpu_is_eager_whatever_was_measured(committed, monkeypatch):
    committed(entry(10.0, sm=75))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert not auto()


def test_a_named_implementation_does_not_look_at_measurements(committed):
    assert runs_triton("relu2_mlp", "triton", OnCuda(), 1)
    committed(entry(10.0))
    assert not runs_triton("relu2_mlp", "eager", OnCuda(), 65536)


# ---- set_implementation


def test_the_meaning_of_auto_is_set_for_the_process_or_for_a_while(committed):
    committed(entry(10.0))
    with set_implementation("eager"):
        assert not auto() and implementation("relu2_mlp", CUDA, BF16) == ("eager", "set_implementation('eager')")
        assert runs_triton("relu2_mlp", "triton", OnCuda(), 1), "a named implementation is what it says"
        with set_implementation("triton"):
            assert auto("linear_relu2", rows=1) and implementation("linear_relu2", CUDA, BF16)[0] == "triton"
            with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: .*not in torch\.float64"):
                auto(dtype=torch.float64)
        with pytest.raises(ValueError, match="'kernels'; expected 'auto', 'eager' or 'triton'"):
            set_implementation("kernels")
        assert not auto(), "the former meaning returned"
        set_implementation("auto")
        assert auto()
    assert auto()


@pytest.mark.skipif(not INTERPRETING, reason="runs kernels on CPU tensors")
def test_another_meaning_of_auto_compiles_again():
    torch.compiler.reset()
    x, w, graphs = torch.ones(2, 8), torch.ones(4, 8), []

    def keep(graph, _inputs):
        graphs.append(graph.code)
        return graph

    def program(x, w):
        return linear_relu2(x, w) + fake_quant_linear(x, w, RowQuant(bits=6))

    compiled = torch.compile(program, fullgraph=True, backend=keep)
    results = []
    for meaning in ("auto", "eager", "triton", "triton", "eager"):
        with set_implementation(meaning):
            results.append(compiled(x, w))
    assert ["golfgpt_kernels.linear_relu2" in code for code in graphs] == [False, False, True]
    assert ["by_kernel = True" in code for code in graphs] == [False, False, True]
    assert all(torch.equal(result, results[0]) for result in results)
