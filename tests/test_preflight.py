"""`golfgpt preflight`: a run that would end well, and each way in which it would not."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from golfgpt.cli import main
from golfgpt.errors import InputError
from golfgpt.train import checkpoint, preflight
from golfgpt.train.export import Exporter
from golfgpt.train.saver import Saver
from golfgpt.train.score import ModelScorer
from golfgpt.train.step import TrainStep


@pytest.fixture
def rows(tiny, tmp_path, monkeypatch):
    """rows(section=fields, …): the checks by name. Nothing may stay in the folder that they worked in."""
    monkeypatch.chdir(tmp_path)

    def made(**sections) -> dict[str, preflight.Row]:
        config = replace(tiny, **{name: replace(getattr(tiny, name), **fields) for name, fields in sections.items()})
        found = preflight.preflight(config, lambda config: config)
        assert not list(tmp_path.iterdir())
        return {row.name: row for row in found}

    return made


@pytest.mark.parametrize("slow", [False, True])
def test_a_run_that_will_end_well(rows, monkeypatch, slow):
    """On a CPU that is too slow for it, of short steps. A forecast just below the limit is a warning."""
    monkeypatch.setattr(preflight, "LONG_STEP", 0.0 if slow else 1e9)
    found = rows()
    warned = {name: row.advice for name, row in found.items() if row.verdict != "ok"}
    assert tuple(found) == preflight.CHECKS and list(warned) == ["model"] * slow
    assert "bit for bit" in found["resume"].found and found["time"].found.startswith("8 steps")
    total = int(found["byte budget"].found.split()[1].replace(",", ""))
    assert rows(budget={"artifact_bytes": total})["byte budget"].verdict == "warning"


def fails(error):
    def instead(*args, **kwargs):
        raise error

    return lambda original: instead


def without_momentum(save):
    return lambda folder, c: save(folder, replace(c, optimizers={k: 0 * v for k, v in c.optimizers.items()}))


def with_other_data(restore):
    def instead(saver, found):
        saver.step.data._rehearsed.reverse()
        return restore(saver, found)

    return instead


def with_other_weights(load):
    def instead(path):
        model, tokenizer = load(path)
        torch.nn.init.ones_(model.tok_emb)
        return model, tokenizer

    return instead


def jumping(clocks):
    readings = iter([(0.0, 0.0), (2.0, 3600.0)])
    return lambda: next(readings)


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
CHANGED = {
    "window": ({"eval": {"window": 10**6, "max_tokens": None}}, "data and settings", 3, "choose a smaller window"),
    "tokenizer": ({"model": {"vocab_size": 512}}, "data and settings", 3, "--model.vocab-size 384"),
    "shards": ({"data": {"order": "shuffled"}}, "data and settings", 3, "--shard-tokens"),
    "graph": ({"runtime": {"graph": "step"}}, "model", 3, "expected a GPU"),
    "diverged": ({"optim": {"tied_embed_lr": 1e38}}, "two steps", 5, "not finite"),
    "bytes": ({"budget": {"artifact_bytes": 61_000}}, "byte budget", 4, "over budget: "),
    "cap": ({"schedule": {"max_seconds": 1e-6}}, "time", 4, "--schedule.max-seconds"),
}
BROKEN = {
    "compiler": ((preflight, "warm_up", fails(RuntimeError("no g++"))), preflight.COMPILE, 1, "RuntimeError: no g++"),
    "memory": ((TrainStep, "update", fails(NO_MEMORY)), "two steps", 3, "--data.microbatch-tokens"),
    "full": ((checkpoint, "save", fails(NO_SPACE)), "checkpoint", 3, "No space left"),
    "state": ((checkpoint, "save", without_momentum), "resume", 6, "optimizers."),
    "data": ((Saver, "restore", with_other_data), "resume", 6, "without one"),
    "export": ((Exporter, "export", fails(InputError("cannot be stored"))), "export", 3, "cannot be stored"),
    "reload": ((preflight, "load", with_other_weights), "reload", 6, "tok_emb"),
    "scoring": ((ModelScorer, "score", fails(NO_MEMORY)), preflight.SCORE, 3, "--eval.batch-tokens"),
    "disk": ((shutil, "disk_usage", lambda _: lambda path: SimpleNamespace(free=1000)), "disk", 3, "1,000 are free"),
    "clock": ((preflight, "_clocks", jumping), "clock", 6, "3600.00 s"),
}


@pytest.mark.parametrize("case", [*CHANGED, *BROKEN])
def test_what_would_end_it_is_named(rows, monkeypatch, case):
    """By the check that fails, and no other does."""
    sections = {}
    if case in CHANGED:
        sections, name, code, advice = CHANGED[case]
    else:
        (owner, attribute, change), name, code, advice = BROKEN[case]
        monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    failed = [row for row in rows(**sections).values() if row.verdict == "fails"]
    assert [(row.name, row.exit_code) for row in failed] == [(name, code)] and advice in failed[0].advice


@pytest.mark.long
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
@pytest.mark.parametrize("seconds", ["60", "1e-6"])
def test_command_and_ranks(corpus, tmp_path, launcher, seconds):
    options = ["--recipe", "demo", "--model.vocab-size", "384", "--data.path", str(corpus), "--runtime.device", "cpu"]
    options += ["--budget.code-bytes", "0", "--runtime.dtype", "float32", "--schedule.max-seconds", seconds]
    command = [sys.executable, *launcher, "-m", "golfgpt", "preflight", *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if seconds == "60":
        assert run.returncode == 0 and "\n0 of 13 checks failed" in run.stdout, run.stderr
    else:
        assert run.returncode == (1 if launcher else 4) and "time fails: training ends after" in run.stdout, run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failed, world", [(None, "1"), (None, "2"), ("export", "1")])
def test_the_last_line_says_what_to_do_next(monkeypatch, capsys, failed, world):
    """The command of the run as it was launched, or what was not tried."""
    last = preflight.CHECKS.index(failed) if failed else len(preflight.CHECKS)
    found = [preflight.Row(name, "now") for name in preflight.CHECKS[:last]]
    if failed:
        found.append(preflight.Row(failed, "now", verdict="fails", advice="full", exit_code=4))
    monkeypatch.setattr(preflight, "preflight", lambda config, count: found)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
    argv = ["preflight", "--recipe", "demo", "--data.path", "my books"]
    monkeypatch.setattr(sys, "argv", ["golfgpt", *argv])
    assert main(argv) == (4 if failed else 0)
    last = capsys.readouterr().out.splitlines()[-1]
    if failed:
        assert last.startswith(
            "1 of 13 checks failed, 6 not tried (byte budget, reload, scored batch, time, disk, clock)"
        )
    else:
        command = "golfgpt" if world == "1" else "torchrun --standalone --nproc-per-node 2 -m golfgpt"
        assert last == f"next: {command} train --recipe demo --data.path 'my books'"
