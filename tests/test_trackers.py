"""Trackers: what they are told, and that none of them stops a run."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import metrics

from golfgpt.cli import main
from golfgpt.errors import InputError, Interrupted
from golfgpt.train import trackers
from golfgpt.train.reporter import Reporter
from golfgpt.train.train import train

STANDINS = {
    "wandb": """
import json, pathlib
class Run:
    def __init__(self, told): self.told, self.summary = told, self
    def write(self, *what): print(json.dumps(what, default=str), file=open(self.told, "a"))
    def log(self, values, step): self.write("log", step, values)
    def update(self, values): self.write("summary", values)
    def finish(self): self.write("finish")
def Settings(**values): return values
def init(**values):
    run = Run(pathlib.Path(values["dir"]) / "told"); run.write("init", values); return run
""",
    "trackio": """
import json, os, pathlib
class Run:
    def write(self, *what):
        told = pathlib.Path(os.environ["TRACKIO_DIR"]).parent / "told"
        print(json.dumps(what), file=open(told, "a"))
    def log(self, values, step): self.write("log", step, values)
run = Run()
def finish(): run.write("finish")
def init(**values):
    print("* a line of trackio"); run.write("init", values); return run
""",
}
"""Modules with what is used of the real ones."""

TOLD = """
import sys; sys.path[:0] = sys.argv[3:]
from pathlib import Path
from golfgpt.config import RunConfig, RuntimeConfig
from golfgpt.train.trackers import Tracking
config = RunConfig(runtime=RuntimeConfig(tracker=sys.argv[1]))
tracking = Tracking(config, Path(sys.argv[2]), lambda text: sys.exit(text))
tracking.metric("train", {"step": 1, "loss": 2.5, "bpb_ema": None, "checks": {"windows": 3}, "flag": True})
tracking.metric("result", {"steps": 1, "score": {"val_bpb": 1.25, "label": "val_bpb"}})
tracking.finish(None)
"""


def tracked(name: str, folder: Path, *path: Path) -> subprocess.CompletedProcess:
    """A step and a result, told to a tracker in a process of its own, which modules in `path` come first in."""
    folder.mkdir()
    command = [sys.executable, "-c", TOLD, name, str(folder), *map(str, path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


class Tracker:
    """Keeps what it is told; `fails` is the method that raises."""

    fails: str | None = None
    error: Exception = RuntimeError("disk full")

    def __init__(self, folder):
        self.told, type(self).last = [], self

    def _do(self, *what):
        print("chatter")
        self.told.append(what)
        if what[0] == self.fails:
            raise self.error

    def start(self, config):
        self._do("start", config)

    def log(self, step, values):
        self._do("log", step, values)

    def finish(self, result):
        self._do("finish", result)


@pytest.fixture
def tracker(monkeypatch):
    """`Tracker` in place of TensorBoard."""
    kind = type("Told", (Tracker,), {})
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", kind)
    return kind


@pytest.fixture
def config(tiny):
    schedule, runtime = replace(tiny.schedule, max_steps=13), replace(tiny.runtime, tracker="tensorboard", log_every=5)
    return replace(tiny, schedule=schedule, runtime=replace(runtime, val_every=12))


def test_tensorboard_has_the_numbers_of_the_log(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(config, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [row for row in metrics(tmp_path / "run", "train") if row["step"] <= 10 or row["step"] == 13]
    for name in ("loss", "grad_norm", "step_seconds"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(row["step"], pytest.approx(row[name])) for row in rows]
    assert [event.step for event in events.Scalars("val/val_bpb")] == [12]
    assert events.Scalars("result/score.val_bpb")[0].value == pytest.approx(result["score"]["val_bpb"])
    config_text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"batch_tokens": 1024' in config_text


def test_a_tracker_is_told_start_log_finish(config, tmp_path, tracker, capsys):
    result = train(config, tmp_path / "run", quiet=True)
    names = [what[0] for what in tracker.last.told]
    assert names[0] == "start" and names[-1] == "finish" and names.count("finish") == 1
    assert tracker.last.told[0][1]["model"]["model_dim"] == 48 and tracker.last.told[-1][1] == result
    logged = [what[1:] for what in tracker.last.told if what[0] == "log"]
    assert [step for step, values in logged if "train/loss" in values] == [*range(1, 11), 13]
    assert all(type(value) in (int, float) for _, values in logged for value in values.values())
    assert capsys.readouterr().out == "", "standard output is for --json"


def test_a_run_outlives_its_tracker(config, tmp_path, tracker, capsys):
    tracker.fails = "log"
    result = train(config, tmp_path / "run")
    assert result["score"]["val_bpb"] > 0 and len(metrics(tmp_path / "run", "train")) == 13
    warnings = re.findall("warning: .*", (tmp_path / "run" / "train.log").read_text())
    assert len(warnings) == 1 and warnings[0] in capsys.readouterr().out


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_switched_off(config, tmp_path, tracker, method):
    tracker.fails, warnings = method, []
    tracking = trackers.Tracking(config, tmp_path, warnings.append)
    for step in (1, 2):
        tracking.metric("train", {"step": step, "loss": 1.0})
    tracking.metric("result", {"steps": 2})
    tracking.finish(None)
    assert [what[0] for what in tracker.last.told].count(method) == 1, "it is not called again"
    assert len(warnings) == 1 and f"tensorboard failed in {method} (RuntimeError: disk full)" in warnings[0]


def test_an_import_that_fails_is_a_failure_of_the_tracker(config, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers.Tracking(config, tmp_path, warnings.append).metric("train", {"step": 1, "loss": 1.0})
    assert len(warnings) == 1 and "tensorboard failed in start (ModuleNotFoundError" in warnings[0]


def test_a_signal_in_a_tracker_stops_the_run(tmp_path, config, tracker):
    stop = Interrupted("stopped", signal.SIGTERM)
    tracker.fails, tracker.error = "log", RuntimeError("wrapped")
    tracker.error.__cause__ = stop
    tracking = trackers.Tracking(config, tmp_path, pytest.fail)
    with pytest.raises(Interrupted, match="stopped"):
        tracking.metric("train", {"step": 1, "loss": 1.0})


def test_a_run_that_ends_without_a_score_finishes_its_tracker(config, tmp_path, tracker, monkeypatch):
    monkeypatch.setattr("golfgpt.train.train.export_and_score", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run")
    assert tracker.last.told[-1] == ("finish", None)


def test_a_missing_package_is_an_error_before_training(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    words = ["--model.vocab-size", "384", "--data.path", str(corpus), "--runtime.tracker", "wandb", "--name", "run"]
    assert main(["train", "--recipe", "small", *words]) == 3
    assert 'wandb is not installed: pip install "golfgpt[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run").exists()
    with pytest.raises(InputError, match=r"golfgpt\[trackio\]"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        trackers.require_tracker("trackio")
    trackers.require_tracker("none")


def test_only_rank_0_has_a_tracker(config, tracker):
    reporter = Reporter(None, speak=False)
    reporter.track(config)
    reporter.metric("train", step=1, loss=1.0)
    assert not hasattr(tracker, "last")


@pytest.mark.parametrize("name", STANDINS)
def test_calls_of_wandb_and_trackio(name, tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / f"{name}.py").write_text(STANDINS[name])
    done = tracked(name, tmp_path / "run", tmp_path)
    assert done.stdout == ""
    told = [json.loads(line) for line in (tmp_path / "run" / "told").read_text().splitlines()]
    (kind, settings), (*log,), *_ = told
    assert kind == "init" and settings["name"] == "run" and settings["project"] == "golfgpt"
    assert log == ["log", 1, {"train/loss": 2.5}] and told[-1] == ["finish"]
    if name == "wandb":
        assert settings["mode"] == "offline" and ["summary", {"steps": 1, "score.val_bpb": 1.25}] in told
    else:
        assert ["log", 1, {"result/steps": 1, "result/score.val_bpb": 1.25}] in told
    assert told.count(["finish"]) == 1


@pytest.mark.slow
def test_real_wandb_writes_below_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracked("wandb", tmp_path / "run")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert b"train/loss" in data and b"score.val_bpb" in data and b"num_layers" in data


@pytest.mark.slow
def test_real_trackio_writes_below_the_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    assert tracked("trackio", tmp_path / "run").stdout == ""
    with sqlite3.connect(tmp_path / "run" / "trackio" / "golfgpt.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert rows == [{"train/loss": 2.5}, {"result/steps": 1, "result/score.val_bpb": 1.25}]
