"""Training: ranks, resume, signals, divergence, clock, budget, on a real corpus and real processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golfgpt_kernels import implementation
from models import final_weights, lively, metrics, packed

import golfgpt
from golfgpt.config import AverageConfig, BudgetConfig, LoopConfig, ScheduleConfig, to_dict
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, InputError, Interrupted, NonFiniteError
from golfgpt.optim.flat import FlatGradients
from golfgpt.quant import artifact
from golfgpt.quant.formats import decode
from golfgpt.quant.quantizer import Quantizer
from golfgpt.recipes import RECIPES
from golfgpt.train import checkpoint
from golfgpt.train.clock import Ledger
from golfgpt.train.forecast import Forecast, forecast, forecast_recipe
from golfgpt.train.kernels import choose_kernels
from golfgpt.train.memory import activation_bytes
from golfgpt.train.progress import DECAY, announce_time
from golfgpt.train.reporter import Reporter
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.step import TrainStep
from golfgpt.train.train import train

CPU = Ranks(0, 1, torch.device("cpu"))


def test_end_to_end(tiny, tmp_path, capsys):
    path = tmp_path / "run"
    result = train(tiny, path)
    printed = capsys.readouterr().out
    assert f"run {path}: " in printed and printed.count("60,000; limit 16,000,000") == 1
    assert printed.splitlines()[-1].startswith(f"val_bpb (first 4,000 tokens) {result['score']['val_bpb']:.4f}")
    assert "train_loss:" not in printed and "Serialized" not in printed, "the published format is for train.log"
    assert {p.name for p in path.iterdir()} >= {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "tokenizer.model",
        "model.golf",
        "result.json",
    }
    losses = [row["loss"] for row in metrics(path, "train")]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    assert result == json.loads((path / "result.json").read_text())
    assert result["artifact_bytes"] == (path / "model.golf").stat().st_size
    assert result["total_bytes"] == result["artifact_bytes"] + 60_000
    assert result["score"]["label"] == "val_bpb (first 4,000 tokens)"
    assert result["compressors_bpb"] is None, "only the leading tokens were scored"
    log = (path / "train.log").read_text()
    for piece in ("step:8/8 train_loss:", "model_params:", "_roundtrip_exact val_loss:", "Total submission size int8+"):
        assert piece in log

    model, tokenizer = golfgpt.load(path)
    text = tokenizer.decode(model.generate(torch.tensor([tokenizer.bos_id]), 20, window=64, temperature=0))
    assert isinstance(text, str)
    trained = final_weights(path)
    decoded = decode(Quantizer(tiny.model, tiny.quant).encode(trained))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in decoded.items()), "what was trained is what ships"
    with pytest.raises(InputError, match="already holds a run"):
        train(tiny, path)


@pytest.mark.numeric
@pytest.mark.parametrize("record", [False, True], ids=["plain", "2026-04-27"])
def test_gradients_do_not_depend_on_ranks_or_microbatches(tiny, corpus, record):
    """Three ranks take spans 3/3/2; their sums are the gradient of one rank, and so is a split batch. A packed row is a
    microbatch, so the record has only one size of them; its spans are clipped one by one."""
    tiny = packed(tiny) if record else tiny
    dataset = Dataset.open(corpus)
    whole = TrainStep(tiny, dataset, CPU)
    expected = whole.wait(whole.launch(3))
    config = replace(tiny, data=replace(tiny.data, microbatch_tokens=128 if record else 64))
    several = replace(tiny, data=replace(tiny.data, microbatch_tokens=128 if record else 512))
    split = [] if record else [[TrainStep(config, dataset, CPU)], [TrainStep(several, dataset, CPU)]]
    for trainers in (*split, [TrainStep(tiny, dataset, Ranks(r, 3, CPU.device)) for r in range(3)]):
        total, loss = torch.zeros_like(whole.flat.gradients), 0.0
        for trainer in trainers:
            trainer.flat.ranks = _Silent(trainer.ranks)
            result = trainer.wait(trainer.launch(3))
            total += trainer.flat.gradients
            loss += result.loss
        assert loss == pytest.approx(expected.loss, abs=1e-5)
        torch.testing.assert_close(total, whole.flat.gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("microbatch", [128, 64])
def test_spans_are_clipped_one_by_one(tiny, corpus, microbatch):
    """Against the gradients of single spans, of which some exceed the limit."""
    data = replace(tiny.data, microbatch_tokens=microbatch)
    dataset, model = Dataset.open(corpus), lively(tiny.model)
    step = TrainStep(replace(tiny, data=data), dataset, CPU)
    step.model.load_state_dict(model.state_dict())
    windows = step.data.read(2).windows
    gradients = []
    for span in windows:
        loss = model.loss(span[:-1].view(-1, 64), span[1:].view(-1, 64))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    norms = torch.stack([torch.stack(torch._foreach_norm(g)).norm() for g in gradients])
    limit = float(norms.median())
    assert norms.min() < limit < norms.max()
    config = replace(tiny, data=data, optim=replace(tiny.optim, grad_clip_norm=limit, grad_clip="span"))
    step = TrainStep(config, dataset, CPU)
    step.model.load_state_dict(model.state_dict())
    step.launch(2)
    for i, p in enumerate(step.model.parameters()):
        parts = [g[i] * min(1.0, limit / norm) for g, norm in zip(gradients, norms, strict=True)]
        torch.testing.assert_close(p.grad, sum(parts) / 8, atol=1e-6, rtol=1e-4)


def test_a_span_that_is_not_finite_is_not_clipped_away(tiny, corpus):
    step = TrainStep(tiny, Dataset.open(corpus), CPU)
    step.flat.gradients.fill_(1e30)  # finite, but not its norm
    step.flat.clip_(1.0)
    assert (step.flat.gradients == torch.tensor(1e30)).all()


def test_the_decay_of_a_step_tapers(tiny, corpus):
    """A matrix without a gradient only decays: whole up to 70 % of the budget, by half at the end of it."""
    optim = replace(tiny.optim, weight_decay=0.5, weight_decay_end=0.5, matrix_lr=0.1)
    config = replace(tiny, optim=optim, schedule=replace(tiny.schedule, warmdown_frac=0.0))
    step, shares = TrainStep(config, Dataset.open(corpus), CPU), []
    for number in range(8):
        pending = step.launch(number)
        step.model.mlp_fc.grad.zero_()
        before = step.model.mlp_fc.detach().clone()
        step.update(pending)
        shares.append(float((1 - step.model.mlp_fc.detach() / before).median()) / 0.05)
    assert shares == pytest.approx([1] * 6 + [1 - 0.5 * (0.75 - 0.7) / 0.3, 1 - 0.5 * (0.875 - 0.7) / 0.3], abs=1e-3)


class _Silent:
    """A rank of several whose sums are done by the test."""

    def __init__(self, ranks: Ranks):
        self.rank, self.world, self.device, self.main = ranks.rank, ranks.world, ranks.device, ranks.is_main

    def sum_(self, tensor):
        return tensor


@pytest.mark.slow
@pytest.mark.parametrize("world, optimizer, record", [(3, "replicated", False), (2, "sharded", True)])
def test_gloo_processes_agree_with_one(tiny, tmp_path, world, optimizer, record):
    """Losses equal within rounding, and every rank ends with the same score. Of the record, the loop begins within."""
    tiny = packed(tiny, start=0.5) if record else tiny
    train(tiny, tmp_path / "one")
    config = replace(tiny, runtime=replace(tiny.runtime, optimizer=optimizer))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    code = (
        "import json, sys, torch\n"
        "from pathlib import Path\n"
        "from golfgpt.config import RunConfig, from_dict\n"
        "from golfgpt.train.train import train\n"
        "torch.set_num_threads(1)\n"
        f"config = from_dict(RunConfig, json.loads(Path({str(tmp_path / 'config.json')!r}).read_text()))\n"
        f"train(config, Path({str(tmp_path / 'many')!r}))\n"
    )
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "main.py"], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    one, many = (metrics(tmp_path / name, "train") for name in ("one", "many"))
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3), a["step"]
    assert one[0]["loss"] == pytest.approx(many[0]["loss"], abs=1e-5)
    scores = [json.loads((tmp_path / name / "result.json").read_text())["score"] for name in ("one", "many")]
    assert scores[0]["val_bpb"] == pytest.approx(scores[1]["val_bpb"], abs=2e-2)
    assert scores[0]["tokens"] == scores[1]["tokens"] and scores[0]["bytes"] == scores[1]["bytes"]
    assert f"world_size:{world}" in (tmp_path / "many" / "train.log").read_text()


def test_running_mean_of_the_losses(tiny, tmp_path, monkeypatch):
    """Each loss weighs DECAY of the next one; a resumed run starts the mean anew."""
    told, wait = [], TrainStep.wait
    monkeypatch.setattr(Reporter, "status", lambda self, text: told.append(text))

    def stop(self, pending):
        if pending.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return wait(self, pending)

    monkeypatch.setattr(TrainStep, "wait", stop)
    with pytest.raises(Interrupted, match="state saved at step 6"):
        train(tiny, tmp_path / "run")
    monkeypatch.setattr(TrainStep, "wait", wait)
    train(tiny, tmp_path / "run", resume=True)
    rows, text = metrics(tmp_path / "run", "train"), Dataset.open(tiny.data.path).manifest.train
    for part in (rows[:6], rows[6:]):
        for n, row in enumerate(part, 1):
            weights = [DECAY ** (n - i) for i in range(1, n + 1)]
            mean = sum(w * each["loss"] for w, each in zip(weights, part, strict=False)) / sum(weights)
            assert row["loss_ema"] == pytest.approx(mean)
            assert row["bpb_ema"] == pytest.approx(mean * text.tokens / math.log(2) / text.decoded_bytes)
    live = [line for line in told if re.match(r"step \d+  \d+ s left", line)]
    for row, line in zip(rows, live, strict=True):
        means = f"mean loss {row['loss_ema']:.4f}  {row['bpb_ema']:.4f} bits/byte"
        assert re.match(rf"step {row['step']}  \d+ s left  {means}  ", line)
    last = rf"train_loss:{rows[7]['loss']:.4f} train_time:\d+ms step_avg:[\d.]+ms train_loss_ema:{mean:.4f}"
    assert re.search(rf"^step:8/8 {last}$", (tmp_path / "run" / "train.log").read_text(), re.MULTILINE)


def test_no_bits_per_byte_of_shards_without_a_manifest(tiny, tmp_path, corpus, monkeypatch):
    told = []
    monkeypatch.setattr(Reporter, "status", lambda self, text: told.append(text))
    shutil.copytree(corpus, tmp_path / "data", ignore=shutil.ignore_patterns("manifest.json", "*.bytes"))
    config = replace(tiny, data=replace(tiny.data, path=str(tmp_path / "data")), schedule=ScheduleConfig(max_steps=2))
    train(config, tmp_path / "run")
    assert [row["bpb_ema"] for row in metrics(tmp_path / "run", "train")] == [None, None]
    assert [line for line in told if line.startswith("step 2  ")] and "bits/byte" not in "".join(told)


def test_steps_enqueued_ahead_train_the_same(tiny, tmp_path, monkeypatch):
    """As on a GPU, where a result is read after the next step is enqueued: with validations, or a stop and a resume."""
    config = replace(tiny, runtime=replace(tiny.runtime, val_every=3, val_tokens=500))
    train(config, tmp_path / "waiting")
    monkeypatch.setattr(TrainStep, "ahead", 1)
    train(config, tmp_path / "ahead")
    wait, caught = TrainStep.wait, []

    def stop_once(self, pending):
        if pending.step == 2 and not caught:
            caught.append(os.kill(os.getpid(), signal.SIGTERM))
        return wait(self, pending)

    monkeypatch.setattr(TrainStep, "wait", stop_once)
    with pytest.raises(Interrupted, match="state saved at step 6"):
        train(tiny, tmp_path / "broken")
    train(tiny, tmp_path / "broken", resume=True)
    rows = {name: [row["loss"] for row in metrics(tmp_path / name, "train")] for name in ("waiting", "ahead", "broken")}
    assert rows["waiting"] == rows["ahead"] == rows["broken"] and len(rows["ahead"]) == 8
    scores = [[row["val_loss"] for row in metrics(tmp_path / name, "val")] for name in ("waiting", "ahead")]
    assert scores[0] == scores[1] and len(scores[0]) == 2
    assert {row["tokens"] for row in metrics(tmp_path / "waiting", "val")} == {500}
    files = [(tmp_path / name / "model.golf").read_bytes() for name in rows]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize(("value", "clip"), [(float("inf"), 0.0), (float("nan"), 1.0)])
def test_a_non_finite_step_changes_nothing_and_names_the_tensor(tiny, tmp_path, monkeypatch, where, ahead, value, clip):
    """Nor does the step after it, which is on its way when the host reads of the first."""
    monkeypatch.setattr(TrainStep, "ahead", ahead)
    step_sum, sum_ = TrainStep.sum, FlatGradients.sum_

    def poisoned(self, step, *args):
        def poison(flat):
            sum_(flat)
            if step == 3 and where == "loss":
                flat.control[0] = float("nan")
            elif step == 3:
                self.model.mlp_fc.grad[2, 5, 7] = value

        monkeypatch.setattr(FlatGradients, "sum_", poison)
        return step_sum(self, step, *args)

    config = replace(tiny, schedule=replace(tiny.schedule, warmdown_frac=0), average=AverageConfig(kind="ema"))
    config = replace(config, optim=replace(config.optim, grad_clip_norm=clip))
    train(replace(config, schedule=replace(config.schedule, max_steps=3)), tmp_path / "good")
    monkeypatch.setattr(TrainStep, "sum", poisoned)
    name = "blocks.2.mlp.fc.weight" if where == "gradient" else r"the loss \(nan\)"
    with pytest.raises(NonFiniteError, match=f"step 3: .*{name}.*nothing was updated"):
        train(config, tmp_path / "bad")
    (a, _), (b, _) = (checkpoint.latest(tmp_path / name / "checkpoints") for name in ("good", "bad"))
    assert b.step == 3
    for of in ("model", "optimizers", "average"):
        a_tensors, b_tensors = getattr(a, of), getattr(b, of)
        assert a_tensors.keys() == b_tensors.keys()
        assert all(torch.equal(a_tensors[k], b_tensors[k]) for k in a_tensors)


def clock_of_steps(monkeypatch, seconds: float) -> None:
    """Let the training clock advance by so many seconds a step, and by nothing else."""
    clock, step_sum = [0.0], TrainStep.sum

    def slow(self, *args):
        clock[0] += seconds
        return step_sum(self, *args)

    monkeypatch.setattr(TrainStep, "sum", slow)
    monkeypatch.setattr("golfgpt.train.train.Ledger", lambda: Ledger(now=lambda: clock[0]))


def test_the_cap_stops_before_the_step_that_would_cross(tiny, tmp_path, monkeypatch):
    """On a clock that only the steps advance, by 20 s each."""
    clock_of_steps(monkeypatch, 20)
    runtime = replace(tiny.runtime, compile="off")
    config = replace(tiny, runtime=runtime, schedule=ScheduleConfig(max_steps=100_000, max_seconds=650))
    result = train(config, tmp_path / "run")
    assert result["steps"] == 32 and result["seconds"]["train"] == pytest.approx(640)
    assert "stopping_early: wallclock_cap" in (tmp_path / "run" / "train.log").read_text()
    second = replace(config, schedule=replace(config.schedule, max_seconds=35))
    assert train(second, tmp_path / "one")["steps"] == 1, "the second step would cross"
    looped = replace(config.model, loop=LoopConfig(first=1, last=1, passes=4, start=0.2))
    looped = replace(config, model=looped, schedule=replace(config.schedule, max_seconds=55))
    assert train(looped, tmp_path / "looped")["steps"] == 1, "it would have twice the layers"


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_slow_first_step_is_no_measure_of_the_others(tiny, tmp_path, monkeypatch, ahead):
    """Compilation and lazy initialization happen once. Schedules go on at the pace of the steps after it."""
    clock, step_sum, seen = [0.0], TrainStep.sum, {}

    def slow(self, step, *args):
        seen[step] = self.pace.seconds_at(step), clock[0]
        clock[0] += 0.05 if step else 3.0
        return step_sum(self, step, *args)

    monkeypatch.setattr(TrainStep, "sum", slow)
    monkeypatch.setattr(TrainStep, "ahead", ahead)
    monkeypatch.setattr("golfgpt.train.train.Ledger", lambda: Ledger(now=lambda: clock[0]))
    runtime = replace(tiny.runtime, compile="off")  # trials of a kept compiled form would move the clock
    config = replace(tiny, runtime=runtime, schedule=ScheduleConfig(max_steps=30, max_seconds=9.0))
    assert train(config, tmp_path / "run")["steps"] == 30
    for step, (expected, true) in seen.items():
        if step != 1 or not ahead:
            assert expected == pytest.approx(true, abs=0.06), step


@pytest.fixture
def stalls(tiny, monkeypatch):
    """On a clock that only microbatches advance, by a second each: `stalls[step, microbatch]` is called after one of
    them, and returns more seconds. "config" is `tiny` without a decay."""
    clock, stalls, backward = [0.0], {}, TrainStep.backward

    def slow(self, step, *args):
        for done, of in backward(self, step, *args):
            yield done, of
            clock[0] += 1 + stalls.get((step, done), lambda: 0)()

    monkeypatch.setattr(TrainStep, "backward", slow)
    monkeypatch.setattr("golfgpt.train.train.Ledger", lambda: Ledger(now=lambda: clock[0]))
    stalls["config"] = replace(tiny, schedule=replace(tiny.schedule, warmdown_frac=0.0))
    return stalls


def test_the_last_step_is_logged_also_if_only_the_next_one_is_past_the_cap(stalls, tmp_path):
    """Else submit check finds a log that ends before its result."""
    config, path = stalls["config"], tmp_path / "run"
    stalls[11, 7] = lambda: 30
    schedule = replace(config.schedule, max_steps=400, max_seconds=110.0)
    assert train(replace(config, schedule=schedule), path)["steps"] == 12
    log = (path / "train.log").read_text()
    assert "training ended at 126.00 s of 110, after step 12: step 12 took longer than those before it" in log
    steps = [line for line in log.splitlines() if line.startswith("step:")]
    assert len(steps) == 11 and steps[-1].startswith("step:12/400 train_loss:"), "ten, then one of 50, then the last"


@pytest.mark.parametrize("ahead", [0, 1])
def test_no_microbatch_begins_after_the_cap(stalls, tmp_path, monkeypatch, ahead):
    """A step has eight. The fourth step stalls in its third, beyond what any forecast allows: it is not applied."""
    config = stalls["config"]
    train(replace(config, schedule=replace(config.schedule, max_steps=3)), tmp_path / "three")
    monkeypatch.setattr(TrainStep, "ahead", ahead)
    stalls[3, 2] = lambda: 100
    path = tmp_path / "run"
    assert train(replace(config, schedule=replace(config.schedule, max_seconds=120.0)), path)["steps"] == 3
    a, b = final_weights(path), final_weights(tmp_path / "three")
    assert all(torch.equal(a[name], b[name]) for name in a)
    log = (path / "train.log").read_text()
    assert "training ended at 127.00 s of 120, after step 3: step 4 was abandoned after 3 of 8 microbatches, 103" in log
    assert "warning: training took 127.000 s, more than schedule.max_seconds 120" in log
    assert "stopping_early: wallclock_cap train_time:127000ms step:3/8\n" in log
    short = replace(config, schedule=replace(config.schedule, max_seconds=2.5))
    told = "2.5 is too short for one step: step 1 was abandoned after 3 of 8 microbatches, 3.0 s; raise --schedule"
    with pytest.raises(BudgetError, match=re.escape(told)):
        train(short, tmp_path / "short")
    assert not (tmp_path / "short" / "config.json").exists(), "the name is free"


@pytest.mark.parametrize("step", [0, 2])
def test_a_signal_does_not_wait_for_the_end_of_a_long_step(stalls, tmp_path, step):
    path, config, seen = tmp_path / "run", stalls["config"], []
    stalls[step, 1] = lambda: os.kill(os.getpid(), signal.SIGTERM) or 4
    stalls[step, 2] = lambda: seen.append("computed after the signal") or 0
    message = r"state saved at step 2\. Resume with" if step else r"nothing was saved yet\.$"
    with pytest.raises(Interrupted, match=message):
        train(config, path)
    assert (path / "config.json").exists() == bool(step) and not seen
    if step:
        stalls.pop((step, 1))
        train(config, path, resume=True)
        train(config, tmp_path / "unbroken")
        assert (path / "model.golf").read_bytes() == (tmp_path / "unbroken" / "model.golf").read_bytes()


def test_a_decay_that_did_not_complete_is_said(tiny, tmp_path, monkeypatch):
    """By the steps it does. By the clock it does not, where a step takes a fifth of the time."""
    clock_of_steps(monkeypatch, 2.0)
    train(tiny, tmp_path / "steps")
    train(replace(tiny, schedule=replace(tiny.schedule, max_seconds=9.9)), tmp_path / "clock")
    logs = [(tmp_path / name / "train.log").read_text() for name in ("steps", "clock")]
    warning = "the decay of the learning rate did not complete: it ended at 0.480 of its base"
    assert [warning in log for log in logs] == [False, True]
    assert "of 9.9, after step 4: another step could have ended at 6.000 + 2 x 2.100 = 10.200 s" in logs[1]


def test_the_forecast_of_a_step(tiny, corpus, monkeypatch):
    """A step has sixteen rows, of which a microbatch has two; each trial is said to take a quarter of a second."""
    monkeypatch.setattr("golfgpt.train.forecast._least", lambda work, rounds=None: work() or 0.25)
    step = TrainStep(tiny, Dataset.open(corpus), CPU)
    state = {name: value.clone() for name, value in (step.model.state_dict() | step.optimizers.state()).items()}
    found = forecast(step)
    assert found.seconds == 0.25 / 2 * 16 + 0.25
    assert str(found) == "about 2.2 s for 1,024 tokens in float32"
    after = step.model.state_dict() | step.optimizers.state()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert forecast_recipe(packed(tiny)).seconds == found.seconds
    told = []
    clocked = replace(tiny, schedule=ScheduleConfig(max_seconds=20.0))
    announce_time(clocked, found, SimpleNamespace(line=told.append))
    assert told[0].endswith("or 8 steps in 20 s") and "training for 8 steps is next to nothing: raise" in told[1]
    announce_time(replace(tiny, schedule=ScheduleConfig()), found, SimpleNamespace(line=told.append))
    assert told[2].endswith("or 266 steps in 600 s") and len(told) == 3
    hopeless = replace(tiny, schedule=ScheduleConfig(max_seconds=0.7))
    with pytest.raises(BudgetError, match=r"0\.7 is too short for one step, forecast to take about 2\.2 s for 1,024 t"):
        announce_time(hopeless, found, SimpleNamespace(line=told.append))
    assert told[3].endswith("or 0 steps in 0.7 s") and len(told) == 4


@pytest.mark.parametrize(("alone", "threads"), [(0.4, 1), (0.6, 0)])
def test_one_thread_is_taken_where_it_is_more_than_twice_as_fast(tiny, corpus, monkeypatch, alone, threads):
    used = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    seconds = {4: 1.0, 1: alone}
    monkeypatch.setattr(
        "golfgpt.train.forecast._measured", lambda step: Forecast(seconds[used[-1]], 1024, 64, "float32")
    )
    step = TrainStep(replace(tiny, runtime=replace(tiny.runtime, threads=0)), Dataset.open(corpus), CPU)
    found = forecast(step)
    assert found.seconds == (alone if threads else 1.0)
    assert found.slower == ("4 threads were forecast to take 1 s a step" if threads else "")
    assert (step.config.runtime.threads, used[-1]) == (threads, 1 if threads else 4)


def test_a_cap_too_short_for_one_step(tiny, tmp_path):
    with pytest.raises(BudgetError, match="too short for one step"):
        train(replace(tiny, schedule=ScheduleConfig(max_seconds=1e-6)), tmp_path / "run")


def test_over_budget_is_scored_kept_and_refused(tiny, tmp_path):
    size = train(tiny, tmp_path / "fits")["total_bytes"]
    assert "by this forecast" not in (tmp_path / "fits" / "train.log").read_text()
    exact = replace(tiny, budget=BudgetConfig(artifact_bytes=size, code_bytes=60_000))
    assert train(exact, tmp_path / "exact")["margin_bytes"] == 0
    with pytest.raises(BudgetError, match="over budget: "):
        train(replace(tiny, budget=BudgetConfig(artifact_bytes=size - 1, code_bytes=60_000)), tmp_path / "over")
    assert artifact.read(tmp_path / "over" / "model.golf").state
    assert json.loads((tmp_path / "over" / "result.json").read_text())["margin_bytes"] == -1
    with pytest.raises(BudgetError, match="over budget"):
        train(replace(tiny, budget=BudgetConfig(artifact_bytes=size - 20_000, code_bytes=60_000)), tmp_path / "half")
    assert "over its budget, by this forecast" in (tmp_path / "half" / "train.log").read_text()


def test_a_long_step_gives_signs_of_life_and_a_finished_run_says_so(tiny, tmp_path, monkeypatch):
    clock, told, backward = [0.0], [], TrainStep.backward
    config = replace(tiny, data=replace(tiny.data, microbatch_tokens=tiny.data.seq_len))
    config = replace(config, schedule=replace(config.schedule, max_steps=1))

    def slow(self, *args):
        for done_of in backward(self, *args):
            clock[0] += 4
            yield done_of

    monkeypatch.setattr(TrainStep, "backward", slow)
    monkeypatch.setattr("golfgpt.train.train.Ledger", lambda: Ledger(now=lambda: clock[0]))
    monkeypatch.setattr(Reporter, "status", lambda self, text: told.append(text))
    train(config, tmp_path / "run")
    of = tiny.data.batch_tokens // tiny.data.seq_len
    assert f"step 1: 1 of {of} microbatches after 8 s" in told and f"step 1: 0 of {of}" not in str(told)
    monkeypatch.undo()
    train(config, tmp_path / "run", resume=True)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "training was over at step 1: exporting and scoring again" in log and "stopping_early" not in log


def test_a_training_that_learned_nothing_is_said(tiny, tmp_path):
    idle = replace(tiny.optim, matrix_lr=1e-9, scalar_lr=1e-9, tied_embed_lr=1e-9)
    train(replace(tiny, optim=idle), tmp_path / "idle")
    train(tiny, tmp_path / "sane")
    found = ["no better than guessing one of 384 tokens" in (tmp_path / name / "train.log").read_text()
             for name in ("idle", "sane")]  # fmt: skip
    assert found == [True, False]


@pytest.mark.parametrize(("every", "taken"), [(100, 0), (8, 1), (3, 2)])
def test_an_average_of_too_few_is_not_exported_and_the_log_says_so(tiny, tmp_path, every, taken):
    average = AverageConfig(kind="swa", swa_start_lr=1.0, swa_every=every)
    schedule = replace(tiny.schedule, warmdown_frac=0.99)
    train(replace(tiny, average=average, schedule=schedule), tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    said = (
        f"warning: swa: {taken} of 8 steps are in the average, too few"
        if taken < 2
        else "swa:exporting the average of 2 steps"
    )
    assert said in log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, data=replace(c.data, path=None)), "no data"),
        (lambda c: replace(c, data=replace(c.data, path="nowhere")), "there is no folder nowhere"),
        (lambda c: replace(c, model=replace(c.model, vocab_size=385)), "use --model.vocab-size 384"),
        (lambda c: replace(c, eval=replace(c.eval, window=10**6)), "longer than the 4000 tokens"),
        (
            lambda c: replace(
                c, model=replace(c.model, smear_gate="after_norm"), eval=replace(c.eval, document_aware=True)
            ),
            "does not mix documents, got smear_gate after_norm .*; train with --model.document-start 1",
        ),
        (lambda c: replace(c, model=replace(c.model, mlp_hidden=2_000_000)), "tensors take .* more than 268435456"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tiny, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train(change(tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_spans(tiny, corpus):
    with pytest.raises(InputError, match=r"raise --data\.spans to at least 9"):
        TrainStep(tiny, Dataset.open(corpus), Ranks(8, 9, CPU.device))


def test_compiled_warm_up_leaves_no_trace(tiny, corpus):
    dataset = Dataset.open(corpus)
    trainer = TrainStep(tiny, dataset, CPU)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.warm_up(2)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert not any(value.any() for value in trainer.optimizers.state().values())
    reference = TrainStep(tiny, dataset, CPU)
    for step in range(2):
        for t in (trainer, reference):
            pending = t.launch(step)
            t.wait(pending)
            t.update(pending)
    for a, b in zip(trainer.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_runtime_kernels_is_the_meaning_of_auto_while_a_run_lasts(tiny, monkeypatch):
    def chosen():
        return implementation("relu2_mlp", CPU.device, torch.float32)[0]

    config = replace(tiny, runtime=replace(tiny.runtime, kernels="triton"))
    with choose_kernels(config, CPU):
        assert chosen() == "triton"
    assert chosen() == "eager"
    monkeypatch.setattr("golfgpt.train.kernels.cannot_run", lambda device, dtype: "no CUDA device")
    with pytest.raises(InputError, match="is triton, which cannot run: no CUDA device; use"):
        choose_kernels(config, CPU)


@pytest.mark.parametrize(
    ("file", "run", "left"),
    [
        (None, False, False),
        ("notes.txt", False, True),
        ("model.golf", True, True),
        ("checkpoints/step_00000008.safetensors", True, True),
    ],
)
def test_only_a_run_that_saved_nothing_is_discarded(tiny, tmp_path, file, run, left):
    path = tmp_path / "run"
    folder = RunFolder.create(path, tiny, b"tokenizer")
    if file:
        (path / file).write_bytes(b"content")
    folder.discard()
    folder.close()
    assert ((path / "config.json").exists(), path.exists()) == (run, left)
    RunFolder.open(path).close() if run else RunFolder.create(path, tiny, b"tokenizer").close()


def test_a_discarded_run_leaves_no_empty_folder_of_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/kept").mkdir(parents=True)
    for name in ("runs/a/b", "runs/a/c"):
        RunFolder.create(Path(name), tiny, b"tokenizer").close()
    for name, left in (("runs/a/b", {"a", "kept"}), ("runs/a/c", {"kept"})):
        folder = RunFolder.open(Path(name))
        folder.discard()
        folder.close()
        assert {path.name for path in Path("runs").iterdir()} == left


def test_a_diverged_last_update_is_not_exported(tiny, tmp_path, monkeypatch):
    update = TrainStep.update

    def explode(self, pending):
        value = update(self, pending)
        if pending.step == 7:
            self.model.mlp_fc.data.fill_(float("inf"))
        return value

    monkeypatch.setattr(TrainStep, "update", explode)
    with pytest.raises(NonFiniteError, match="parameter mlp_fc is not finite"):
        train(tiny, tmp_path / "run")
    assert not (tmp_path / "run" / "model.golf").exists()


def test_a_rank_without_windows_and_an_error_on_one_rank(tiny, corpus):
    """Two windows on three ranks; and a failing rank makes the others stop instead of waiting."""
    from golfgpt.errors import PeerError

    class Peers(Ranks):
        def sum_(self, tensor):
            return tensor.add_(1)

    with pytest.raises(PeerError):
        Peers(1, 2, CPU.device).raise_on_any_rank(None)
    with pytest.raises(InputError, match="mine"):
        Peers(1, 2, CPU.device).raise_on_any_rank(InputError("mine"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["golfgpt.train.step.Prefetcher", "golfgpt.train.train.RunFolder.create"])
def test_a_rank_that_fails_in_set_up_stops_all_and_leaves_the_name_free(tiny, tmp_path, where):
    """Rank 1 of two in its own set-up, or rank 0 when it makes the folder."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny)))
    _, name = where.rsplit(".", 1)
    code = (
        "import json, os\nfrom pathlib import Path\nfrom unittest import mock\n"
        "from golfgpt.config import RunConfig, from_dict\nfrom golfgpt.train.train import train\n"
        f"fails = int(os.environ['RANK']) == {int(name == 'Prefetcher')}\n"
        f"config = from_dict(RunConfig, json.loads(Path({str(tmp_path / 'config.json')!r}).read_text()))\n"
        "try:\n"
        f"    with mock.patch({where!r}, side_effect=OSError('bad disk')) if fails else mock.MagicMock():\n"
        f"        train(config, Path({str(tmp_path / 'run')!r}))\n"
        "except Exception as error:\n"
        f"    Path({str(tmp_path)!r}, os.environ['RANK']).write_text(type(error).__name__)\n"
    )
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, tmp_path / "main.py"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    failed = int(name == "Prefetcher")
    assert [(tmp_path / str(rank)).read_text() for rank in (failed, 1 - failed)] == ["OSError", "PeerError"]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("micro", "advice"),
    [(None, "--data.microbatch-tokens 64 takes the same steps in about .* GiB"), (64, "one sequence is the minimum")],
)
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_running_out_of_memory_says_what_needs_less(tiny, tmp_path, monkeypatch, kind, micro, advice):
    def loss(*args, **options):
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("golfgpt.model.gpt.GPT.loss", loss)
    config = replace(tiny, data=replace(tiny.data, microbatch_tokens=micro))
    with pytest.raises(InputError, match=f"out of memory in the first step: .* tokens need about .*{advice}"):
        train(config, tmp_path / "run")
    monkeypatch.setattr("golfgpt.model.gpt.GPT.loss", lambda *args, **options: (_ for _ in ()).throw(kind("else")))
    if kind is RuntimeError:
        with pytest.raises(RuntimeError, match="else"):
            train(config, tmp_path / "other")


def test_activations_are_estimated_near_the_published_peaks():
    """Peak MiB allocated by the published runs, which hold weights and optimizer too (0.3 GB)."""
    for name, tokens, peak in (
        ("baseline", 65_536, 10_184),
        ("mixed-qat", 65_536, 11_251),
        ("int6-mlp3x", 98_304, 16_840),
        ("int5-int6-swa", 98_304, 18_870),
        ("int6-qat-4096", 49_152, 8_521),
    ):
        estimate = activation_bytes(RECIPES[name].config.model, tokens, 2) / 2**20
        assert 1.05 < estimate / peak < 1.08, name


def test_without_a_terminal_a_silence_is_broken_by_what_goes_on(capsys):
    reporter, said = Reporter(None), ""
    with contextlib.closing(reporter):
        reporter.status("ready")  # of a step: its line
        reporter.show("ready")
        reporter._told -= 5  # seconds of silence
        time.sleep(1.5)
        reporter.status("compressing")
        deadline = time.monotonic() + 60
        while said.count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().out
    assert said == "ready\ncompressing\n"
