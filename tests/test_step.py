"""The training step's benchmark at tiny sizes: its forms do the same work, and what it writes is complete and right.

No time is judged.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("sentencepiece")  # bare GPU machines may lack it

from bench import forms, published, report, step
from bench.flops import attention_flops, floor_ms, matrix_flops, matrix_parameters, mfu
from golfgpt.config import BigramConfig, ModelConfig
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.recipes import get

CPU = torch.device("cpu")
BASELINE, MIXED_QAT = get("baseline").config.model, get("mixed-qat").config.model


def setup_of(recipe: str) -> forms.Setup:
    return forms.Setup.of(recipe, small=True, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """All recipes through the command line, in float32 on a CPU."""
    out = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert step.main(["--small", "--out", str(out), "--seconds", "3600"]) == 0
    (file,) = out.glob("small-step-*.json")
    assert (out / "small-step.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


# ---- the same work


@pytest.mark.slow
@pytest.mark.parametrize("recipe", step.RECIPES)
def test_forms_agree_over_several_steps(result, recipe):
    (entry,) = [entry for entry in result["entries"] if entry["recipe"] == recipe]
    losses = entry["losses"]
    assert set(losses) == {"eager", "published_all", "golfgpt"}
    for ours, theirs, eager in zip(losses["golfgpt"], losses["published_all"], losses["eager"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)
        assert eager == pytest.approx(ours, abs=1e-4)
    assert len(losses["golfgpt"]) == step.CHECKED_STEPS
    assert losses["golfgpt"][-1] < losses["golfgpt"][0], "nothing was learned: the updates were not compared"
    assert entry["same_work"] is True and set(entry["loss_difference"]) == {"eager", "published_all"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", step.RECIPES)
def test_other_work_has_other_losses(result, recipe, monkeypatch):
    """The published form without its grid, or, where there is none, with every eighth matrix moving only."""
    monkeypatch.setattr(published, "on_grid", lambda w, grid, levels: w)
    setup = setup_of(recipe)
    form = forms.Published(setup, step.backend(setup))
    form.world = forms.RANKS if recipe == "baseline" else 1
    losses = [form.step(i, lambda phase: None) for i in range(step.CHECKED_STEPS)]
    (entry,) = [entry for entry in result["entries"] if entry["recipe"] == recipe]
    changed = {"losses": {"golfgpt": entry["losses"]["golfgpt"], "published_all": losses}, "loss_difference": {}}
    step.check_losses(changed, torch.float32)
    assert changed["same_work"] is False


@pytest.mark.slow
def test_losses_of_published_are_nearer_than_those_of_another_seed(result, tmp_path, capsys):
    first, *others = result["entries"]
    curve = first["curve"]
    assert [entry["curve"] for entry in others] == [None, None]
    assert {name: len(losses) for name, losses in curve["losses"].items()} == dict.fromkeys(
        ("golfgpt", "published_all", "another seed"), step.SMALL_CURVE_STEPS
    )
    assert curve["losses"]["golfgpt"][: step.CHECKED_STEPS] == pytest.approx(first["losses"]["golfgpt"], abs=1e-6), (
        "it starts over from the same weights"
    )
    assert 0 < curve["difference"] < 0.01 * curve["spread"] and curve["tokens"] == "made up"
    text = report.step_figures(result | {"small": False})
    assert "losses of 20 steps (made up): distance to published / between seeds, wanted at most 1.0;" in text


def test_tokens_of_a_prepared_folder(corpus):
    tokens = forms.read_tokens(corpus, 384)
    assert tokens.dtype == "uint16" and len(tokens) > 10_000 and tokens.max() < 384
    with pytest.raises(InputError, match="no train shards with a vocabulary of 300"):
        forms.read_tokens(corpus, 300)
    with pytest.raises(InputError, match="holds no train shards"):
        forms.read_tokens(corpus / "nowhere", 384)


@pytest.mark.parametrize("theirs", [[4.0, 3.0004], [4.0, math.nan], [math.nan, 3.0]])
def test_losses_that_differ_are_not_the_same_work(theirs):
    entry = {"losses": {"golfgpt": [4.0, 3.0], "published_all": theirs}, "loss_difference": {}}
    step.check_losses(entry, torch.float32)
    assert entry["same_work"] is False


def test_rank_0_of_8_orthogonalizes_every_eighth_matrix():
    """Of the 54 of 9 layers: 0 c_q, 8 c_v, 16 mlp.fc, 24 c_q, 32 c_v, 40 mlp.fc, 48 c_q. All are in the buffer."""
    config = get("baseline").config
    shapes = [
        s for s in published.Model(config.model, 8, "off", torch.float32).state_dict().items() if "blocks" in s[0]
    ]
    matrices = [torch.nn.Parameter(torch.zeros(w.shape)) for name, w in shapes if name.endswith(".weight")]
    seen = []

    def orthogonalize(u, steps, dtype):
        seen.append(tuple(u.shape))
        return torch.ones_like(u)

    muon = published.Muon(matrices, config.optim, torch.float32, orthogonalize)
    for p in matrices:
        p.grad = torch.zeros_like(p)
    muon.world = forms.RANKS
    muon.step(0.5, 0.9)
    assert len(matrices) == 54
    assert seen == [(512, 512), (256, 512), (1024, 512), (512, 512), (256, 512), (1024, 512), (512, 512)]
    assert [i for i, p in enumerate(matrices) if p.any()] == [0, 8, 16, 24, 32, 40, 48]
    assert matrices[0][0, 0] == -0.5


# ---- what is written


@pytest.mark.slow
def test_result_is_complete(result):
    assert {"gpu", "sm", "torch", "triton", "cuda", "driver", "date", "command", "roofs"} <= result.keys()
    assert result["small"] is True and result["dtype"] == "float32" and result["unfinished"] == []
    assert [entry["recipe"] for entry in result["entries"]] == list(step.RECIPES)
    for entry in result["entries"]:
        assert entry["failed"] == {}
        assert set(entry["forms"]) == set(step.FORMS) == set(entry["ratios"])
        for name, form in entry["forms"].items():
            ms = form["ms"]
            assert all(value > 0 for value in ms.values()), (name, ms)
            assert form["tokens_per_second"] == pytest.approx(entry["tokens"] / ms["step"] * 1e3, rel=1e-3, abs=0.5)
            ours = entry["forms"]["golfgpt"]["ms"]["step"]
            assert entry["ratios"][name]["step"] == pytest.approx(ours / ms["step"], abs=1e-3)
        assert 0 < entry["optimizer_share"] < 1
        assert (entry["fake_quant_ms"] is None) == (entry["recipe"] == "baseline")
        assert entry["recipe"] == "baseline" or entry["fake_quant_share"] > 0
    wanted = report.step_figures(result)
    assert "reached" not in wanted and "missed" not in wanted, "tiny models reach nothing"
    assert wanted.count("losses the same") == 3


def test_what_the_time_does_not_suffice_for_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    importlib.import_module("torch._dynamo")  # by AdamW else: the limit would leave half of it for the next tests
    assert step.main(["--small", "--seconds", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("small-step-*.json")
    assert json.loads(file.read_text())["unfinished"] == list(step.RECIPES)
    assert "the time is up" in capsys.readouterr().out


def test_a_form_that_fails_says_why_and_the_others_go_on(monkeypatch, tmp_path):
    def build(name, *args):
        if name == "eager":
            raise torch.cuda.OutOfMemoryError("eager needs 200 GiB")
        return forms.build(name, *args)

    monkeypatch.setattr(step, "build", build)
    monkeypatch.setattr(step, "FORMS", ("eager", "golfgpt"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.main(["--small", "--recipes", "baseline", "--out", str(tmp_path)]) == 1
    (entry,) = json.loads(next(tmp_path.glob("small-step-*.json")).read_text())["entries"]
    assert "200 GiB" in entry["failed"]["eager"]
    assert entry["same_work"] is None and entry["forms"]["golfgpt"]["ms"]["step"] > 0


@pytest.mark.parametrize("arguments", [["--recipes", "basline", "--small"], []], ids=["unknown recipe", "no GPU"])
def test_bad_arguments_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert "basline" in (said := capsys.readouterr().err) or "--small" in said


class Ticks:
    """An event of a GPU on which every recording takes a millisecond more than the one before."""

    now = count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Ticks.count += 1
        Ticks.now += Ticks.count
        self.at = Ticks.now

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_times_and_memory_of_a_gpu(monkeypatch):
    """On a GPU that is made up: what lies between two marks is the first one's, a turn's first step is not counted,
    and the peak is what the form holds between steps plus what a turn adds."""

    class Form:
        def enter(self):
            pass

        def step(self, number, mark):
            for phase in ("data", "forward", "backward", "data", "optimizer", "rest"):
                mark(phase)
            return torch.tensor(float(number))

    allocated = {"memory_allocated": 1000, "max_memory_allocated": 1700}
    monkeypatch.setattr(Ticks, "now", 0)
    monkeypatch.setattr(Ticks, "count", 0)
    monkeypatch.setattr(torch.cuda, "Event", Ticks)
    for name in ("synchronize", "reset_peak_memory_stats", *allocated):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: allocated.get(name))
    setup = SimpleNamespace(device=SimpleNamespace(type="cuda"), config=setup_of("baseline").config)
    timed = step.Timed(Form(), setup)
    timed.resident = 300
    assert timed.turn(2) == [0.0, 1.0] and timed.turn(2) == [2.0, 3.0]
    first, second = timed.times
    # The recordings of the second step are 8 to 14: data 9 + 12, forward 10, backward 11, optimizer 13, rest 14.
    assert first == {"step": 69, "forward": 10, "backward": 11, "optimizer": 13, "data": 21, "rest": 14}
    assert second["step"] == 69 + 14 * 6
    entry = timed.entry(floor=11.1)
    assert entry["ms"]["step"] == 111 and entry["of_floor"] == 0.1 and entry["steps"] == 2
    assert entry["peak_bytes"] == 300 + 1700 - 1000


def test_synchronizations_are_told_from_other_warnings(monkeypatch):
    class Form:
        def step(self, number, mark):
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)
            warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)

    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = step.synchronizations(Form(), 0)
    assert len(found) == 2 and found[0] == found[1] and found[0].startswith("test_step.py:")
    assert modes == ["warn", "default"]


def test_trace_is_chromes(tmp_path):
    class Form:
        def step(self, number, mark):
            torch.ones(3).sum()

    step.trace(Form(), 0, tmp_path / "new" / "trace.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "new" / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::sum" for event in events) >= 2


def test_needs_no_package_of_the_command_line():
    """GPU machines lack them."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'zstandard', 'brotli', 'rich', 'filelock'):\n"
        "    sys.modules[name] = None\n"
        "import bench.step\n"
        "assert not {'golfgpt.cli', 'golfgpt.quant.artifact'} & sys.modules.keys()\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---- formulas


def test_matrix_flops_are_those_that_run():
    """Products of the forward and backward, counted while they run; attention is another op on a CPU."""
    config, ids = setup_of("int5-int6-swa").config.model, torch.zeros(2, 33, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        GPT(config).loss(ids[:, :-1], ids[:, 1:]).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if op.__name__ in ("mm", "addmm", "bmm"))
    assert products == matrix_flops(config, 64)


def test_baseline_by_hand():
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 1024 * 512
    assert matrix_parameters(BASELINE) == 9 * layer + 1024 * 512 == 17_039_360
    assert matrix_flops(BASELINE, 65_536) == 6 * 17_039_360 * 65_536
    # Pairs of positions, 4 flops per channel each; a query's own position counts half.
    sequences, pairs = 64, sum(i + 0.5 for i in range(1024))
    attention = 9 * sequences * pairs * 4 * 512
    assert attention_flops(BASELINE, 65_536, 1024) == attention
    seconds = 0.04354
    assert mfu(BASELINE, 65_536, 1024, 43.54) == pytest.approx(
        (6 * 17_039_360 * 65_536 + 3 * attention) / seconds / 989e12
    )


@pytest.mark.parametrize(("config", "known"), [(BASELINE, 14.2), (MIXED_QAT, 16.5)], ids=["baseline", "mixed-qat"])
def test_floor_is_near_the_one_that_was_summed_by_hand(config, known):
    """On an H100; that sum rounds each of its terms and counts some 0.3 ms of communication."""
    assert floor_ms(config, 65_536, 1024, tflops=790, gbps=3350) == pytest.approx(known, abs=0.5)


def test_floor_knows_pairs_and_tall_matrices():
    small = ModelConfig(num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2, mlp_hidden=192)
    pairs = ModelConfig(
        num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2, mlp_hidden=192,
        bigram=BigramConfig(rows=100, dim=32),
    )  # fmt: skip
    flops = 6 * 64 * 32 * 1000 + 5 * (3 * 32 * 32 * 64 + 32**3)
    more = floor_ms(pairs, 1000, 10, 1e-3, math.inf) - floor_ms(small, 1000, 10, 1e-3, math.inf)
    assert more == pytest.approx(flops / 1e-3 / 1e9)


# ---- the report


def form(ms: float, peak: int, **phases) -> dict:
    times = dict.fromkeys(report.STEP_PHASES, ms / 5) | phases
    return {
        "ms": {"step": ms} | times, "spread": 0.01, "steps": 30, "tokens_per_second": int(65_536e3 / ms),
        "mfu": 0.4, "of_floor": 0.5, "peak_bytes": peak,
    }  # fmt: skip


def test_report_says_what_was_reached(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    entry = step.new_entry("baseline", setup_of("baseline"), {"tflops": 790.0, "gbps": 3350.0})
    entry["forms"] = {
        "published": form(40.0, 10**10),
        "published_all": form(50.0, 10**10),
        "golfgpt": form(20.0, 9 * 10**9, optimizer=0.5),
    }
    entry |= {"same_work": True, "loss_difference": {"eager": 1e-3}, "synchronizations": ["trainer.py:112"]}
    entry["failed"]["eager"] = "OutOfMemoryError: too much"
    entry["execution"] = {"kernels": "mlp", "trials": ["loss: slower"]}
    step.add_ratios(entry)
    made_up = {"gpu": "Fixture GPU", "sm": 90, "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-01"}
    made_up |= {"small": False, "dtype": "bfloat16", "entries": [entry]}
    (tmp_path / report.step_result_name(made_up)).write_text(json.dumps(made_up))
    report.main(["--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert (tmp_path / "step-Fixture-GPU-torch2.11.0-triton3.6.0.json").exists()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| base")]
    assert [row[1] for row in rows] == ["published", "published, all matrices", "golfgpt"]
    assert rows[2][2] == "20.00" and rows[0][8] == "0.50" and rows[1][8] == "0.40"
    assert "golfgpt / published, wanted at most 0.6; 0.5, reached" in said
    assert "peak memory golfgpt / published, wanted at most 0.8; 0.9, missed" in said
    assert "optimizer's share, wanted at most 0.03; 0.025, reached" in said
    assert "host synchronizations, wanted at most 0; 1, missed (trainer.py:112)" in said
    assert "eager failed: OutOfMemoryError" in said and "chosen kernels mlp\n  - loss: slower" in said
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


# ---- on a GPU


@pytest.mark.gpu
def test_tiny_models_on_cuda(tmp_path):
    assert step.main(["--small", "--recipes", "mixed-qat", "--out", str(tmp_path), "--seconds", "300"]) == 0
    (entry,) = json.loads(next(tmp_path.glob("small-step-*.json")).read_text())["entries"]
    assert entry["failed"] == {} and entry["same_work"] is True
    assert isinstance(entry["synchronizations"], list) and entry["execution"]["trials"]
    assert all(form["peak_bytes"] > 0 for form in entry["forms"].values())
