"""Agreement with the published scripts: vectors in the folder named by GOLFGPT_CONFORMANCE.

Every configuration, shape and hyperparameter is read from the files' metadata, so that vectors of the same
kinds with other seeds and shapes run unchanged. A kind whose recipe is not built yet is skipped by name.
Tolerances are those of the vectors' own description.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golfgpt_kernels import newton_schulz
from safetensors import safe_open

from golfgpt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig, ScheduleConfig
from golfgpt.data.shards import open_shard
from golfgpt.distributed import Ranks
from golfgpt.evaluate import Windows, score_windows
from golfgpt.model import GPT
from golfgpt.optim import Muon
from golfgpt.quant import Quantizer
from golfgpt.recipes import RECIPES
from golfgpt.trainer import Trainer
from golfgpt.upstream import from_upstream, read_ptz, to_upstream

FOLDER = os.environ.get("GOLFGPT_CONFORMANCE")
FILES = sorted(p for p in Path(FOLDER).iterdir() if p.suffix in (".safetensors", ".ptz")) if FOLDER else []

pytestmark = pytest.mark.skipif(not FOLDER, reason="GOLFGPT_CONFORMANCE names no folder of vectors")


class Vectors(dict):
    """Tensors of one file, with its metadata parsed from JSON where it is JSON."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            super().__init__({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            self.path, self.meta = path, {}
            for key, value in (file.metadata() or {}).items():
                try:
                    self.meta[key] = json.loads(value)
                except json.JSONDecodeError:
                    self.meta[key] = value

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}


def model_config(meta: dict) -> ModelConfig:
    """Upstream's names to ours; skips configurations whose recipe is not built yet."""
    config = dict(meta["config"])
    waits = [name for name in ("bigram_vocab_size", "bigram_dim") if config.pop(name, 0)]
    waits += [name for name in ("rope_reference_length", "resid_mix_init") if name in meta]
    waits += ["qat"] if not meta.get("qat", "none").startswith("none") else []
    if waits:
        pytest.skip(f"recipe {meta.get('recipe')} needs {', '.join(waits)}")
    config.pop("train_seq_len", None)
    hidden = int(config["model_dim"] * config.pop("mlp_mult"))
    return ModelConfig(mlp_hidden=hidden, **config)


def build(config: ModelConfig, state: dict[str, torch.Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(from_upstream(state, config))
    return model


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def check_gpt(v: Vectors) -> None:
    model = build(model_config(v.meta), v.part("param."))
    loss = model.loss(v["input_ids"], v["target_ids"])
    loss.backward()
    assert abs(loss.item() - v["loss"].item()) <= 1e-5
    grads = to_upstream({name: p.grad for name, p in model.named_parameters()})
    expected = v.part("grad.")
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative(grads[name], grad) <= 1e-4, name
    if "eval_logits" in v:
        logits = model.logits(model(v["input_ids"]))
        assert (logits - v["eval_logits"]).abs().max() <= 1e-4


def check_muon(v: Vectors) -> None:
    for name in sorted(k for k in v if k.startswith("ns.") and ".out" in k):
        stem, steps = name.rsplit(".out", 1)
        assert relative(newton_schulz(v[f"{stem}.in"], steps=int(steps)), v[name]) <= 0.1, name
    for kind in ("muon", "muon_wd"):
        hyper = v.meta[kind]
        for i in sorted({k.split(".")[1] for k in v if k.startswith(f"{kind}.")}):
            p = torch.nn.Parameter(v[f"muon.{i}.p0"].clone())
            optimizer = Muon([p], **hyper)
            grads = [v[k] for k in sorted(k for k in v if k.startswith(f"muon.{i}.g"))]
            for grad in grads:
                p.grad = grad
                optimizer.step()
            last = v[f"{kind}.{i}.p{len(grads)}"]
            error = (p.detach() - last).norm() / (last - v[f"muon.{i}.p0"]).norm()
            assert error <= 0.1, f"{kind}.{i}"


def check_quant(v: Vectors) -> None:
    if "R0" not in str(v.meta["recipe"]).split(", "):
        pytest.skip(f"recipe {v.meta['recipe']} is not built yet")
    source = Vectors(v.path.with_name(v.meta["state"] + ".safetensors"))
    config = model_config(source.meta)
    quantizer = Quantizer(config, RECIPES["baseline"].config.quant)
    assert quantizer.payload_bytes == v.meta["payload_bytes"]
    encoded = quantizer.encode(from_upstream({k: t.float() for k, t in source.items()}, config))
    codes = to_upstream({name: t.values for name, t in encoded.items()})
    scales = to_upstream({n: t.scale for n, t in encoded.items() if t.scale is not None})
    for name, expected in v.part("q.").items():
        assert torch.equal(codes[name], expected), name
    for name, expected in v.part("scale.").items():
        assert torch.equal(scales[name], expected), name
    for name, expected in v.part("keep.").items():
        assert torch.equal(codes[name], expected), name
    assert {*v.part("q."), *v.part("keep.")} == set(codes)


def check_ptz(path: Path) -> None:
    if not path.name.split(".")[1].startswith("r0"):
        pytest.skip(f"the export format of {path.name} is not built yet")
    export = Vectors(next(path.parent.glob("quant_r0*.safetensors")))
    source = Vectors(path.with_name(export.meta["state"] + ".safetensors"))
    weights = read_ptz(path)
    for name, codes in export.part("q.").items():
        decoded = codes.float() * export[f"scale.{name}"].float()[:, None]
        dtype = torch.bfloat16 if source[name].dtype == torch.bfloat16 else torch.float32
        assert torch.equal(weights[name], decoded.to(dtype).float()), name
    for name, kept in export.part("keep.").items():
        assert torch.equal(weights[name], kept), name
    build(model_config(source.meta), weights)


def check_sliding(v: Vectors) -> None:
    model = build(model_config(v.meta), v.part("param."))
    tokens = v["tokens"].numpy()
    prev, ids = tokens[:-1], tokens[1:]
    spaced = v["has_leading_space"].numpy()[ids].astype(bool) & ~v["is_boundary"].numpy()[prev].astype(bool)
    nbytes = int(v["base_bytes"].numpy()[ids].sum() + spaced.sum())
    for key in sorted(k for k in v if k.startswith("nll.stride")):
        windows = Windows(len(ids), v.meta["window"], int(key.removeprefix("nll.stride")))
        got = np.full(len(tokens), np.nan)
        with torch.no_grad():
            for positions, nats in score_windows(
                model,
                model.head_weight,
                model.config.logit_softcap,
                lambda start, stop: tokens[start:stop],
                windows,
                range(len(windows)),
                7,
                torch.device("cpu"),
            ):
                assert np.isnan(got[positions]).all(), "a token was scored twice"
                got[positions] = nats
        expected = v[key].numpy()
        assert np.abs(got[1:] - expected).max() <= 1e-4, key
        mean, bpb = v.meta["once." + key.removeprefix("nll.")]
        assert abs(got[1:].mean() - mean) <= 1e-5
        assert abs(got[1:].sum() / np.log(2) / nbytes - bpb) <= 1e-5


class ShardOnly:
    """What `Trainer` needs of a data set: the training shards."""

    def __init__(self, shard: Path):
        self.train = [open_shard(shard)]


def check_trajectory(v: Vectors) -> None:
    hyper = v.meta["hyperparameters"]
    config = model_config(v.meta)
    beta1, beta2 = hyper["adam_betas"]
    run = RunConfig(
        model=config,
        optim=OptimConfig(
            matrix_lr=hyper["matrix_lr"],
            scalar_lr=hyper["scalar_lr"],
            tied_embed_lr=hyper["tied_embed_lr"],
            muon_momentum=hyper["muon_momentum"],
            muon_momentum_warmup_start=hyper["muon_momentum_warmup_start"],
            muon_momentum_warmup_steps=hyper["muon_momentum_warmup_steps"],
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=hyper["adam_eps"],
            weight_decay=hyper["weight_decay"],
            grad_clip_norm=hyper["grad_clip_norm"],
        ),
        schedule=ScheduleConfig(
            kind="warmdown_steps",
            max_seconds=None,
            max_steps=hyper["iterations"],
            warmdown_steps=hyper["warmdown_iters"],
        ),
        data=DataConfig(batch_tokens=hyper["train_batch_tokens"], seq_len=hyper["train_seq_len"]),
        runtime=RuntimeConfig(dtype="float32"),
    )
    trainer = Trainer(run, ShardOnly(v.path.with_name(v.meta["shard"])), Ranks(0, 1, torch.device("cpu")))
    init = v.part("init.")
    trainer.model.load_state_dict(from_upstream(init, config))
    for step in range(hyper["iterations"]):
        result = trainer.accumulate(step)
        tolerance = 1e-5 if step == 0 else 2e-3 if step < 8 else 1e-2
        assert abs(result.loss - v["losses"][step].item()) <= tolerance, step
        multiplier = trainer.update(step, result)
        assert abs(multiplier - v["lr_multiplier"][step].item()) <= 1e-9, step
    final = to_upstream({k: p.detach() for k, p in trainer.model.named_parameters()})
    for name, expected in v.part("final.").items():
        if expected.numel() >= 64:
            error = (final[name] - expected).norm() / (expected - init[name]).norm()
            assert error <= 0.3, (name, error)


CHECKS = {
    "gpt": check_gpt,
    "muon": check_muon,
    "quant": check_quant,
    "sliding": check_sliding,
    "trajectory": check_trajectory,
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_conformance(path: Path):
    if path.suffix == ".ptz":
        return check_ptz(path)
    v = Vectors(path)
    kind = path.name.replace(".", "_").split("_")[0]
    if path.name.startswith("quant_state"):
        pytest.skip("input of the quant_* vectors")
    if kind not in CHECKS:
        pytest.skip(f"kind {kind} belongs to a recipe that is not built yet")
    CHECKS[kind](v)
