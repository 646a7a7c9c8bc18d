"""`golfgpt runs`: lists, conditions, broken folders."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from golfgpt import recipes
from golfgpt.cli import main
from golfgpt.config import ModelConfig, RunConfig, to_dict
from golfgpt.errors import InputError
from golfgpt.runs import (
    Condition,
    artifact_file,
    check_fields,
    list_runs,
    read_result,
    recipe_name,
    sort_runs,
    write_config,
)


def add(path: Path, config: RunConfig, *, bpb: float | None = None, day: int = 1, recipe: str = "small") -> Path:
    path.mkdir(parents=True)
    write_config(path, config)
    command = ["golfgpt", "train", "--recipe", recipe, "--seed", "1"]
    (path / "env.json").write_text(json.dumps({"command": command, "started": f"2026-01-0{day}T00:00:00Z"}))
    if bpb is not None:
        score = {"val_bpb": bpb, "val_loss": bpb * 1.7, "label": "val_bpb"}
        (path / "result.json").write_text(json.dumps({"score": score, "steps": 10 * day, "total_bytes": 1000 + day}))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """runs/ with two finished runs, one that stopped, and a run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    small = recipes.get("small").config
    add(Path("runs/one"), small, bpb=1.5, day=1)
    add(Path("runs/two"), replace(small, seed=7), bpb=1.25, day=2)
    add(Path("runs/half"), RunConfig(model=ModelConfig(num_layers=10)), day=3, recipe="baseline")
    add(Path("runs/sweep/trial"), RunConfig(seed=9), bpb=1.75, day=4)
    Path("runs/sweep/study.db").touch()
    return Path("runs")


def names(argv: list[str], capsys) -> list[str]:
    assert main(["runs", *argv, "--json"]) == 0
    return [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]]


def test_list(folder, capsys):
    assert main(["runs"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:5]] == ["runs/sweep/trial", "runs/half", "runs/two", "runs/one"]
    assert out[3].split() == ["runs/two", "small", "7", "1.2500", "1,002", "20", "finished", "2026-01-02T00:00:00Z"]
    assert out[2].split() == ["runs/half", "baseline", "1337", "stopped", "2026-01-03T00:00:00Z"]
    assert out[-1] == "4 of 4 runs below runs"
    assert names(["runs/sweep"], capsys) == names(["runs/sweep/trial"], capsys) == ["runs/sweep/trial"]


def test_sort_and_limit(folder, capsys):
    by_score = ["runs/two", "runs/one", "runs/sweep/trial", "runs/half"]
    assert names(["--sort", "val_bpb"], capsys) == by_score
    assert names(["--sort", "val_bpb", "--reverse"], capsys) == [*by_score[2::-1], "runs/half"]  # no score: last
    assert names(["--sort", "val_bpb", "--limit", "1"], capsys) == by_score[:1]
    assert names(["--sort", "run"], capsys) == sorted(by_score)
    assert names(["--reverse"], capsys) == ["runs/one", "runs/two", "runs/half", "runs/sweep/trial"]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("model.num_layers=10", "half"),
        ("seed=7", "two"),
        ("val_bpb<1.6", "one two"),
        ("val_bpb>=1.5", "one sweep/trial"),
        ("val_bpb!=1.50", "half sweep/trial two"),
        ("val_bpb=None", "half"),
        ("status=stopped", "half"),
        ("recipe=baseline", "half"),
        ("started>2026-01-03", "half sweep/trial"),
        ("model.tie_embeddings=False", ""),
        ("model.xsa_layers=[]", "half one sweep/trial two"),
        ("steps=20 total_bytes=1002", "two"),
        ("steps=20 total_bytes=1001", ""),
    ],
)
def test_where(folder, capsys, where, found):
    argv = ["--sort", "run", "--where", *where.split()]
    assert names(argv, capsys) == [f"runs/{name}" for name in found.split()]


def test_a_condition_shows_its_field(folder, capsys):
    assert main(["runs", "--where", "model.num_layers=10"]) == 0
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[-1] == "model.num_layers" and row.split()[-1] == "10"


def test_where_no_run_matches_the_values_are_named(folder, capsys):
    assert main(["runs", "--where", "status=finish"]) == 0
    assert capsys.readouterr().out.endswith("0 of 4 runs below runs\nstatus is finished, stopped in these runs\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--where", "num_layers=9"], "no run has a field num_layers; did you mean model.num_layers?"),
        (["--where", "model.num_layer=9"], "did you mean model.num_layers?"),
        (["--sort", "val_bqb"], "did you mean val_bpb?"),
        (["--where", "seed"], "--where 'seed' is no condition; expected FIELD=VALUE"),
        (["--where", "seed<many"], "has 1337 there, which has no order with 'many'"),
        (["--limit", "0"], "--limit is 0; expected at least 1"),
        (["elsewhere"], "there is no folder elsewhere"),
    ],
)
def test_bad_input_is_named(folder, capsys, argv, message):
    assert main(["runs", *argv]) == 3
    got = capsys.readouterr()
    assert message in got.err and not got.out


def test_fields_without_runs_and_with_null():
    check_fields(["model.num_layers", "val_bpb"], [])
    with pytest.raises(InputError, match="no run has a field adapted"):
        check_fields(["adapted"], [])


def test_broken_runs_are_listed_with_the_reason(folder, capsys):
    for name, file, text, _ in (broken := [
        ("cut", "config.json", '{"format": 4, "model": ', "cut/config.json: Expecting value"),
        ("old", "config.json", '{"format": 3}', "old/config.json: the run has format 3"),
        ("list", "result.json", "[1]", "list/result.json: root: expected an object, got [1]"),
        ("bytes", "env.json", b"\xff\xfe\xff", "bytes/env.json: "),
        ("place", "result.json", None, "place/result.json"),
    ]):  # fmt: skip
        path = add(folder / name, RunConfig(), bpb=1.0)
        (path / file).unlink()
        if text is None:
            (path / file).mkdir()
        else:
            (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    odd = add(folder / "odd", RunConfig(), bpb=2.0)
    (odd / "env.json").write_text('{"command": 5, "started": {"a": []}}')  # odd, and readable
    assert main(["runs", "--where", "val_bpb<3"]) == 0
    out = capsys.readouterr().out
    for _, _, _, message in broken:
        assert any(line.startswith("broken: ") and message in line for line in out.splitlines())
    assert "runs/one" in out and "runs/odd" in out and "4 of 10 runs" in out
    assert main(["runs", "--json"]) == 0
    assert {run["run"] for run in json.loads(capsys.readouterr().out)["broken"]} == {f"runs/{row[0]}" for row in broken}
    for name, _, _, message in broken:
        assert main(["runs", "show", f"runs/{name}"]) == 3
        assert message in capsys.readouterr().err


def test_why_a_folder_has_no_artifact(tmp_path):
    with pytest.raises(InputError, match="before the run has ended; to finish it: golfgpt train --resume"):
        (tmp_path / "config.json").touch()
        artifact_file(tmp_path)
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="ended; to follow it: golfgpt watch"):
        artifact_file(tmp_path)
    (tmp_path / "result.json").touch()
    with pytest.raises(InputError, match="any more; to write it again: golfgpt train --resume"):
        artifact_file(tmp_path)
    for name in ("config.json", "result.json"):
        (tmp_path / name).unlink()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="is an export for other programs"):
        artifact_file(tmp_path)


def test_a_locked_run_is_running_and_asking_does_not_disturb_it(folder):
    lock = folder / "half" / ".lock"
    assert list_runs(folder / "half")[0].status == "stopped" and not lock.exists()
    with filelock.FileLock(lock):
        assert list_runs(folder / "half")[0].status == "running"
    assert list_runs(folder / "half")[0].status == "stopped"
    with filelock.FileLock(lock).acquire(timeout=0):
        pass


def test_hidden_folders_and_loops_are_not_searched(folder):
    add(folder / ".trash" / "gone", RunConfig())
    (folder / "sweep" / "loop").symlink_to(folder.resolve())
    add(folder / "one" / "inner", RunConfig())  # a run holds no runs
    assert len(list_runs(folder)) == 4


def test_a_partial_score_is_marked(folder, capsys):
    result = json.loads((folder / "one/result.json").read_text())
    result["score"]["label"] = "val_bpb (first 4,000 tokens)"
    (folder / "one/result.json").write_text(json.dumps(result))
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert main(["runs", "--json"]) == 0
    labels = {run["run"]: run["score.label"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert labels["runs/one"] == "val_bpb (first 4,000 tokens)" and labels["runs/two"] == "val_bpb"
    assert "1.5000*" in out and "1.2500*" not in out and "* not the score of all of the text" in out


def test_show(folder, capsys):
    assert main(["runs", "show", "runs/two"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/two: finished, seed 7") and "score.val_bpb   1.25" in out
    assert out.endswith("changed from recipe small:\n  seed: 1337 -> 7\n")
    assert main(["runs", "show", "runs/one"]) == 0
    assert capsys.readouterr().out.endswith("changed from recipe small:\n  nothing\n")
    assert main(["runs", "show", "runs/half", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "stopped" and found["result"] is None and found["config"]["model"]["num_layers"] == 10
    assert main(["runs", "show", "runs"]) == 3
    assert "runs holds no run: folders in it are runs (golfgpt runs lists them);" in capsys.readouterr().err


def test_a_stopped_run_says_how_far_it_came(folder, capsys):
    """After a resume that took back the last step."""
    lines = [{"kind": "train", "step": step, "loss": 6.0 - step, "train_seconds": 1.0 * step} for step in (1, 2, 3)]
    lines.append({"kind": "resume", "step": 2})
    (folder / "half/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["runs", "--where", "steps=2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["runs/half", "baseline", "1337", "2", "stopped"]
    assert main(["runs", "show", "runs/half"]) == 0
    out = capsys.readouterr().out
    assert "step           2\n" in out and "train_seconds  2.0\n" in out and "loss           4\n" in out
    assert out.endswith("\nnext: golfgpt train --resume runs/half continues it\n")


def test_numbers_are_short_for_a_reader_and_whole_in_json(folder, capsys):
    values = {"score": {"val_bpb": 1.23456789, "nats": 20615.820268}, "seconds": {"train": 9.87654}}
    (folder / "one/result.json").write_text(json.dumps(values))
    assert main(["runs", "show", "runs/one"]) == 0
    shown = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {("score.val_bpb", "1.2346"), ("score.nats", "20615.8"), ("seconds.train", "9.9")} <= shown
    assert main(["runs", "show", "runs/one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == values


def test_what_a_run_chose_or_measured_is_no_change(folder, capsys):
    config = recipes.get("small").config
    chosen = replace(config, runtime=replace(config.runtime, dtype="float32", threads=1))
    write_config(folder / "one", replace(chosen, budget=replace(config.budget, code_bytes=25_580)))
    assert main(["runs", "show", "runs/one"]) == 0
    assert capsys.readouterr().out.endswith("changed from recipe small:\n  nothing\n")
    assert main(["runs", "diff", "runs/one", "runs/two"]) == 0
    assert capsys.readouterr().out.split("results:")[0].split(
        "chosen or measured by the runs, or given at a resume:\n"
    ) == [
        "seed: 1337 -> 7\n", "  budget.code_bytes: 25580 -> None\n  runtime.dtype: 'float32' -> 'auto'\n"
        "  runtime.threads: 1 -> 0\n"
    ]  # fmt: skip
    assert main(["runs", "diff", "runs/one", "runs/two", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert chosen.keys() == {"budget.code_bytes", "runtime.dtype", "runtime.threads"}
    env = {"command": ["golfgpt", "train", "--recipe", "small", "--runtime.dtype=float32"]}
    (folder / "one/env.json").write_text(json.dumps(env))
    assert main(["runs", "show", "runs/one"]) == 0
    assert capsys.readouterr().out.endswith("changed from recipe small:\n  runtime.dtype: 'auto' -> 'float32'\n")


def test_suggested_commands_can_be_pasted(folder, capsys):
    (folder / "half").rename(folder / "half a run")
    for argv in (["compare", "runs/half a run", "--target-nats", "3"], ["sample", "runs/half a run"]):
        assert main(argv) == 3
        assert "golfgpt train --resume 'runs/half a run'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["runs", "show", "one"], "did you mean runs/one?"),
        (["runs", "show", "runs/onne"], "did you mean runs/one?"),
        (["eval", "one"], "did you mean runs/one?"),
        (["sample", "one"], "did you mean runs/one?"),
        (["train", "--resume", "twoo"], "did you mean runs/two?"),
        (["runs", "sweep"], "did you mean runs/sweep?"),
        (["runs", "show", "runs/sweep"], "(golfgpt runs runs/sweep lists them)"),
        (["sample", "runs/my data"], "it is a prepared data folder"),
    ],
)
def test_a_place_without_a_run_names_what_was_meant(folder, capsys, argv, hint):
    (folder / "my data").mkdir()
    (folder / "my data/manifest.json").touch()
    assert main(argv) == 3
    assert hint in capsys.readouterr().err


def test_diff(folder, capsys):
    assert main(["runs", "diff", "runs/one", "runs/two"]) == 0
    results = "results:\n  steps: 10 -> 20\n  score.val_bpb: 1.5 -> 1.25\n  total_bytes: 1001 -> 1002\n"
    assert capsys.readouterr().out == f"seed: 1337 -> 7\n{results}"
    assert main(["runs", "diff", "runs/one", "runs/two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == {"seed": [1337, 7]}
    assert main(["runs", "diff", "runs/one", "runs/one"]) == 0
    assert capsys.readouterr().out == "the configurations are equal\n"
    assert main(["runs", "diff", "runs/one", "runs/none"]) == 3
    assert "runs/none holds no run" in capsys.readouterr().err


def test_recipe_name():
    assert recipe_name({"command": ["golfgpt", "train", "--seed", "1", "--recipe=golf"]}) == "golf"
    assert recipe_name({"command": ["golfgpt", "demo"]}) == "demo"
    assert recipe_name({"command": ["golfgpt", "train", "--recipe"]}) is None
    assert recipe_name({"command": []}) is None and recipe_name({}) is None


def test_numbers_sort_before_text(folder):
    runs = list_runs(folder)
    for run, value in zip(runs, ("b", 2, None, 1.5), strict=True):
        run.values["mixed"] = value
    assert [run.get("mixed") for run in sort_runs(runs, "mixed")] == [1.5, 2, "b", None]
    assert Condition.parse("mixed=b").holds(runs[0]) and not Condition.parse("mixed.more=b").holds(runs[0])


def test_lists_and_comparisons_import_no_torch(folder):
    code = (
        "import sys; from golfgpt.cli import main\n"
        "assert main(['runs', '--json']) == 0 and main(['compare', 'runs/one', '--target-nats', '3']) == 3\n"
        "assert not {'torch', 'pandas', 'scipy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_real_run(tiny, tmp_path, capsys):
    """What train writes is what the lists and comparisons read."""
    from golfgpt.train.train import train

    path = tmp_path / "runs" / "real"
    result = train(replace(tiny, seed=2), path, quiet=True)
    (run,) = list_runs(path.parent)
    assert run.status == "finished" and run.get("val_bpb") == result["score"]["val_bpb"] and run.get("seed") == 2
    assert run.get("total_bytes") == result["total_bytes"] and run.get("started")
    assert json.loads(json.dumps(to_dict(read_result(path).config)))["model"] == run.get("model")
    assert main(["compare", str(path), "--target-nats", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["target"]
    assert found["label"] == "val_bpb (first 4,000 tokens)" and not found["a"]["left_out"]
    assert found["bpb_per_nat"] * result["score"]["val_loss"] == pytest.approx(result["score"]["val_bpb"])
