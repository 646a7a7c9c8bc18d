"""Which published effects appear at a scale that a CPU trains: experiments, their runs, and docs/experiments.md.

    python -m bench.experiments --data DIR --out DIR [--only NAME ...] [--processes 2] [--seconds N]
    python -m bench.experiments --out DIR --report [--document FILE]

An experiment is a set of labelled configs derived from one base. Configs that train the same weights share a training:
from it come all averages, exports and evaluations that were asked for. Each config and seed gives one line in
OUT/experiments-cpu.jsonl, under a hash of the config; what is there is not run again. --seconds starts no training
after that time. The report is made from the lines alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import golfgpt_kernels
import torch

import golfgpt
from golfgpt.config import AverageConfig, BigramConfig, QuantConfig, RunConfig, differences
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError
from golfgpt.files import write_bytes
from golfgpt.model.gpt import GPT
from golfgpt.optim.averaging import Average
from golfgpt.quant import artifact
from golfgpt.score.evaluate import evaluate
from golfgpt.train.step import TrainStep

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


def jobs(experiments: Sequence[Experiment]) -> list[list[RunConfig]]:
    """Configs to score, those of one training together. In the experiments' order, third seeds last: two already tell
    the noise."""
    wanted: dict[str, dict[str, RunConfig]] = {}
    for seeds, experiment in product((SEEDS[:2], SEEDS[2:]), experiments):
        for seed, config in product(seeds, experiment.configs.values()):
            if SEEDS.index(seed) < experiment.seeds:
                config = replace(config, seed=seed)
                wanted.setdefault(key(trained(config)), {})[key(config)] = config
    return [list(configs.values()) for configs in wanted.values()]


def run_job(configs: list[RunConfig], data: str) -> list[dict]:
    """Train once, then average, export and score as each of `configs` says; one line of results for each."""
    torch.set_num_threads(1)
    dataset, ranks = Dataset.open(Path(data)), Ranks(0, 1, torch.device("cpu"))
    first, begun = configs[0], time.process_time()
    trainer = TrainStep(replace(trained(first), runtime=first.runtime), dataset, ranks)
    parameters = dict(trainer.model.named_parameters())
    averages = {config.average: Average(parameters, config.average) for config in configs}
    failed = None
    try:
        for step in range(first.schedule.max_steps):
            pending = trainer.launch(step)
            multiplier = trainer.update(pending)
            trainer.wait(pending)
            for average in averages.values():
                average.update(step + 1, multiplier)
        trainer.check_finite()
    except NonFiniteError as error:
        failed = {"error": str(error)}
    facts = {
        "training": key(trained(first)),
        "train_cpu_seconds": round(time.process_time() - begun, 1),
        "parameters": trainer.model.num_parameters(),
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "dataset": dataset.digest,
        **environment(),
    }

    def score(config: RunConfig, state: dict[str, torch.Tensor]) -> float:
        model = GPT(config.model)
        model.load_state_dict(state)
        return evaluate(model, dataset, config, ranks, dtype=trainer.dtype).val_bpb

    @cache
    def before(average: AverageConfig) -> float:
        return score(replace(first, eval=BASE.eval), weights(average))

    def weights(average: AverageConfig) -> dict[str, torch.Tensor]:
        return trainer.model.state_dict() | averages[average].weights()

    def export(config: RunConfig) -> dict[str, Any]:
        stored = {"tokenizer_sha256": dataset.need_tokenizer().digest, "seq_len": config.data.seq_len}
        blob = artifact.pack(weights(config.average), model=config.model, quant=config.quant, **stored)
        return {
            "before": before(config.average) if config.eval == BASE.eval else None,
            "bpb": score(config, artifact.unpack(blob).state),
            "bytes": len(blob),
            "averaged": averages[config.average].count,
        }

    return [
        {"key": key(config), "seed": config.seed, "config": differences(BASE, config), **facts}
        | (failed or export(config))
        for config in configs
    ]


def environment() -> dict[str, Any]:
    """Of a line: machine, versions, the sources' digest, date."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = [Path(module.__file__).parent for module in (golfgpt, golfgpt_kernels)]
    sources = [file.read_bytes() for package in packages for file in sorted(package.rglob("*.py"))]
    return {
        "machine": f"{names[0]}, {os.cpu_count()} cores",
        "golfgpt": golfgpt.__version__,
        "sources": hashlib.sha256(b"".join(sources)).hexdigest()[:12],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def read_rows(file: Path) -> dict[str, dict]:
    """Lines by key; a last line that was torn by a kill is cut off."""
    data = file.read_bytes() if file.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_bytes(file, whole)
    return {row["key"]: row for row in map(json.loads, whole.splitlines())}


def run(experiments: Sequence[Experiment], data: Path, file: Path, processes: int, seconds: float) -> None:
    """Run what `file` does not hold yet. Each training is a job of one thread in one of `processes` processes."""
    begun, done = time.monotonic(), read_rows(file)
    digest = Dataset.open(data).digest
    if others := {row["dataset"] for row in done.values()} - {digest}:
        raise SystemExit(f"{file} holds results on other data ({', '.join(others)}); take another --out")
    open_jobs = [[config for config in job if key(config) not in done] for job in jobs(experiments)]
    open_jobs = [job for job in open_jobs if job]
    total, running = len(open_jobs), set()
    print(f"{total} trainings, {sum(map(len, open_jobs))} scores to go", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool, open(file, "ab", buffering=0) as out:
        while open_jobs or running:
            while open_jobs and len(running) < processes and time.monotonic() - begun < seconds:
                running.add(pool.submit(run_job, open_jobs.pop(0), str(data)))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                rows = future.result()
                out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                os.fsync(out.fileno())
            left = len(open_jobs) + len(running)
            print(f"{time.monotonic() - begun:.0f} s: {total - left} of {total} trainings", flush=True)


# The report, from the lines alone.


def values(rows: dict[str, dict], config: RunConfig, metric: str) -> dict[int, float]:
    """bpb, before, penalty or bytes of `config` by seed, of the seeds that were run and did not diverge."""
    if metric == "penalty":
        before = values(rows, config, "before")
        return {seed: bpb - before[seed] for seed, bpb in values(rows, config, "bpb").items() if seed in before}
    found = {seed: rows.get(key(replace(config, seed=seed)), {}).get(metric) for seed in SEEDS}
    return {seed: value for seed, value in found.items() if value is not None}


def paired(rows: dict[str, dict], a: RunConfig, b: RunConfig, metric: str) -> list[float]:
    """a minus b, for each seed that both have."""
    x, y = values(rows, a, metric), values(rows, b, metric)
    return [x[seed] - y[seed] for seed in x if seed in y]


def variances(rows: dict[str, dict], metric: str, shared: bool) -> list[float]:
    """Variance over seeds of each difference between a config and the first of its experiment that two seeds or more
    give. `shared`: of two exports or evaluations of one training, else of two trainings."""
    found = []
    for experiment in EXPERIMENTS:
        first, *others = experiment.configs.values()
        for config in others:
            sample = paired(rows, config, first, metric)
            if len(sample) > 1 and shared == (trained(config) == trained(first)):
                found.append(statistics.variance(sample))
    return found


def noise(rows: dict[str, dict], metric: str, shared: bool, sample: Sequence[float] = (0.0,)) -> float:
    """Standard deviation over seeds of the differences `sample`: their own, but no less than what half of all
    comparisons have; for one seed the root of the mean variance of all; nan without any."""
    found = variances(rows, metric, shared)
    if not found:
        return math.nan
    if len(sample) < 2:
        return math.sqrt(statistics.mean(found))
    return math.sqrt(max(statistics.variance(sample), statistics.median(found)))


def judged(rows: dict[str, dict], experiment: Experiment, claim: Claim) -> tuple[list[float], str]:
    """worse minus better by seed, and what follows: an effect counts beyond three standard errors of the mean."""
    better, worse = experiment.configs[claim.better], experiment.configs[claim.worse]
    found = paired(rows, worse, better, claim.metric)
    if not found:
        return found, "not run"
    sigma = noise(rows, claim.metric, trained(better) == trained(worse), found)
    mean, limit = statistics.mean(found), 3 * sigma / math.sqrt(len(found))
    if math.isnan(limit):
        return found, "not judged: no estimate of the noise"
    if abs(mean) <= limit:
        return found, "not resolvable at this scale"
    words = ("appears", "does not appear, the opposite does") if claim.source else ("yes", "no, the opposite")
    return found, ("published direction " if claim.source else "") + words[mean < 0]


def spread(found: Sequence[float], sign: str = "") -> str:
    """Mean and, of several, the standard deviation."""
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):{sign}.4f}{deviation}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def section(rows: dict[str, dict], experiment: Experiment) -> str:
    """One experiment: its table."""
    lines, left, first = [], [], next(iter(experiment.configs.values()))
    for label, config in experiment.configs.items():
        scores, size = (values(rows, config, metric) for metric in ("bpb", "bytes"))
        if not scores:
            left.append(label)
            continue
        before, penalty = (list(values(rows, config, metric).values()) for metric in ("before", "penalty"))
        against = "–" if config is first else spread(paired(rows, config, first, "bpb"), "+")
        figures = (spread(before), spread(list(scores.values())), spread(penalty, "+"), against)
        lines.append((label, str(len(scores)), *figures, f"{statistics.mean(size.values()):,.0f}"))
    header = ("config", "seeds", "before export", "after export", "penalty", "against the first", "bytes")
    text = [f"## {experiment.name}", experiment.question, *([markdown(header, lines)] if lines else [])]
    text += [f"Not run: {', '.join(left)}."] if left else []
    text += [experiment.note] if experiment.note and lines else []
    return "\n\n".join(text)


_FACTS = ("machine", "dtype", "torch", "python", "golfgpt", "sources", "dataset", "date")
_CLAIMS = (
    "experiment",
    "should be better",
    "than",
    "measure",
    "difference",
    "seeds",
    "verdict",
    "source in recipes.md",
)


def report(rows: dict[str, dict]) -> str:
    """docs/experiments.md. Raises ValueError for results on several data sets."""
    facts = {name: ", ".join(sorted({row[name] for row in rows.values()})) for name in _FACTS}
    if "," in facts["dataset"]:
        raise ValueError(f"results on several data sets: {facts['dataset']}")
    cpu = {row["training"]: row["train_cpu_seconds"] for row in rows.values()}
    sizes = [row["parameters"] for row in rows.values()]
    claims = []
    for experiment in EXPERIMENTS:
        for c in experiment.claims:
            found, verdict = judged(rows, experiment, c)
            if not found:
                continue  # the section says what was not run
            figures = (spread(found, "+"), str(len(found)), verdict)
            claims.append((experiment.name, c.better, c.worse, c.metric, *figures, c.source or "none published"))
    sections = [section(rows, experiment) for experiment in EXPERIMENTS]
    errors = [f"- {', '.join(row['config'])}: {row['error']}" for row in rows.values() if "error" in row]
    if errors:
        sections.append("## Diverged\n\n" + "\n".join(errors))
    steps, tokens = BASE.schedule.max_steps, BASE.data.batch_tokens
    intro = f"""# Experiments

Written by `python -m bench.experiments --out bench/results --report` from `bench/results/{RESULTS}`; every figure is
measured. To repeat, with the books corpus:

    golfgpt data prepare books_train.jsonl.zst --val books_val.jsonl.zst --vocab-size {BASE.model.vocab_size} --out DIR
    python -m bench.experiments --data DIR --out OUT
    python -m bench.experiments --out OUT --report

**Scale.** {BASE.model.num_layers} layers of width {BASE.model.model_dim}, {min(sizes):,} to {max(sizes):,} parameters,
{steps} steps of {tokens:,} tokens in sequences of {BASE.data.seq_len} unless stated: {steps * tokens:,} tokens. Such a
model is far from converged, its weights are small and few; what is not resolved here may matter at 17 M parameters and
6 billion tokens, and the other way round. Scores are bits per byte of the first {BASE.eval.max_tokens:,} tokens of the
validation text, in chunks unless stated. Seeds ({", ".join(map(str, SEEDS))}, in this order) change the initial weights
only: the data and their order are the same, and no run depends on a clock.

**Where.** {len(cpu)} trainings, {len(rows)} scores, {sum(cpu.values()) / 3600:.1f} CPU hours of training, one thread
each, on {facts["machine"]}; activations {facts["dtype"]}. torch {facts["torch"]}, Python {facts["python"]}, golfgpt
{facts["golfgpt"]} (SHA-256 of the sources begins {facts["sources"]}), data set {facts["dataset"][:16]},
{facts["date"]}.

**Verdicts.** Differences are paired by seed. An effect counts when their mean exceeds three standard errors. The
standard deviation over seeds is that of the comparison itself, but at least the median of all comparisons with several
seeds; where there is one seed, it is the root of the mean variance of all: {noise(rows, "bpb", False):.4f} bpb between
two trainings and {noise(rows, "bpb", True):.4f} between two averages or exports of one; of the penalty, the score after
export minus the score before, {noise(rows, "penalty", False):.4f} and {noise(rows, "penalty", True):.4f}.

## Claims

A positive difference is in favour of the second column.

{markdown(_CLAIMS, claims)}"""
    return "\n\n".join([intro, *sections]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="prepared folder, vocabulary 1024")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULTS}")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="write --document, run nothing")
    parser.add_argument("--document", type=Path, default=Path(__file__).parent.parent / "docs" / "experiments.md")
    args = parser.parse_args(argv)
    if args.report:
        return write_bytes(args.document, report(read_rows(args.out / RESULTS)).encode())
    if args.data is None:
        parser.error("--data names the prepared folder")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a job's process imports torch
    chosen = [experiment for experiment in EXPERIMENTS if experiment.name in args.only]
    run(chosen, args.data, args.out / RESULTS, args.processes, args.seconds)


if __name__ == "__main__":
    main()
