"""Recipes: named starting configurations. Each is derived from another one by replacing a few fields.

A recipe that produced a published number is never edited. A new recipe gets a new name. Standard library only.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from golfgpt.config import (
    AverageConfig,
    BigramConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from golfgpt.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """A named configuration with a summary and notes."""

    name: str
    summary: str
    """One sentence."""
    config: RunConfig
    notes: tuple[str, ...] = ()
    """What is published about it, which of its fields reproduce flaws, and how golfgpt differs."""


_baseline = RunConfig(
    schedule=ScheduleConfig(kind="warmdown_steps", warmdown_steps=1200),
    optim=OptimConfig(embed_dtype="bfloat16"),
    quant=QuantConfig(clip="quantile", clip_floor=1.0, codes_from="float32_scale", compressor="zlib"),
)

_warmdown_int8 = replace(
    _baseline,
    model=replace(_baseline.model, mlp_hidden=992, rope_reference_len=1024),
    optim=replace(_baseline.optim, matrix_lr=0.06, scalar_lr=0.06, tied_embed_lr=0.07, grad_clip_norm=1.0),
    schedule=replace(_baseline.schedule, warmdown_steps=20_000),
    quant=replace(_baseline.quant, rules=("tok_emb.weight=float16",)),
    eval=EvalConfig(window=1408),
)

_slow_optim = replace(
    _baseline.optim,
    matrix_lr=0.02,
    scalar_lr=0.02,
    tied_embed_lr=0.03,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
)

_long_context = replace(
    _baseline,
    model=replace(_baseline.model, rope_reference_len=1024),
    optim=replace(_slow_optim, grad_clip_norm=0.3),
    schedule=replace(_baseline.schedule, warmdown_steps=3000),
    data=DataConfig(batch_tokens=786_432, seq_len=2048),
    eval=EvalConfig(window=2048, stride=512),
)

_int6_mlp3x = replace(
    _long_context,
    model=replace(_long_context.model, mlp_hidden=1536),
    quant=replace(_baseline.quant, bits=6, rules=("tok_emb.weight=float16", "blocks.-[12].attn.c_k.weight=float16")),
    eval=EvalConfig(window=2048, stride=256),
)

_mixed_qat = replace(
    _baseline,
    model=replace(_baseline.model, mlp_hidden=1536),
    optim=_slow_optim,
    schedule=replace(_baseline.schedule, warmdown_steps=3000),
    quant=replace(_baseline.quant, bits=6, rules=("tok_emb.weight=int8",), qat="r4"),
    eval=EvalConfig(window=1024, stride=64, rule="r4"),
)

_int6_qat_4096 = replace(
    _mixed_qat,
    data=DataConfig(batch_tokens=393_216, seq_len=4096),
    quant=QuantConfig(
        bits=6,
        rules=("tok_emb.weight=float16",),
        clip_floor=1.0,
        code_range="full",
        control_dtype="float16",
        qat="r4",
        compressor="zstd",
    ),
    eval=EvalConfig(window=4096, stride=64, rule="r4b"),
)

_int6_ptq_4096 = replace(_int6_qat_4096, quant=replace(_int6_qat_4096.quant, qat="off"))

_int5_int6_swa_base = RunConfig(
    model=ModelConfig(
        num_layers=10,
        mlp_hidden=1536,
        matrix_init="orthogonal",
        smear_gate="after_norm",
        bigram=BigramConfig(rows=10_240, dim=128),
    ),
    optim=replace(_slow_optim, grad_clip_norm=0.3, weight_decay=0.04),
    schedule=ScheduleConfig(kind="warmdown_steps", warmdown_steps=3000),
    data=DataConfig(batch_tokens=786_432, seq_len=2048),
    average=AverageConfig(kind="swa", swa_start_lr=0.4, swa_every=50, sums="parameter"),
    quant=QuantConfig(
        bits=6,
        rules=("tok_emb.weight=float16", "blocks.8.attn.c_k.weight=float16", "*.mlp.*=int5"),
        scale_floor=2**-14,
        code_range="full",
        keep_numel=8192,
        control_dtype="float16",
        prune=0.03,
        compressor="zstd",
    ),
    eval=EvalConfig(window=2048, stride=64),
)

_int5_int6_swa = replace(
    _int5_int6_swa_base,
    model=replace(_int5_int6_swa_base.model, resid_mix_init="phase", rope_reference_len=2048),
    schedule=replace(_int5_int6_swa_base.schedule, warmdown_shape="cosine", warmdown_max_frac=0.5),
    average=replace(_int5_int6_swa_base.average, swa_start_lr=0.35, swa_every=25),
    quant=replace(
        _int5_int6_swa_base.quant,
        rules=("tok_emb.weight=float16", "*.mlp.*=int5"),
        prune=0.05,
        qat="r5",
        compressor="lzma",
    ),
    eval=EvalConfig(window=4096, stride=64),
    seed=42,
)

_golf = replace(
    _int5_int6_swa_base,
    model=replace(_int5_int6_swa_base.model, document_start=1),
    optim=replace(_int5_int6_swa_base.optim, embed_dtype="float32"),
    schedule=ScheduleConfig(warmdown_frac=0.6),
    average=AverageConfig(),
    quant=QuantConfig(bits=6, rules=("tok_emb.weight=int8",), keep_numel=8192, qat="export", qat_start=0.5),
    budget=BudgetConfig(fit="mlp_hidden"),
)

_demo = RunConfig(
    model=ModelConfig(num_layers=2, model_dim=192, num_heads=3, num_kv_heads=1, mlp_hidden=384),
    optim=OptimConfig(matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.025, muon_momentum_warmup_steps=100),
    schedule=ScheduleConfig(max_seconds=115.0, warmdown_frac=0.85),
    data=DataConfig(batch_tokens=2048, seq_len=256, microbatch_tokens=1024),
    quant=QuantConfig(keep_numel=4096),
    eval=EvalConfig(stride=128, batch_tokens=8192),
    runtime=RuntimeConfig(checkpoint_seconds=20.0),
)

_small = replace(
    _demo,
    model=ModelConfig(num_layers=6, model_dim=192, num_heads=3, num_kv_heads=1, mlp_hidden=384),
    schedule=replace(_demo.schedule, max_seconds=600.0, warmdown_frac=0.6),
    data=DataConfig(batch_tokens=4096, seq_len=512, microbatch_tokens=2048),
    eval=EvalConfig(batch_tokens=8192),
    runtime=RuntimeConfig(),
)

_FLOOR = "quant.clip_floor 1 is the published scale floor: rows with a largest weight below 1 lose levels"
_EMBED = "optim.embed_dtype bfloat16 is as published: embedding and its Adam moments in bfloat16"
_ROPE = (
    "model.rope_reference_len 1024 is hard-coded in the published script, so training at 2048 uses the rotary base "
    "20,452"
)
_CODE = "The published score counts 47,642 to 57,201 bytes of code; budget.code_bytes allows 60,000"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "baseline",
            "R0, the published naive baseline: 9 layers of width 512, a vocabulary of 1024 tokens with tied "
            "embedding, Muon and Adam, int8 with one scale per row and the published scale floor, zlib. 600 s on 8 "
            "GPUs.",
            _baseline,
            (
                "Published: 13,780 steps, val_bpb 1.2244, on another validation split than all later results",
                _FLOOR,
                _EMBED,
                _CODE,
            ),
        ),
        Recipe(
            "warmdown-int8",
            "R1 (PR #61): learning rate that decays from the first step on, float16 embedding, MLP width 992, scored "
            "in chunks of 1408 tokens with NTK-aware RoPE.",
            _warmdown_int8,
            (
                "Published: 12,756 steps, val_bpb 1.2154. The gain over R0 comes from the longer evaluation window and "
                "the embedding, not from the schedule: before quantization R1 has 1.2226, and PR #42, with a warmdown "
                "of 3,600 steps at the same rates and width, has 1.2192",
                "schedule.warmdown_steps is larger than the number of steps of a run, so slow first steps lower the "
                "learning rate",
                _FLOOR,
                _EMBED,
            ),
        ),
        Recipe(
            "long-context",
            "R2 (PR #96): sequences of 2048 tokens, 786,432 tokens per step, lower learning rates, gradients clipped "
            "at 0.3, scored with windows of 2048 tokens at stride 512.",
            _long_context,
            ("Published: 7,751 steps, val_bpb 1.1764", _ROPE, _FLOOR, _EMBED),
        ),
        Recipe(
            "int6-mlp3x",
            "R3 (PR #114): long-context with int6, an MLP of three times the model width, float16 for the embedding "
            "and the key matrices of the last two layers, stride 256.",
            _int6_mlp3x,
            (
                "Published: 7,199 steps, val_bpb 1.1574; mean of three further seeds 1.1574",
                _ROPE,
                _FLOOR,
                _EMBED,
            ),
        ),
        Recipe(
            "mixed-qat",
            "R4 (PR #65): the baseline with int6 fake quantization of every linear layer from step 0, int8 embedding, "
            "MLP width 1536, stride 64.",
            _mixed_qat,
            (
                "Published: 12,395 steps, val_bpb 1.1630",
                "quant.qat r4 trains on another grid than it exports: scales are not rounded and have no floor",
                "eval.rule r4 never scores the first 960 tokens; every_token scores them",
                _FLOOR,
                _EMBED,
            ),
        ),
        Recipe(
            "int6-qat-4096",
            "R4b (PR #66): mixed-qat with sequences of 4096 tokens, float16 embedding, int6 clipped at the maximum of "
            "each row, zstd 22, stride 64.",
            _int6_qat_4096,
            (
                "Published: three seeds, mean val_bpb 1.1632",
                "quant.qat r4 trains on another grid than it exports, here also with another clip",
                "eval.rule r4b counts the last tokens of the text up to 64 times; every_token counts them once",
                _FLOOR,
                _EMBED,
            ),
        ),
        Recipe(
            "int6-ptq-4096",
            "R4b without fake quantization (PR #66 before its last change).",
            _int6_ptq_4096,
            ("Published: three seeds, mean val_bpb 1.1652", "eval.rule r4b as in int6-qat-4096", _FLOOR, _EMBED),
        ),
        Recipe(
            "int5-int6-swa-base",
            "PR #180: 10 layers, SmearGate, BigramHash, orthogonal initialization, weight decay, int5 MLP and int6 "
            "attention without fake quantization, averaged weights, 3 % pruning, zstd 22.",
            _int5_int6_swa_base,
            (
                "Published: 6,709 steps, val_bpb 1.1427",
                "The key matrix of blocks.8 is kept in float16 by its name, although blocks.9 is the last block",
                "average.sums parameter sums the embeddings in bfloat16",
                _EMBED,
            ),
        ),
        Recipe(
            "int5-int6-swa",
            "R5 (PR #326): int5-int6-swa-base with int5/int6 fake quantization from step 0, phase-transition residual "
            "mix, cosine warmdown, 5 % pruning, lzma, scored at length 4096 with NTK-aware RoPE.",
            _int5_int6_swa,
            (
                "Published: 6,606 steps, val_bpb 1.1702 before averaging and quantization; its evaluation never "
                "finished on 8 GPUs. It is worse than int5-int6-swa-base at every point of comparison",
                "schedule.warmdown_max_frac 0.5 shortens the warmdown if steps are slow",
                "quant.qat r5 trains with scales that are not rounded",
                "average.sums parameter sums the embeddings in bfloat16",
                _EMBED,
            ),
        ),
        Recipe(
            "golf",
            "Ours: 10 layers, SmearGate and BigramHash that stop at document boundaries, int6 fake quantization on the "
            "grid of the artifact after half of the budget, int8 embedding, the widest MLP that fits the byte budget, "
            "stride 64.",
            _golf,
            (
                "Never trained at full size: no published or measured score",
                "From docs/experiments.md, at 1.2 M parameters and three seeds: BigramHash gains 0.021 bits per byte "
                "and weight decay 0.005. Averaging costs 0.013, the phase-transition mix 0.026 and a scale floor "
                "0.027, so these three are left out",
                "Not resolvable there, and kept because they are correct, free or published: SmearGate (0.004 +- "
                "0.005), fake quantization on the grid of the artifact, gates that stop at document boundaries, "
                "orthogonal initialization. Also not resolvable: int5 MLPs, left out to keep the recipe simpler",
                "budget.fit replaces model.mlp_hidden before training (golfgpt budget --recipe golf shows the new "
                "value)",
            ),
        ),
        Recipe("small", "1.7 M parameters, ten minutes of training on two CPU cores.", _small),
        Recipe("demo", "0.7 M parameters, two minutes of training on two CPU cores.", _demo),
    )
}


def get(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError for an unknown name, with the closest known one."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown recipe {name!r}{hint} (expected one of {', '.join(RECIPES)})")
    return RECIPES[name]
