"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from golfgpt.cli import COMMANDS, main
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset, open_shard, write_shard
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import missing_package
from golfgpt.model.gpt import GPT
from golfgpt.runs import read_config, write_config
from golfgpt.score import evaluate as evaluation
from golfgpt.train.run_folder import RunFolder

TINY = [
    word
    for field, value in {
        "model.vocab-size": 384,
        "budget.code-bytes": 60_000,  # counting takes ten seconds: tests/test_bundle.py
        "model.num-layers": 2,
        "model.model-dim": 32,
        "model.num-heads": 2,
        "model.num-kv-heads": 1,
        "model.mlp-hidden": 48,
        "schedule.max-steps": 4,
        "schedule.max-seconds": None,
        "data.batch-tokens": 512,
        "data.seq-len": 64,
        "quant.keep-numel": 100,
        "eval.window": 64,
        "eval.stride": 64,
        "runtime.checkpoint-seconds": 0,
        "runtime.dtype": "float32",
    }.items()
    for word in (f"--{field}", str(value))
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(here, corpus, capsys) -> Path:
    assert main(["train", "--recipe", "demo", "--data.path", str(corpus), "--name", "first", *TINY]) == 0
    capsys.readouterr()
    return here / "runs" / "first"


def run_json(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_eval_sample_budget_inspect_export(trained, corpus, capsys):
    result = json.loads((trained / "result.json").read_text())
    assert main(["budget", str(trained), "--optim.matrix-lr", "3"]) == 3
    again = run_json(capsys, "eval", trained)
    assert again["score"]["val_bpb"] == result["score"]["val_bpb"]
    sliding = run_json(capsys, "eval", trained, "--eval.stride", "16", "--eval.max-tokens", "3000")["score"]
    assert (sliding["stride"], sliding["tokens"]) == (16, 3000)
    info = run_json(capsys, "inspect", trained)
    assert info["bytes"] == result["artifact_bytes"] and info["sha256"] == result["artifact_sha256"]
    plain = {"input_scale": 1.0, "xsa": False, "residual": "sequential"}
    assert info["plan"][1] == {"row": 1, "skip_source": 0, "skip_row": 0} | plain
    assert run_json(capsys, "budget", trained)["file_bytes"] == result["artifact_bytes"]
    assert run_json(capsys, "export", trained, "--to", "safetensors")["tensors"] == 25
    tensors = load_file(trained / "model.safetensors")
    assert tensors["blocks.1.attn.c_k.weight"].shape == (16, 32)


def test_samples(trained, capsys):
    asked = ["sample", trained, "--prompt", "def main", "--tokens", "12", "--top-k", "0"]
    several = run_json(capsys, *asked, "--samples", "2")
    assert several["prompt"] == "def main"
    first, second = several["samples"]
    assert first["text"] != second["text"] and 0 < first["tokens"] <= 12
    assert run_json(capsys, *asked, "--seed", "1")["samples"] == [second]
    file = trained / "prompt.txt"
    file.write_text("def main")
    assert run_json(capsys, *asked[:2], "--prompt-file", file, *asked[4:])["samples"] == [first]
    assert main(["sample", str(trained), "--prompt-file", str(file), "--prompt", "x"]) == 3
    file.write_bytes(b"caf\xe9")
    assert main(["sample", str(trained), "--prompt-file", str(file)]) == 3
    assert "byte 3 is not UTF-8" in capsys.readouterr().err


def test_a_document_that_ends_early_is_said_or_passed(trained, capsys, monkeypatch):
    tokenizer = Tokenizer.from_file(trained / "tokenizer.model")
    spoken = [*tokenizer.encode("one"), tokenizer.bos_id, *tokenizer.encode("two")]

    def generate(model, ids, count, *, stop_id, **options):
        return spoken[: spoken.index(stop_id) if stop_id else count]

    monkeypatch.setattr(GPT, "generate", generate)
    assert main(["sample", str(trained), "--tokens", str(len(spoken))]) == 0
    said = capsys.readouterr()
    assert said.out == "one\n" and f"after {spoken.index(tokenizer.bos_id)} of {len(spoken)} tokens" in said.err
    assert main(["sample", str(trained), "--tokens", str(len(spoken)), "--past-end"]) == 0
    assert tuple(capsys.readouterr()) == ("one\n\ntwo\n", "")


def test_a_score_shows_what_was_checked(trained, capsys):
    shown = run_json(capsys, "eval", trained, "--eval.max-tokens", "2000")["score"]["checks"]
    assert shown["later_token_change"] == 0 and shown["windows"] > 0
    assert main(["eval", str(trained), "--eval.max-tokens", "2000"]) == 0
    assert "probabilities sum to 1 within" in capsys.readouterr().out
    assert "checks" in json.loads((trained / "result.json").read_text())["score"]


@pytest.mark.parametrize("flags", [[], ["--eval.stride", "16", "--eval.document-aware"], ["--json"]])
def test_a_model_that_peeks_exits_6_without_a_score(trained, capsys, monkeypatch, flags):
    forward = GPT.forward

    def peeks(self, ids, **options):
        hidden = forward(self, ids, **options)
        return hidden + self.tok_emb[ids.roll(-1, 1)[:, -hidden.size(1) :]]

    monkeypatch.setattr(GPT, "forward", peeks)
    assert main(["eval", str(trained), *flags]) == 6
    out, err = capsys.readouterr()
    assert "val_bpb" not in out + err
    assert "the model sees ahead" in err


def test_eval_continues_after_sigterm(trained, capsys, monkeypatch):
    options = ["--eval.stride", "16", "--eval.batch-tokens", "1024", "--eval.max-tokens", "3000"]
    whole = run_json(capsys, "eval", trained, *options)["score"]
    kept = trained / "eval_partial_0.json"
    assert not kept.exists()
    score_windows = evaluation.score_windows

    def stopped(*args):
        for i, item in enumerate(score_windows(*args)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    monkeypatch.setattr(evaluation, "score_windows", stopped)
    assert main(["eval", str(trained), *options]) == 143
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err
    assert json.loads(kept.read_text())["values"][1] == 64 + 2 * 16 * 16
    monkeypatch.undo()
    monkeypatch.chdir(trained.parent.parent)
    assert main(["eval", str(trained), *options]) == 0
    out = capsys.readouterr().out
    assert "continuing an interrupted evaluation: 576 tokens are scored already" in out
    assert f"val_loss {whole['val_loss']:.4f}" in out
    assert not kept.exists()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            ModuleNotFoundError("No module named 'tyro'", name="tyro"),
            'tyro is not installed: pip install "golfgpt[train]"',
        ),
        (
            ImportError("golfgpt_kernels needs torch >= 2.10", name="golfgpt_kernels"),
            "golfgpt_kernels needs torch >= 2.10",
        ),
        (ImportError("cannot import name 'f'", name="golfgpt_kernels", path="golfgpt_kernels/__init__.py"), None),
        (ModuleNotFoundError("No module named 'golfgpt.nothing'", name="golfgpt.nothing"), None),
        (ImportError("numpy must be built anew"), None),
    ],
)
def test_only_a_missing_or_old_package_is_worth_advice(error, advice):
    """Any other ImportError is a bug and keeps its traceback."""
    assert missing_package(error) == advice


def test_evals_are_kept_and_say_what_they_leave_out(trained, corpus, capsys):
    config = read_config(trained)
    write_config(trained, replace(config, eval=replace(config.eval, max_tokens=900)))
    assert main(["eval", str(trained)]) == 0
    said = capsys.readouterr().out
    assert "eval.max_tokens 900 is kept from training; --eval.max-tokens None scores all" in said
    assert "gzip, xz, zstd and bigram are not shown" in said
    sgd = ["--eval.max-tokens", "1300", "--eval.stride", "32", "--eval.ttt.kind", "sgd", "--eval.ttt.sgd.epochs", "1"]
    assert main(["eval", str(trained), *sgd, "--eval.ttt.sgd.chunk-tokens", "640"]) == 0
    assert "kept from training" not in capsys.readouterr().out
    first, second = run_json(capsys, "runs", "show", trained)["evals"]
    assert (first["tokens"], first["stride"], first["artifact"], first["data"]) == (900, 64, "model.golf", str(corpus))
    assert (second["tokens"], second["stride"], second["adapted"]["kind"]) == (1300, 32, "sgd")
    assert main(["runs", "show", str(trained)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("20") and "model.golf" in line]
    assert [re.search(r"val_bpb.*", row)[0] for row in rows] == [
        first["label"], second["label"], second["adapted"]["label"]
    ]  # fmt: skip


def test_a_whole_score_does_not_replace_the_partial_one_of_the_run(trained, capsys):
    assert main(["eval", str(trained)]) == 0
    assert "the run keeps" not in capsys.readouterr().out
    result = json.loads((trained / "result.json").read_text())
    (trained / "result.json").write_text(json.dumps(result | {"score": result["score"] | {"partial": True}}))
    config = read_config(trained)
    write_config(trained, replace(config, eval=replace(config.eval, max_tokens=900)))
    assert main(["eval", str(trained), "--eval.max-tokens", "None"]) == 0
    assert f"train --resume {trained} --eval.max-tokens None replaces it" in capsys.readouterr().out


def test_text_of_another_tokenizer_is_to_be_prepared_with_the_runs(trained, corpus, capsys):
    """Of another size, of the same, and text that nobody prepared: one piece of advice, which works."""
    model = trained / "tokenizer.model"
    text = trained / "text.jsonl"
    text.write_text("".join((corpus.parent / "text.jsonl").read_text().splitlines(keepends=True)[:20]))
    for size in ("400", "384"):
        assert main(["data", "prepare", str(text), "--out", f"other{size}", "--vocab-size", size]) == 0
        assert main(["eval", str(trained), "--data.path", f"other{size}"]) == 3
        assert f"golfgpt data prepare FILES --tokenizer {model} --out DIR" in capsys.readouterr().err
    assert main(["eval", str(trained), "--data.path", str(text)]) == 3
    assert f"golfgpt data prepare {text} --tokenizer {model} --out DIR" in capsys.readouterr().err
    assert main(["data", "prepare", str(text), "--tokenizer", str(model), "--out", "same"]) == 0
    for unfinished in (False, True):  # then there is no digest, and paths are compared
        if unfinished:
            (trained / "result.json").rename("result.json")
        for path, noted in (("same", True), (str(corpus), False)):
            assert main(["eval", str(trained), "--data.path", path, "--eval.max-tokens", "200"]) == 0
            assert ("note: this data folder differs from the run's" in capsys.readouterr().out) is noted
    assert main(["train", "--recipe", "demo", "--data.path", str(text)]) == 3
    assert f"golfgpt data prepare {text} --out data/text, then use data/text" in capsys.readouterr().err


def test_the_command_that_prepares_text_works_as_printed(here, capsys):
    """Of a folder and of a file with spaces, and where the place that it would take is taken."""
    folder, text = here / "my books", "\n\n".join(f"{i} " * 700 for i in range(40))
    folder.mkdir()
    (folder / "a b.txt").write_text(text)
    for source in ("my books", "my books/a b.txt", "my books"):
        assert main(["train", "--recipe", "demo", "--data.path", source]) == 3
        command, then = capsys.readouterr().err.split("golfgpt data prepare ")[1].split(", then use ")
        assert main(["data", "prepare", *shlex.split(command), "--vocab-size", "271"]) == 0
        assert (here / shlex.split(then)[0] / "manifest.json").exists()
    assert sorted(path.name for path in (here / "data").iterdir()) == ["a b", "my books", "my books-tokens"]


def test_prepare_ends_with_the_command_that_trains_on_it_or_says_why_not(here, capsys):
    (here / "text.txt").write_text("\n\n".join(f"{i} " * 700 for i in range(40)))
    (here / "short.txt").write_text("a few words")
    for val, last in (
        ("text.txt", "next: golfgpt train --recipe small --data.path 'my data' --model.vocab-size 271"),
        (
            "short.txt",
            "warning: val has only 12 tokens, and recipe small scores windows of 512: prepare more text with",
        ),
    ):
        inputs = ["text.txt"] if val == "text.txt" else ["text.txt", "--val", val]
        assert main(["data", "prepare", *inputs, "--out", "my data", "--vocab-size", "271", "--overwrite"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(last)
    assert main(["data", "prepare", "my data", "--out", "again"]) == 3
    assert "golfgpt train --recipe small --data.path 'my data'" in capsys.readouterr().err


def test_the_r4_variant_is_labelled(trained, capsys):
    shown = run_json(capsys, "eval", trained, "--eval.stride", "16", "--eval.rule", "r4", "--eval.max-tokens", "1008")
    assert shown["score"]["label"] == "val_bpb (first 1,008 tokens) (R4: first 48 tokens not scored)"
    assert shown["compressors_bpb"] is None


def test_budget_over_the_cap_exits_4(trained, capsys):
    size = run_json(capsys, "budget", trained)["file_bytes"]
    assert main(["budget", str(trained), "--budget.artifact-bytes", str(size + 60_000)]) == 0
    assert main(["budget", str(trained), "--budget.artifact-bytes", str(size + 59_999)]) == 4
    assert "over budget: " in capsys.readouterr().err


def test_budget_before_training_computes_the_published_counts(capsys):
    sizes = run_json(capsys, "budget", "--recipe", "baseline", "--budget.code-bytes", "60000")
    assert 15_700_000 < sizes.pop("forecast_bytes") < 15_940_000
    assert sizes.pop("mlp_hidden") == 1024
    assert sizes.pop("verdict").startswith("fits by the forecast, but")
    assert sizes == {"parameters": 17_059_912, "payload_bytes": 17_178_912, "model_bytes_limit": 15_940_000}
    for limit, code, word in ((20_000_000, 0, "whatever"), (15_000_000, 4, "does not fit, by the forecast")):
        options = ("--recipe", "baseline", "--budget.code-bytes", "60000", "--budget.artifact-bytes", str(limit))
        assert main(["budget", *options]) == code
        assert word in capsys.readouterr().out


def test_recipes(capsys):
    assert run_json(capsys, "recipes", "demo")["name"] == "demo"
    assert set(run_json(capsys, "recipes")) >= {"baseline", "demo", "small"}
    assert run_json(capsys, "recipes", "show", "baseline")["config"]["optim"]["matrix_lr"] == 0.04


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["trian"], 2, "did you mean train?"),
        (["data", "prepar"], 2, "did you mean data prepare?"),
        (["--json", "train"], 2, "expected a command first, got --json"),
        (
            ["data", "prepare", "a.txt", "--out", "d", "b.txt"],
            2,
            "unexpected argument b.txt; the files or runs to work on",
        ),
        (["budget", "small"], 3, "did you mean golfgpt budget --recipe small?"),
        (["recipes", "demmo"], 3, "did you mean demo?"),
        (["sample"], 2, "expected PATH, got none"),
        (["sample", "--prompt", "x"], 2, "(required)\ngolfgpt: expected PATH, got none"),
        (["sample", "--temprature", "1"], 2, "unknown option --temprature; did you mean --temperature?"),
        (["submit", "pack", "x", "--out", "y"], 2, "expected --author STR, --github-id STR and --name STR, got none"),
        (["submit", "pack", "x", "--out", "y"], 2, "\n--author STR: Your name. (required)\n--github-id STR: Your"),
        (["try", "--recipe", "demo", "--runs", "2", "--", "--optim.matrix-lr", "1"], 2, "unknown option --runs\n"),
        (["compare", "--target-nats", "3"], 3, "expected at least one run, got none"),
        (["data", "prepare"], 2, "expected --out PATH, got none"),
        (["train", "--recipe", "demmo"], 3, "did you mean demo?"),
        (["train", "--data.path", "."], 3, "--recipe baseline on GPUs, --recipe small on a CPU"),
        (["train", "--resume", "runs/first", "--recipe", "golf"], 3, "runs/first or --recipe golf, not both"),
        (["budget", "runs/first", "--recipe", "golf"], 3, "runs/first or --recipe golf, not both"),
        (["budget", "--recipe", "baseline", "--recipe", "demmo"], 3, "did you mean demo?"),
        (["recipes", "show", "demmo"], 3, "did you mean demo?"),
        (["eval", "nowhere"], 3, "nowhere holds no run"),
        (["eval", "--json", "nowhere"], 3, "expected the run: golfgpt eval nowhere"),
        (["train", "--eval.stride", "5000"], 3, "exceeds the window 1024"),
        (["data", "prepare", "--out", "d", "--vocab-size", "0"], 3, "vocabulary size 0"),
        (["recipes", "list", "demo"], 3, "recipes show demo"),
        (["data", "prepare", "--val", "x.txt", "--out", "d"], 3, "need inputs to train on"),
        (["sample", "nowhere", "--temperature", "nan"], 3, "--temperature is nan; expected 0 to 100"),
        (["sample", "nowhere"], 3, "there is no nowhere"),
        (["inspect", "nowhere"], 3, "there is no nowhere"),
        (["train", "--recipe", "demo", "--name", "../x"], 3, "is not a folder name"),
        (["train", "--recipe", "demo"], 3, "no data: expected a prepared folder"),
        (["data", "prepare", "missing.txt", "--out", "d"], 3, "missing.txt"),
        (["data", "verify", "missing"], 3, "there is no folder missing"),
    ],
)
def test_mistakes_are_named(here, capsys, argv, code, message):
    assert main(argv) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model.num-layer", "3"], 2, "unknown option --model.num-layer; did you mean --model.num-layers?"),
        (["--seed"], 2, "--seed has no value"),
        (["more"], 2, "unexpected argument more"),
        (["--schedule.max-seconds", "1m"], 3, "--schedule.max-seconds got 1m; expected a number or None"),
        (["--model.xsa-layers", "1", "x"], 3, "--model.xsa-layers got 1, x; expected a whole number"),
        (["--data.order=up"], 3, "--data.order got up; expected one of sequential, shuffled, coprime, packed"),
        (["--model.model-dim", "100", "--model.num-heads", "7"], 3, "model.model_dim 100 is not a multiple of"),
        (["--eval.stride", "0"], 3, "eval.stride is 0; expected >= 1"),
    ],
)
def test_a_bad_option_is_named_last(capsys, flags, code, message):
    assert main(["train", *flags]) == code
    *about, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"golfgpt: {message}") and 1 <= len(about) <= 2
    assert about[0] == "golfgpt train --help lists all options"


def test_an_unknown_option_comes_before_a_missing_one(here, capsys):
    (here / "text.txt").write_text("text")
    assert main(["data", "prepare", "text.txt", "--output", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "golfgpt: unknown option --output; did you mean --out?"
    assert main(["data", "prepare", "text.txt", "--vocab-size", "300"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "golfgpt: expected --out PATH, got none"


def test_code_alone_over_the_budget_is_a_budget_error(capsys):
    assert main(["budget", "--recipe", "small", "--budget.artifact-bytes", "1000"]) == 4
    assert "leaves nothing of budget.artifact_bytes 1,000 for a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--eval.ttt.lora.rank 8",
            "lora.rank has no effect on eval.ttt.kind off; drop it, or add --eval.ttt.kind lora or",
        ),
        ("--eval.ttt.kind sgd --eval.ttt.lora.rank 8", "lora.rank has no effect on eval.ttt.kind sgd"),
        (
            "--eval.ttt.kind lora --eval.ttt.phases 2",
            "phases has no effect on eval.ttt.kind lora; drop it, or add --eval.ttt.kind phased",
        ),
    ],
)
def test_options_of_another_test_time_training_are_refused(here, options, message, capsys):
    write_config(here, RunConfig())
    for command in (["eval", "."], ["train", "--recipe", "small"]):
        assert main([*command, *options.split()]) == 3
        assert message in capsys.readouterr().err


def test_what_cannot_go_on_is_said_before_the_work(trained, capsys):
    """A name that is taken, a folder that is not there, and data of a sweep, whose name stays free."""
    assert main(["train", "--recipe", "demo", "--name", "first"]) == 3
    assert "runs/first already holds a run; choose another --name" in capsys.readouterr().err
    assert main(["export", str(trained), "--to", "golf", "--out", "none/x.golf"]) == 3
    captured = capsys.readouterr().err
    assert "there is no folder" in captured and "compressing" not in captured
    assert main(["sweep", "--recipe", "small", "--grid", "optim.matrix_lr=0.1,0.2", "--data.path", "none"]) == 3
    assert "none" in capsys.readouterr().err and not Path("runs/sweep").exists()
    data = ["--data.path", read_config(trained).data.path, "--grid", "model.vocab_size=1000,2000"]
    width = ["--grid", "model.num_layers=2,3", "--sampler", "random", "--trials", "2"]
    for options, said in (([], "no data: expected"), (data, "model.vocab_size is 1000; expected"), (width, "no data")):
        assert main(["sweep", "--recipe", "small", "--grid", "optim.matrix_lr=0.1,0.2", *options]) == 3
        assert said in capsys.readouterr().err and not Path("runs/sweep").exists()


def test_sigterm_ends_a_command_that_goes_on_after_errors(monkeypatch, capsys):
    """A check of doctor that fails is a row."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("golfgpt.doctor.checks.CHECKS", {"killed": lambda machine: os.kill(os.getpid(), 15)})
    assert main(["doctor"]) == 143
    assert capsys.readouterr().err.endswith("golfgpt: stopped by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_sigterm_stays_ignored(monkeypatch):
    kill = replace(COMMANDS["recipes"], run=lambda args: os.kill(os.getpid(), signal.SIGTERM) or 0)
    monkeypatch.setitem(COMMANDS, "recipes", kill)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["recipes"]) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_threads_that_wait_do_not_hold_their_core():
    """libgomp reads this when torch is imported."""
    code = "import os, sys; sys.argv[1:] = ['--version']; from golfgpt.__main__ import main\n"
    code += "try: main()\nfinally: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    for setting, spins in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        settings = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        env = {name: value for name, value in os.environ.items() if name not in settings} | setting
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"{spins} False"


def test_a_file_that_is_not_there_is_no_run(trained, capsys):
    assert main(["eval", str(trained / "none.golf")]) == 3
    assert f"there is no {trained / 'none.golf'};" in capsys.readouterr().err


def test_a_text_that_is_too_short_to_train_on(trained, corpus, here, capsys):
    source = Dataset.open(corpus)
    for tokens, code in ((64, 3), (65, 0)):
        folder = here / f"short{tokens}"
        shutil.copytree(corpus, folder)
        for file in folder.glob("*_train_*.bin"):
            file.unlink()
        (folder / "manifest.json").unlink()
        write_shard(folder / "golf_train_000000.bin", source.train[0][:tokens])
        short = ["train", "--recipe", "demo", "--data.path", str(folder), "--name", f"n{tokens}", *TINY]
        assert main([*short, "--data.seq-len", "64"]) == code
        found = capsys.readouterr()
        assert ("64 tokens to train on, and a sequence takes 65" in found.err) == (code == 3)
        assert ("more than there are: they repeat" in found.out) == (code == 0)


def test_validation_text_that_changed_is_not_scored(trained, corpus, here, capsys):
    """Two tokens change places, so that no count of bytes shows it."""
    shutil.copytree(corpus, here / "bad")
    (shard,) = (here / "bad").glob("golf_val_*.bin")
    tokens = open_shard(shard)[:].copy()
    first = next(i for i in range(10, len(tokens)) if tokens[i] != tokens[i + 1])
    tokens[[first, first + 1]] = tokens[[first + 1, first]]
    write_shard(shard, tokens)
    assert main(["eval", str(trained), "--data.path", str(here / "bad")]) == 6
    assert "golf_val_000000.bin has changed since it was prepared" in capsys.readouterr().err


def test_an_option_of_train_is_known_elsewhere(tmp_path, capsys):
    assert main(["doctor", "--schedule.max-seconds=5"]) == 2
    wanted = "golfgpt: --schedule.max-seconds is for golfgpt train; golfgpt doctor does not take it"
    assert capsys.readouterr().err.splitlines()[-1] == wanted
    assert main(["sample", str(tmp_path), "--eval.stride", "64"]) == 2
    assert "--eval.stride is for golfgpt train and golfgpt eval;" in capsys.readouterr().err
    write_config(tmp_path, RunConfig())
    assert main(["eval", str(tmp_path), "--runtime.compile", "on"]) == 2
    assert capsys.readouterr().err.endswith("golfgpt eval does not take it; did you mean --eval.compile?\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("demo", "--recipe demo"),
        ("my books", "--data.path 'my books'"),
        ("runs/first", "--resume runs/first"),
        ("--lr", "--optim.matrix-lr"),
        ("--steps", "--schedule.max-steps"),
        ("--batch-size", "--data.batch-tokens"),
        ("--layers", "--model.num-layers"),
        ("--dim", "--model.model-dim"),
        ("--window", "--eval.window"),
        ("--data=x", "--data.path"),
        ("--output", "--name"),
        ("-n", "--name"),
    ],
)
def test_what_a_trainer_types_is_understood(here, capsys, typed, meant):
    """And the line above the error is about the option that it names."""
    (here / "my books").mkdir()
    (here / "runs" / "first").mkdir(parents=True)
    (here / "runs" / "first" / "config.json").touch()
    assert main(["train", typed]) == 2
    *about, error = capsys.readouterr().err.splitlines()
    assert error.endswith(f"; did you mean {meant}?") and all(line.startswith(f"{meant}") for line in about[1:])


@pytest.mark.parametrize(
    ("argv", "code", "shown"),
    [
        ([], 2, len(COMMANDS)),
        (["help"], 0, len(COMMANDS)),
        (["data"], 2, 3),
        (["data", "--help"], 0, 3),
        (["submit"], 2, 2),
    ],
)
def test_commands_are_listed(capsys, argv, code, shown):
    """All, or those of a group."""
    assert main(argv) == code
    assert capsys.readouterr().out.count("\n  golfgpt ") == shown


def test_help_names_what_is_used_most_in_unbroken_paragraphs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert not stop.value.code
    most, options = capsys.readouterr().out.split("Most used:\n")[1].split("\n\n", 1)
    rows = [row.strip("│ ") for row in options.splitlines()]
    assert all(any(row.startswith(f"{flag} ") for row in rows) for flag in re.findall("^--[^ ]+", most, re.MULTILINE))
    at = next(i for i, row in enumerate(rows) if row.startswith("--model.smear-gate"))
    assert all(len(row) > 55 for row in rows[at + 1 : at + 4])  # of 70: no line ends where the source's does


def test_damaged_artifacts_are_refused(trained, capsys):
    file = trained / "model.golf"
    data = file.read_bytes()
    for damaged in (data[:-1], data + b"x", data[:100] + bytes([data[100] ^ 1]) + data[101:], b""):
        file.write_bytes(damaged)
        assert main(["sample", str(trained)]) == 3
        assert "model.golf" in capsys.readouterr().err


def test_the_wrong_tokenizer_is_refused(trained, capsys):
    model = trained / "tokenizer.model"
    from golfgpt.data.tokenizer import train_tokenizer

    model.write_bytes(train_tokenizer(["other text entirely, " * 40, "with words of its own " * 40], 300))
    assert main(["sample", str(trained)]) == 3
    assert "is not the tokenizer that" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_torchrun_restarts_resumes_the_run_it_began(here, tiny, monkeypatch, capsys):
    """And no other run of that name. Without an id, it says so before it begins."""
    calls = []
    monkeypatch.setattr("golfgpt.train.train.train", lambda config, path, **kw: calls.append((config, kw["resume"])))
    command = ["train", "--recipe", "demo", "--name", "first"]
    monkeypatch.setenv("RANK", "0")
    for begun_by in ("none", "b", "a"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", begun_by)
        RunFolder.create(here / "runs" / "first", tiny, b"").close()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
        for count in "01":
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
            assert main(command) == 0
        (here / "runs" / "first" / "config.json").unlink()
    assert [resume for _, resume in calls] == [False] * 5 + [True] and calls[-1][0] == tiny
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main(command) == 3 and "add --standalone or --rdzv-id NAME" in capsys.readouterr().err


def test_torchrun_and_a_terminal(here, corpus):
    """Two gloo processes through `-m golfgpt`, output on a pseudo-terminal: the live line is drawn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "golfgpt"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command, "train", "--recipe", "demo", "--data.path", str(corpus), "--name", "two", *TINY],
        stdout=slave,
        stderr=slave,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says EIO when the last writer is gone
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(timeout=200) == 0, output.decode()
    assert b"run runs/two, recipe demo" in output and b"ms/step" in output
    assert "world_size:2" in (here / "runs" / "two" / "train.log").read_text()
    assert (here / "runs" / "two" / "result.json").exists()
