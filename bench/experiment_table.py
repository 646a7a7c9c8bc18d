"""The experiments of bench/experiments.py: sets of labelled configs derived from one base, and claims about them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from golfgpt.config import BigramConfig, QuantConfig, RunConfig, differences

RESULTS = "experiments-cpu.jsonl"
SEEDS = (1337, 1338, 1339)
TOK8 = "tok_emb.weight=int8"


def vary(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """`config` with fields of some sections replaced."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


BASE = vary(
    RunConfig(seed=SEEDS[0]),
    model=dict(num_layers=4, model_dim=192, num_heads=3, num_kv_heads=1, mlp_hidden=384, matrix_init="orthogonal",
               smear_gate="after_norm", bigram=BigramConfig(rows=1024, dim=32), document_start=1),
    optim=dict(matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.025, muon_momentum_warmup_steps=50),
    schedule=dict(max_steps=160, max_seconds=None, warmdown_frac=0.6),
    data=dict(batch_tokens=1024, seq_len=256, spans=1),
    average=dict(kind="swa", swa_start_lr=0.4, swa_every=2),
    quant=dict(bits=6, rules=(TOK8,), keep_numel=4096, qat="export", compressor="zstd"),
    eval=dict(max_tokens=51_200, batch_tokens=4096),
    runtime=dict(device="cpu", dtype="bfloat16", threads=1),
)  # fmt: skip
"""1.2 M parameters, 164 k tokens. Every part that is a candidate for recipe golf is on."""


@dataclass(frozen=True)
class Claim:
    """`better` scores lower than `worse`, both labels of one experiment."""

    better: str
    worse: str
    source: str = ""
    """Where recipes.md publishes it; empty: nothing is published, the direction is golfgpt's guess."""
    metric: str = "bpb"
    """bpb: of the decoded artifact; before: before export; penalty: the first minus the second."""


@dataclass(frozen=True)
class Experiment:
    name: str
    question: str
    configs: dict[str, RunConfig]
    """By label; the first is what the others are compared with."""
    claims: Sequence[Claim] = ()
    seeds: int = 1
    note: str = ""
    """What the figures say, written once they were there."""


def batch(tokens: int) -> RunConfig:
    """The base without an average at `tokens` a step, with as many tokens in all."""
    steps = BASE.schedule.max_steps * BASE.data.batch_tokens // tokens
    return vary(UNAVERAGED, data={"batch_tokens": tokens}, schedule={"max_steps": steps})


UNAVERAGED = vary(BASE, average={"kind": "none"})
PLAIN = vary(UNAVERAGED, quant={"qat": "off"})
"""Neither QAT nor an average: what quantization costs is measured on it."""
BRIEF = vary(PLAIN, schedule={"warmdown_frac": 0.05})
SLIDING = vary(BASE, eval={"stride": 64})
INT5_HIDDEN, NO_BIGRAM_HIDDEN = 480, 416
"""MLP widths that bring the forecast of these two variants back to the base's bytes, as budget.fit would."""
NO_BIGRAM = {"bigram": BigramConfig(), "mlp_hidden": NO_BIGRAM_HIDDEN}

PARTS = {
    "all parts": BASE,
    "QAT off": vary(BASE, quant={"qat": "off"}),
    "QAT on R4's grid": vary(BASE, quant={"qat": "r4"}),
    "QAT from half of the budget": vary(BASE, quant={"qat_start": 0.5}),
    "scale floor of 1": vary(BASE, quant={"clip_floor": 1.0}),
    "int5 MLP, wider": vary(BASE, quant={"rules": (TOK8, "*.mlp.*=int5")}, model={"mlp_hidden": INT5_HIDDEN}),
    "average off": UNAVERAGED,
    "average EMA 0.95": vary(BASE, average={"kind": "ema", "ema_decay": 0.95}),
    "gates cross documents": vary(BASE, model={"document_start": None}),
    "SmearGate off": vary(BASE, model={"smear_gate": "none"}),
    "BigramHash off, MLP wider": vary(BASE, model=NO_BIGRAM),
    "uniform init": vary(BASE, model={"matrix_init": "uniform"}),
    "phase resid_mix": vary(BASE, model={"resid_mix_init": "phase"}),
    "weight decay 0.04": vary(BASE, optim={"weight_decay": 0.04}),
}
PUBLISHED = {
    "QAT off": "§15, R4b: three seeds each, 1.16323 with QAT, 1.16520 without",
    "scale floor of 1": "§17 T2: 47 % error at int6 where row maxima are below 1 (calculated, no run published)",
    "phase resid_mix": "§16: R5 is worse than its parent, from QAT or from this (inferred, never separated)",
}
FRACTIONS, BITS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0), (8, 6, 5)

# fmt: off
EXPERIMENTS = (
    Experiment(
        "parts", "Which parts of recipe golf help? One is taken away at a time, at equal steps and forecast bytes.",
        PARTS,
        [*(Claim("all parts", label, PUBLISHED.get(label, "")) for label in PARTS if label != "all parts"),
         Claim("QAT off", "all parts", "§16: QAT costs 0.005 to 0.007 before export", "before")],
        seeds=3,
        note="Bytes are zstd's, which differ by up to 4 % between payloads of one format and equal entropy: smaller "
        "differences say nothing. With a scale floor of 1 rows use few of their levels: that artifact is a third "
        "smaller, so its line is not at equal bytes. Seeds differ in their initial weights only.",
    ),
    Experiment(
        "bits", "Matrices in int8 to int4, with and without QAT; embedding int8, no average.",
        {f"{kind} int{bits}": vary(config, quant={"bits": bits})
         for (kind, config), bits in product((("PTQ", PLAIN), ("QAT", UNAVERAGED)), (*BITS, 4))},
        [Claim("PTQ int8", "PTQ int6", "§16: R0 loses 0.0072 at int8, #70 0.0107 at int6", "penalty"),
         Claim("PTQ int6", "PTQ int5", metric="penalty"),
         Claim("QAT int6", "PTQ int6", "§16: R4 loses 0.0015, #70 0.0107", "penalty"),
         Claim("QAT int6", "PTQ int6", "§15, R4b: 1.16323 with QAT, 1.16520 without"),
         *(Claim(f"QAT int{bits}", f"PTQ int{bits}", metric="penalty") for bits in (5, 4)),
         *(Claim(f"QAT int{bits}", f"PTQ int{bits}") for bits in (8, 5, 4))],
    ),
    Experiment(
        "embedding", "The tied embedding in three formats: exports of the same weights, matrices int6, no QAT.",
        {f: vary(PLAIN, quant={"rules": (f"tok_emb.weight={f}",)}) for f in ("int8", "int6", "float16")},
        [Claim("int8", "int6", "§15: R4's log, 0.047 with the scale floor"),
         Claim("float16", "int8", "§16: #42 loses 0.0005 with float16, R0 0.0072")],
        seeds=3,
    ),
    Experiment(
        "newton-schulz", "Do seven Newton-Schulz steps beat five, at a short and a long warmdown? No QAT, no average.",
        {f"{n} steps, warmdown {frac}": vary(PLAIN, optim={"muon_ns_steps": n}, schedule={"warmdown_frac": frac})
         for frac, n in product((0.2, 1.0), (5, 7))},
        [Claim(f"7 steps, warmdown {frac}", f"5 steps, warmdown {frac}") for frac in (0.2, 1.0)],
    ),
    Experiment(
        "length", "Training length 256 against 512, at equal tokens, each scored in windows of its own, stride 64.",
        {"256": SLIDING, "512": vary(SLIDING, data={"seq_len": 512})},
        [Claim("256", "512", "§15: length 2048 1.17800, 4096 1.17932, both unclipped, the second at half the batch")],
    ),
    Experiment(
        "stride", "What does a smaller stride gain? The same weights, windows of 256.",
        {f"stride {stride}": vary(BASE, eval={"stride": stride}) for stride in (256, 128, 64, 32, 16)},
        [Claim("stride 64", "stride 256", "§8: R2 to R4 gain 0.021 to 0.034 over chunks"),
         Claim("stride 16", "stride 64")],
        note="Windows of 256 leave a token 128 others on average; a model this young hardly uses what is further away.",
    ),
    Experiment(
        "ntk", "Chunks longer than the 256 of training, with and without a larger rotary base: the same weights.",
        {"256": BASE}
        | {f"{window}, {kind}": vary(BASE, eval={"window": window}, model={"rope_reference_len": reference})
           for window, (kind, reference) in product((352, 512, 1024), (("NTK", 256), ("plain", None)))},
        [Claim("352, NTK", "256", "§16: R1 gains about 0.007 at 1.375 times its length"),
         *(Claim(f"{window}, NTK", f"{window}, plain") for window in (352, 512, 1024))],
    ),
    Experiment(
        "averages", "Where SWA starts (fraction of the peak rate), how fast an EMA forgets; last, hardly a warmdown.",
        {"none": UNAVERAGED}
        | {f"SWA below {lr}": vary(BASE, average={"swa_start_lr": lr}) for lr in (0.2, 0.4, 0.7, 1.0)}
        | {f"EMA {d}": vary(BASE, average={"kind": "ema", "ema_decay": d}) for d in (0.8, 0.9, 0.95, 0.98)}
        | {"warmdown 0.05, none": BRIEF}
        | {f"warmdown 0.05, EMA {d}": vary(BRIEF, average={"kind": "ema", "ema_decay": d}) for d in (0.9, 0.95)},
        [Claim("SWA below 0.4", "none"), Claim("SWA below 0.2", "SWA below 0.4"), Claim("EMA 0.9", "none"),
         Claim("warmdown 0.05, EMA 0.95", "warmdown 0.05, none")],
        note="With a warmdown of 0.6 the loss falls up to the last step, and every average is behind. With hardly a "
        "warmdown an EMA does the warmdown's work. recipes.md knows no run scored both with and without an average.",
    ),
    Experiment(
        "batch", "Tokens a step, at equal tokens and equal learning rates; no average.",
        {f"{tokens} tokens": batch(tokens) for tokens in (1024, 512, 2048)},
        [Claim("512 tokens", "1024 tokens"), Claim("1024 tokens", "2048 tokens")],
    ),
    Experiment(
        "clip", "Does clipping the gradient's norm help?",
        {f"clip {norm}": vary(BASE, optim={"grad_clip_norm": norm}) for norm in (0.0, 0.1, 0.3, 0.5, 1.0)},
        [Claim("clip 0.3", "clip 0.0", "§15: R2 at 0.3 1.17643, at 0 1.17800")],
    ),
    Experiment(
        "penalty", "Does a longer warmdown (a fraction of the steps) make quantization cheaper? No QAT, no average.",
        {f"{frac} int{bits}": vary(PLAIN, schedule={"warmdown_frac": frac}, quant={"bits": bits})
         for bits, frac in product(BITS, FRACTIONS)},
        [Claim(f"1.0 int{bits}", f"0.05 int{bits}", "§18: R1's announcement; no sweep is published", "penalty")
         for bits in BITS],
    ),
)
# fmt: on


def trained(config: RunConfig) -> RunConfig:
    """What of `config` decides the trained weights; the rest is put to its default."""
    model, quant = config.model, config.quant
    if model.rope_reference_len is not None and model.rope_reference_len >= config.data.seq_len:
        model = replace(model, rope_reference_len=None)
    quant = QuantConfig() if quant.qat == "off" else replace(quant, compressor=QuantConfig.compressor, level=None)
    return RunConfig(
        model=model,
        optim=config.optim,
        schedule=config.schedule,
        data=replace(config.data, path=None),
        quant=quant,
        seed=config.seed,
    )


def key(config: RunConfig) -> str:
    """What a config is called in the results: a hash of its fields that are not at their defaults; the dtype, which a
    result states, is none of them."""
    fields = differences(RunConfig(), vary(config, data={"path": None}, runtime={"dtype": "auto"}))
    return hashlib.sha256("\n".join(fields).encode()).hexdigest()[:16]
