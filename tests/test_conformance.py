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
from golfgpt.model import GPT, LAYER_MATRICES, MATRIX_BANKS, rope_table
from golfgpt.optim import Muon
from golfgpt.quant import Quantizer
from golfgpt.recipes import RECIPES
from golfgpt.scoring import Scorer, Windows, score_windows
from golfgpt.trainer import Trainer
from golfgpt.upstream import from_upstream, parameter_shapes, read_ptz, to_upstream

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


def model_config(v: Vectors) -> ModelConfig:
    """Upstream's names to ours. R5's modules scale the rotary base beyond the training length."""
    config = dict(v.meta["config"])
    reference = v.meta.get("rope_reference_length", config.pop("train_seq_len", None))
    pairs = config.pop("bigram_vocab_size", 0)
    return ModelConfig(
        mlp_hidden=int(config["model_dim"] * config.pop("mlp_mult")),
        rope_reference_len=reference,
        resid_mix_init=v.meta.get("resid_mix_init", "identity"),
        smear_gate="after_norm" if any(name.endswith("smear.gate") for name in v) else "none",
        bigram_hash="xor" if pairs else "none",
        bigram_vocab_size=pairs,
        bigram_dim=config.pop("bigram_dim", 0) if pairs else 0,
        **config,
    )


def fake_quantization(v: Vectors, config: ModelConfig, impl: str) -> dict[str, dict] | None:
    """Options of each bank that the file's recipe fake-quantizes in training: grids of fp32 scales."""
    qat = v.meta.get("qat", "none")
    if qat.startswith("none"):
        return None
    grid = {"scale_dtype": torch.float32, "impl": impl}
    if qat.startswith("int6_ste on every linear"):
        grid |= {"bits": 6, "clip": "quantile", "scale_floor": 1e-8 / 31}
        return {name: grid for name in LAYER_MATRICES}
    assert qat.startswith("int5 rows for .mlp., int6 rows for .attn. and *.proj"), qat
    grid |= {"code_range": "full"}
    int5, int6 = grid | {"bits": 5, "scale_floor": 1e-12 / 15}, grid | {"bits": 6, "scale_floor": 1e-12 / 31}
    banks = [name for name in MATRIX_BANKS if name in parameter_shapes(config)]
    return {name: int5 if name.startswith("mlp") else int6 for name in banks}


def build(config: ModelConfig, state: dict[str, torch.Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(from_upstream(state, config))
    return model


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def check_gpt(v: Vectors, impl: str) -> None:
    config = model_config(v)
    initial = to_upstream({name: p.detach() for name, p in GPT(config).named_parameters()})
    for name, expected in v.part("init.").items():
        assert (initial[name] - expected).abs().max() <= 1e-6, name
    model = build(config, v.part("param."))
    loss = model.loss(v["input_ids"], v["target_ids"], fake_quant=fake_quantization(v, config, impl))
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


def check_ntk_rope(v: Vectors) -> None:
    for name in (key for key in v if key.startswith("cos.")):
        head_dim, length = (int(number) for number in name.split(".")[1:])
        config = ModelConfig(
            model_dim=head_dim,
            num_heads=1,
            num_kv_heads=1,
            rope_base=v.meta["rope_base"],
            rope_reference_len=v.meta["rope_reference_length"],
        )
        cos, sin = rope_table(0, length, head_dim, config.rope_base_at(length), torch.device("cpu"))
        assert (cos[::7] - v[name]).abs().max() <= 1e-3, name
        assert (sin[::7] - v[name.replace("cos", "sin")]).abs().max() <= 1e-3, name


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
    config = model_config(source)
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
    build(model_config(source), weights)


def check_sliding(v: Vectors) -> None:
    model = build(model_config(v), v.part("param."))
    tokens = v["tokens"].numpy()
    prev, ids = tokens[:-1], tokens[1:]
    spaced = v["has_leading_space"].numpy()[ids].astype(bool) & ~v["is_boundary"].numpy()[prev].astype(bool)
    nbytes = v["base_bytes"].numpy()[ids] + spaced
    slab = torch.stack((v["tokens"].long(), torch.from_numpy(np.append(0, nbytes)).long()))

    def score(windows: Windows) -> tuple[torch.Tensor, tuple[float, float]]:
        """Per-token nats, NaN where not scored, and (mean nats, bits per byte)."""
        nats, counted = torch.full((len(ids),), torch.nan, dtype=torch.float64), 0
        scorer = Scorer(model, torch.float32)
        with torch.no_grad():
            for _, part, logprobs in score_windows(scorer, lambda a, b: slab[:, a:b], windows, range(len(windows)), 7):
                targets = part.positions[part.scored] - 1
                assert nats[targets].isnan().all(), "a token was scored twice"
                nats[targets] = -logprobs[part.scored].double()
                counted += int(part.nbytes[part.scored].sum())
        total = float(nats.nansum())
        return nats, (total / int((~nats.isnan()).sum()), total / np.log(2) / counted)

    keys = [key for key in sorted({*v, *v.meta}) if key.startswith(("nll.stride", "pr65.stride"))]
    assert keys
    for key in keys:
        kind, stride = key.split(".stride")
        windows = Windows(len(ids), v.meta["window"], int(stride), r4=kind == "pr65")
        nats, means = score(windows)
        if kind == "nll":
            assert (nats - v[key]).abs().max() <= 1e-4, key
        expected = v.meta[key.replace("nll", "once")]
        assert np.abs(np.subtract(means, expected)).max() <= 1e-5, key


class ShardOnly:
    """What `Trainer` needs of a data set: the training shards."""

    def __init__(self, shard: Path):
        self.train = [open_shard(shard)]


def check_trajectory(v: Vectors) -> None:
    hyper, qat = v.meta["hyperparameters"], v.meta.get("qat", "none")
    waits = [] if qat.startswith("none") else [f"fake quantization in the training loop ({qat})"]
    waits += [] if hyper["warmdown_shape"] == "linear" else [f"a {hyper['warmdown_shape']} warmdown"]
    waits += ["weight averaging"] if hyper["swa_every"] else []
    if waits:
        pytest.skip(f"recipe {v.meta['recipe']} needs {', '.join(waits)}")
    config = model_config(v)
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
    "muon": check_muon,
    "ntk": check_ntk_rope,
    "quant": check_quant,
    "sliding": check_sliding,
    "trajectory": check_trajectory,
}


GPT_FILES = [path for path in FILES if path.name.startswith("gpt_")]


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("path", GPT_FILES, ids=lambda p: p.name)
def test_gpt(path: Path, impl: str):
    v = Vectors(path)
    if impl == "triton" and v.meta.get("qat", "none").startswith("none"):
        pytest.skip("nothing is fake-quantized")
    if impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on CPU tensors under TRITON_INTERPRET=1 only")
    check_gpt(v, impl)


@pytest.mark.parametrize("path", [path for path in FILES if path not in GPT_FILES], ids=lambda p: p.name)
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
