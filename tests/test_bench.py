"""The benchmark's machinery on a CPU: what is checked, timed and kept. No time is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from fake_gpu import FakeCuda, made_up
from golfgpt_kernels import __main__, _dispatch, timing, tuning
from golfgpt_kernels._jit import INTERPRETING, MISSING

from bench import cases, gpu_test, kernels, peers, tune

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TINY = {case.name: case for case in cases.bench_cases(64, 32, ((64, 96),), 1)}
KERNELS = {name: case for name, case in TINY.items() if "triton" in case.columns}
LINEAR = TINY["linear_relu2 64 x 32 x 64 forward"]
MLP = TINY["relu2_mlp 64 x 32 x 64 forward+backward"]
QUANTIZE = TINY["quantize_rows 1 x 64 x 32 forward"]
OPS = ("fake_quant", "muon", "newton_schulz", "relu2_mlp", "softcap_logprobs")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="calls kernels on CPU tensors")

# ---- cases and their check


@interpreted
@pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS.keys())
def test_kernels_pass_and_cases_name_the_rows_that_dispatch_counts(case, monkeypatch):
    asked = set()
    for module in (importlib.import_module(f"golfgpt_kernels.{op}") for op in OPS):

        def runs_triton(op, impl, tensor, rows, really=module.runs_triton):
            asked.add((op, impl, tensor.dtype, rows))
            return really(op, impl, tensor, rows)

        monkeypatch.setattr(module, "runs_triton", runs_triton)
    assert tuning.check(case, CPU) is None
    dispatched = "fake_quantize_rows" if case.op == "fake_quant_linear" else case.op  # which has no dispatch of its own
    rows = {
        rows
        for op, impl, dtype, rows in asked
        if (op, impl) == (dispatched, "triton") and dtype in (case.dtype, torch.float32)
    }
    assert rows in ({case.rows}, {1 << 62}), "1 << 62: any number of rows"


def spoiled(case, spoil):
    """The case with a kernel whose first result is changed."""

    def call(*inputs, impl):
        out = case.call(*inputs, impl="eager")
        return spoil(out) if impl == "triton" else out

    return dataclasses.replace(case, call=call)


def dropped_row(out):
    return torch.cat([out[:-1], torch.zeros_like(out[-1:])])


@pytest.mark.parametrize("case", [LINEAR, MLP], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda out: out * 1.01, "mean error"),
        (lambda out: torch.zeros_like(out) * out, "maximal error"),
        (dropped_row, "maximal error"),
        (lambda out: torch.where(out == out.max(), torch.nan, out), "not finite"),
        (lambda out: out.float(), "expected"),
    ],
    ids=["scale", "zeros", "tail", "nan", "dtype"],
)
def test_check_sees_a_wrong_kernel(case, spoil, why):
    assert why in tuning.check(spoiled(case, spoil), CPU)
    assert tuning.check(spoiled(case, lambda out: out), CPU) is None


def test_check_sees_what_is_wrong_at_full_size_only():
    case = spoiled(LINEAR, lambda out: dropped_row(out) if len(out) == 64 else out)
    assert tuning.check(case, CPU, rows=32).startswith("out0: differs from eager by")


def test_codes_must_be_equal():
    def one_code_off(out):
        codes, scale = out
        codes = codes.clone()
        codes[0, 0, 0] += 1
        return codes, scale

    assert tuning.check(spoiled(QUANTIZE, one_code_off), CPU) == "out0: 1 of 2048 values differ from eager's"


def test_full_size_is_what_the_figures_are_about():
    assert {c.shape for c in cases.CASES if c.op == "relu2_mlp"} == {(65536, 512, 1024), (65536, 512, 1536)}
    (fake,) = (c for c in cases.CASES if c.op == "fake_quantize_rows")
    assert fake.shape == (54, 21_233_664) and cases.cost(fake)[1] == 21_233_664 * 6
    (newton_schulz,) = (c for c in cases.CASES if c.op == "newton_schulz" and c.shape == (9, 1536, 512))
    assert cases.cost(newton_schulz)[0] == 9 * 5 * (3 * 512**2 * 1536 + 512**3)
    assert cases.cost(MLP)[0] == 3 * cases.cost(dataclasses.replace(MLP, backward=False))[0] == 12 * 64 * 32 * 64
    assert all(cases.cost(case)[1] > 0 for case in cases.CASES + cases.PEER_CASES)


def test_peers_are_called_by_their_own_signatures(monkeypatch):
    h, w, targets = next(case for case in cases.CASES if case.op == "softcap_cross_entropy").make(CPU, 0, rows=4)

    cce = pytest.importorskip("cut_cross_entropy")
    signature = inspect.signature(cce.linear_cross_entropy)
    monkeypatch.setattr(cce, "linear_cross_entropy", mock.create_autospec(cce.linear_cross_entropy))
    peers.cut_cross_entropy(h, w, targets, "eager")
    given = signature.bind(*cce.linear_cross_entropy.call_args.args, **cce.linear_cross_entropy.call_args.kwargs)
    assert given.arguments.keys() == {"e", "c", "targets", "softcap"} and given.arguments["softcap"] == 30
    assert given.arguments["e"] is h and given.arguments["targets"] is targets
    assert torch.equal(given.arguments["c"], w.bfloat16())

    liger = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = liger.LigerFusedLinearCrossEntropyLoss
    forward = mock.create_autospec(loss.forward)
    monkeypatch.setattr(loss, "forward", lambda *args: forward(*args))
    peers.liger_kernel(h, w, targets, "eager")
    module, weight, hidden, target = forward.call_args.args
    assert list(inspect.signature(forward).parameters)[:4] == ["self", "lin_weight", "_input", "target"]
    assert module.softcap == 30 and module.reduction == "mean" and hidden is h and target is targets
    assert torch.equal(weight, w.bfloat16())


# ---- timing


def raises(case, error):
    def call(*inputs, impl):
        if impl == "triton":
            raise error
        return case.call(*inputs, impl=impl)

    return dataclasses.replace(case, call=call)


MEASURED = {
    "no kernel asked for": (TINY["linear 64 x 32 x 64 forward+backward"], ["eager"], {"eager"}, None),
    "a kernel that fails": (
        raises(LINEAR, ValueError("bro\nken")),
        ["eager", "triton"],
        {"eager"},
        "ValueError: bro ken",
    ),
    "a wrong kernel": (spoiled(LINEAR, torch.zeros_like), ["eager", "triton"], {"eager"}, "maximal error"),
    "a good kernel": (spoiled(LINEAR, lambda out: out), ["eager", "triton"], {"eager", "triton"}, None),
}


@pytest.mark.parametrize(("case", "columns", "timed", "why"), MEASURED.values(), ids=MEASURED)
def test_an_entry_has_times_of_what_is_right_and_the_reason_of_what_is_not(case, columns, timed, why):
    entry = tuning.measure(case, CPU, command="test", columns=columns)
    assert entry["us"].keys() == timed and all(us > 0 for us in entry["us"].values())
    assert (why in entry["failed"]["triton"]) if why else entry["failed"] == {}
    assert entry["correct"] == ("triton" in timed)
    assert tuning.decides(entry) == (why is not None), "auto should know of a broken kernel"
    assert (entry["op"], entry["rows"], entry["dtype"], entry["sm"]) == (case.op, 64, "bfloat16", 0)


def test_calls_rotate_over_the_inputs():
    seen = []
    took = timing.time_us(seen.append, ["a", "b", "c"], CPU, seconds=0)
    assert seen == ["a", "b", "c"] * 7 and took.us > 0 and took.how is None


def test_the_time_limit_interrupts_and_skips():
    def measure(case):
        if case == "broken":
            raise RuntimeError("broken")
        if case == "slow":  # compilers swallow what passes through them, or wrap it
            with contextlib.suppress(TimeoutError):
                time.sleep(60)
            try:
                time.sleep(60)
            except TimeoutError as error:
                raise RuntimeError("compilation failed") from error
        return case

    start = time.monotonic()
    assert list(timing.within(60, ["a", "b"], measure)) == ["a", "b"]
    assert list(timing.within(0.2, ["a", "slow", "b"], measure)) == ["a", None, None]
    with pytest.raises(RuntimeError, match="broken"):
        list(timing.within(60, ["broken"], measure))
    assert time.monotonic() - start < 50


@pytest.mark.parametrize("forbidden", [None, "b"], ids=["captured", "not captured"])
def test_calls_are_captured_in_a_graph_of_at_least_5_ms_or_the_reason_is_kept(forbidden, monkeypatch):
    cuda = FakeCuda(monkeypatch, forbidden)
    took = timing.time_us(cuda.call, ["a", "b"], CUDA)
    if forbidden is None:
        assert cuda.captured == 6, "three rounds of 2 ms"
        assert cuda.replays >= 6 and took.us == pytest.approx(2000 / 6) and took.how is None
    else:
        assert cuda.replays == 0 and took.us == pytest.approx(2000 / 2)
        assert "not permitted when stream is capturing" in took.how


@pytest.mark.skipif(MISSING is not None, reason="without triton auto is eager")
def test_tune_writes_what_auto_reads_and_says_what_it_does(monkeypatch, tmp_path):
    FakeCuda(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "_dispatch.py"))
    us = {"eager": 3.0, "compile": 2.0, "triton": 1.0}
    results = {
        "relu2_mlp": {"us": us, "correct": True},
        "codes_linear": {"us": us, "failed": {"triton": "wrong"}},
        "newton_schulz": {"us": {"eager": 3.0}, "failed": {"compile": "out of memory"}},
    }

    def measure(case, *, device, command):
        return made_up(op=case.op, rows=case.rows, shape=list(case.shape), **({"correct": False} | results[case.op]))

    monkeypatch.setattr(tuning, "measure", measure)
    said = []
    tuning.write_json(_dispatch.tuned_file(CUDA), [made_up(op="other")])
    asked = [case for case in tuning.QUICK if case.op in results]
    entries = tuning.tune(CUDA, cases=asked, say=said.append)
    assert [entry["op"] for entry in entries] == ["relu2_mlp", "newton_schulz", "codes_linear"]
    written = json.loads(_dispatch.tuned_file(CUDA).read_text())
    assert [entry["op"] for entry in written] == ["other", "relu2_mlp", "codes_linear"]
    last = {line.split()[0]: line.split()[1] for line in said[-3:]}
    assert last == {"relu2_mlp": "triton", "newton_schulz": "eager", "codes_linear": "eager"}
    assert any("codes_linear" in line and "wrong" in line for line in said)


def test_tune_needs_a_gpu_and_triton(monkeypatch):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(_dispatch, "MISSING", "triton is not installed (no module)")
    with pytest.raises(tuning.CannotTune, match="needs kernels that run: triton is not installed"):
        tuning.tune(CUDA)


COMMANDS = {
    "bench.tune": (tune.main, []),
    "bench.gpu_test": (gpu_test.main, []),
    "golfgpt_kernels": (__main__.main, ["tune"]),
}


@pytest.mark.parametrize(("main", "arguments"), COMMANDS.values(), ids=COMMANDS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_commands_say_that_they_need_a_gpu(main, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 1 and "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("failed", "code"), [({}, 0), ({"compile": "why"}, 1)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="would keep it")
def test_without_a_gpu_the_benchmark_times_small_sizes_and_no_kernel(failed, code, monkeypatch, capsys):
    asked = []

    def measure(case, _device, *, command, columns):
        asked.append((case.op, case.rows, case.backward, tuple(columns)))
        return made_up(op=case.op, us=dict.fromkeys(columns, 1.0), correct=False, failed=failed)

    monkeypatch.setattr(tuning, "measure", measure)
    assert kernels.main(["linear_relu2", "token_logprobs"]) == code
    ops = ("linear_relu2", False), ("linear_relu2", True), ("token_logprobs", False)
    assert sorted(asked) == [(op, 512, backward, ("eager", "compile")) for op, backward in ops]
    assert "| linear_relu2 |" in capsys.readouterr().out


def test_the_installed_command_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(tuning, "tune", lambda device, seconds: [{"op": "relu2_mlp", "seconds": seconds}])
    __main__.main(["tune", "--seconds", "7", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("tune-Fixture-GPU-*.json")
    result = json.loads(file.read_text())
    assert result["entries"] == [{"op": "relu2_mlp", "seconds": 7.0}] and result["gpu"] == "Fixture GPU"


def test_a_half_written_file_is_never_seen(tmp_path, monkeypatch):
    file = tmp_path / "a" / "result.json"
    tuning.write_json(file, {"entries": [1]})
    with pytest.raises(TypeError):
        tuning.write_json(file, {"entries": object()})
    assert json.loads(file.read_text()) == {"entries": [1]}
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


# ---- gpu-test


def test_gpu_test_takes_kernel_tests_and_no_others():
    names = {file.name for file in gpu_test.gpu_files()}
    assert {"test_gpu.py", "test_relu2_kernels.py", "test_fake_quant_kernels.py"} <= names
    assert not names & {"test_prepare.py", "test_artifact.py", "test_tokenizer.py"}


def test_gpu_test_selects_and_keeps_outcomes(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef device(): return 'cpu'\n"
        "def test_good(device): pass\n"
        "def test_bad(device): assert not 'reason'\n"
        "def test_other(): assert False\n"
    )
    code = (
        "import sys, pathlib, pytest\nfrom bench.gpu_test import Journal\n"
        "journal = Journal(pathlib.Path('out.json'), {'tests': []}, 60)\n"
        "sys.exit(pytest.main(['-p', 'bench.gpu_test', '-c', '/dev/null', 'test_it.py'], plugins=[journal]))"
    )
    paths = f"{gpu_test.ROOT}:{gpu_test.ROOT / 'kernels'}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": paths}, capture_output=True)
    tests = json.loads((tmp_path / "out.json").read_text())["tests"]
    assert done.returncode == 1
    assert [(row["test"].split("::")[1], row["outcome"]) for row in tests] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
    ]
    assert "reason" in tests[1]["why"]
