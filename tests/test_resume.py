"""Runs that stop and go on: signals, kills, full disks, resuming, the run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from models import final_weights, metrics, packed

from golfgpt.cli import main
from golfgpt.config import BudgetConfig, DataConfig, ScheduleConfig, to_dict
from golfgpt.distributed import Ranks
from golfgpt.errors import BusyError, InputError, Interrupted
from golfgpt.model.gpt import GPT
from golfgpt.quant.artifact import read
from golfgpt.quant.formats import decode
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import read_config
from golfgpt.train import checkpoint
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.signals import Signals
from golfgpt.train.step import TrainStep
from golfgpt.train.train import train

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.numeric
@pytest.mark.parametrize("record", [False, True], ids=["plain", "2026-04-27"])
def test_resume_is_bit_identical(tiny, tmp_path, monkeypatch, capfd, record):
    """Of the record, the loop begins after the interruption."""
    tiny = packed(tiny, start=0.8) if record else tiny
    loss, seen = GPT.loss, []
    monkeypatch.setattr(GPT, "loss", lambda *args, **kw: seen.append(kw["looping"]) or loss(*args, **kw))
    train(tiny, tmp_path / "unbroken")
    assert seen[-64::8] == ([False] * 7 + [True] if record else [True] * 8), "8 steps of 8 spans"

    update = TrainStep.update

    def stop_after_step_4(self, pending):
        if pending.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, pending)

    monkeypatch.setattr(TrainStep, "update", stop_after_step_4)
    path = tmp_path / "broken"
    with pytest.raises(Interrupted, match=r"SIGTERM; state saved at step 6\. Resume with: golfgpt train --resume") as e:
        train(tiny, path)
    assert e.value.exit_code == 143
    assert not (path / "model.golf").exists()
    assert "SIGTERM: the run ends after this step" in capfd.readouterr().err
    monkeypatch.undo()
    train(tiny, path, resume=True)
    assert metrics(path, "resume") == [{**metrics(path, "resume")[0], "step": 6}]
    a, b = final_weights(tmp_path / "unbroken"), final_weights(path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (path / "model.golf").read_bytes() == (tmp_path / "unbroken" / "model.golf").read_bytes()


def test_killed_outright_and_resumed(tiny, tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle of the run: the last interval checkpoint continues. Unfinished, it is exported."""
    config = replace(
        tiny,
        schedule=ScheduleConfig(max_steps=400, max_seconds=None),
        runtime=replace(tiny.runtime, checkpoint_seconds=0.2),
    )
    path = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    code = (
        "import json\nfrom pathlib import Path\n"
        "from golfgpt.config import RunConfig, from_dict\nfrom golfgpt.train.train import train\n"
        f"config = json.loads(Path({str(tmp_path / 'config.json')!r}).read_text())\n"
        f"train(from_dict(RunConfig, config), Path({str(path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(path.glob("checkpoints/step_*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found, _ = checkpoint.latest(path / "checkpoints")
    assert 0 < found.step < 400
    short = replace(config, schedule=ScheduleConfig(max_steps=found.step + 2, max_seconds=None))
    refused = r"another config \(schedule\.max_steps: 400 -> .*follows that schedule.*start a new run with it: the"
    with pytest.raises(InputError, match=refused):
        train(short, path, resume=True)
    assert not metrics(path, "end"), "what is refused is no end of the run"
    update, killed = TrainStep.update, []

    def interrupt_once(self, pending):
        if not killed:
            killed.append(os.kill(os.getpid(), signal.SIGINT))
        return update(self, pending)

    monkeypatch.setattr(TrainStep, "update", interrupt_once)
    with pytest.raises(Interrupted, match="SIGINT; state saved at step") as error:
        train(config, path, resume=True)
    assert error.value.exit_code == 130
    again, _ = checkpoint.latest(path / "checkpoints")
    assert again.step > found.step
    assert main(["sample", str(path)]) == 3
    assert f"what it has saved: golfgpt export {path} --to golf; to finish it: " in capsys.readouterr().err
    assert main(["export", str(path), "--to", "golf"]) == 0
    assert f"the checkpoint's weights after step {again.step}: training has not ended" in capsys.readouterr().out
    decoded = decode(Quantizer(config.model, config.quant).encode(again.model))
    assert all(torch.equal(tensor, decoded[name]) for name, tensor in read(path / "export.golf").state.items())
    assert main(["sample", str(path / "export.golf"), "--tokens", "3"]) == 0
    assert main(["eval", str(path / "export.golf"), "--eval.max-tokens", "100", "--runtime.device", "cpu"]) == 0
    (path / "checkpoints" / "step_00000399.safetensors").write_bytes(b"cut off")
    (path / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert main(["export", str(path), "--source", "checkpoint"]) == 3
    (tmp_path / "tokenizer.model").rename(path / "tokenizer.model")
    capsys.readouterr()
    assert main(["export", str(path), "--source", "checkpoint", "--json"]) == 0
    captured = capsys.readouterr()
    assert "step_00000399.safetensors" in captured.err and "; an older checkpoint is used" in captured.err
    assert json.loads(captured.out)["step"] == again.step and not json.loads(captured.out)["finished"]
    assert main(["sample", str(path)]) == 3
    assert "before the run has ended" in capsys.readouterr().err, "although the folder has model.safetensors"


def test_a_fitted_run_keeps_its_width_when_the_budget_changes(tiny, tmp_path):
    budget = BudgetConfig(artifact_bytes=200_000, reserve_bytes=0, fit="mlp_hidden")
    first = train(replace(tiny, budget=budget), tmp_path / "run")
    config = read_config(tmp_path / "run")
    again = replace(config, budget=replace(budget, artifact_bytes=300_000))
    result = train(again, tmp_path / "run", resume=True)
    assert result["parameters"] == first["parameters"] and result["margin_bytes"] == first["margin_bytes"] + 100_000


def test_a_folder_in_use_is_refused(tiny, tmp_path):
    path = tmp_path / "run"
    folder = RunFolder.create(path, tiny, b"")
    done = subprocess.run(
        [sys.executable, "-m", "golfgpt", "train", "--resume", str(path)], capture_output=True, text=True, timeout=120
    )
    folder.close()
    assert done.returncode == BusyError.exit_code
    assert "in use by another process" in done.stderr


def test_a_changed_data_set_is_refused_on_resume(tiny, tmp_path, corpus):
    shutil.copytree(corpus, tmp_path / "data")
    config = replace(tiny, data=DataConfig(path=str(tmp_path / "data"), batch_tokens=1024, seq_len=64))
    train(config, tmp_path / "run")
    (tmp_path / "data" / "manifest.json").unlink()
    for file in (tmp_path / "data").glob("*.bytes"):
        file.unlink()
    with pytest.raises(InputError, match="has changed since the checkpoint"):
        train(config, tmp_path / "run", resume=True)


def test_full_disk_during_training_is_a_warning(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    result = train(tiny, tmp_path / "run")
    assert result["steps"] == 8
    assert "warning: no checkpoint at step 8" in (tmp_path / "run" / "train.log").read_text()


def test_run_config_is_what_the_folder_holds(tiny, tmp_path):
    folder = RunFolder.create(tmp_path / "run", tiny, b"")
    folder.close()
    assert read_config(tmp_path / "run") == tiny
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    older = {key: value for key, value in values.items() if key != "format"}
    more = values | {"model": values["model"] | {"layers": 3}}
    for text, message in (
        (more, r"unknown key model\.layers"),
        (older, "the run has format 1, expected 4"),
    ):
        (tmp_path / "run" / "config.json").write_text(json.dumps(text))
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / "run")


def test_a_signal_is_told_in_place_of_the_live_line(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(os, "write", lambda file, data: told.append(data))
    with Signals(tmp_path) as signals:
        signals.deferred = True
        for terminal in (False, True):
            monkeypatch.setattr(os, "isatty", lambda file, terminal=terminal: terminal)
            signals.caught.clear()
            os.kill(os.getpid(), signal.SIGINT)
    assert told[0].startswith(b"SIGINT: the run ends after this step") and told[1] == b"\r\x1b[2K" + told[0]


def test_a_stop_during_validation_loses_nothing(tiny, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr("golfgpt.train.score.evaluate", stopped)
    config = replace(tiny, runtime=replace(tiny.runtime, val_every=3))
    with pytest.raises(Interrupted, match="state saved at step 3"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert train(tiny, tmp_path / "run", resume=True)["steps"] == 8


@pytest.mark.parametrize(("val_every", "step"), [(3, 3), (0, 8)], ids=["before validation", "before export"])
def test_a_signal_after_the_vote_does_not_wait_for_an_evaluation(tiny, tmp_path, monkeypatch, val_every, step):
    """It comes while the checkpoint is written, when the step has already voted."""
    save = checkpoint.save

    def signaled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", signaled)
    monkeypatch.setattr("golfgpt.train.score.evaluate", lambda *a, **k: pytest.fail("evaluated after SIGTERM"))
    config = replace(tiny, runtime=replace(tiny.runtime, val_every=val_every))
    with pytest.raises(Interrupted, match=f"state saved at step {step}"):
        train(config, tmp_path / "run")


def test_a_run_may_move_and_its_evaluation_change(tiny, tmp_path, corpus):
    train(replace(tiny, eval=replace(tiny.eval, max_tokens=500)), tmp_path / "run")
    shutil.copytree(corpus, tmp_path / "moved")
    moved = replace(tiny, data=replace(tiny.data, path=str(tmp_path / "moved")))
    assert train(moved, tmp_path / "run", resume=True)["score"]["tokens"] == 4000
    assert "replaces the score" not in (tmp_path / "run" / "train.log").read_text()
    train(replace(moved, eval=replace(tiny.eval, max_tokens=600)), tmp_path / "run", resume=True)
    assert [row["tokens"] for row in metrics(tmp_path / "run", "eval")] == [500, 4000], "that were replaced"
    whole = "warning: val_bpb (first 600 tokens) replaces the score of the whole text"
    assert (whole in (tmp_path / "run" / "train.log").read_text()) == (tiny.eval.max_tokens is None)


def test_without_a_checkpoint_the_stored_config_still_rules(tiny, tmp_path):
    RunFolder.create(tmp_path / "run", tiny, b"").close()
    with pytest.raises(InputError, match=r"another config \(optim\.matrix_lr: 0\.04 -> 0\.1"):
        train(replace(tiny, optim=replace(tiny.optim, matrix_lr=0.1)), tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "train.log").exists(), "of which submit check reads the configuration"


def test_a_finished_run_without_checkpoints_is_not_trained_again(tiny, tmp_path):
    train(tiny, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "model.golf").read_bytes()
    with pytest.raises(InputError, match=r"no intact checkpoint, and .* step 0 would replace its model\.golf"):
        train(tiny, tmp_path / "run", resume=True)
    assert not (tmp_path / "run/checkpoints").exists()
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/step_00000009.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"no intact checkpoint \(.*step_00000009.safetensors.*\), and"):
        train(tiny, tmp_path / "run", resume=True)
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert (tmp_path / "run" / "model.golf").read_bytes() == before
    (tmp_path / "run" / "model.golf").unlink()
    train(tiny, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.golf").read_bytes() == before and any((tmp_path / "run/checkpoints").iterdir())


def test_a_run_without_the_newest_fields_resumes(tiny, tmp_path, monkeypatch):
    """Its config.json and checkpoint lack runtime.tracker and val_tokens, and eval.compile."""
    path, old = tmp_path / "run", to_dict(tiny)
    del old["runtime"]["tracker"], old["runtime"]["val_tokens"], old["eval"]["compile"]
    monkeypatch.setattr("golfgpt.train.saver.to_dict", lambda config: old)
    monkeypatch.setattr("golfgpt.runs.to_dict", lambda config: old)
    train(tiny, path)
    monkeypatch.undo()
    saved, _ = checkpoint.latest(path / "checkpoints")
    assert "tracker" not in saved.config["runtime"] and "tracker" not in (path / "config.json").read_text()
    train(read_config(path), path, resume=True)
    assert json.loads((path / "config.json").read_text())["runtime"]["tracker"] == "none"


def test_torn_metrics_and_leftovers_are_cleaned(tiny, tmp_path):
    path = tmp_path / "run"
    folder = RunFolder.create(path, tiny, b"")
    folder.metric("train", step=1)
    folder.close()
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')
    (path / "checkpoints" / ".step_00000001.safetensors.x.tmp").write_bytes(b"half")
    folder = RunFolder.open(path)
    folder.metric("resume", step=1)
    folder.close()
    assert [row["kind"] for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())] == [
        "train",
        "resume",
    ]
    assert list((path / "checkpoints").iterdir()) == []


def test_a_full_disk_does_not_end_a_run_over_a_log_line(tiny, tmp_path, monkeypatch, capsys):
    folder = RunFolder.create(tmp_path / "run", tiny, b"")
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    folder.metric("train", step=1)
    folder.log("a line")
    monkeypatch.undo()
    folder.close()
    assert capsys.readouterr().err.count("No space left on device") == 1
