"""What test-time training gains, in bits per byte against seconds: plain, sliding, SGD, LoRA, phased.

    python -m experiments.adaptation --data DIR --weights DIR --out DIR [--seeds 1 2 3]
    python -m experiments.adaptation --out DIR --report

The models are those of experiments.penalty without fake quantization, one a seed, in float32; --weights is its OUT, and
what it lacks is trained. Learning rates are chosen with the first seed on training documents that no model has read;
then every seed is scored on the validation text. A finished score is a line of OUT/adaptation.jsonl; a call goes on
with what it lacks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from bench.experiment_report import markdown
from bench.experiment_table import vary
from bench.experiments import environment
from experiments import penalty
from golfgpt.config import RunConfig
from golfgpt.data.prepare import prepare
from golfgpt.data.shards import Dataset, gather
from golfgpt.model.gpt import GPT
from golfgpt.score.evaluate import evaluate
from golfgpt.score.ttt.evaluate import evaluate_adapted

RESULTS = "adaptation.jsonl"
TUNE_TOKENS, TOKENS = 32_768, 49_152
STRIDE = 64
"""Of everything but the plain score, and the chunk of the LoRAs: all predict a token from 193 to 256 tokens, as far as
the text or the document has so many."""

BASE = vary(penalty.BASE, eval=dict(max_tokens=TOKENS), runtime=dict(dtype="float32", compile="off"))
SLIDING = vary(BASE, eval=dict(stride=STRIDE))


def adapted(kind: str, sgd: dict | None = None, lora: dict | None = None) -> RunConfig:
    """SGD by chunks of 4,096 tokens; LoRAs of rank 8 in batches of 8 documents, in the order of the text; two phases in
    16 documents."""
    ttt = replace(
        BASE.eval.ttt,
        kind=kind,
        max_seconds=36_000.0,
        phases=2,
        phase_documents=16,
        sgd=replace(BASE.eval.ttt.sgd, chunk_tokens=4096, **(sgd or {})),
        lora=replace(BASE.eval.ttt.lora, rank=8, chunk_tokens=STRIDE, documents=8, order="stream", **(lora or {})),
    )
    return vary(SLIDING, eval=dict(ttt=ttt))


PLAIN = {
    "plain": BASE,
    "sliding": SLIDING,
    "sliding in documents": vary(SLIDING, eval=dict(document_aware=True)),
}
OWN = {"sgd": "sliding", "lora": "sliding in documents", "phased": "sliding in documents"}
"""Kind -> the score without learning whose contexts are the same."""
SGD_LR, LORA_LR = (3e-4, 0.001, 0.003, 0.01), (0.001, 0.003, 0.01, 0.03)


def unread(data: Path, folder: Path) -> Path:
    """A prepared folder, made unless it is there. Its validation text are the last 24 training documents, which belong
    to none of seeds 1 to 4; eight documents before them stand for its training text."""
    if folder.exists():
        return folder
    dataset = Dataset.open(data)
    tokenizer = dataset.need_tokenizer()
    ids = gather(dataset.train, dataset.train_tokens - 200_000, dataset.train_tokens)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))[-32:]
    files = [folder.with_name(f"{folder.name}_{split}.jsonl") for split in ("train", "val")]
    for file, part in zip(files, (documents[:8], documents[8:]), strict=True):
        file.write_text("".join(json.dumps({"text": tokenizer.decode(d[1:].tolist())}) + "\n" for d in part))
    prepare(files[:1], folder, tokenizer=tokenizer, val=files[1:], workers=1)
    return folder


T95 = {3: 4.303, 4: 3.182, 5: 2.776}
"""Number of pairs -> quantile 0.975 of Student's t."""


def rows(out: Path) -> list[dict]:
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Scores:
    """Scores of trained models, each computed once."""

    def __init__(self, out: Path, weights: Path):
        self.out, self.weights, self.lines = out, weights, rows(out)

    def __call__(self, seed: int, name: str, config: RunConfig, data: Path, *, tune: bool = False) -> float:
        """Bits per byte, infinite where the weights diverge. Adds a line unless there is one of this seed, name and
        learning rates."""
        sgd, lora = config.eval.ttt.sgd.lr, config.eval.ttt.lora.lr
        key = {"seed": seed, "name": name, "tune": tune}
        key |= {"sgd_lr": sgd if name in ("sgd", "phased") else None}
        key |= {"lora_lr": lora if name in ("lora", "phased") else None}
        for row in self.lines:
            whole = row["diverged"] or row["tokens"] == (TUNE_TOKENS if tune else TOKENS)
            if whole and key.items() <= row.items():
                return math.inf if row["diverged"] else row["bpb"]
        model, dataset = GPT(BASE.model), Dataset.open(data)
        model.load_state_dict(load_file(penalty.weights_file(self.weights, seed, None)))
        if tune:
            config = vary(config, eval=dict(max_tokens=TUNE_TOKENS))
        score = evaluate if name in PLAIN else evaluate_adapted
        cpu = time.process_time()
        found = score(model, dataset, config, penalty.CPU, dtype=torch.float32)
        cpu = time.process_time() - cpu
        diverged = getattr(found, "diverged", False)
        row = key | dict(bpb=found.val_bpb, tokens=found.tokens, diverged=diverged, cpu_seconds=round(cpu, 1))
        row |= {"dataset": dataset.digest, **environment()}
        with open(self.out / RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")
        print({name: row[name] for name in (*key, "bpb", "cpu_seconds")}, flush=True)
        self.lines.append(row)
        return math.inf if diverged else row["bpb"]


def chosen(scores: Scores, seed: int, data: Path) -> dict[str, RunConfig]:
    """Kind -> its config with the learning rates that are best on `data`."""

    def best(kind: str, configs: Sequence[RunConfig]) -> RunConfig:
        return min(configs, key=lambda config: scores(seed, kind, config, data, tune=True))

    sgd = best("sgd", [adapted("sgd", sgd={"lr": lr}) for lr in SGD_LR])
    lora = best("lora", [adapted("lora", lora={"lr": lr}) for lr in LORA_LR])
    rate = {"lr": lora.eval.ttt.lora.lr}
    phased = best("phased", [adapted("phased", sgd={"lr": lr}, lora=rate) for lr in SGD_LR[:2]])
    return {"sgd": sgd, "lora": lora, "phased": phased}


def table(lines: Sequence[dict]) -> str:
    """Scores, gains over the plain score and over the score with the same contexts, paired by seed, with the 95 %
    interval of the mean by Student's t, and CPU seconds as multiples of the plain score's."""
    found: dict[str, dict[int, dict]] = {}
    for row in lines:
        if not row["tune"]:
            found.setdefault(row["name"], {})[row["seed"]] = row

    def gains(name: str, over: str) -> str:
        pairs = [found[over][seed]["bpb"] - row["bpb"] for seed, row in found[name].items() if seed in found[over]]
        if not pairs or name == over:
            return "–"
        mean = f"{statistics.mean(pairs):+.4f}"
        if len(pairs) not in T95:
            return mean
        half = T95[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
        return f"{mean} ± {half:.4f}"

    out = []
    for name, seeds in found.items():
        bpb, cpu = (statistics.mean(row[key] for row in seeds.values()) for key in ("bpb", "cpu_seconds"))
        own = gains(name, OWN[name]) if name in OWN else "–"
        plain = statistics.mean(row["cpu_seconds"] for row in found["plain"].values())
        out.append((name, str(len(seeds)), f"{bpb:.4f}", gains(name, "plain"), own, f"{cpu:.0f}", f"{cpu / plain:.1f}"))
    header = ("score", "seeds", "val_bpb", "gain over plain", "gain by learning", "CPU seconds", "of plain's")
    return markdown(header, out)


def tuning(lines: Sequence[dict]) -> str:
    """Scores of the learning rates that were tried."""
    header = ("kind", "sgd.lr", "lora.lr", "val_bpb")
    rows = [row for row in lines if row["tune"]]

    def cells(row: dict) -> tuple[str, ...]:
        rates = ("–" if row[name] is None else f"{row[name]:g}" for name in ("sgd_lr", "lora_lr"))
        return row["name"], *rates, "diverged" if row["diverged"] else f"{row['bpb']:.4f}"

    return markdown(header, [cells(row) for row in rows])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help=f"prepared folder, vocabulary {BASE.model.vocab_size}")
    parser.add_argument("--weights", type=Path, help="OUT of experiments.penalty")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULTS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", action="store_true", help="train and score nothing")
    args = parser.parse_args(argv)
    if not args.report:
        if not (args.data and args.weights):
            parser.error("--data and --weights name folders")
        torch.set_num_threads(1)
        for folder in (args.out, args.weights):
            folder.mkdir(parents=True, exist_ok=True)
        penalty.train(args.seeds[0], None, args.data, args.weights)
        scores = Scores(args.out, args.weights)
        configs = PLAIN | chosen(scores, args.seeds[0], unread(args.data, args.out / "unread"))
        for seed in args.seeds:
            penalty.train(seed, None, args.data, args.weights)
            for name, config in configs.items():
                scores(seed, name, config, args.data)
    print(tuning(rows(args.out)), table(rows(args.out)), sep="\n\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
