"""Which vocabulary gives the best model of a fixed size: 1,024, 4,096 and 8,192 tokens, with and without CaseOps.

    python -m experiments.vocabularies --data sp1024=DIR sp4096=DIR sp4096_caps=DIR ... --out DIR [--seeds 1 2 3]
    python -m experiments.vocabularies --out DIR --report

Every model is forecast to be stored in equally many bytes: what an embedding leaves goes into the MLP (budget.fit).
All are stored as the records store theirs (int6 by deviation, int7 embedding, GPTQ), take equally many steps of equally
many tokens, and are scored on the same text. So a larger vocabulary reads more text, as it does in a fixed time. A
finished run is a line of OUT/vocabularies.jsonl; a call goes on with what it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.experiment_report import markdown
from bench.experiment_table import vary
from bench.experiments import environment
from experiments.effects import PARENT, open_part
from experiments.penalty import CPU, advance
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.model.gpt import GPT
from golfgpt.quant import artifact, calibration
from golfgpt.quant.budget import fitted
from golfgpt.quant.quantizer import Quantizer
from golfgpt.score.evaluate import evaluate
from golfgpt.train.step import TrainStep

RESULTS = "vocabularies.jsonl"
ARTIFACT_BYTES = 1_400_000
SCORED_BYTES = 300_000

BASE = vary(
    PARENT,
    model=dict(mlp_slope=0.5, rope_dims=16, ln_scale=True),
    optim=dict(muon_row_norm=True),
    schedule=dict(max_steps=600, min_lr=0.1),
    data=dict(batch_tokens=2048),
    average=dict(kind="ema", ema_decay=1 - 17 / 600),
    quant=dict(
        bits=6, clip="deviation", deviations=12.85, rules=("tok_emb.weight=int7@15",), method="gptq",
        calibration_tokens=131_072, compressor="brotli",
    ),
    budget=dict(fit="mlp_hidden", artifact_bytes=ARTIFACT_BYTES, code_bytes=0, reserve_bytes=0),
    runtime=dict(dtype="bfloat16", compile="on"),
)  # fmt: skip


def run_config(dataset: Dataset, seed: int) -> RunConfig:
    """The run on `dataset`, its MLP as wide as the bytes allow."""
    per_token = dataset.manifest.val.decoded_bytes / dataset.val_tokens
    config = vary(
        replace(BASE, seed=seed),
        model=dict(vocab_size=dataset.vocab_size),
        eval=dict(max_tokens=round(SCORED_BYTES / per_token)),
    )
    return fitted(config)


def run(name: str, data: Path, seed: int) -> dict:
    """Train, store and score; the line of results."""
    dataset = open_part(data, seed)
    config, begun = run_config(dataset, seed), time.process_time()
    trainer = TrainStep(config, dataset, CPU)
    trainer.average.begin()
    advance(trainer, 0, config.schedule.max_steps)
    trainer.check_finite()
    trainer.data.close()
    seconds = time.process_time() - begun
    state, model = trainer.model.state_dict() | trainer.average.weights(), GPT(config.model)

    def score(state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        return evaluate(model, dataset, config, CPU, dtype=torch.float32).val_bpb

    before = score(state)
    hessians = calibration.calibrate(config, model, dataset, CPU, torch.float32)
    encoded = Quantizer(config.model, config.quant).encode(state, hessians)
    stored = {"tokenizer_sha256": dataset.need_tokenizer().digest, "seq_len": config.data.seq_len}
    blob = artifact.seal(encoded, model=config.model, quant=config.quant, **stored)
    row = dict(data=name, seed=seed, mlp_hidden=config.model.mlp_hidden, parameters=trainer.model.num_parameters())
    row |= dict(bytes=len(blob), before=before, bpb=score(artifact.unpack(blob).state), cpu_seconds=round(seconds))
    return row | {"dataset": dataset.digest, **environment()}


def rows(out: Path) -> list[dict]:
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(lines: Sequence[dict]) -> str:
    """Scores and bytes of each vocabulary, and differences to the first, paired by seed."""
    found: dict[str, dict[int, dict]] = {}
    for row in lines:
        found.setdefault(row["data"], {})[row["seed"]] = row
    out, first = [], next(iter(found.values()), {})
    for name, seeds in found.items():
        means = [statistics.mean(row[key] for row in seeds.values()) for key in ("bpb", "before", "bytes")]
        gains = [first[seed]["bpb"] - row["bpb"] for seed, row in seeds.items() if seed in first]
        spread = f"{min(gains):+.4f} to {max(gains):+.4f}" if len(gains) > 1 else "–"
        gain = f"{statistics.mean(gains):+.4f}" if gains else "–"
        row = next(iter(seeds.values()))
        cells = (f"{means[0]:.4f}", f"{means[0] - means[1]:.4f}", f"{means[2]:,.0f}", str(row["mlp_hidden"]))
        out.append((name, str(len(seeds)), *cells, gain, spread))
    header = ("vocabulary", "seeds", "score", "penalty", "bytes", "MLP", "gain over the first", "least to largest")
    return markdown(header, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help="prepared folders")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULTS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in () if args.report else args.seeds:
        for name, folder in (item.split("=", 1) for item in args.data):
            if any((row["data"], row["seed"]) == (name, seed) for row in rows(args.out)):
                continue
            row = run(name, Path(folder), seed)
            with open(args.out / RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: row[key] for key in ("data", "seed", "bytes", "before", "bpb", "cpu_seconds")}, flush=True)
    print(table(rows(args.out)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
