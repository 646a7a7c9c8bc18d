"""Published files as runs, and runs in other formats: through the command line, on a model trained here."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import in_banks, latest_record, lively, tiny_config

from golfgpt.cli import main
from golfgpt.config import AverageConfig, QuantConfig
from golfgpt.files import write_bytes
from golfgpt.importer import layer_groups_of
from golfgpt.published.files import read_export
from golfgpt.published.names import from_published, to_published
from golfgpt.quant import artifact
from golfgpt.quant.formats import decode
from golfgpt.quant.quantizer import Quantizer
from golfgpt.train import checkpoint
from golfgpt.train.run_folder import newest_weights
from golfgpt.train.train import train

QUANT = QuantConfig(bits=6, keep_numel=1000, control_dtype="float16", compressor="zlib")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A run of a few steps that averages its weights."""
    folder = tmp_path_factory.mktemp("runs")
    average = AverageConfig(kind="swa", swa_start_lr=1.0, swa_every=2)
    train(replace(tiny_config(corpus), quant=QUANT, average=average), folder / "first", quiet=True)
    return folder / "first"


@pytest.fixture
def state(trained) -> dict[str, torch.Tensor]:
    """Its weights, as published scripts save them."""
    return {name: tensor.clone() for name, tensor in to_published(newest_weights(trained)[0].model).items()}


@pytest.fixture
def import_argv(corpus, tmp_path, monkeypatch) -> list[str]:
    """`golfgpt import m.pt` as the run "a" in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["import", "m.pt", "--tokenizer", str(corpus / "tokenizer.model"), "--name", "a"]


def mixed(trained: Path) -> dict:
    """R5's dict: int6 codes with float16 scales, the rest in float16."""
    w, m = {}, {}
    model = artifact.inspect(trained / "model.golf").model
    for bank, tensor in Quantizer(model, QUANT).encode(newest_weights(trained)[0].model).items():
        for name, values in to_published({bank: tensor.values}).items():
            if tensor.scale is None:
                w[name], m[name] = values.half(), "passthrough"
            else:
                scale = to_published({bank: tensor.scale})[name]
                w[f"{name}.q"], w[f"{name}.scale"], m[name] = values, scale, {"type": "int6"}
    return {"w": w, "m": m}


def run_json(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# Import


def test_a_state_dict_becomes_a_run_that_scores_like_the_run_it_is_of(trained, state, import_argv, corpus, capsys):
    torch.save(state, "m.pt")
    options = ["--quant.bits", "6", "--quant.keep-numel", "1000", "--quant.control-dtype", "float16"]
    options += ["--quant.clip", "max", "--quant.clip-floor", "0", "--quant.codes-from", "stored_scale"]
    options += ["--data.seq-len", "64", "--data.batch-tokens", "1024"]
    found = run_json(capsys, *import_argv, *options)
    assert found["format"] == "state_dict" and found["model"]["mlp_hidden"] == 64
    assert set(found["assumed"]) == {"logit_softcap", "rope_base", "rope_reference_len"}
    original, imported = artifact.read(trained / "model.golf").state, artifact.read("runs/a/model.golf").state
    assert all(torch.equal(tensor, imported[name]) for name, tensor in original.items())
    tail = ["--data.path", str(corpus), "--eval.max-tokens", "4000", "--eval.window", "64", "--eval.stride", "48"]
    tail += ["--runtime.dtype", "float32", "--runtime.device", "cpu"]
    score = run_json(capsys, "eval", "runs/a", *tail)["score"]
    result = json.loads((trained / "result.json").read_text())["score"]
    assert score["val_bpb"] == pytest.approx(result["val_bpb"], rel=1e-9)
    assert main(["sample", "runs/a", "--tokens", "5"]) == 0
    assert main(["export", "runs/a"]) == 0 and Path("runs/a/model.safetensors").exists()


RECORD = latest_record(tiny_config(Path()).model)
RECORD_OPTIONS = [
    "--model.num-layers", "3", "--model.mlp-slope", "0.5", "--model.rope-dims", "4", "--model.ln-scale",
    "--model.xsa-layers", "0", "1", "2", "--model.attn-gate-scale", "0.5", "--model.smear-gate", "input",
    "--model.document-start", "1", "--model.loop.first", "1", "--model.loop.last", "1", "--model.loop.passes", "3",
    "--model.parallel.first", "2",
]  # fmt: skip


@pytest.mark.parametrize("spelling", [dict, in_banks])
def test_a_later_record_is_imported_scored_exported_and_imported_again(import_argv, corpus, spelling, capsys):
    weights = {name: p.detach() for name, p in lively(RECORD).named_parameters()}
    torch.save(spelling({name: tensor.clone() for name, tensor in to_published(weights).items()}), "m.pt")
    assert main(import_argv) == 3
    assert "skip_weights has 2 rows, expected 1" in capsys.readouterr().err
    assert main([*import_argv, *RECORD_OPTIONS]) == 0
    out = capsys.readouterr().out
    for shown in (
        "loop.last 1 (layers 4 to 5 in",
        "parallel.first 2 (7 of 11",
        "attn_gate_scale 0.5 (0.5 in",
        "xsa_layers (0, 1",
    ):
        assert f"assumed, because the tensors do not show it: model.{shown}" in out
    assert "model.parallel.kind" not in out and "value_embedding" not in out
    model = artifact.inspect("runs/a/model.golf").model
    assert model == RECORD
    assert all(torch.equal(tensor, weights[name]) for name, tensor in newest_weights(Path("runs/a"))[0].model.items())
    tail = ["--data.path", str(corpus), "--eval.max-tokens", "500", "--eval.window", "64", "--runtime.device", "cpu"]
    assert math.isfinite(run_json(capsys, "eval", "runs/a", *tail)["score"]["val_bpb"])
    assert main(["sample", "runs/a", "--tokens", "5"]) == 0
    assert main(["export", "runs/a", "--source", "checkpoint", "--out", "a.safetensors"]) == 0
    torch.save(safetensors.torch.load_file("a.safetensors"), "m.pt")
    run_json(capsys, *import_argv[:-1], "b", *RECORD_OPTIONS)
    assert Path("runs/a/model.golf").read_bytes() == Path("runs/b/model.golf").read_bytes()


def test_codes_are_taken_over_and_not_quantized_twice(trained, import_argv, capsys):
    torch.save(mixed(trained), "m.pt")
    run_json(capsys, *import_argv, "--average.kind", "swa")  # as the recipe that a user names may have it
    export, info = read_export("m.pt"), artifact.inspect("runs/a/model.golf")
    ours = Quantizer(info.model, QUANT).encode(newest_weights(trained)[0].model)
    theirs = layer_groups_of(export, info.model)
    assert theirs.keys() == ours.keys() and info.formats == {name: group.format for name, group in theirs.items()}
    for name, group in ours.items():
        assert torch.equal(theirs[name].values, group.values), name
        assert group.scale is None or torch.equal(theirs[name].scale, group.scale), name
    decoded, weights = artifact.read("runs/a/model.golf").state, newest_weights(Path("runs/a"))[0].model
    for name, tensor in from_published(export.state, info.model).items():
        assert torch.equal(weights[name], tensor), name
        torch.testing.assert_close(decoded[name], tensor, rtol=2**-8, atol=0)  # bfloat16 rounds the embedding


def flat_codes(content: dict) -> None:
    w, name = content["w"], "blocks.0.attn.q_gain"
    w.pop(name)
    w[f"{name}.q"], w[f"{name}.scale"] = torch.ones(3, dtype=torch.int8), torch.ones((), dtype=torch.float16)
    content["m"][name] = {"type": "int8"}


def large_scales(content: dict) -> None:
    content["w"]["blocks.0.mlp.fc.weight.scale"] = torch.full((64,), 5e37)
    content["w"]["blocks.0.mlp.fc.weight.q"].clamp_(-5, 5)


def small_vocabulary(content: dict) -> None:
    for name in ("tok_emb.weight.q", "tok_emb.weight.scale"):
        content["w"][name] = content["w"][name][:300].clone()


def banked_codes(content: dict) -> None:
    w, m, names = content["w"], content["m"], [f"blocks.{i}.mlp.fc.weight" for i in range(3)]
    w["mlp_up_bank.q"] = torch.stack([w.pop(f"{name}.q") for name in names])
    w["mlp_up_bank.scale"] = torch.ones(3, dtype=torch.float16)
    for name in names:
        del w[f"{name}.scale"], m[name]
    m["mlp_up_bank"] = {"type": "int6"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (banked_codes, "mlp_up_bank is quantized, expected a passthrough tensor: it is not a matrix"),
        (flat_codes, "attn.q_gain is quantized, expected a passthrough tensor"),
        (large_scales, "scales whose weights exceed float32"),
        (small_vocabulary, "the tokenizer has 384 tokens, the model 300"),
    ],
)
def test_what_makes_no_run_is_not_written(trained, import_argv, capsys, change, message):
    content = mixed(trained)
    change(content)
    torch.save(content, "m.pt")
    assert main(import_argv) == 3
    assert message in capsys.readouterr().err
    assert not Path("runs/a/config.json").exists()


def test_an_import_that_fails_gives_its_name_back(state, import_argv, corpus, monkeypatch, capsys):
    torch.save(state, "m.pt")
    for function in ("checkpoint.save", "write_bytes"):
        with monkeypatch.context() as full:
            full.setattr(f"golfgpt.importer.{function}", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
            assert main(import_argv) == 3
    assert main(import_argv) == 0
    assert main(["train", "--resume", "runs/a", "--data.path", str(corpus)]) == 3
    assert "was imported: there is no training to continue" in capsys.readouterr().err


# Export


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
        decoded = decode(expected.encode(newest_weights(trained)[0].model))
        assert all(torch.equal(tensor, decoded[name]) for name, tensor in artifact.read(out).state.items())
    assert sizes[5] < sizes[8]
    config = json.loads((trained / "config.json").read_text())
    tail = ["--eval.max-tokens", "2000", "--runtime.device", "cpu", "--data.path", config["data"]["path"]]
    scores = [run_json(capsys, "eval", str(trained / name), *tail)["score"] for name in ("int5.golf", "model.golf")]
    assert not math.isclose(scores[0]["val_bpb"], scores[1]["val_bpb"])


def test_an_average_of_too_few_steps_is_not_exported_and_said(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    saved, _ = checkpoint.latest(run / "checkpoints")
    empty = saved.average | {"count": torch.zeros(())}
    checkpoint.save(run / "checkpoints", replace(saved, step=saved.step + 1, average=empty))
    assert main(["export", str(run), "--source", "checkpoint"]) == 0
    assert f"warning: 0 of {saved.step + 1} steps are in the average, too few" in capsys.readouterr().err
    state = from_published(
        safetensors.torch.load_file(run / "model.safetensors"), artifact.inspect(run / "model.golf").model
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.model.items())


def test_a_damaged_end_of_a_run_is_not_replaced_by_an_earlier_step(trained, tmp_path, capsys):
    """And what an artifact says of itself comes from the artifact, not from what lies beside it."""
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "tokenizer.model").unlink()
    assert main(["export", str(run), "--to", "golf"]) == 0
    assert (
        artifact.inspect(run / "export.golf").tokenizer_sha256 == artifact.inspect(run / "model.golf").tokenizer_sha256
    )
    saved, _ = checkpoint.latest(run / "checkpoints")
    checkpoint.save(run / "checkpoints", replace(saved, step=saved.step - 1, finished=False))
    write_bytes(run / "checkpoints" / f"step_{saved.step:08d}.safetensors", b"cut off")  # `saved` maps the other file
    capsys.readouterr()
    assert main(["export", str(run), "--to", "golf", "--overwrite"]) == 3
    refused = capsys.readouterr().err
    assert f"no intact checkpoint of its end, only one of step {saved.step - 1} (" in refused
    assert "use --source artifact" in refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "golf", "--out", "{run}/model.golf"], "or the artifact of a run"),
        (["--to", "golf", "--out", "{run}/config.json"], "must end in .golf"),
        (["--out", "{run}/checkpoints/step_0.safetensors"], "is in the checkpoints folder of a run"),
        (["--out", "{run}/model.golf"], "must end in .safetensors"),
        (["--quant.bits", "5"], "quant.bits: 6 -> 5 has no effect on --to safetensors"),
        (["--to", "golf", "--quant.qat", "export"], "quant.qat: 'off' -> 'export' has no effect on export"),
        (
            ["--to", "golf", "--quant.rules", "nothing=int6"],
            "'nothing' decides nothing: it matches no tensor",
        ),
    ],
)
def test_exports_that_make_no_sense_are_refused(trained, options, message, capsys):
    assert main(["export", str(trained), *(option.format(run=trained) for option in options)]) == 3
    assert message in capsys.readouterr().err
