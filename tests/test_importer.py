"""Published files as runs, and runs in other formats: through the command line, on a model trained here."""

from __future__ import annotations

import io
import json
import lzma
import zlib
from dataclasses import replace

import pytest
import torch

from golfgpt.cli import main
from golfgpt.config import AverageConfig, QuantConfig
from golfgpt.importer import import_model, parts_of
from golfgpt.published import from_published, read_export, to_published
from golfgpt.quant import artifact
from golfgpt.quant.quantizer import Quantizer
from golfgpt.train.run_folder import trained_weights
from golfgpt.train.train import train

QUANT = QuantConfig(bits=6, keep_numel=1000, control_dtype="float16", compressor="zlib")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of a few steps that averages its weights."""
    from models import tiny_config

    folder = tmp_path_factory.mktemp("runs")
    average = AverageConfig(kind="swa", swa_start_lr=1.0, swa_every=2)
    config = replace(tiny_config(corpus), quant=QUANT, average=average)
    train(config, folder / "first", quiet=True)
    return folder / "first"


def saved(content, compress=lambda data: data) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return compress(buffer.getvalue())


def mixed(state: dict[str, torch.Tensor], model) -> dict:
    """R5's dict: int6 codes with float16 scales, the rest in float16."""
    w, m = {}, {}
    for part, tensor in Quantizer(model, QUANT).encode(state).items():
        names = to_published({part: tensor.values})
        for name, values in names.items():
            if tensor.scale is None:
                w[name], m[name] = values.half(), "passthrough"
            else:
                scale = to_published({part: tensor.scale})[name]
                w[f"{name}.q"], w[f"{name}.scale"], m[name] = values, scale, {"type": "int6"}
    return {"w": w, "m": m}


def run_json(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_state_dict_becomes_a_run_that_scores_like_the_run_it_is_of(trained, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = trained_weights(trained)
    bare = {name: tensor.clone() for name, tensor in to_published(weights).items()}
    (tmp_path / "final_model.pt").write_bytes(saved(bare))
    options = ["--quant.bits", "6", "--quant.keep-numel", "1000", "--quant.control-dtype", "float16"]
    options += ["--quant.clip", "max", "--quant.clip-floor", "0", "--quant.codes-from", "stored_scale"]
    options += ["--data.seq-len", "64", "--data.batch-tokens", "1024"]
    tokenizer = str(corpus / "tokenizer.model")
    found = run_json(capsys, "import", "final_model.pt", "--tokenizer", tokenizer, "--name", "a", *options)
    assert found["format"] == "state_dict" and found["model"]["mlp_hidden"] == 64
    assert set(found["assumed"]) == {"logit_softcap", "rope_base", "rope_reference_len"}
    original, imported = artifact.read(trained / "model.golf"), artifact.read(tmp_path / "runs/a/model.golf")
    for name, tensor in original.state.items():
        assert torch.equal(tensor, imported.state[name]), name
    tail = ["--data.path", str(corpus), "--eval.max-tokens", "4000", "--eval.window", "64", "--eval.stride", "48"]
    tail += ["--runtime.dtype", "float32", "--runtime.device", "cpu"]
    score = run_json(capsys, "eval", "runs/a", *tail)["score"]
    result = json.loads((trained / "result.json").read_text())["score"]
    assert score["val_bpb"] == pytest.approx(result["val_bpb"], rel=1e-9)
    assert main(["sample", "runs/a", "--tokens", "5"]) == 0
    assert main(["export", "runs/a"]) == 0 and (tmp_path / "runs/a/model.safetensors").exists()


@pytest.mark.parametrize("compress", [zlib.compress, lzma.compress], ids=["zlib", "xz"])
def test_codes_are_taken_over_and_not_quantized_twice(trained, corpus, tmp_path, compress):
    from models import tiny_config

    from golfgpt.data.tokenizer import Tokenizer

    state = trained_weights(trained)
    average = AverageConfig(kind="swa")  # as the recipe that a user names may have it
    config = replace(tiny_config(corpus), average=average)
    (tmp_path / "final_model.int8.ptz").write_bytes(saved(mixed(state, config.model), compress))
    export = read_export(tmp_path / "final_model.int8.ptz")
    tokenizer = Tokenizer.from_file(corpus / "tokenizer.model")
    info = import_model(export, tokenizer, config, tmp_path / "run")
    ours = Quantizer(config.model, QUANT).encode(state)
    theirs = parts_of(export, config.model)
    assert theirs.keys() == ours.keys() and info.formats == {name: part.format for name, part in theirs.items()}
    for name, part in ours.items():
        assert torch.equal(theirs[name].values, part.values), name
        assert part.scale is None or torch.equal(theirs[name].scale, part.scale), name
    weights = trained_weights(tmp_path / "run")
    for name, tensor in from_published(export.state, config.model).items():
        assert torch.equal(weights[name], tensor), name


def flat_codes(w: dict, m: dict) -> None:
    name = "blocks.0.attn.q_gain"
    w.pop(name)
    w[f"{name}.q"], w[f"{name}.scale"] = torch.ones(3, dtype=torch.int8), torch.ones((), dtype=torch.float16)
    m[name] = {"type": "int8"}


def large_scales(w: dict, m: dict) -> None:
    w["blocks.0.mlp.fc.weight.scale"] = torch.full((64,), 5e37)
    w["blocks.0.mlp.fc.weight.q"].clamp_(-5, 5)


def a_negative_view(w: dict, m: dict) -> None:
    w["tok_emb.weight.q"] = torch._neg_view(w["tok_emb.weight.q"].clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flat_codes, "attn.q_gain is quantized and no matrix"),
        (large_scales, "scales whose weights exceed float32"),
        (a_negative_view, "tok_emb.weight is not a plain contiguous tensor"),
    ],
)
def test_what_no_reader_would_take_is_not_written(trained, corpus, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    content = mixed(trained_weights(trained), artifact.inspect(trained / "model.golf").model)
    change(content["w"], content["m"])
    (tmp_path / "m.ptz").write_bytes(saved(content, zlib.compress))
    assert main(["import", "m.ptz", "--tokenizer", str(corpus / "tokenizer.model"), "--name", "a"]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs/a/config.json").exists()


def test_an_import_that_fails_gives_its_name_back(trained, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bare = {name: tensor.clone() for name, tensor in to_published(trained_weights(trained)).items()}
    (tmp_path / "final_model.pt").write_bytes(saved(bare))
    argv = ["import", "final_model.pt", "--tokenizer", str(corpus / "tokenizer.model"), "--name", "a"]
    with monkeypatch.context() as full:
        for function in ("checkpoint.save", "write_bytes"):
            full.setattr(f"golfgpt.importer.{function}", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
            assert main(argv) == 3
            full.undo()
    assert main(argv) == 0
    assert main(["train", "--resume", "runs/a", "--data.path", str(corpus)]) == 3
    assert "was imported: there is no training to continue" in capsys.readouterr().err


def test_an_artifact_alone_is_exported_from_what_it_decodes_to(trained, tmp_path, capsys):
    (tmp_path / "b.golf").write_bytes((trained / "model.golf").read_bytes())
    found = run_json(capsys, "export", str(tmp_path / "b.golf"), "--to", "golf", "--quant.compressor", "zlib")
    assert found["source"] == "artifact" and artifact.read(tmp_path / "export.golf").state
    argv = ["--to", "golf", "--quant.compressor", "zlib", "--out", str(tmp_path / "b.golf"), "--overwrite"]
    assert main(["export", str(tmp_path / "b.golf"), *argv]) == 3, "its own source"
    assert main(["export", str(tmp_path / "export.golf"), *argv]) == 0


def test_a_run_is_stored_in_other_formats_from_its_trained_weights(trained, capsys):
    sizes = {}
    for bits in (8, 5):
        out = trained / f"int{bits}.golf"
        argv = ["export", str(trained), "--to", "golf", "--quant.bits", str(bits), "--out", str(out)]
        sizes[bits] = run_json(capsys, *argv)["bytes"]
        assert main(argv) == 3 and "replace it with --overwrite" in capsys.readouterr().err
        assert run_json(capsys, *argv, "--overwrite")["bytes"] == sizes[bits]
        expected = Quantizer(artifact.inspect(out).model, replace(QUANT, bits=bits))
        decoded = expected.decode(expected.encode(trained_weights(trained)))
        assert all(torch.equal(tensor, decoded[name]) for name, tensor in artifact.read(out).state.items())
    assert sizes[5] < sizes[8]
    config = json.loads((trained / "config.json").read_text())
    tail = ["--eval.max-tokens", "2000", "--runtime.device", "cpu", "--data.path", config["data"]["path"]]
    scores = [run_json(capsys, "eval", str(trained / name), *tail)["score"] for name in ("int5.golf", "model.golf")]
    assert scores[0]["val_bpb"] != scores[1]["val_bpb"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "golf", "--out", "{run}/model.golf"], "or the artifact of a run"),
        (["--to", "golf", "--out", "{run}/config.json"], "must end in .golf"),
        (["--out", "{run}/checkpoints/step_0.safetensors"], "is in the checkpoints folder of a run"),
        (["--out", "{run}/model.golf"], "must end in .safetensors"),
        (["--quant.bits", "5"], "quant.bits: 6 -> 5 has no effect on --to safetensors"),
        (["--to", "golf", "--quant.qat", "export"], "quant.qat: 'off' -> 'export' has no effect on export"),
        (["--to", "golf", "--quant.rules", "nothing=int6"], "'nothing' matches no tensor of this model"),
    ],
)
def test_exports_that_make_no_sense_are_refused(trained, options, message, capsys):
    assert main(["export", str(trained), *(option.format(run=trained) for option in options)]) == 3
    assert message in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_refused(trained, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = to_published(trained_weights(trained))
    state["tok_emb.weight"] = state["tok_emb.weight"][:300].clone()
    (tmp_path / "m.pt").write_bytes(saved({name: tensor.clone() for name, tensor in state.items()}))
    assert main(["import", "m.pt", "--tokenizer", str(corpus / "tokenizer.model")]) == 3
    assert "the tokenizer has 384 tokens, the model 300" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
