"""The experiments' list, keys, runner and report; no training longer than eight steps."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bench import experiments
from bench.experiment_report import judged, noise, report, variances
from bench.experiment_table import (
    BASE,
    EXPERIMENTS,
    NO_BIGRAM_HIDDEN,
    PARTS,
    SEEDS,
    Claim,
    Experiment,
    key,
    trained,
    vary,
)
from bench.experiments import jobs, read_rows, run
from experiments.soak import slope, whole_lines
from golfgpt.config import RunConfig
from golfgpt.quant.budget import forecast_bytes
from golfgpt.quant.quantizer import Quantizer
from golfgpt.train.train import train


def row(config: RunConfig, **fields) -> dict:
    """A line of results, as a job writes it."""
    facts = dict.fromkeys(("dtype", "machine", "golfgpt", "torch", "python", "sources", "date"), "some")
    common = {"training": key(trained(config)), "parameters": 5, "train_cpu_seconds": 3600.0, "dataset": "d" * 64}
    return {"key": key(config), "seed": config.seed, "config": [], **facts, **common, **fields}


def by_key(*rows: dict) -> dict[str, dict]:
    return {row["key"]: row for row in rows}


def test_list_is_well_formed():
    assert len({experiment.name for experiment in EXPERIMENTS}) == len(EXPERIMENTS)
    for experiment in EXPERIMENTS:
        assert 1 <= experiment.seeds <= len(SEEDS)
        assert len({key(config) for config in experiment.configs.values()}) == len(experiment.configs)
        for config in experiment.configs.values():
            assert config.seed == SEEDS[0] and config.schedule.max_seconds is None
        for claim in experiment.claims:
            assert {claim.better, claim.worse} <= experiment.configs.keys() and claim.better != claim.worse
            assert claim.metric in ("bpb", "before", "penalty") and (not claim.source or claim.source.startswith("§"))


def test_variants_of_other_formats_are_forecast_at_equal_bytes():
    sizes = {label: forecast_bytes(Quantizer(config.model, config.quant)) for label, config in PARTS.items()}
    width = vary(BASE, model={"mlp_hidden": BASE.model.mlp_hidden + 16})
    step = forecast_bytes(Quantizer(width.model, width.quant)) - sizes["all parts"]
    assert {label for label, size in sizes.items() if abs(size - sizes["all parts"]) > step / 2} == set()
    assert PARTS["int5 MLP, wider"].model.mlp_hidden > BASE.model.mlp_hidden < NO_BIGRAM_HIDDEN


def test_keys_depend_on_what_differs_from_the_defaults_and_not_on_the_data_folder():
    assert key(RunConfig()) == "e3b0c44298fc1c14"  # SHA-256 of nothing
    assert key(RunConfig(seed=7)) == "4dff4c6be86e579e"
    assert key(vary(BASE, data={"path": "elsewhere"})) == key(BASE) != key(replace(BASE, seed=1))


def test_configs_of_one_training_share_it():
    plain = vary(BASE, quant={"qat": "off"})
    same = (
        vary(plain, quant={"bits": 5, "rules": ()}),
        vary(plain, average={"kind": "none"}),
        vary(plain, eval={"window": 1024}, model={"rope_reference_len": 256}),
    )
    other = (
        vary(plain, model={"rope_reference_len": 128}),
        vary(plain, quant={"qat": "r5"}),
        vary(plain, optim={"grad_clip_norm": 1.0}),
        replace(plain, seed=1),
    )
    assert {key(trained(config)) for config in same} == {key(trained(plain))}
    assert key(trained(plain)) not in {key(trained(config)) for config in other}
    assert key(trained(vary(BASE, quant={"bits": 5}))) != key(trained(BASE))  # QAT sees the grid


def test_jobs_hold_every_config_once_and_third_seeds_come_last():
    everything = [config for job in jobs(EXPERIMENTS) for config in job]
    assert len({key(config) for config in everything}) == len(everything)
    wanted = {
        key(replace(config, seed=seed))
        for experiment in EXPERIMENTS
        for seed in SEEDS[: experiment.seeds]
        for config in experiment.configs.values()
    }
    assert {key(config) for config in everything} == wanted
    third = [job[0].seed == SEEDS[2] for job in jobs(EXPERIMENTS)]
    assert third == sorted(third) and True in third
    assert all(len({key(trained(config)) for config in job}) == 1 for job in jobs(EXPERIMENTS))


def test_a_job_scores_what_a_run_scores_and_is_not_run_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "BASE", tiny)  # "before" is for its evaluation
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    swa = {"kind": "swa", "swa_start_lr": 0.9, "swa_every": 1}
    configs = {"a": tiny, "b": vary(tiny, average=swa), "c": vary(tiny, quant={"bits": 4})}
    chosen, file = (Experiment("e", "?", configs),), tmp_path / "rows.jsonl"
    run(chosen, tiny.data.path, file, 1, 1000.0)
    rows = read_rows(file)
    assert len(rows) == 3 and len({row["training"] for row in rows.values()}) == 1
    for label in ("a", "b"):
        result, found = train(configs[label], tmp_path / label), rows[key(configs[label])]
        assert (found["bpb"], found["bytes"]) == (result["score"]["val_bpb"], result["artifact_bytes"])
    a, b, c = (rows[key(configs[label])] for label in "abc")
    assert a["before"] == c["before"] != b["before"] and c["bpb"] > a["bpb"] and c["bytes"] < a["bytes"]
    assert (a["averaged"], b["averaged"]) == (0, 2)

    file.write_bytes(file.read_bytes() + b'{"key": "to')
    monkeypatch.setattr(experiments, "run_job", lambda configs, data: pytest.fail("ran a finished job again"))
    run(chosen, tiny.data.path, file, 1, 1000.0)
    assert read_rows(file) == rows


def test_results_of_other_data_are_refused(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(tiny)) + "\n")
    with pytest.raises(SystemExit, match="other data"):
        run((), tiny.data.path, tmp_path / "rows.jsonl", 1, 1.0)
    with pytest.raises(ValueError, match="several data sets"):
        report(by_key(row(BASE), row(PARTS["QAT off"], dataset="e" * 64)))


def hand_made() -> dict[str, dict]:
    """Three seeds: without QAT 0.1 worse, on R4's grid 0.2 better, without an average 0.003, 0.001 and 0.002 worse."""
    rows = []
    for i, seed in enumerate(SEEDS):
        base = 2.0 + i
        for label, bpb in (
            ("all parts", base),
            ("QAT off", base + 0.1 + 0.001 * i),
            ("uniform init", base + 0.001 * (i - 1)),
            ("QAT on R4's grid", base - 0.2 - 0.001 * i),
            ("average off", base + (0.003, 0.001, 0.002)[i]),
        ):
            rows.append(row(replace(PARTS[label], seed=seed), bpb=bpb, before=bpb - 0.01, bytes=900_000 + i))
    rows.append(row(replace(PARTS["phase resid_mix"], seed=SEEDS[0]), error="step 3: the loss (nan) is not finite"))
    return by_key(*rows)


def test_verdicts():
    rows, parts = hand_made(), EXPERIMENTS[0]
    assert variances(rows, "bpb", shared=False) == pytest.approx([1e-6, 1e-6, 1e-6])
    assert noise(rows, "bpb", True) == noise(rows, "bpb", True, [0.0, 0.0]) == pytest.approx(0.001)
    assert noise(rows, "bpb", True, [0.0, 2.0]) == pytest.approx(2**0.5)

    def verdict(worse: str, better: str = "all parts", metric: str = "bpb", source: str = "") -> str:
        return judged(rows, parts, Claim(better, worse, source, metric))[1]

    assert verdict("QAT off", source="§15") == "published direction appears"
    assert verdict("all parts", "QAT off", source="§15") == "published direction does not appear, the opposite does"
    assert verdict("QAT on R4's grid") == "no, the opposite"
    assert verdict("uniform init") == "not resolvable at this scale"
    assert verdict("average off") == "yes"
    assert verdict("SmearGate off") == verdict("phase resid_mix") == "not run"
    one_seed = {name: line for name, line in rows.items() if line["seed"] == SEEDS[0]}
    assert judged(one_seed, parts, Claim("all parts", "QAT off"))[1] == "not judged: no estimate of the noise"


def test_report_renders_from_lines_alone():
    text = report(hand_made())
    assert "| all parts | 3 | 2.9900 ± 1.0000 | 3.0000 ± 1.0000 | +0.0100 ± 0.0000 | – | 900,001 |" in text
    assert "| QAT off | 3 | 3.0910 ± 1.0010 | 3.1010 ± 1.0010 | +0.0100 ± 0.0000 | +0.1010 ± 0.0010 | 900,001 |" in text
    assert "Not run: " in text and "| SmearGate off |" not in text
    assert "the loss (nan) is not finite" in text
    assert "5 trainings" not in text and "16 scores" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables) and len({line.count("|") for line in tables}) == 2


def test_soak_reads_whole_lines_and_finds_a_slope(tmp_path):
    """A line that is still being written once ended a soak."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"one\ntw")
    with open(file, "rb") as lines:
        assert list(whole_lines(lines)) == [b"one\n"]
        file.write_bytes(b"one\ntwo\n")
        assert list(whole_lines(lines)) == [b"two\n"]
    found = slope([(t, 5 + 3 * t / 3600) for t in range(600, 6000, 10)])
    assert found.per_hour == pytest.approx(3, rel=0.01) and found.error < 0.02
