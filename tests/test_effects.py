"""The queue of experiments/effects.py, its lines and its verdicts; no training longer than two steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from bench import experiments as runner
from bench.experiment_table import key, vary
from bench.experiments import read_rows
from experiments import effects
from experiments.effects import PARENT, SEEDS, STACK, WITHOUT, gains, open_part, queue, table, verdict
from golfgpt.config import RunConfig, differences
from golfgpt.data.shards import Dataset
from golfgpt.model.gpt import GPT


def test_the_queue_begins_with_pairs_and_leaves_fourth_and_fifth_seeds_for_the_end():
    runs = [(effects.label(config), config.seed) for config in queue()]
    assert runs[:4] == [("stack", 1), ("parent", 1), ("stack", 2), ("parent", 2)]
    assert {seed for _, seed in runs[:10]} == set(SEEDS)
    labels = [f"stack without {part}" for part in WITHOUT]
    assert runs[10:] == [(name, s) for seeds in ((1, 2, 3), (4, 5)) for name in labels for s in seeds]
    assert len({key(config) for config in queue()}) == len(runs) == 45


def test_a_run_without_a_part_differs_from_the_stack_in_it_alone():
    parts = {part: {line.split(":")[0] for line in differences(STACK, config)} for part, config in WITHOUT.items()}
    assert parts == {
        "input-gated smear": {"model.smear_gate", "model.document_start"},
        "gated attention": {"model.attn_gate", "model.attn_gate_scale"},
        "recurrence": {f"model.loop.{field}" for field in ("first", "last", "passes", "start")},
        "XSA": {"model.xsa_layers"},
        "leaky²": {"model.mlp_slope"},
        "MuonEq-R": {"optim.muon_row_norm"},
        "EMA with LR floor": {"average.kind", "average.ema_decay", "schedule.min_lr"},
    }
    changed = {line.split(":")[0] for line in differences(PARENT, STACK)}
    assert changed == set().union(*parts.values()) | {"model.rope_dims", "model.ln_scale", "model.skip_gates"}


def test_runs_of_a_seed_start_from_the_same_weights():
    parent = GPT(PARENT.model, seed=3).state_dict()
    for config in (STACK, *WITHOUT.values()):
        other = GPT(config.model, seed=3).state_dict()
        assert all((value == other[name]).all() for name, value in parent.items() if name != "skip_weights")
        assert (other["skip_weights"] == 1).all() and 1.6e6 < sum(value.numel() for value in other.values()) < 1.7e6


def test_seeds_read_parts_of_the_text_that_do_not_overlap(corpus):
    parts = [open_part(corpus, seed).train for seed in SEEDS]
    whole = np.concatenate(Dataset.open(corpus).train)
    read = np.concatenate([tokens for (tokens,) in parts])
    assert len({len(tokens) for (tokens,) in parts}) == 1 and 0 <= len(whole) - len(read) < len(SEEDS)
    assert (read == whole[: len(read)]).all()


@pytest.fixture
def short(tiny, monkeypatch) -> dict[str, RunConfig]:
    """Two steps of a stack that averages and of its parent instead of the labelled configs, in this process."""
    parent = vary(tiny, schedule={"max_steps": 2}, data={"spans": 1, "path": None}, quant={"compressor": "zstd"})
    configs = {"stack": vary(parent, average={"kind": "ema", "ema_decay": 0.5}), "parent": parent}
    monkeypatch.setattr(effects, "LABELS", configs)
    monkeypatch.setattr(effects, "queue", lambda: [replace(c, seed=s) for s in SEEDS[:2] for c in configs.values()])
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    return configs


def test_a_second_call_takes_the_runs_that_are_missing(short, corpus, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(corpus), "--out", str(tmp_path / "out"), "--processes", "1"]
    file = tmp_path / "out" / effects.RESULTS
    effects.main([*argv, "--seconds", "0"])
    assert not file.read_bytes()

    effects.main(argv)
    lines = file.read_bytes().splitlines(keepends=True)
    rows = read_rows(file)
    assert [(row["label"], row["seed"]) for row in rows.values()] == [
        ("stack", 1), ("parent", 1), ("stack", 2), ("parent", 2)
    ]  # fmt: skip
    stack, parent, other, _ = rows.values()
    assert stack["loss"] == parent["loss"] != other["loss"]  # they differ in the average alone, which is at the end
    assert (
        stack["before"] != parent["before"]
        and stack["before"] != stack["bpb"]
        and parent["config"] == ["seed: 1337 -> 1"]
    )
    assert {"machine", "torch", "dtype", "seconds", "cpu_seconds", "dataset", "bytes"} <= stack.keys()

    file.write_bytes(lines[0] + lines[1] + lines[2][:40])
    taken = []
    monkeypatch.setattr(effects, "run_job", lambda configs, data: taken.extend(configs) or [rows[key(configs[0])]])
    effects.main(argv)
    assert [key(config) for config in taken] == list(rows)[2:] and read_rows(file) == rows
    assert "4 trainings" not in capsys.readouterr().out.split("2 trainings, 2 scores to go")[1]


def lines(config: RunConfig, label: str, scores: dict[int, float]) -> dict[str, dict]:
    common = {"label": label, "cpu_seconds": 60.0}
    return {
        key(replace(config, seed=s)): {**common, "seed": s, "bpb": x, "before": x - 0.01, "loss": 2 * x}
        for s, x in scores.items()
    }


def test_differences_are_paired_by_seed_and_judged():
    rows = lines(STACK, "stack", {1: 2.0, 2: 2.5, 3: 3.0, 4: 3.5})
    rows |= lines(PARENT, "parent", {1: 2.11, 2: 2.6, 3: 3.09, 5: 9.0})
    rows |= lines(WITHOUT["XSA"], "stack without XSA", {1: 1.9, 2: 2.41, 3: 2.9})
    rows |= lines(WITHOUT["recurrence"], "stack without recurrence", {1: 2.1, 2: 2.4, 3: 3.01})
    rows |= lines(WITHOUT["leaky²"], "stack without leaky²", {1: 2.1, 2: 2.6})
    diverged = replace(WITHOUT["MuonEq-R"], seed=1)
    rows[key(diverged)] = {"label": "stack without MuonEq-R", "seed": 1, "error": "step 3: the loss is not finite"}
    assert gains(rows, PARENT, "bpb") == pytest.approx([0.11, 0.1, 0.09])
    found = table(rows)
    assert "| whole stack | 3 | +0.1000 ± 0.0058 | gains | +0.1000 ± 0.0058 | +0.2000 ± 0.0115 | gains |" in found
    assert "| XSA | 3 | -0.0967 ± 0.0033 | loses |" in found
    assert "| recurrence | 3 | +0.0033 ± 0.0578 | not resolvable |" in found
    assert "| leaky² | 2 | +0.1000 ± 0.0000 | not resolvable |" in found
    assert "| stack | 4 | 2.7500 | 5.5000 | 60 |" in found and "| gated attention |" not in found
    assert "stack without MuonEq-R, seed 1: step 3: the loss is not finite" in found


def test_verdicts():
    assert verdict([0.1, 0.1]) == verdict([]) == verdict([0.0, 0.0, 0.0]) == "not resolvable"
    assert verdict([0.1, 0.1, 0.1]) == "gains" and verdict([-0.1, -0.1, -0.11]) == "loses"
    assert verdict([0.1, 0.0, 0.02]) == "not resolvable"
