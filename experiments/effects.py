"""What the parts of the newest records are worth in a model that a CPU trains: all of them, and all but one.

    python -m experiments.effects --data DIR --out DIR [--processes 2] [--seconds N]
    python -m experiments.effects --out DIR --report

The stack is trained beside its parent, which has none of the parts, then without one part at a time. Each call goes on
with the first runs of `queue` that OUT/effects.jsonl lacks, one thread each, and ends with the table. A finished run is
a line there; an interruption loses the runs in progress. --seconds starts no run after that time.

All runs take equally many steps, but not equally long: the loop makes a step slower. Runs of one seed start from the
same initial weights (a part's own parameters aside) and read the same tokens in the same order; each seed has a fifth
of the text for itself.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from golfgpt_kernels._dispatch import dtype_name

from bench.experiment_report import markdown
from bench.experiment_table import key, vary
from bench.experiments import environment, read_rows, work_off
from golfgpt.config import LoopConfig, RunConfig, differences
from golfgpt.data.shards import Dataset, gather
from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError
from golfgpt.model.gpt import GPT
from golfgpt.quant import artifact
from golfgpt.score.evaluate import evaluate
from golfgpt.train.step import TrainStep

RESULTS = "effects.jsonl"
SEEDS = (1, 2, 3, 4, 5)
STEPS = 1500

PARENT = vary(
    RunConfig(),
    model=dict(num_layers=6, model_dim=192, num_heads=3, num_kv_heads=1, mlp_hidden=384),
    optim=dict(matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.025, muon_momentum_warmup_steps=100, weight_decay=0.04),
    schedule=dict(max_steps=STEPS, max_seconds=None, warmdown_frac=0.7),
    data=dict(batch_tokens=512, seq_len=256, spans=1, order="shuffled"),
    quant=dict(keep_numel=4096, compressor="zstd"),
    eval=dict(max_tokens=131_072, batch_tokens=8192),
    runtime=dict(device="cpu", dtype="float32", threads=1, compile="off"),
)
"""The shape of recipe small before it had a pair table, 1.7 M parameters, with relu², Muon and a warmdown to zero.
float32, because a CPU without bfloat16 instructions takes several times as long in bfloat16, and lines of several
machines must be comparable."""

STACK = vary(
    PARENT,
    model=dict(smear_gate="input", document_start=1, attn_gate="sparse", attn_gate_scale=0.5, gate_window=12,
               loop=LoopConfig(first=2, last=3, passes=3, start=0.35), xsa_layers=tuple(range(6)), mlp_slope=0.5,
               rope_dims=16, ln_scale=True, skip_gates=True),
    optim=dict(muon_row_norm=True),
    schedule=dict(min_lr=0.1),
    average=dict(kind="ema", ema_decay=1 - 17 / STEPS),
)  # fmt: skip
"""What the record of 2026-04-27 trains with, as far as it is no matter of scale; no parallel lanes."""

WITHOUT = {
    "input-gated smear": vary(STACK, model={"smear_gate": "none", "document_start": None}),
    "gated attention": vary(STACK, model={"attn_gate": "none", "attn_gate_scale": 1.0}),
    "recurrence": vary(STACK, model={"loop": LoopConfig()}),
    "XSA": vary(STACK, model={"xsa_layers": ()}),
    "leaky²": vary(STACK, model={"mlp_slope": 0.0}),
    "MuonEq-R": vary(STACK, optim={"muon_row_norm": False}),
    "EMA with LR floor": vary(
        STACK, average={"kind": "none", "ema_decay": PARENT.average.ema_decay}, schedule={"min_lr": 0.0}
    ),
}
"""The stack without the part that is named."""

LABELS = {"stack": STACK, "parent": PARENT, **{f"stack without {part}": config for part, config in WITHOUT.items()}}


def queue() -> list[RunConfig]:
    """All runs, in the order in which they are taken: five pairs of stack and parent, then each part for three seeds,
    then for the others."""
    pairs = [replace(config, seed=seed) for seed in SEEDS for config in (STACK, PARENT)]
    rounds = (SEEDS[:3], SEEDS[3:])
    return pairs + [replace(config, seed=s) for seeds in rounds for config in WITHOUT.values() for s in seeds]


def label(config: RunConfig) -> str:
    return next(name for name, known in LABELS.items() if key(known) == key(replace(config, seed=known.seed)))


def open_part(data: str | os.PathLike, seed: int) -> Dataset:
    """The data set of `data` with the part of its training tokens that belongs to `seed`."""
    dataset = Dataset.open(Path(data))
    tokens, index = dataset.train_tokens // len(SEEDS), SEEDS.index(seed)
    dataset.train = [gather(dataset.train, index * tokens, (index + 1) * tokens)]
    return dataset


def run_job(configs: list[RunConfig], data: str) -> list[dict]:
    """Train and score the one config of a job; its line of results.

    loss is the mean training loss of the last twentieth of the steps, before the weights of each step are averaged;
    before and bpb are the scores of the final (averaged) weights and of the artifact made of them."""
    (config,) = configs
    torch.set_num_threads(1)
    dataset, ranks = open_part(data, config.seed), Ranks(0, 1, torch.device("cpu"))
    trainer = TrainStep(config, dataset, ranks)
    row = {
        "key": key(config),
        "label": label(config),
        "seed": config.seed,
        "config": differences(LABELS["parent"], config),
    }
    row |= {"parameters": trainer.model.num_parameters(), "dtype": dtype_name(trainer.dtype)}
    row |= {"dataset": dataset.digest, **environment()}
    begun, cpu, losses = time.monotonic(), time.process_time(), []
    trainer.average.begin()
    try:
        for step in range(config.schedule.max_steps):
            pending = trainer.launch(step)
            trainer.update(pending)
            losses.append(trainer.wait(pending).loss)
        trainer.check_finite()
    except NonFiniteError as error:
        return [row | {"error": str(error)}]
    finally:
        trainer.data.close()
    row |= {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}

    def score(state: dict[str, torch.Tensor]) -> float:
        model = GPT(config.model)
        model.load_state_dict(state)
        return evaluate(model, dataset, config, ranks, dtype=trainer.dtype).val_bpb

    weights = trainer.model.state_dict() | trainer.average.weights()
    stored = {"tokenizer_sha256": dataset.need_tokenizer().digest, "seq_len": config.data.seq_len}
    blob = artifact.pack(weights, model=config.model, quant=config.quant, **stored)
    loss = statistics.mean(losses[-max(1, len(losses) // 20) :])
    scores = {"before": score(weights), "bpb": score(artifact.unpack(blob).state)}
    return [row | {"loss": loss, **scores, "bytes": len(blob)}]


def gains(rows: dict[str, dict], without: RunConfig, metric: str) -> list[float]:
    """How much lower `metric` is with the stack than `without`, for each seed that has both."""
    found = []
    for seed in SEEDS:
        a, b = (rows.get(key(replace(config, seed=seed)), {}).get(metric) for config in (without, STACK))
        if a is not None and b is not None:
            found.append(a - b)
    return found


def verdict(found: Sequence[float]) -> str:
    """gains or loses, if there are three differences and their mean exceeds two standard errors."""
    if len(found) < 3 or abs(statistics.mean(found)) <= 2 * standard_error(found):
        return "not resolvable"
    return "gains" if statistics.mean(found) > 0 else "loses"


def standard_error(found: Sequence[float]) -> float:
    return statistics.stdev(found) / math.sqrt(len(found))


def shown(found: Sequence[float]) -> str:
    if len(found) < 2:
        return f"{found[0]:+.4f}" if found else "–"
    return f"{statistics.mean(found):+.4f} ± {standard_error(found):.4f}"


def table(rows: dict[str, dict]) -> str:
    """Paired differences with their standard errors, and what ran how long, in Markdown."""
    lines = []
    for name, without in {"whole stack": PARENT, **WITHOUT}.items():
        bpb, before, loss = (gains(rows, without, metric) for metric in ("bpb", "before", "loss"))
        if bpb:
            lines.append((name, str(len(bpb)), shown(bpb), verdict(bpb), shown(before), shown(loss), verdict(loss)))
    header = ("part", "n", "score", "verdict", "score before export", "loss", "verdict by loss")
    means = []
    for name, config in LABELS.items():
        done = [rows.get(key(replace(config, seed=seed)), {}) for seed in SEEDS]
        done = [row for row in done if "bpb" in row]
        if done:
            score, loss, cpu = (
                statistics.mean(row[metric] for row in done) for metric in ("bpb", "loss", "cpu_seconds")
            )
            means.append((name, str(len(done)), f"{score:.4f}", f"{loss:.4f}", f"{cpu:.0f}"))
    failed = [f"{row['label']}, seed {row['seed']}: {row['error']}" for row in rows.values() if "error" in row]
    sections = [markdown(header, lines), markdown(("run", "seeds", "score", "loss", "CPU seconds"), means), *failed]
    return "\n\n".join(sections)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help=f"prepared folder, vocabulary {PARENT.model.vocab_size}")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULTS}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    file = args.out / RESULTS
    if not args.report:
        if args.data is None:
            parser.error("--data names the prepared folder")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a job's process imports torch
        args.out.mkdir(parents=True, exist_ok=True)
        work_off([[config] for config in queue()], run_job, args.data, file, args.processes, args.seconds)
    print(table(read_rows(file)))


if __name__ == "__main__":
    main()
