"""Comparisons: against scipy.stats, against published numbers of several seeds, and as a user meets them."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from golfgpt import recipes
from golfgpt.cli import main
from golfgpt.compare import Criteria, compare, compare_target, one_sample, paired, welch
from golfgpt.config import BudgetConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig
from golfgpt.errors import InputError
from golfgpt.runs import Run, read_run, write_config
from golfgpt.score.config import SGDConfig, TTTConfig
from golfgpt.sweep.space import changes

A = {1: 3.10, 2: 3.13, 3: 3.08, 4: 3.11}
B = {1: 3.15, 2: 3.16, 3: 3.14, 4: 3.15}
CRITERIA = Criteria(margin=0.01, alpha=0.05, power=0.9)

# val_bpb by seed. R: the reference's recipes.md section 15; F: frontier_model.md section 2 (all from published logs).
R4B_QAT = {1337: 1.16356083, 1338: 1.16275343, 1339: 1.16337225}
R4B_NO_QAT = {1337: 1.16614760, 1338: 1.16531758, 1339: 1.16412094}
R3 = {1337: 1.15991107, 1338: 1.15583788, 1339: 1.15650724}
F1 = {1337: 1.12278, 42: 1.12360, 2024: 1.12357}
F3 = {1: 1.08554, 42: 1.08664, 1234: 1.08463, 1337: 1.08554, 2025: 1.08578}
F4 = {42: 1.08079, 314: 1.08103, 999: 1.08118}
F5 = {0: 1.07258, 1: 1.07325, 2: 1.07426}
F6 = {42: 1.05989, 0: 1.06125, 1234: 1.06209}
SP1024_BYTES = 2.435930
"""Bytes per token of the published validation text (recipes.md, sanity checks)."""


def values(side: dict[int, float]) -> list[float]:
    return list(side.values())


def test_welch_is_that_of_scipy():
    found = welch(A, {1: 3.15, 7: 3.16, 9: 3.14}, CRITERIA)
    b = [3.15, 3.16, 3.14]
    known = stats.ttest_ind(b, values(A), equal_var=False, alternative="greater")
    assert found.claims[0].p == pytest.approx(known.pvalue) and found.degrees_of_freedom == pytest.approx(known.df)
    beyond = stats.ttest_ind([x - 0.01 for x in b], values(A), equal_var=False, alternative="greater")
    assert found.claims[1].margin == 0.01 and found.claims[1].p == pytest.approx(beyond.pvalue)
    interval = stats.ttest_ind(b, values(A), equal_var=False).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx(tuple(interval))


def test_paired_and_one_sample_are_those_of_scipy():
    found = paired(A, dict(reversed(B.items())), CRITERIA)  # paired by seed, not by order
    known = stats.ttest_rel(values(B), values(A), alternative="greater")
    assert found.claims[0].p == pytest.approx(known.pvalue) and found.degrees_of_freedom == 3
    assert (found.low, found.high) == pytest.approx(
        tuple(stats.ttest_rel(values(B), values(A)).confidence_interval(0.9))
    )
    against = stats.ttest_1samp(values(A), 3.12, alternative="less")
    assert one_sample(A, 3.12, CRITERIA).claims[0].p == pytest.approx(against.pvalue)


@pytest.mark.parametrize("gain", [0.005, 0.02, 0.2])
@pytest.mark.parametrize("test", ["welch", "paired"])
def test_seeds_are_the_fewest_with_the_power(test, gain):
    a = {1: 3.00, 2: 3.02, 3: 2.99}
    b = {1: 3.00 + gain, 2: 3.05 + gain, 3: 2.96 + gain}
    found = (welch if test == "welch" else paired)(a, b, Criteria(margin=0))
    (claim,) = found.claims
    var_a, var_b = stats.tvar(values(a)), stats.tvar(values(b))
    gains = [b[seed] - a[seed] for seed in a]

    def power(n: int) -> float:
        if test == "welch":
            df = (n - 1) * (var_a + var_b) ** 2 / (var_a**2 + var_b**2)
            error = math.sqrt((var_a + var_b) / n)
        else:
            df, error = n - 1, math.sqrt(stats.tvar(gains) / n)
        return stats.nct.sf(stats.t.isf(0.01, df), df, found.gain / error)

    assert power(claim.seeds) >= 0.8
    assert claim.seeds == 2 or power(claim.seeds - 1) < 0.8


def test_the_interval_and_the_verdict_agree():
    for margin in (0.02, 0.03, 0.04, 0.05):
        found = welch(A, B, Criteria(margin=margin))
        assert found.claims[1].significant == (found.low > margin)


def test_no_number_of_seeds_shows_a_gain_below_the_margin():
    found = welch(A, B, Criteria(margin=0.1))
    assert found.claims[0].seeds and found.claims[1].seeds is None and not found.claims[1].significant
    assert welch(B, A).claims[0].seeds is None and welch(B, A).high < 0


def test_a_tiny_effect_needs_many_seeds():
    assert 10_000 < welch({1: 0.0, 2: 1.0}, {1: 0.001, 2: 1.001}, Criteria(margin=0)).claims[0].seeds < 10**8


@pytest.mark.parametrize("test", [welch, paired])
def test_without_a_spread_there_is_no_test(test):
    alone = test({1: 3.0}, {1: 3.1})
    assert alone.gain == pytest.approx(0.1) and not alone.claims and alone.low is None and "one seed" in alone.untested
    assert "no spread" in test({1: 3.0, 2: 3.0}, {1: 3.5, 2: 3.5}).untested


def test_paired_names_the_missing_seeds():
    with pytest.raises(InputError, match="seeds 3, 4 only in A and seed 9 only in B"):
        paired(A, {1: 3.1, 2: 3.1, 9: 3.1})


@pytest.mark.parametrize("wrong", [{"alpha": 0}, {"alpha": 0.5}, {"power": 1}, {"margin": -1}, {"margin": math.nan}])
def test_criteria_that_make_no_test(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Criteria(**wrong)


def test_published_means_and_deviations():
    """As the records and the reference state them."""
    for seeds, mean, sd in ((R4B_QAT, 1.16323, 0.00042), (R4B_NO_QAT, 1.16520, 0.00102), (R3, 1.15742, 0.0022)):
        side = compare_target(published(seeds), 3).a
        assert side.mean_bpb == pytest.approx(mean, abs=6e-6)
        assert side.sd_loss * bpb_per_nat() == pytest.approx(sd, rel=0.02)
    assert sum(F1.values()) / 3 == pytest.approx(1.1233, abs=5e-5)


def test_published_t_of_r4b():
    """Its record tests three seeds against the threshold 1.2194 and states t = 230.34."""
    found = one_sample(R4B_QAT, 1.2194)
    assert found.gain / found.standard_error == pytest.approx(230.34, abs=0.005)


def test_published_conversions():
    """val_loss and val_bpb of R1, R2 and R4 (recipes.md section 15), and 0.005 nats = 0.0030 bits per byte there.
    R0's are of other text: its 2.0727 nats would be 1.2276 bits per byte of theirs."""
    for nats, bpb in ((2.05221139, 1.21543588), (2.02251969, 1.19785009), (1.96369923, 1.16301431)):
        assert nats * bpb_per_nat() == pytest.approx(bpb, rel=1e-5)
    assert 2.07269931 * bpb_per_nat() == pytest.approx(1.22436570 + 0.0032, abs=1e-4)
    assert 0.005 * bpb_per_nat() == pytest.approx(0.0030, abs=5e-5)


def test_published_smallest_gap_of_three_seeds():
    """With SD 0.00068 (the median of 20 records) three seeds a side show a gap of 0.0021 bits per byte at p < 0.01."""
    spread = {1: -0.00068, 2: 0.0, 3: 0.00068}
    for gap, significant in ((0.00205, False), (0.0021, True)):
        found = welch(spread, {seed: value + gap for seed, value in spread.items()}, Criteria(margin=0))
        assert found.claims[0].significant == significant


@pytest.mark.parametrize(
    ("new", "old", "margin", "better", "record"),
    [
        (R4B_QAT, R4B_NO_QAT, 0.0030, False, False),  # p = 0.031: three seeds do not show a gain of QAT
        (F3, F1, 0.0030, True, True),
        (F4, F3, 0.0019, True, True),
        (F5, F4, 0.0019, True, True),
        (F6, F5, 0.0023, True, True),
    ],
    ids=["qat", "F3-F1", "F4-F3", "F5-F4", "F6-F5"],
)
def test_published_records(new, old, margin, better, record):
    """Margins: 0.005 nats in bits per byte of the newer record's tokenizer. All agree with scipy.stats."""
    found = welch(new, old, Criteria(margin=margin))
    known = stats.ttest_ind([x - margin for x in values(old)], values(new), equal_var=False, alternative="greater")
    assert found.claims[1].p == pytest.approx(known.pvalue)
    assert [claim.significant for claim in found.claims] == [better, record]


def test_track_3():
    """Sixteen seeds at 2,575 and 2,580 steps (modded-nanogpt, records/track_3_optimization, 2026-09-30)."""
    for mean, score, passed in ((3.27926000, 0.00296, False), (3.27896875, 0.004125, True)):
        found = compare_target(seeds_of(RunConfig(), {seed: mean + (seed - 7.5) / 1e4 for seed in range(16)}), 3.28)
        assert found.track3 == pytest.approx(score, abs=1e-8) and found.track3_passed == passed
        assert f"expected at least 0.004: {'passed' if passed else 'not passed'}" in str(found)


def bpb_per_nat() -> float:
    return compare_target(published(F1), 3).bpb_per_nat


def result(loss: float, **score) -> dict:
    tokens, nbytes = 1_000_000, round(1_000_000 * SP1024_BYTES)
    plain = {"val_loss": loss, "val_bpb": loss * tokens / nbytes / math.log(2), "tokens": tokens, "bytes": nbytes}
    plain |= {"label": "val_bpb", "window": 1024, "stride": 64, "document_aware": False, "partial": False}
    return {"score": plain | score, "dataset": "d1", "steps": 100, "adapted": None}


def seeds_of(config: RunConfig, losses: dict[int, float], name: str = "a", **score) -> list[Run]:
    return [
        Run(path=Path(f"{name}{seed}"), config=replace(config, seed=seed), env={}, result=result(loss, **score))
        for seed, loss in losses.items()
    ]


def published(bpb: dict[int, float]) -> list[Run]:
    return seeds_of(RunConfig(), {seed: value * SP1024_BYTES * math.log(2) for seed, value in bpb.items()})


OTHER = RunConfig(optim=OptimConfig(matrix_lr=0.02))


def test_same_seeds_and_models_are_paired():
    found = compare(seeds_of(RunConfig(), A), seeds_of(OTHER, B, "b"))
    assert found.difference == paired(A, B) and found.welch == welch(A, B)
    assert found.changes == ("optim.matrix_lr: 0.04 -> 0.02",)
    assert "\n\nA is better than B\n" in str(found)
    assert "the mean of A is 0.04500 nats/token, 0.02665 bits per byte lower than B" in str(found)
    assert "significant at p < 0.01 (p = 0.003, paired, 3 degrees of freedom)" in str(found)
    for seed in A:
        assert f"a{seed} " in str(found) and f"b{seed} " in str(found)


def test_other_seeds_or_models_are_not_paired():
    wider = RunConfig(model=ModelConfig(mlp_hidden=1040))
    found = compare(seeds_of(RunConfig(), A), seeds_of(wider, B, "b"))
    assert found.difference == welch(A, B) and found.welch is None and "model.mlp_hidden differ" in found.pairing
    forced = compare(seeds_of(RunConfig(), A), seeds_of(wider, B, "b"), test="paired")
    assert forced.difference == paired(A, B)
    fewer = {seed: B[seed] for seed in (1, 2, 3)}
    found = compare(seeds_of(RunConfig(), A), seeds_of(OTHER, fewer, "b"))
    assert found.difference == welch(A, fewer) and "seed 4 only in A" in str(found)
    assert compare(seeds_of(RunConfig(), A), seeds_of(OTHER, B, "b"), test="welch").difference == welch(A, B)


def test_what_is_not_significant_is_said_in_words():
    near = {seed: value + 0.02 for seed, value in A.items()}
    found = str(compare(seeds_of(RunConfig(), A), seeds_of(OTHER, near, "b"), test="welch"))
    assert "\n\nit is not shown that A is better or worse than B\n" in found and "\nA is better" not in found
    assert "better at all: not significant at p < 0.01 (p = 0.11, welch" in found
    assert "for a power of 0.8 at this gain and spread: 24 seeds per side, 20 more of A and 20 more of B" in found
    worse = str(compare(seeds_of(OTHER, B, "b"), seeds_of(RunConfig(), A)))
    assert "\n\nA is worse than B: the interval of the gain is below 0\n" in worse
    assert "more seeds like these would not show it" in worse
    alone = str(compare(seeds_of(RunConfig(), {1: 3.0}), seeds_of(OTHER, {1: 3.1}, "b")))
    assert "\n\nno test, so not known whether A is better or worse than B: one seed shows no spread" in alone
    assert "train at least two per side" in alone and "paired by seed" not in alone
    target = str(compare_target(seeds_of(RunConfig(), {1: 3.0}), 3.1))
    assert "train at least two\n" in target and "per side" not in target
    assert "per side" not in str(compare_target(seeds_of(RunConfig(), A), 3.13))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 5}, "other validation data: tokens is 1000000 and 5"),
        ({"dataset": "d2"}, "other validation data: dataset is 'd1' and 'd2'"),
        ({"stride": 128}, "other rules of scoring: stride is 64 and 128"),
        ({"label": "val_bpb (first 5 tokens)", "partial": True}, "other parts of the validation text: label"),
        ({"val_loss": math.nan}, "score's val_loss as nan; expected a finite number above 0"),
        ({"bytes": None}, "score's bytes as None; expected a finite number"),
    ],
)
def test_other_validation_data_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        compare(seeds_of(RunConfig(), A), seeds_of(OTHER, B, "b", **change))
    mixed = seeds_of(RunConfig(), A)
    mixed[2] = seeds_of(RunConfig(), {3: 3.1}, **change)[0]
    with pytest.raises(InputError, match=message):
        compare(mixed, seeds_of(OTHER, B, "b"))


def test_a_side_is_one_configuration():
    a, b = seeds_of(RunConfig(), A), seeds_of(OTHER, B, "b")
    with pytest.raises(InputError, match=r"got several: optim\.matrix_lr is 0\.04 in a1 and 0\.02 in b2$"):
        compare([a[0], b[1]], [b[0]])
    with pytest.raises(InputError, match="a1 and again1 both have seed 1"):
        compare([*a, *seeds_of(RunConfig(), {1: 3.2}, "again")], b)
    with pytest.raises(InputError, match="a1 is on both sides"):
        compare(a, [a[0], b[1]])
    elsewhere = RunConfig(
        runtime=RuntimeConfig(threads=3), budget=BudgetConfig(code_bytes=1), eval=EvalConfig(batch_tokens=2048)
    )
    moved = [*a[:3], *seeds_of(elsewhere, {4: 3.11})]
    found = compare(moved, b)
    assert found.difference == paired(A, B)
    assert "the runs of A also differ in eval.batch_tokens, runtime.threads" in str(found)  # code_bytes was measured


def test_adapted_scores():
    a, b = seeds_of(RunConfig(), A), seeds_of(OTHER, B, "b")
    with pytest.raises(InputError, match=r"a1 has no adapted score; make it with golfgpt eval a1 --eval\.ttt\.kind"):
        compare(a, b, kind="adapted")
    for run, kind in [(run, "sgd") for run in a] + [(run, "lora") for run in b]:
        label = {"label": f"val_bpb (adapted: {kind})", "settings": {"kind": kind}, "dataset": "d1"}
        run.result["adapted"] = run.result["score"] | label | {"val_loss": run.result["score"]["val_loss"] - 0.1}
    found = compare(a, b, kind="adapted")
    assert found.difference.gain == pytest.approx(0.045) and found.a.mean_loss == pytest.approx(3.005)
    assert found.label == "val_bpb (adapted: sgd) | val_bpb (adapted: lora)"
    a[1].result["adapted"]["settings"] = {"kind": "sgd", "epochs": 9}
    with pytest.raises(InputError, match="other rules of scoring: settings"):
        compare(a, b, kind="adapted")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Runs a1 to a4 and b1 to b4 of two configurations, in runs/."""
    monkeypatch.chdir(tmp_path)
    for run in [*seeds_of(RunConfig(), A), *seeds_of(OTHER, B, "b")]:
        path = Path("runs") / run.path
        path.mkdir(parents=True)
        write_config(path, run.config)
        (path / "result.json").write_text(json.dumps(run.result))
    return tmp_path


def sides(a: str, b: str) -> list[str]:
    return [*(f"runs/a{seed}" for seed in a), "--against", *(f"runs/b{seed}" for seed in b)]


def test_command(folders, capsys):
    assert main(["compare", *sides("1234", "1234"), "--margin-nats", "0.01", "--target-nats", "3.28"]) == 0
    out = capsys.readouterr().out
    assert "better by more than 0.01 nats/token: significant at p < 0.01" in out
    assert "track 3: (3.28 - 3.10500) * sqrt(4) = 0.35000, expected at least 0.004: passed" in out
    assert "is not in the comparison" not in out
    assert main(["compare", *sides("1234", "1234"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["difference"]["claims"][1]["margin"] == 0.005 and found["a"]["seeds"][0]["run"] == "runs/a1"


def test_left_out_seeds_are_named(folders, capsys):
    (folders / "runs/a3/result.json").unlink()
    assert main(["compare", *sides("14", "1234")]) == 0
    out = capsys.readouterr().out
    assert "runs/a2 (seed 2, finished) has the configuration of A too, and is not in the comparison" in out
    assert "runs/a3 (seed 3, stopped) has the configuration of A too" in out
    assert "b1 (seed" not in out


def test_steps_that_differ_are_named(folders, capsys):
    for seed, steps in (("1", 140), ("2", 100)):
        file = folders / f"runs/a{seed}/result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": steps}))
    command = ["compare", "runs/a1", "runs/a2", "--against", "runs/b1", "runs/b2"]
    for seed, steps, noted in (("1", 149, False), ("1", 151, True)):
        for each in ("1", "2"):
            file = folders / f"runs/b{each}/result.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": steps if each == seed else 120}))
        assert main(command) == 0
        assert (f"the runs took 100 to {steps} steps" in capsys.readouterr().out) == noted


def test_two_sides_of_one_configuration(folders, capsys):
    assert main(["compare", "runs/a1", "runs/a4", "--against", "runs/a2"]) == 0
    out = capsys.readouterr().out
    assert "A and B have the same configuration" in out and "one more of" not in out
    assert out.count("is not in the comparison") == 1 and "runs/a3 (seed 3, finished)" in out


def test_one_seed_names_the_command_that_trains_another(folders, capsys):
    for name in ("a2", "a3", "a4", "b1", "b3", "b4"):
        (folders / f"runs/{name}/config.json").unlink()
    command = ["golfgpt", "train", "--recipe", "baseline", "--seed=1", "--name", "x", "--data.path", "my data"]
    command += ["--eval.max-tokens", "2000"]  # of a run that was scored again, on the whole text
    for name in ("a1", "b2"):
        (folders / f"runs/{name}/env.json").write_text(json.dumps({"command": command}))
    (folders / "runs/b2").rename(folders / "runs/b-s2")
    assert main(["compare", "runs/a1", "--against", "runs/b-s2"]) == 0
    out, start = capsys.readouterr().out, "golfgpt train --recipe baseline --data.path 'my data'"
    assert f"  one more of A: {start} --seed 2 --name a1-s2\n  one more of B: {start} --seed 1 --name b-s1\n" in out
    (folders / "runs/b-s1").mkdir()
    (folders / "runs/a1/env.json").write_text(json.dumps({"command": command, "world_size": 8}))
    assert main(["compare", "runs/a1", "--against", "runs/b-s2"]) == 0
    out = capsys.readouterr().out
    assert "one more of B" not in out and "A: torchrun --standalone --nproc-per-node 8 -m golfgpt train" in out


def test_the_command_of_one_more_seed_is_one_that_train_takes(folders, capsys, monkeypatch):
    """Also of a run whose test-time training was switched off, with what only that kind reads left in its config."""
    for name in ("a2", "a3", "a4", "b1", "b2", "b3", "b4"):
        (folders / f"runs/{name}/config.json").unlink()
    command = ["golfgpt", "train", "--recipe", "small", "--eval.ttt.kind", "sgd", "--eval.ttt.sgd.lr", "0.1"]
    command += ["--eval.batch-tokens", "2048", "--name", "a1"]
    (folders / "runs/a1/env.json").write_text(json.dumps({"command": command}))
    small, asked = recipes.get("small").config, []
    monkeypatch.setattr("golfgpt.cli.train._train", lambda config, path, **options: asked.append(config) or 0)
    for kind, rules in (("off", {"eval.ttt.kind": "off"}), ("sgd", {"eval.ttt.kind": "sgd", "eval.ttt.sgd.lr": 0.1})):
        evaluation = EvalConfig(batch_tokens=2048, stride=64, ttt=TTTConfig(kind=kind, sgd=SGDConfig(lr=0.1)))
        write_config(folders / "runs/a1", replace(small, seed=1, eval=evaluation))
        assert main(["compare", "runs/a1", "--target-nats", "3.28"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "one more of A: " in line]
        assert main(shlex.split(line.partition("golfgpt ")[2])) == 0, capsys.readouterr().err
        wanted = {"eval.batch_tokens": 2048, "eval.stride": 64} | {n: v for n, v in rules.items() if v != "off"}
        assert changes(small, replace(asked.pop(), seed=small.seed)) == wanted


def test_other_rules_of_scoring_have_a_way_out():
    (a,), (b,) = seeds_of(RunConfig(), {1: 3.0}), seeds_of(replace(OTHER, eval=EvalConfig(window=512)), {1: 3.0}, "b")
    b.result["score"]["window"] = 512
    with pytest.raises(InputError, match=r"golfgpt train --resume b1 --eval.window=1024 --eval.stride=1024 \("):
        compare([a], [b])
    with pytest.raises(InputError, match=r"golfgpt train --resume a1 --eval.window=512 --eval.stride=512 \("):
        compare([b], [a])
    part = seeds_of(replace(OTHER, eval=EvalConfig(max_tokens=5)), {1: 3.0}, "b", tokens=5, partial=True)
    for sides in (([a], part), (part, [a])):
        with pytest.raises(InputError, match=r"parts of .*: golfgpt train --resume b1 --eval.max-tokens=None \("):
            compare(*sides)


def test_command_refuses(folders, capsys):
    (folders / "runs/a3/result.json").unlink()
    for argv, message in (
        (sides("123", "1234"), "runs/a3 has no result.json: golfgpt train --resume runs/a3 continues it"),
        ([*sides("12", "1234"), "--test", "paired"], "seeds 3, 4 only in B: train it"),
        (["runs/a1"], "--against RUN"),
        ([*sides("12", "12"), "--alpha", "2"], "alpha is 2.0"),
        (["runs/a1", "--target-nats", "-1"], "the target is -1.0"),
        (["runs/none", "--target-nats", "3"], "runs/none holds no run"),
        (["runs/a1/result.json", "--target-nats", "3"], "runs/a1/result.json holds no run"),
    ):
        assert main(["compare", *argv]) == 3
        assert message in capsys.readouterr().err
    assert read_run(Path("runs/a3")).result is None
