"""The report of benchmarks, from a made-up result of a GPU that does not exist, and what is adopted from it."""

from __future__ import annotations

import json

import pytest
import torch
from fake_gpu import FakeCuda, made_up
from golfgpt_kernels import _dispatch, tuning
from golfgpt_kernels._jit import MISSING

from bench import report

CUDA = torch.device("cuda", 0)


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
    ops = ("relu2_mlp", "linear_relu2")
    assert [_dispatch.implementation(op, CUDA, torch.bfloat16)[0] for op in ops] == ["triton", "eager"]


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
