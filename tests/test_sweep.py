"""Sweeps and tries: the space, the study, killed processes, decisions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tyro

from golfgpt import recipes
from golfgpt.cli import main
from golfgpt.cli.sweep import Change
from golfgpt.config import RunConfig
from golfgpt.errors import InputError, Interrupted
from golfgpt.runs import read_run
from golfgpt.sweep import children, decide, space
from golfgpt.sweep.children import Children, Outcome

ROOT = Path(__file__).parent.parent
BASELINE = recipes.get("baseline").config


# ---- the space


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_flags_lead_from_one_config_to_another(name):
    config = replace(recipes.get(name).config, seed=7)
    options = space.flags(space.changes(BASELINE, config))
    assert tyro.cli(Change, args=options, default=Change(config=BASELINE)).config == config


def spec(**values) -> space.Spec:
    values = {
        "recipe": "demo",
        "config": recipes.get("demo").config,
        "space": {"optim.matrix_lr": (0.02, 0.03)},
    } | values
    return space.Spec(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {}}, "the space is empty"),
        ({"space": {"optim.matrix_lr": ()}}, "optim.matrix_lr has no values"),
        ({"space": {"optim.matrx_lr": (1.0,)}}, "did you mean optim.matrix_lr?"),
        ({"space": {"optim.lr": (1.0,)}}, "did you mean optim.matrix_lr or optim.scalar_lr or optim.tied_embed_lr?"),
        ({"space": {"optimm.matrix_lr": (1.0,)}}, "did you mean optim?"),
        ({"space": {"seed.x": (1,)}}, "seed is a field, not a section"),
        ({"space": {"seed": (1, 2)}}, "use seeds"),
        ({"space": {"optim.matrix_lr": (0.02, -1.0)}}, r"expected >= 0 \(in optim.matrix_lr=-1.0\)"),
        ({"space": {"model.num_layers": ("two",)}}, "model.num_layers = 'two', expected a whole number"),
        ({"space": {"model.num_layers": (2, 2)}}, "a value twice"),
        ({"space": {"optim.matrix_lr": space.Range(low=1, high=2)}}, "sampler grid expected a list"),
        ({"space": {"optim.matrix_lr": space.Range(low=2, high=1)}, "sampler": "tpe", "trials": 2}, "low < high"),
        ({"space": {"optim.x": space.Range(low=1, high=2)}, "sampler": "random", "trials": 2}, "unknown key optim.x"),
        ({"trials": 3}, "drop trials"),
        ({"sampler": "random"}, "give the number of points"),
        ({"seeds": 0}, "seeds is 0; expected at least 1"),
    ],
)
def test_bad_specs(values, message):
    with pytest.raises(InputError, match=message):
        spec(**values)


def test_values_that_fit_only_together():
    """A grid is checked point by point: neither value of the first pair is valid alone."""
    both = {"schedule.max_seconds": (None,), "schedule.reserve_seconds": (0.0, 5.0)}
    with pytest.raises(InputError, match=r"schedule.reserve_seconds is 5"):
        spec(space=both)
    assert len(spec(space={"model.num_heads": (6,), "model.num_kv_heads": (3, 6)}).points) == 2


def test_grid_of_the_command_line():
    grid = space.parse_grid(["optim.matrix-lr=0.02,3e-2", "model.tie_embeddings=true,false", "quant.compressor=zstd"])
    assert grid == {
        "optim.matrix_lr": (0.02, 0.03), "model.tie_embeddings": (True, False), "quant.compressor": ("zstd",)
    }  # fmt: skip
    with pytest.raises(InputError, match=r"expected section.field=value"):
        space.parse_grid(["optim.matrix_lr"])


def test_spec_file(tmp_path):
    file = tmp_path / "lr.toml"
    file.write_text(
        'recipe = "demo"\nseeds = 2\n[fixed]\ndata.path = "x"\n[space]\nmodel.xsa_layers = [[0], [0, 1]]\n'
        "optim.matrix_lr = {low = 0.01, high = 0.1, log = true}\n"
    )
    read = space.read_spec(file)
    assert (read.values, read.fixed) == ({"recipe": "demo", "seeds": 2}, {"data.path": "x"})
    lr = space.Range(low=0.01, high=0.1, log=True)
    assert read.space == {"model.xsa_layers": ([0], [0, 1]), "optim.matrix_lr": lr}
    assert spec(space=read.space, sampler="tpe", trials=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = ", "Invalid value"),
        ('recipe = "demo"\nsedes = 2', "unknown key sedes; did you mean seeds?"),
        ('recipe = "demo"\nseeds = "2"', "seeds = '2', expected a whole number"),
        ('recipe = "demo"\n[space]\noptim.matrix_lr = 3', "expected a list of values"),
        ('recipe = "demo"\n[space]\noptim.matrix_lr = {low = 1, hihg = 3}', "expected low, high"),
        ('recipe = "demo"\n[fixed]\noptim.matrix_lx = 3', "unknown key optim.matrix_lx; did you mean"),
        ('recipe = "dem"\n[space]\noptim.matrix_lr = [3]', "unknown recipe 'dem'; did you mean demo?"),
        ("[space]\noptim.matrix_lr = [3]", "expected a recipe"),
        ('recipe = "demo"', "the space is empty"),
    ],
)
def test_bad_spec_files(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(text)
    assert main(["sweep", "s.toml"]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---- decisions


def keeps(differences: np.ndarray) -> np.ndarray:
    """How `decide` would decide on each row, at all looks at once."""
    kept, alive = np.zeros(len(differences), bool), np.ones(len(differences), bool)
    for n, look in zip(decide.LOOKS, decide.under_null(decide.LOOKS), strict=True):
        mean, error = differences[:, :n].mean(1), differences[:, :n].std(1, ddof=1) / n**0.5
        kept |= alive & (mean >= look.bound * error)
        alive &= ~kept & (mean > 0)
    return kept


@pytest.mark.parametrize("noise", [1e-4, 0.0032, 0.2])
def test_at_most_five_percent_of_nulls_are_kept(noise):
    """1,000 changes without an effect, scored with the measured noise over seeds (docs/sweeps.md), a smaller and a
    larger one."""
    scores = np.random.default_rng(1).normal(2.7, noise, (2, 1000, decide.LOOKS[-1]))
    decisions = [until_decided(row) for row in scores[0] - scores[1]]
    assert sum(test.verdict == "keep" for test in decisions) <= 50
    assert {test.verdict for test in decisions} == {"keep", "discard"}


def until_decided(differences: np.ndarray) -> decide.Decision:
    for n in decide.LOOKS:
        test = decide.decide(differences[:n].tolist())
        if test.verdict != "continue":
            break
    return test


def test_at_most_five_percent_with_noise_that_is_not_normal():
    draw = np.random.default_rng(2)
    shape = (2, 40_000, decide.LOOKS[-1])
    for scores in (
        draw.exponential(size=shape),
        draw.standard_t(3, shape),
        draw.random(shape),
        draw.normal(size=shape),
    ):
        assert keeps(scores[0] - scores[1]).mean() < 0.05
    assert keeps(draw.random(shape[1:]) - 0.5).mean() < 0.05


def test_bounds_spend_what_they_should():
    x = np.random.default_rng(3).standard_normal((200_000, decide.LOOKS[-1]))
    without_discards = np.zeros(len(x), bool)
    for n, look in zip(decide.LOOKS, decide.under_null(decide.LOOKS), strict=True):
        without_discards |= x[:, :n].mean(1) >= look.bound * x[:, :n].std(1, ddof=1) / n**0.5
    assert abs(without_discards.mean() - decide.ALPHA) < 0.002


def test_decisions():
    better = decide.decide([0.010, 0.011, 0.012])
    assert better.verdict == "keep" and better.low > 0 and better.confidence > 1 - decide.ALPHA
    assert decide.decide([0.010, 0.000, 0.012]).verdict == "continue"
    worse = decide.decide([-0.010, 0.000, -0.012])
    assert worse.verdict == "discard" and worse.confidence < 0.5
    same = decide.decide([0.0] * 3)
    assert same.verdict == "discard"
    last = decide.decide([0.010, -0.008, 0.012, -0.009, 0.01, -0.01, 0.02, 0.0])
    assert last.verdict == "discard" and last.low < 0 < last.mean
    with pytest.raises(ValueError, match="4 differences; expected the seeds of a look, 3, 5, 8"):
        decide.decide([0.1] * 4)
    with pytest.raises(ValueError, match="from 2 on"):
        decide.under_null((1, 2))


# ---- the study, with runs that end as told


def outcome(score: float, code: int = 0, total: int = 1000, train: float = 1.0) -> Outcome:
    result = {
        "score": {"val_bpb": score}, "adapted": None, "total_bytes": total, "seconds": {"train": train}, "steps": 8
    }  # fmt: skip
    return Outcome(code=code, result=result, message="", wall=2.0)


class Scripted(Children):
    """Trains nothing: `end(config)` is the score or the outcome of a run, `probes(config)` the scores on its way."""

    def __init__(self, end, probes=lambda config: ()):
        super().__init__()
        self.end, self.probes, self.trained = end, probes, []

    def train(self, path, recipe, config, give_up=bool):
        self.trained.append(path.name)
        path.mkdir(parents=True, exist_ok=True)
        for step, score in enumerate(self.probes(config), 1):
            with open(path / "metrics.jsonl", "a") as out:
                row = {"kind": "val", "step": step, "val_bpb": score, "probe_bpb": None}
                out.write(json.dumps(row) + "\n")
            if give_up():
                return None
        end = self.end(config)
        return end if isinstance(end, Outcome) else outcome(end)


def lr(config: RunConfig) -> float:
    return config.optim.matrix_lr


def run_sweep(folder: Path, of: space.Spec, end, probes=lambda config: (), jobs: int = 1):
    pytest.importorskip("optuna")
    from golfgpt.sweep.run import sweep
    from golfgpt.sweep.study import Study

    study, scripted = Study(folder, of), Scripted(end, probes)
    rows = sweep(study, jobs, scripted, lambda text: None)
    return rows, study, scripted.trained


GRID = {"optim.matrix_lr": (0.1, 0.3, 0.2)}


def test_sweep_trains_every_point_once(tmp_path):
    rows, study, _ = run_sweep(tmp_path, spec(space=GRID, seeds=2), lambda c: lr(c) + (c.seed - 1337) / 100)
    assert [(row.number, row.values, row.state) for row in rows] == [
        (0, {"optim.matrix_lr": 0.1}, "complete"),
        (1, {"optim.matrix_lr": 0.3}, "complete"),
        (2, {"optim.matrix_lr": 0.2}, "pruned"),  # after one seed, 0.1 worse than the best; the floor is 0.03
    ]
    assert rows[0].scores == {"1337": 0.1, "1338": pytest.approx(0.11)} and study.best.number == 0
    assert run_sweep(tmp_path, spec(space=GRID, seeds=2), lr)[2] == []


def test_scores_of_a_part_of_the_text_are_labelled(tmp_path):
    """In the table of a sweep, and wherever a try prints or stores scores."""
    from golfgpt.cli.sweep import _table
    from golfgpt.sweep import attempt

    def partial(config):
        end = outcome(noisy(config))
        end.result["score"]["label"] = "val_bpb (first 9 tokens)"
        return end

    rows, study, _ = run_sweep(tmp_path / "sweep", spec(space=GRID), partial)
    assert "val_bpb (first 9 tokens)" in _table(rows, study.noise).splitlines()[0]
    result, _ = try_change(tmp_path / "try", partial)
    assert attempt.summary(result).endswith("\nthe scores are val_bpb (first 9 tokens)")
    assert attempt.line(result)[-1] == attempt.as_json(result)["score"] == "val_bpb (first 9 tokens)"


def test_an_estimate_says_what_trains_the_runs():
    from golfgpt.cli.sweep import _estimate_table
    from golfgpt.sweep.run import Estimate

    cost = Estimate(runs=6, seconds_per_run=600.0, hours=0.5, source="2 finished runs")
    assert _estimate_table(Path("runs/lr"), cost, 2).splitlines() == [
        "estimate",
        "folder         runs/lr",
        "runs to train  6, 2 at once",
        "each           600.0 s, estimated from 2 finished runs",
        "all            30 minutes",
        "nothing was started; the same command without --dry-run trains them",
    ]


def test_a_dry_run_leaves_no_run(tmp_path):
    pytest.importorskip("optuna")
    from golfgpt.sweep.run import estimate

    def killed(config):
        raise Interrupted("stopped", signal.SIGTERM)

    for end in (killed, lambda config: 1.0):
        folder = tmp_path / "sweep"
        (folder / ".dry-run").mkdir(parents=True)  # as kill -9 leaves it
        (folder / ".dry-run.log").touch()
        scripted = Scripted(end)
        scripted.signum = signal.SIGTERM if end is killed else 0
        try:
            assert estimate(folder, spec(), 1, scripted, None).runs == 2
        except Interrupted as error:
            assert str(error) == "stopped by SIGTERM; nothing was started, and the run that was timed is deleted"
        assert scripted.trained == [".dry-run"] and not folder.exists()


def test_the_table_has_the_steps_and_the_end_has_the_next_command(tmp_path):
    from golfgpt.cli.sweep import _next, _table

    def end(config):
        found = outcome(lr(config))
        found.result["steps"] = 15 if config.seed == 1337 else 1
        return found

    of = spec(space={"optim.matrix_lr": (0.3, 0.1)}, seeds=2)
    rows, study, _ = run_sweep(tmp_path, of, end)
    assert "  1 to 15  " in _table(rows, study.noise)
    a, b = (f"{tmp_path}/000{i}-s1337 {tmp_path}/000{i}-s1338" for i in (1, 0))
    assert _next(of, rows) == [
        f"best: trial 1, {a}",
        f"next, whether it is better than trial 0: golfgpt compare {a} --against {b}",
    ]
    assert len(_next(of, rows[:1])) == 1 and not _next(of, [])
    assert "--seeds 3" in _next(spec(space={"optim.matrix_lr": (0.3, 0.1)}), rows)[1]


def test_workers_share_a_study(tmp_path):
    rows, _, trained = run_sweep(tmp_path, spec(space={"optim.matrix_lr": tuple(range(12))}), lr, jobs=4)
    assert sorted(trained) == [f"{i:04d}-s1337" for i in range(12)]
    assert [row.values["optim.matrix_lr"] for row in rows] == list(range(12))


def test_a_trial_that_ends_while_another_is_claimed_is_not_taken_again(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from golfgpt.sweep.study import Study

    study = Study(tmp_path / "sweep", spec(space={"optim.matrix_lr": (0.1, 0.2)}))
    first, hold, ends = contextlib.ExitStack(), Study._hold, [True]
    claim = first.enter_context(study.claim())

    def late(self, number):
        if number == 0 and ends:
            ends.pop()
            study.study.tell(claim.trial, 1.0)
            first.close()
        return hold(self, number)

    monkeypatch.setattr(Study, "_hold", late)
    with study.claim() as second:
        assert second.values == {"optim.matrix_lr": 0.2} and not ends


def test_the_table_names_scores_that_are_newer_than_the_study(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from golfgpt.sweep import run

    rows, study, _ = run_sweep(tmp_path, spec(space={"optim.matrix_lr": (0.1,)}), lr)
    assert rows[0].message == ""
    monkeypatch.setattr(run, "finished", lambda path: outcome(1.25))
    assert run.rows(study)[0].message == "seed 1337 was scored again: val_bpb 1.2500, not counted here"
    assert run.rows(study)[0].score == 0.1


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_drawn_points_are_those_of_a_sweep_that_was_never_stopped(tmp_path, sampler):
    axes = {
        "optim.matrix_lr": space.Range(low=0.01, high=1.0, log=True),
        "model.num_layers": space.Range(low=2, high=9),
        "model.xsa_layers": ([0], [0, 1]),
    }
    whole, _, _ = run_sweep(tmp_path / "a", spec(space=axes, sampler=sampler, trials=14), lr)
    run_sweep(tmp_path / "b", spec(space=axes, sampler=sampler, trials=6), lr)
    rows, _, trained = run_sweep(tmp_path / "b", spec(space=axes, sampler=sampler, trials=14), lr)
    assert [row.values for row in rows] == [row.values for row in whole] and len(trained) == 8
    assert len({row.values["optim.matrix_lr"] for row in rows}) == 14
    assert {type(row.values["model.num_layers"]) for row in rows} == {int}


def test_failures_are_kept_and_end_no_sweep(tmp_path):
    ends = {
        0.1: Outcome(code=1, result=None, message="KeyError: 'x'"),
        0.2: Outcome(code=5, result=None, message="loss is nan at step 3"),
        0.3: outcome(1.0, code=4, total=20_000_000),
        0.4: outcome(1.1, train=11.0),
        0.5: 1.5,
    }
    of = spec(space={"optim.matrix_lr": tuple(ends)}, max_seconds=10.0)
    rows, study, _ = run_sweep(tmp_path, of, lambda config: ends[lr(config)])
    states = {row.values["optim.matrix_lr"]: row.state for row in rows}
    assert states == {0.1: "failed", 0.2: "diverged", 0.3: "over the limits", 0.4: "over the limits", 0.5: "complete"}
    assert study.best.number == 4
    assert {row.message for row in rows} == {
        "", "seed 1337: exit code 1: KeyError: 'x'", "seed 1337: exit code 5: loss is nan at step 3"
    }  # fmt: skip


def test_prunes_only_what_is_worse_by_more_than_the_noise(tmp_path):
    """The floor is 3 sqrt(2) 0.01 = 0.042. The best trial so far has 1.0, 0.9 on its way."""
    of = spec(space={"optim.matrix_lr": (0.0, 0.04, 0.05)}, noise=0.01)
    rows, _, _ = run_sweep(tmp_path, of, lambda c: 0.8 + lr(c), lambda c: (1.0 + lr(c), 0.9))
    assert [(row.values["optim.matrix_lr"], row.state) for row in rows] == [
        (0.0, "complete"), (0.04, "complete"), (0.05, "pruned")
    ]  # fmt: skip
    assert rows[2].message == "seed 1337: worse than the best trial at the same step"
    unknown, study, _ = run_sweep(tmp_path / "b", spec(space=of.space), lambda c: 0.8 + lr(c), lambda c: (lr(c),))
    assert study.noise is None and {row.state for row in unknown} == {"complete"}


def test_signals_leave_trials_to_be_continued(tmp_path):
    def stop(config):
        if lr(config) == 0.3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return lr(config)

    with pytest.raises(Interrupted, match=r"SIGTERM; the runs are saved. The same command continues") as error:
        run_sweep(tmp_path, spec(space=GRID), stop)
    assert error.value.exit_code == 128 + signal.SIGTERM
    rows, _, trained = run_sweep(tmp_path, spec(space=GRID), lr)
    assert trained == ["0001-s1337", "0002-s1337"] and {row.state for row in rows} == {"complete"}


def test_a_trial_of_a_living_process_is_left_alone(tmp_path):
    pytest.importorskip("optuna")
    from golfgpt.sweep.study import Study

    with Study(tmp_path, spec(space=GRID)).claim() as claim:
        assert claim.values == {"optim.matrix_lr": 0.1}
        assert run_sweep(tmp_path, spec(space=GRID), lr)[2] == ["0001-s1337", "0002-s1337"]
    assert run_sweep(tmp_path, spec(space=GRID), lr)[2] == ["0000-s1337"]


def test_another_sweep_on_one_study_is_refused(tmp_path):
    run_sweep(tmp_path, spec(space=GRID), lr)
    before = (tmp_path / "study.journal").read_bytes()
    others = {
        r"space.optim.matrix_lr: \[0.1\] here, \[0.1, 0.3, 0.2\] in the study": {"space": {"optim.matrix_lr": (0.1,)}},
        "seeds: 2 here, 1 in the study": {"seeds": 2},
        "fixed.model.num_layers: 5 here, not given in the study": {
            "config": space.with_values(recipes.get("demo").config, {"model.num_layers": 5})
        },
    }
    for message, values in others.items():
        with pytest.raises(InputError, match=message):
            run_sweep(tmp_path, spec(**({"space": GRID} | values)), lr)
    with pytest.raises(
        InputError, match=r"is the folder of a sweep; .* continues it \(.*space.optim.matrix_lr \[0.1, "
    ):
        space.read_spec(tmp_path)
    assert (tmp_path / "study.journal").read_bytes() == before


def test_damaged_studies(tmp_path):
    run_sweep(tmp_path, spec(space=GRID), lr)
    file = tmp_path / "study.journal"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed within the last record: trial 2's end
    rows, _, trained = run_sweep(tmp_path, spec(space=GRID), lr)
    assert trained == ["0002-s1337"] and {row.state for row in rows} == {"complete"}
    for damaged, message in (
        (lines[0] + b"{half\n" + b"".join(lines[1:]), "line 2 is not a record"),
        (b"".join(lines[3:]), "cannot be read"),
        (whole.replace(b'"version":1', b'"version":99'), "has version 99, expected 1"),
        (whole.replace(b'"golfgpt":{', b'"theirs":{'), "version 'no golfgpt version', expected 1"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            run_sweep(tmp_path, spec(space=GRID), lr)
        assert file.read_bytes() == damaged


# ---- a try, with runs that end as told


def try_change(folder: Path, end, **values):
    from golfgpt.sweep.attempt import Loop, attempt, read_loop

    folder.mkdir(exist_ok=True)
    loop = read_loop(folder) or Loop(recipe="demo", config=recipes.get("demo").config, looks=(3, 5))
    if not (folder / "incumbent.json").exists():
        loop.save(folder)
    scripted = Scripted(end)
    changed = space.with_values(loop.config, values or {"optim.matrix_lr": 0.5})
    return attempt(folder, loop, changed, scripted, lambda text: None), scripted.trained


def noisy(config: RunConfig) -> float:
    return 2.0 - lr(config) + (config.seed % 3) / 1000 + (config.seed % 5) * lr(config) / 1000


def test_a_kept_change_is_the_next_incumbent(tmp_path):
    from golfgpt.sweep.attempt import read_loop

    result, trained = try_change(tmp_path, noisy)
    assert (result.decision, result.change, result.test.seeds) == ("keep", "--optim.matrix-lr=0.5", 3)
    assert read_loop(tmp_path).config.optim.matrix_lr == 0.5
    result, again = try_change(tmp_path, noisy, **{"optim.matrix_lr": 0.4})
    assert result.decision == "discard" and read_loop(tmp_path).config.optim.matrix_lr == 0.5
    assert set(trained) & set(again) == {name for name in trained if name.startswith(Path(result.runs[0]).name)}
    head, *lines = (tmp_path / "results.tsv").read_text().splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert [(row["decision"], row["change"], row["seeds"]) for row in rows] == [
        ("keep", "--optim.matrix-lr=0.5", "3"), ("discard", "--optim.matrix-lr=0.4", "3")
    ]  # fmt: skip
    assert float(rows[0]["confidence"]) >= 1 - decide.ALPHA and float(rows[0]["low"]) > 0


def test_runs_of_a_change_that_fail(tmp_path):
    ends = {"failed": Outcome(code=1, result=None, message="KeyError"), "discard": outcome(1.0, code=4, total=2**30)}
    ends_of_change = lambda end: lambda config: end if lr(config) == 0.5 else 2.0  # noqa: E731
    for decision, end in ends.items():
        result, _ = try_change(tmp_path, ends_of_change(end))
        assert result.decision == decision and f"exit code {end.code} at seed 1337" in result.note
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 3
    with pytest.raises(InputError, match=r"the incumbent .* failed: exit code 1 at seed 1337: KeyError"):
        try_change(tmp_path, lambda config: ends["failed"])


def test_an_incumbent_without_the_newest_fields_is_read(tmp_path):
    from golfgpt.sweep.attempt import Loop, digest, read_loop

    loop = Loop(recipe="demo", config=RunConfig(), looks=(2,))
    loop.save(tmp_path)
    values = json.loads((tmp_path / "incumbent.json").read_text())
    del values["config"]["eval"]["compile"]
    (tmp_path / "incumbent.json").write_text(json.dumps(values))
    assert read_loop(tmp_path) == loop
    compiled = replace(loop.config, eval=replace(loop.config.eval, compile="on"))
    assert digest(compiled) == digest(loop.config), "its runs are those of the incumbent"


def test_a_change_that_was_overtaken_is_not_the_incumbent(tmp_path):
    from golfgpt.sweep.attempt import read_loop

    def overtaken(config):
        if config.seed == 1339 and lr(config) == 0.5:
            loop = read_loop(tmp_path)
            replace(loop, config=space.with_values(loop.config, {"model.num_layers": 3})).save(tmp_path)
        return noisy(config)

    result, _ = try_change(tmp_path, overtaken)
    assert result.decision == "keep" and "another change was kept meanwhile" in result.note
    assert read_loop(tmp_path).config.model.num_layers == 3


@pytest.mark.parametrize("change", [{"optim.matrix_lr": 0.02}, {"seed": 5}, {"schedule.max_steps": 9}])
def test_changes_that_cannot_be_tried(tmp_path, change):
    with pytest.raises(InputError, match=r"changes nothing|sets seed|sets schedule.max_steps, the budget"):
        try_change(tmp_path, noisy, **change)


# ---- the commands


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    return tmp_path


def test_a_run_is_the_first_incumbent(here, monkeypatch, capsys):
    from golfgpt.sweep.attempt import read_loop
    from golfgpt.train.run_folder import RunFolder

    scripted = Scripted(noisy)
    monkeypatch.setattr(children, "Children", lambda: scripted)
    config = recipes.get("demo").config
    run = RunFolder.create(here / "runs/first", replace(config, model=replace(config.model, num_layers=3)), b"")
    run.close()
    command = ["try", "runs/first", "--steps", "4", "--looks", "2", "3"]
    for recipe, known in (("demo", "demo"), ("of-another-version", "baseline")):
        env = {"command": ["golfgpt", "train", "--recipe", recipe]}
        (here / "runs/first/env.json").write_text(json.dumps(env))
        assert main([*command, "--name", recipe, "--", "--optim.matrix-lr", "0.5"]) == 0
        assert "keep: --optim.matrix-lr=0.5" in capsys.readouterr().out
        loop = read_loop(here / "runs" / recipe)
        assert (loop.recipe, loop.config.model.num_layers, loop.looks) == (known, 3, (2, 3))
    assert main(["try", "--name", "x", "--steps", "4", "runs/first", "--", "--optim.matrix-lr", "0.5"]) == 3
    assert "the first argument of golfgpt try is --name; expected the run: golfgpt try runs/" in capsys.readouterr().err


def test_try_from_the_command_line(here, monkeypatch, capsys):
    monkeypatch.setattr(children, "Children", lambda: Scripted(noisy))
    change = ["--", "--optim.matrix-lr", "0.5"]
    assert main(["try", "--recipe", "demo", "--steps", "4", "--json", *change]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["decision"] == "keep" and len(result["candidate"]["scores"]) == 3
    assert main(["try", "--", "--optim.matrix-lr", "0.4"]) == 0
    assert "discard: --optim.matrix-lr=0.4: gain -0.09" in capsys.readouterr().out
    for bad, message in (
        (["try"], "there is no change to try"),
        (["try", *change], "the change changes nothing"),
        (["try", "--steps", "9", *change], "schedule.max_steps: 4 -> 9; give only the change"),
        (["try", "--looks", "2", *change], "got --looks (2,); give only the change"),
        (["try", "--name", "new", *change], "has no incumbent yet"),
        (
            ["try", "--name", "new", "--recipe", "demo", "--steps", "4", "--", "--schedule.max-steps", "9"],
            "sets schedule.max_steps",
        ),
        (["try", "--name", "new", "--recipe", "demo", *change], "expected the budget"),
        (["try", "--name", "new", "--recipe", "demo", "--budget", "2x", *change], "expected a time such as 120s"),
        (["try", "--name", "new", "--recipe", "demo", "--steps", "4", "--looks", "1", *change], "from 2 on"),
        (
            ["try", "--name", "new", "--recipe", "demo", "--steps", "4", "--budget", "1s", *change],
            "--budget or --steps",
        ),
    ):
        assert main(bad) == 3, bad
        assert message in capsys.readouterr().err
    assert main(["try", "--", "--optim.matrx-lr", "0.4"]) == 2
    err = capsys.readouterr().err
    assert "golfgpt: unknown option --optim.matrx-lr; did you mean --optim.matrix-lr?" in err and "│" not in err
    assert not (here / "runs/new/incumbent.json").exists()


def test_the_same_first_try_goes_on_and_an_incumbent_that_does_not_train_is_not_kept(here, monkeypatch, capsys):
    ends = iter([Outcome(code=3, result=None, message="no data"), 1.0, "stopped"])

    def end(config):
        if (found := next(ends, None)) == "stopped":
            scripted.signum = signal.SIGTERM
            scripted.check()
        return found or noisy(config)

    scripted = Scripted(end)
    monkeypatch.setattr(children, "Children", lambda: scripted)
    first = ["try", "--recipe", "demo", "--steps", "4", "--", "--optim.matrix-lr", "0.5"]
    assert main(first) == 3 and "failed: exit code 3 at seed 1337: no data" in capsys.readouterr().err
    assert not (here / "runs/try/incumbent.json").exists()
    assert main(first) == 128 + signal.SIGTERM and (here / "runs/try/incumbent.json").exists()
    scripted.signum = 0
    assert main(first) == 0 and "keep: --optim.matrix-lr=0.5" in capsys.readouterr().out
    assert main(["try", "--recipe", "small", *first[3:]]) == 3


@pytest.mark.long
def test_sweep_from_the_command_line_killed_and_continued(here, tiny, capsys):
    """Estimated, stopped by SIGTERM, killed, and continued: no finished run is trained again, a half-trained one
    resumes, and one that outlives its sweep is waited for."""
    config = replace(
        tiny,
        schedule=replace(tiny.schedule, max_steps=100),
        quant=replace(tiny.quant, compressor="zlib"),
        eval=replace(tiny.eval, max_tokens=500),
        runtime=replace(tiny.runtime, kernels="eager", compile="off", attention="math", threads=1),
    )
    demo = recipes.get("demo").config
    command = ["sweep", "--recipe", "demo", *space.flags(space.changes(demo, config)), "--name", "lr"]
    command += ["--grid", "optim.matrix_lr=0.02,0.03"]
    first, second = here / "runs/lr/0000-s1337", here / "runs/lr/0001-s1337"

    assert main([*command, "--dry-run", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["runs"] == 2 and cost["hours"] == pytest.approx(2 * cost["seconds_per_run"] / 3600)
    assert not list((here / "runs/lr").glob("[!.]*"))

    def start(until: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-m", "golfgpt", *command], stdout=subprocess.DEVNULL)
        while not (until.is_file() and until.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        return process

    process = start(first / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list((first / "checkpoints").iterdir()) and not (first / "result.json").exists()
    process = start(second / "metrics.jsonl")
    process.kill()
    process.wait(60)
    done = (first / "result.json").read_bytes()
    assert main([*command, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in out["trials"]] == ["complete", "complete"] and out["best"] in (0, 1)
    assert (first / "result.json").read_bytes() == done
    assert read_run(second).config.optim.matrix_lr == 0.03
    counts = [(run / "train.log").read_text().count("train_loader:dataset") for run in (first, second)]
    assert counts == [2, 1]
