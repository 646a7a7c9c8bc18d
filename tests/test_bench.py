"""The benchmark's machinery on a CPU: what is checked, timed, searched, reported and adopted. No time is judged."""

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
from golfgpt_kernels import __main__, _dispatch, timing, tuning
from golfgpt_kernels._jit import INTERPRETING, MISSING
from golfgpt_kernels._tiles import TABLES, Tile

from bench import cases, gpu_test, kernels, peers, report, tune

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
    shadow = "fake_quantize_rows" if case.op == "fake_quant_linear" else case.op  # which has no dispatch of its own
    rows = {
        rows
        for op, impl, dtype, rows in asked
        if (op, impl) == (shadow, "triton") and dtype in (case.dtype, torch.float32)
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


class FakeCuda:
    """Streams, events and graphs that do their work on the CPU at once; a capture of `forbidden` fails."""

    def __init__(self, monkeypatch, forbidden=None):
        self.capturing, self.captured, self.replays, self.forbidden = False, 0, 0, forbidden
        nothing = contextlib.nullcontext
        for name, value in {
            "Stream": lambda device: self,
            "current_stream": lambda device: self,
            "Event": lambda enable_timing: self,
            "CUDAGraph": lambda: self,
            "device": lambda device: nothing(),
            "stream": lambda stream: nothing(),
            "graph": self.graph,
            "set_stream": lambda stream: None,
            "synchronize": lambda device: None,
            "is_available": lambda: True,
            "get_device_name": lambda device=None: "Fixture GPU",
            "get_device_capability": lambda device=None: (9, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def call(self, inputs):
        if self.capturing and inputs == self.forbidden:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured += self.capturing

    def replay(self):
        self.replays += 1

    def elapsed_time(self, end):
        return 2.0  # milliseconds

    def wait_stream(self, stream): ...

    record = synchronize = lambda self: None


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


# ---- search

GEMM = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def test_candidates_are_powers_of_two_that_fit():
    tiles = tune.candidates(GEMM, 2, 227 * 1024)
    assert GEMM in tiles and len(tiles) > 100
    assert all(value & (value - 1) == 0 for tile in tiles for name, value in tile.items() if name != "num_stages")
    for tile in tiles:
        m, n, k = (tile[f"BLOCK_{axis}"] for axis in "MNK")
        assert (m + n) * k * 2 * tile["num_stages"] <= 227 * 1024
        assert m * n / (32 * tile["num_warps"]) <= 128, "accumulators in registers"
    assert len(tune.candidates(GEMM, 2, 99 * 1024)) < len(tiles)
    assert tune.candidates({"BLOCK": 4096, "num_warps": 1}, 4, 0)[0] == {"BLOCK": 1024, "num_warps": 1}


def test_search_starts_with_the_shipped_tile_and_walks_downhill():
    target = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    tiles = tune.candidates(GEMM, 2, 227 * 1024)

    def evaluate(batch):
        for tile in batch:
            yield "spills" if tile["num_stages"] == 6 else 100 + tune.distance(tile, target)

    steps = list(tune.best_first(GEMM, tiles, evaluate, 60))
    assert steps[0][0] == GEMM and len(steps) == len(tiles)
    tried = [tile for tile, _ in steps]
    assert tried.index(target) < len(tiles) / 2
    assert [tile for tile, _ in tune.best_first(GEMM, tiles, evaluate, -1)] == [GEMM], "when the time is up it ends"


@interpreted
def test_recorded_launches_are_those_of_the_table_with_its_tile():
    found = tune.units([LINEAR, MLP], CPU)
    assert {unit.kernel for unit in found} == {"linear_relu2_fwd", "relu2_mlp_dz", "weight_grad"}
    unit = next(unit for unit in found if unit.kernel == "linear_relu2_fwd")
    assert found[unit] == [LINEAR], "the case without backward is enough"
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    inputs = MLP.make(CPU, 0)
    with tune.recording({unit: tile}, run=True) as launches:
        out = MLP.run(inputs, "triton")
    (ours,) = (launch for launch in launches if launch.unit == unit)
    assert ours.options == tile and len(launches) > 1
    assert torch.equal(out["out0"], MLP.run(inputs, "triton")["out0"]), "and afterwards all is as before"
    select = TABLES["linear_relu2_fwd"].select(CPU, torch.bfloat16, 64)
    assert "unit" not in select


@interpreted
def test_evaluation_refuses_wrong_results_and_survives_errors(monkeypatch):
    monkeypatch.setattr(tune, "time_launches", lambda calls, device: float(len(calls)))
    monkeypatch.setattr(tune.Evaluation, "compile", lambda self, tiles: None)
    (unit,) = tune.units([LINEAR], CPU)
    evaluation = tune.Evaluation(unit, [LINEAR], CPU)
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    good, bad = evaluation([tile, {**tile, "BLOCK_M": 24}])
    assert good == 2.0 and isinstance(bad, str)
    evaluation.eager = [{"out0": torch.zeros_like(evaluation.eager[0]["out0"])}]
    assert "differs from eager" in next(evaluation([tile]))


def test_the_winning_line_is_python_that_makes_a_tile():
    this = {"kernel": "k", "itemsize": 2, "size": 65536, "cases": ["c"]}
    this |= {"shipped": {"launch": GEMM, "us": 100.0}, "best": {"launch": GEMM | {"num_stages": 3}, "us": 90.0}}
    (tile,) = eval(tune.tile_line(this, made_up(gpu="GH")), {"Tile": Tile})
    assert tile.launch == this["best"]["launch"] and (tile.sm, tile.itemsize) == (90, 2)
    assert "GH" in tile.source and "90.0 us" in tile.source and "100.0" in tile.source


# ---- report: a made-up result of a GPU that does not exist


def made_up(**fields):
    return {
        "op": "relu2_mlp", "sm": 90, "gpu": "Fixture GPU", "dtype": "bfloat16", "rows": 65536,
        "shape": [65536, 512, 1024], "direction": "forward+backward",
        "us": {"eager": 1000.0, "compile": 800.0, "triton": 500.0}, "spread": {}, "how": {}, "failed": {},
        "correct": True, "flops": 200_000_000_000, "bytes": 800_000_000,
        "torch": "2.11.0", "triton": "3.6.0", "command": "fixture", "date": "2026-01-01",
    } | fields  # fmt: skip


@pytest.fixture
def result(tmp_path):
    """Roofs of 800 TFLOP/s and 4,000 GB/s: the floor of 0.2 TFLOP and 0.8 GB is 250 us."""
    entries = [
        made_up(),
        made_up(op="linear_relu2", correct=False, failed={"triton": "out0: differs"}),
        made_up(op="linear", us={"eager": 3.0, "compile": 2.0}, correct=False),
    ]
    value = made_up(cuda="13.0", driver="1", roofs={"tflops": 800.0, "gbps": 4000.0}, entries=entries)
    file = tmp_path / report.result_name(value)
    tuning.write_json(file, value)
    return file


def test_report_makes_a_table(result, tmp_path, capsys):
    assert result.name == "gpu-Fixture-GPU-torch2.11.0-triton3.6.0.json"
    report.main(["--results", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    mlp, failed, plain = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows[1:])
    assert mlp[:3] == ["relu2_mlp", "65,536 x 512 x 1,024", "forward+backward"]
    assert mlp[3:] == ["1,000.0", "800.0", "500.0", "250.0", "0.62", "400", "1,600", "50%", "triton"]
    assert failed[5:] == ["failed", "250.0", "-", "-", "-", "-", "eager"], "no speed of a wrong kernel"
    assert plain[3:6] == ["3.0", "2.0", "-"] and plain[-1] == "", "auto is not asked"
    figures = [line for line in printed.splitlines() if line.startswith("- ")]
    assert figures == [
        "- relu2_mlp 65536 x 512 x 1024 forward+backward / torch.compile: wanted at most 0.75; 0.62, reached",
        "- relu2_mlp 65536 x 512 x 1024 forward+backward / floor: wanted at most 1.54; 2.00, missed",
    ], "of a wrong kernel there is none"


def test_report_goes_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.main(["--results", str(tmp_path / "none"), "--readme", str(readme)])
        assert readme.read_text() == f"before\n{report.BEGIN}\n{report.NOTHING}\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench:begin"):
        report.main(["--results", str(tmp_path / "none"), "--readme", str(readme)])


@pytest.mark.skipif(MISSING is not None, reason="without triton auto is eager")
def test_adopted_entries_decide_auto(result, tmp_path, monkeypatch):
    measured = tmp_path / "measured.json"
    tuning.write_json(measured, [made_up(us={"eager": 1.0, "compile": 1.0, "triton": 2.0}), made_up(op="other")])
    report.main(["--adopt", str(result), "--measured", str(measured)])
    entries = json.loads(measured.read_text())
    assert [entry["op"] for entry in entries] == ["relu2_mlp", "other", "linear_relu2"], "no kernel, no entry"
    assert entries[0]["us"]["triton"] == 500.0, "the old measurement of the same is replaced"

    FakeCuda(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_dispatch, "__file__", str(tmp_path / "_dispatch.py"))
    ops = ("relu2_mlp", "linear_relu2", "linear")
    assert [_dispatch.implementation(op, CUDA, torch.bfloat16)[0] for op in ops] == ["triton", "eager", "eager"]


def test_an_adopted_step_is_what_doctor_compares_with(tmp_path):
    probe = pytest.importorskip("golfgpt.doctor.probe")  # bare GPU machines lack what it imports
    file, steps = tmp_path / "step-gpu.json", tmp_path / "steps.json"
    ms = {"step": 30.0, "forward": 20.0, "backward": 60.0}
    forms = {"eager": {"ms": ms}, "golfgpt": {"ms": ms}}
    result = {"gpu": "GH", "small": False, "torch": "2.13.0", "date": "2026-01-02", "triton": "3"}
    entries = [{"recipe": "baseline", "forms": forms}]
    for date, torch_version in (("2026-01-02", "2.13.0"), ("2026-01-03", "2.13.0"), ("2026-01-04", "2.14.0")):
        file.write_text(json.dumps(result | {"date": date, "torch": torch_version, "entries": entries}))
        report.main(["--adopt", str(file), "--steps", str(steps)])
    kept = json.loads(steps.read_text())
    assert [(step["torch"], step["date"]) for step in kept] == [("2.13.0", "2026-01-03"), ("2.14.0", "2026-01-04")]
    assert probe.expected_step("GH", steps) == kept[1]
    assert (kept[1]["eager"], kept[1]["golfgpt"]) == (80.0, 30.0)
    for unfit in (
        {"small": True, "entries": entries},
        {"entries": []},
        {"entries": [{"recipe": "baseline", "forms": {}}]},
    ):
        file.write_text(json.dumps(result | unfit))
        with pytest.raises(SystemExit, match="no step of the baseline"):
            report.main(["--adopt", str(file), "--steps", str(steps)])


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
