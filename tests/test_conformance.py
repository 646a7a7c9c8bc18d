"""Agreement with the published scripts: vectors in the folders named by GOLFGPT_CONFORMANCE, separated as PATH is.

Every configuration, shape and hyperparameter is read from the files' metadata, so that vectors of the same
kinds with other seeds and shapes run unchanged. A kind whose recipe is not built yet is skipped by name.
Tolerances are those of the vectors' own description.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golfgpt_kernels import RowQuant, newton_schulz, quantize_rows
from models import fake_quantized, unseen
from safetensors import safe_open

from golfgpt.config import (
    AverageConfig,
    BigramConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    ValueEmbeddingConfig,
)
from golfgpt.data.orders import boundaries
from golfgpt.data.shards import open_shard
from golfgpt.data.stream import Prefetcher
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import parameter_shapes, parameter_table
from golfgpt.model.rotary import rope_table
from golfgpt.model.segments import Segments
from golfgpt.optim.optimizers import Muon
from golfgpt.optim.schedule import muon_momentum
from golfgpt.published import quantizers
from golfgpt.published.files import read_export
from golfgpt.published.names import from_published, infer_config, split_banks, to_published
from golfgpt.quant.formats import QuantizedTensor, TensorFormat, parse_layer_group
from golfgpt.quant.gptq import solve
from golfgpt.quant.quantizer import Quantizer, prune_threshold, pruned
from golfgpt.recipes import RECIPES
from golfgpt.score.windows import Scorer, Windows, score_windows
from golfgpt.train.step import TrainStep

FOLDERS = [Path(folder) for folder in os.environ.get("GOLFGPT_CONFORMANCE", "").split(os.pathsep) if folder]
FILES = sorted(p for folder in FOLDERS for p in folder.iterdir() if p.suffix in (".safetensors", ".ptz"))
OTHERS = "q_pergroup", "q_ttt"  # tests/test_published_containers.py, tests/test_ttt.py
FILES = [path for path in FILES if not path.name.startswith(OTHERS)]

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(not FOLDERS, reason="GOLFGPT_CONFORMANCE names no folder of vectors"),
]


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
        bigram=BigramConfig(rows=pairs, dim=config.pop("bigram_dim", 0)) if pairs else BigramConfig(),
        **config,
    )


def frontier_config(v: Vectors) -> ModelConfig:
    """The same of the records from 2026-03-22 on."""
    c = dict(v.meta["config"])
    layers, names = c["num_layers"], {name.split(".", 1)[-1] for name in v}
    gate = "window" if c.get("attn_out_gate_enabled") else "dense" if c.get("gated_attn_enabled") else "none"
    gate = "sparse" if c.get("sparse_attn_gate_enabled") else gate
    one_lane = c.get("parallel_residual_start", layers)
    two_lanes = c.get("parallel_start_layer", layers)
    kind = "merged" if "lane_merge" in names else "routed" if two_lanes < layers else "off"
    kind = "one_lane" if one_lane < layers else kind
    final = {"mean": "mean", "mlp": "mlp", "attn": "attention"}[c.get("parallel_final_lane", "mean")]
    loops = c.get("num_loops", 0)
    smear = "input" if c.get("smear_gate_enabled") else "after_norm" if "smear.gate" in names else "none"
    values = tuple(int(i) for i in c["ve_layers"].split(",")) if c.get("ve_enabled") else ()
    same = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "tie_embeddings", "logit_softcap")
    return ModelConfig(
        **{name: c[name] for name in (*same, "rope_base", "qk_gain_init", "rope_dims", "ln_scale")},
        mlp_hidden=int(c["model_dim"] * c["mlp_mult"]),
        mlp_slope=0.0 if v.meta.get("activation") == "relu2" or "2026-03-22" in v.meta["record"] else 0.5,
        xsa_layers=tuple(range(layers - c["xsa_last_n"], layers)),
        rope_reference_len=v.meta.get("rope_reference_len"),
        smear_gate=smear,
        document_start=v.meta["bos_id"] if smear == "input" else None,
        bigram=BigramConfig(rows=c["bigram_vocab_size"], dim=c["bigram_dim"]) if "bigram_dim" in c else BigramConfig(),
        value_embedding=ValueEmbeddingConfig(dim=c["ve_dim"] if values else 0, layers=values),
        attn_gate=gate,
        attn_gate_scale=c.get("sparse_attn_gate_scale", 1.0),
        gate_window=c.get("gate_window", 12),
        skip_gates=c.get("skip_gates_enabled", False),
        loop=LoopConfig(first=c["loop_start"], last=c["loop_end"], passes=loops + 1) if loops else LoopConfig(),
        parallel=ParallelConfig(kind=kind, first=min(one_lane, two_lanes) if kind != "off" else 0, final=final),
    )


def check_frontier_forward(v: Vectors) -> None:
    config = frontier_config(v)
    model = build(config, v.part("param."))
    published, expected = to_published(model.state_dict()), split_banks(v.part("param."))
    assert infer_config(v.part("param."), unseen(config)) == infer_config(published, unseen(config)) == config
    assert published.keys() == expected.keys() and all(torch.equal(w, expected[k]) for k, w in published.items())
    looping, segments = v.meta.get("looping_active", True), None
    if "encoder_indices" in v.meta:
        order = v.meta["encoder_indices"] + v.meta["decoder_indices"]
        assert [planned.row for planned in model.plans[looping]] == order
    if "cu_seqlens" in v:
        segments = Segments.of(v["cu_seqlens"], v["input_ids"].size(1), v.meta["max_seqlen"])
    loss = model.loss(v["input_ids"], v["target_ids"], segments=segments, looping=looping)
    loss.backward()
    assert abs(loss.item() - v["loss"].item()) <= 1e-5
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    grads, expected = to_published(grads), split_banks(v.part("grad."))
    assert grads.keys() - expected.keys() <= set(v.meta["zero_grad_params"]) and not expected.keys() - grads.keys()
    for name, grad in expected.items():
        if grad.any():
            assert relative(grads[name], grad) <= 1e-4, name
        else:
            assert not grads[name].any(), name
    if "logits" in v:
        hidden = model(v["input_ids"], segments=segments, looping=looping)
        assert (model.logits(hidden) - v["logits"]).abs().max() <= 1e-4


def quantization(v: Vectors) -> QuantConfig:
    """The published recipe that the file's fake quantization is of; every matrix is quantized, however small."""
    qat = v.meta.get("qat", "none")
    if qat.startswith("none"):
        return QuantConfig()
    if qat.startswith("int6_ste on every linear"):
        return replace(RECIPES["mixed-qat"].config.quant, keep_numel=0)
    assert qat.startswith("int5 rows for .mlp., int6 rows for .attn. and *.proj"), qat
    return replace(RECIPES["int5-int6-swa"].config.quant, keep_numel=0)


def build(config: ModelConfig, state: dict[str, torch.Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(from_published(state, config))
    return model


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def check_gpt(v: Vectors, impl: str) -> None:
    config = model_config(v)
    initial = to_published({name: p.detach() for name, p in GPT(config).named_parameters()})
    for name, expected in v.part("init.").items():
        assert (initial[name] - expected).abs().max() <= 1e-6, name
    model = build(config, v.part("param."))
    stand_ins = fake_quantized(model, Quantizer(config, quantization(v)).fake_quant(), impl=impl)
    loss = model.loss(v["input_ids"], v["target_ids"], stand_ins=stand_ins)
    loss.backward()
    assert abs(loss.item() - v["loss"].item()) <= 1e-5
    grads = to_published({name: p.grad for name, p in model.named_parameters()})
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
    if "record_muon" in v.meta:
        return check_record_muon(v)
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


def check_newton_schulz(v: Vectors) -> None:
    named = {"mar22": "quintic", "apr27": "polar_express_5"}
    for name in [name for name in v if name.endswith(".in")]:
        out = newton_schulz(v[name], steps=5, coefficients=named[name.split(".")[0]])
        assert relative(out, v[name.replace(".in", ".out5")]) <= 0.1, name


def check_record_muon(v: Vectors) -> None:
    for tag, hyper in v.meta["record_muon"].items():
        for stem in sorted({name.rsplit(".", 1)[0] for name in v if name.startswith(f"{tag}.")}):
            p = torch.nn.Parameter(v[f"{stem}.p0"].clone())
            optimizer = Muon(
                [p],
                lr=hyper["lr"],
                momentum=hyper["momentum"],
                nesterov=hyper["nesterov"],
                ns_steps=hyper["backend_steps"],
                weight_decay=hyper["weight_decay"],
                row_norm=hyper.get("row_normalize", False),
                coefficients="polar_express_5" if tag == "apr27" else "quintic",
            )
            for i in range(3):
                p.grad = v[f"{stem}.g{i}"]
                optimizer.step()
            error = (p.detach() - v[f"{stem}.p3"]).norm() / (v[f"{stem}.p3"] - v[f"{stem}.p0"]).norm()
            assert error <= 0.06, (stem, error)


def check_quant(v: Vectors) -> None:
    source = Vectors(v.path.with_name(v.meta["state"] + ".safetensors"))
    config = model_config(source)
    quantizer = Quantizer(config, export_config(str(v.meta["recipe"]), source))
    if "payload_bytes" in v.meta:
        assert quantizer.payload_bytes == v.meta["payload_bytes"]
    values, scales = {}, {}
    for part, tensor in quantizer.encode(from_published({k: t.float() for k, t in source.items()}, config)).items():
        bank, layers = parse_layer_group(part)
        names = parameter_table(config)[bank].published_names[layers]
        layered = names[0].startswith("blocks.")
        values |= zip(names, tensor.values if layered else [tensor.values], strict=True)
        if tensor.scale is not None:
            scales |= zip(names, tensor.scale if layered else [tensor.scale], strict=True)
    # Two spellings: q.NAME, scale.NAME, keep.NAME; or NAME.q, NAME.scale, NAME.
    codes = v.part("q.") or {k.removesuffix(".q"): t for k, t in v.items() if k.endswith(".q")}
    kept = v.part("keep.") if v.part("q.") else {k: t for k, t in v.items() if not k.endswith((".q", ".scale"))}
    if not v.part("q."):
        kept |= {k: t for k, t in v.items() if k == "bigram.scale"}  # a tensor of that name, not a scale
        codes.pop("bigram", None)
    assert {*codes, *kept} == set(values) and set(codes) == set(scales)
    for name, expected in (codes | kept).items():
        assert values[name].dtype == expected.dtype or name in kept, name
        assert torch.equal(values[name].to(expected.dtype), expected), name
    for name, scale in scales.items():
        expected = v.get(f"scale.{name}", v.get(f"{name}.scale"))
        assert scale.dtype == expected.dtype and torch.equal(scale, expected), name


EXPORTS = {
    "R0": "baseline",
    "R1": "warmdown-int8",
    "R2": "long-context",
    "R3": "int6-mlp3x",
    "R4": "mixed-qat",
    "R4b": "int6-qat-4096",
    "R5": "int5-int6-swa",
    "#180": "int5-int6-swa-base",
}


def export_config(recipe: str, source: Vectors) -> QuantConfig:
    """The recipe's export, without pruning and without rules for layers that the vectors' model does not have."""
    quant = RECIPES[EXPORTS[recipe.replace(",", " ").split()[0]]].config.quant
    by_name = "blocks.8.attn.c_k.weight"
    rules = tuple(rule for rule in quant.rules if not rule.startswith(by_name) or by_name in source)
    return replace(quant, rules=rules, prune=0.0)


def check_prune(v: Vectors) -> None:
    source = Vectors(v.path.with_name(v.meta["state"] + ".safetensors"))
    config = model_config(source)
    for bank, w in from_published({k: t.float() for k, t in source.items()}, config).items():
        names = to_published({bank: w})
        after = pruned(parameter_table(config)[bank], w, v.meta["prune_fraction"])
        for name, result in to_published({bank: after}).items():
            if f"threshold.{name}" not in v:
                assert torch.equal(result, names[name]), name
                continue
            threshold = v[f"threshold.{name}"].item()
            assert prune_threshold(names[name], v.meta["prune_fraction"]) == pytest.approx(threshold, rel=1e-6), name
            assert (result == 0).sum().item() == v[f"zeros.{name}"].item(), name


def check_ptz(path: Path) -> None:
    recipe = path.name.split(".")[1].split("_")[0]
    vectors = Vectors(next(path.parent.glob(f"quant_{recipe}_*.safetensors")))
    source = Vectors(path.with_name(vectors.meta["state"] + ".safetensors"))
    export = read_export(path)
    for name, original in source.items():
        q, scale = (f"q.{name}", f"scale.{name}") if f"q.{name}" in vectors else (f"{name}.q", f"{name}.scale")
        if q in vectors:
            assert all(map(torch.equal, export.codes[name], (vectors[q], vectors[scale]))), name
            expected = vectors[q].float() * vectors[scale].float()[:, None]
        else:
            expected = vectors[f"keep.{name}" if f"keep.{name}" in vectors else name]
            assert torch.equal(export.passthrough[name], expected), name
        dtype = torch.bfloat16 if original.dtype == torch.bfloat16 else torch.float32
        assert torch.equal(export.state[name], expected.to(dtype).float()), name
    config = model_config(source)
    assert parameter_shapes(infer_config(export.state)) == parameter_shapes(config)
    build(config, export.state)


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
        windows = Windows(len(ids), v.meta["window"], int(stride), "r4" if kind == "pr65" else "every_token")
        nats, means = score(windows)
        if kind == "nll":
            assert (nats - v[key]).abs().max() <= 1e-4, key
        expected = v.meta[key.replace("nll", "once")]
        assert np.abs(np.subtract(means, expected)).max() <= 1e-5, key


class ShardOnly:
    """What `TrainStep` needs of a data set: the training shards."""

    def __init__(self, *shards: Path):
        self.train = [open_shard(shard) for shard in shards]


def optimizers(hyper: dict, **others: float | None) -> OptimConfig:
    """What all files call by our names, and `others`."""
    same = (
        "matrix_lr", "scalar_lr", "tied_embed_lr", "muon_momentum", "muon_momentum_warmup_start",
        "muon_momentum_warmup_steps", "adam_eps", "grad_clip_norm",
    )  # fmt: skip
    return OptimConfig(**{name: hyper[name] for name in same}, **others)


def check_record_trajectory(v: Vectors) -> None:
    hyper, config = v.meta["hyperparameters"], frontier_config(v)
    order = {"shuffled_sequences": "shuffled", "document_packing": "packed"}.get(v.meta["loader"], "sequential")
    rows = {"sequential": hyper["train_seq_len"]}.get(order, hyper["train_batch_tokens"] // hyper["grad_accum_steps"])
    stepwise = "warmdown_iters" in hyper
    if config.loop.passes > 1:
        config = replace(config, loop=replace(config.loop, start=hyper["enable_looping_at"]))
    run = RunConfig(
        model=config,
        optim=optimizers(
            hyper,
            muon_ns_steps=hyper["muon_backend_steps"],
            adam_beta1=hyper["beta1"],
            adam_beta2=hyper["beta2"],
            weight_decay=hyper["muon_wd"],
            embed_weight_decay=hyper.get("embed_wd"),
            scalar_weight_decay=hyper["adam_wd"],
            muon_row_norm=hyper.get("muon_row_normalize", False),
            muon_coefficients="polar_express_5" if "2026-04-27" in v.meta["record"] else "quintic",
            grad_clip="span" if order == "packed" else "step",
        ),
        schedule=ScheduleConfig(
            kind="warmdown_steps" if stepwise else "warmdown_frac",
            max_seconds=None,
            max_steps=hyper["iterations"],
            warmdown_steps=hyper.get("warmdown_iters", 0),
            warmdown_frac=hyper.get("warmdown_frac", 0.0),
            min_lr=hyper.get("min_lr", 0.0),
        ),
        average=AverageConfig(kind="ema", ema_decay=hyper["ema_decay"], ema_start="initial"),
        data=DataConfig(
            batch_tokens=hyper["train_batch_tokens"],
            seq_len=hyper["train_seq_len"],
            spans=8 if order == "sequential" else 1,
            microbatch_tokens=rows,
            order=order,
            document_start=v.meta["bos_id"] if order == "packed" else None,
        ),
        runtime=RuntimeConfig(dtype="float32"),
    )
    shards = ShardOnly(*(v.path.with_name(name) for name in v.meta["shards"]))
    trainer = TrainStep(run, shards, Ranks(0, 1, torch.device("cpu")))
    trainer.optimizers.muon.dtype = torch.bfloat16  # as published, whatever the forward's
    init = split_banks(v.part("init."))
    trainer.model.load_state_dict(from_published(init, config))
    trainer.average.begin()
    for step in range(hyper["iterations"]):
        pending = trainer.launch(step)
        result = trainer.wait(pending)
        tolerance = 1e-5 if step == 0 else 2e-3 if step < 8 else 1e-2
        assert abs(result.loss - v["losses"][step].item()) <= tolerance, step
        assert config.loop.passes == 1 or trainer.looping(step) == bool(v["looping"][step]), step
        assert abs(muon_momentum(step, run.optim) - v["momentum"][step].item()) <= 1e-9, step
        assert abs(trainer.update(pending) - v["lr_multiplier"][step].item()) <= 1e-9, step
    final = to_published({k: p.detach() for k, p in trainer.model.named_parameters()})
    for result, prefix in ((final, "final."), (to_published(trainer.average.weights()), "ema.")):
        for name, expected in split_banks(v.part(prefix)).items():
            if expected.numel() >= 64:
                moved = (expected - init[name]).norm()
                error = (result[name] - expected).norm() / moved if moved else result[name].norm()
                assert error <= 0.3 * bool(moved), (prefix, name, error)


def check_trajectory(v: Vectors) -> None:
    if "record" in v.meta:
        return check_record_trajectory(v)
    hyper = v.meta["hyperparameters"]
    config = model_config(v)
    beta1, beta2 = hyper["adam_betas"]
    run = RunConfig(
        model=config,
        optim=optimizers(hyper, adam_beta1=beta1, adam_beta2=beta2, weight_decay=hyper["weight_decay"]),
        schedule=ScheduleConfig(
            kind="warmdown_steps",
            max_seconds=None,
            max_steps=hyper["iterations"],
            warmdown_steps=hyper["warmdown_iters"],
            warmdown_shape=hyper["warmdown_shape"],
        ),
        average=AverageConfig(kind="swa", swa_start_lr=hyper["swa_start_frac"], swa_every=hyper["swa_every"])
        if hyper["swa_every"]
        else AverageConfig(),
        quant=quantization(v),
        data=DataConfig(batch_tokens=hyper["train_batch_tokens"], seq_len=hyper["train_seq_len"]),
        runtime=RuntimeConfig(dtype="float32"),
    )
    trainer = TrainStep(run, ShardOnly(v.path.with_name(v.meta["shard"])), Ranks(0, 1, torch.device("cpu")))
    trainer.optimizers.muon.dtype = torch.bfloat16  # as published, whatever the forward's
    init = v.part("init.")
    trainer.model.load_state_dict(from_published(init, config))
    for step in range(hyper["iterations"]):
        pending = trainer.launch(step)
        result = trainer.wait(pending)
        tolerance = 1e-5 if step == 0 else 2e-3 if step < 8 else 1e-2
        assert abs(result.loss - v["losses"][step].item()) <= tolerance, step
        multiplier = trainer.update(pending)
        assert abs(multiplier - v["lr_multiplier"][step].item()) <= 1e-9, step
    final = to_published({k: p.detach() for k, p in trainer.model.named_parameters()})
    averaged = to_published(trainer.average.weights())
    assert trainer.average.count == v.meta["averaged_checkpoints"]
    for result, prefix in ((final, "final."), (averaged, "averaged.")):
        for name, expected in v.part(prefix).items():
            if expected.numel() >= 64:
                error = (result[name] - expected).norm() / (expected - init[name]).norm()
                assert error <= 0.3, (prefix, name, error)


def check_loaders(v: Vectors) -> None:
    """What each span reads, as long as the published loaders were recorded: `order`.wsSPANS.rankSPAN."""
    shards = [open_shard(v.path.with_name(name)) for name in v.meta["shards"]]
    for order, spans in itertools.product(("shuffled", "packed"), (1, 2)):
        config = DataConfig(  # a microbatch of the published loop is a step here
            batch_tokens=v[f"{order}.ws{spans}.rank0.inputs"][0].numel() * spans,
            seq_len=v.meta["seq_len"],
            spans=spans,
            order=order,
            document_start=1 if order == "packed" else None,
        )
        for span in range(spans):
            tag = f"{order}.ws{spans}.rank{span}"
            inputs, targets = v[f"{tag}.inputs"].long(), v.get(f"{tag}.targets")
            data = Prefetcher(shards, config, range(span, span + 1), pin=False)
            for step, expected in enumerate(inputs):
                tokens = data.read(step)
                assert torch.equal(tokens.windows[:, :-1].reshape(expected.shape), expected), (tag, step)
                if order == "packed":
                    assert torch.equal(tokens.windows[:, 1:].reshape(expected.shape), targets[step].long())
                    assert torch.equal(tokens.boundaries[0], v[f"{tag}.cu.{step:02}"]), (tag, step)
            data.close()
    for name in (name for name in v if name.startswith("cu.")):
        case = v.meta[name]
        row = np.zeros(case["total"], dtype=np.uint16)
        row[case["bos"]] = 1
        found = boundaries(row, 1, case["max_doc_len"] or case["total"], case["bucket"])
        assert found.tolist() == v[name].tolist(), name


def damped_twice(hessian: torch.Tensor) -> torch.Tensor:
    """What 2026-03-25 and 2026-03-29 give their solver, which damps again."""
    return hessian + 0.01 * hessian.diagonal().mean().clamp_min(1e-6) * torch.eye(len(hessian))


def check_gptq(v: Vectors) -> None:
    bits = {15: 5, 31: 6, 63: 7, 127: 8}
    for case in v.meta["cases"]:
        tag = case["case"]
        w, h = v[f"{tag}.W"][None], v[f"{tag}.H"][None]
        if f"{tag}.H_damped" in v:
            inputs = [v[f"{tag}.X.{i}"].float() for i in range(case["n_batches"])]
            assert relative(sum(x.T @ x for x in inputs) / len(inputs), h[0]) <= 1e-5
            assert relative(damped_twice(h[0]), v[f"{tag}.H_damped"]) <= 1e-5
        for variant in case["variants"]:
            name, kind, largest = f"{tag}.{variant['name']}", variant["kind"], variant.get("clip_range", 127)
            spec = RowQuant(bits=bits[largest], scale_floor=1 / largest)
            if "clip_sigmas" in variant:
                spec = RowQuant(bits=bits[largest], clip="deviation", deviations=variant["clip_sigmas"])
            scale = quantize_rows(w, spec, impl="eager")[1]

            def solver(w, scale, largest=largest, h=h):
                return solve(w, h, scale, largest)

            if kind in ("clip_search", "gptq_clip_search"):
                codes, scale = quantizers.clip_search(w, spec, solver if kind == "gptq_clip_search" else None)
            elif kind == "int8_row":
                part = w[:, variant["first_row"] :, : variant["columns"]].contiguous()
                codes, scale = quantize_rows(part, RowQuant(bits=8), impl="eager")
            elif kind == "gptq_hessian_sdclip":
                scale = quantizers.hessian_scales(w, h, spec, variant["hessian_clip_lambda"], 0.01)
                codes = solver(w, scale.float()[..., None], largest)
            else:
                codes = solver(w, scale.float()[..., None], largest)
            if kind == "gptq_sdclip_awq":
                group = variant["group_size"]
                scores = quantizers.group_scores(w[0], v[f"{tag}.awq.act_rms"], group)
                torch.testing.assert_close(scores, v[f"{tag}.awq.group_scores"])
                start = int(scores.argmax()) * group
                assert [start] == variant["starts"]
                tensor = QuantizedTensor(TensorFormat(tuple(w.shape), f"int{spec.bits}", "float16"), codes, scale)
                tensor = quantizers.widened(tensor, w, slice(start, start + group), spec, solver)
                codes = tensor.values
                assert torch.equal(tensor.wide_scale[0], v[f"{name}.s_hi"])
            assert torch.equal(scale[0], v[f"{name}.scale"]), name
            different = (codes[0].int() - v[f"{name}.q"].int()).abs()
            assert different.max() <= 1 and (different > 0).float().mean() <= 0.001, name


def check_mixed(v: Vectors) -> None:
    for config in v.meta["configs"]:
        tag, hyper, encoded, banks = config["tag"], config["hparams"], {}, {}
        published = {name.replace(".", "_"): name for name in config["meta"]}
        for bank, name in published.items():
            w, kind, results = v[f"state.{name}"], config["meta"][name], v.part(f"{tag}.result.{name}")
            if kind == "gate_int8_row":
                codes, scale = quantize_rows(w.float(), RowQuant(bits=8), impl="eager")
                assert torch.equal(codes, results[".gq"]) and torch.equal(scale, results[".gs"]), name
            elif kind.startswith("passthrough"):
                assert torch.equal(w.half() if w.is_floating_point() else w, results[""])
            else:
                role = "embed" if name == "tok_emb.weight" else "mlp" if ".mlp." in name else "attn"
                bits = hyper["embed_bits" if role == "embed" else "matrix_bits"]
                spec = RowQuant(bits=bits, clip="deviation", deviations=hyper[f"{role}_clip_sigmas"])
                banks[bank] = w = w.float()
                scale = quantize_rows(w, spec, impl="eager")[1]
                codes = solve(w[None], v[f"H.{name}"][None], scale.float()[None, :, None], spec.qmax)[0]
                assert torch.equal(codes, results[".q"]) and torch.equal(scale, results[".scale"]), name
                encoded[bank] = QuantizedTensor(TensorFormat(tuple(w.shape), f"int{bits}", "float16"), codes, scale)
                lost = float((w - encoded[bank].dequantize()).norm())
                assert lost == pytest.approx(config["residual_norm"][name], rel=1e-4)
        group, ends = (hyper["lqer_asym_group"], "_a") if hyper["lqer_asym_enabled"] else (None, "")
        quant = QuantConfig(
            low_rank=hyper["lqer_rank"], low_rank_tensors=hyper["lqer_top_k"], low_rank_group=group or 0
        )
        refined = quantizers.refined(quant, banks, encoded, None, None)
        chosen = {published[bank] for bank, tensor in refined.items() if tensor.left is not None}
        assert chosen == {*config["lqer_residual_norm"]}
        for bank, name in published.items():
            if name not in chosen:
                continue
            given = v[f"{tag}.factorA.{name}"], v[f"{tag}.factorB.{name}"]
            own = quantizers.factors(banks[bank] - encoded[bank].dequantize(), quant.low_rank)
            assert relative(own[0] @ own[1], given[0] @ given[1]) <= 1e-4
            fields = quantizers.pack_factors(*given, group, torch.float16)
            for field, key in (("left", "lqA"), ("left_scale", "lqAs"), ("right", "lqB"), ("right_scale", "lqBs")):
                assert torch.equal(fields[field], v[f"{tag}.result.{name}.{key}{ends}"].view(fields[field].shape))
            tensor = replace(encoded[bank], format=refined[bank].format, **fields)
            lost = config["lqer_residual_norm"][name]
            assert float((banks[bank] - tensor.dequantize()).norm()) == pytest.approx(lost, rel=1e-4)
            assert float((banks[bank] - refined[bank].dequantize()).norm()) == pytest.approx(lost, rel=0.01)
            if f"{tag}.dequant.{name}" in v:
                torch.testing.assert_close(tensor.dequantize(), v[f"{tag}.dequant.{name}"], rtol=1e-6, atol=1e-6)


CHECKS = {
    "fwd": check_frontier_forward,
    "loaders": check_loaders,
    "newton": check_newton_schulz,
    "muon": check_muon,
    "ntk": check_ntk_rope,
    "prune": check_prune,
    "q_gptq": check_gptq,
    "q_mixed": check_mixed,
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


def marked(path: Path):
    """A trajectory is twenty steps or more of training."""
    return pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name.startswith("trajectory") else [])


@pytest.mark.parametrize("path", [marked(path) for path in FILES if path not in GPT_FILES])
def test_conformance(path: Path):
    if path.suffix == ".ptz":
        return check_ptz(path)
    v = Vectors(path)
    kind = path.stem if path.stem.startswith("q_") else path.name.replace(".", "_").split("_")[0]
    if path.name.startswith("quant_state"):
        pytest.skip("input of the quant_* vectors")
    if kind not in CHECKS:
        pytest.skip(f"vectors of an unknown kind: {kind}")
    CHECKS[kind](v)
