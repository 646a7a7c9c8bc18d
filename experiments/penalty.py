"""What quantization costs a model that a CPU trains: rounding, GPTQ, fake quantization, and both, at 4 to 8 bits.

    python -m experiments.penalty --data DIR --out DIR [--seeds 1 2 3]
    python -m experiments.penalty --out DIR --report

The model is the stack of experiments.effects. A seed's runs share their first steps; then each goes on by itself, with
fake quantization to one number of bits or with none. Weights are kept in OUT, lines in OUT/penalty.jsonl; a call goes
on with what they lack, runs without fake quantization first.

A line is one artifact: seed, bits, which matrices have so many (all, or all but the embedding, which then has int8),
how the codes were chosen, bytes, and the bits per byte that are lost to the weights which it was made of. Clips by
deviation are used as the records use them: codes of 8 bits, so that nothing is clipped, and a grid as coarse as it
takes for an artifact of as many bytes as GPTQ's with the clip at each row's maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.experiment_report import markdown
from bench.experiment_table import vary
from bench.experiments import environment
from experiments.effects import STACK, open_part
from golfgpt.config import QuantConfig, RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.quant import artifact, calibration
from golfgpt.quant.formats import QuantizedTensor
from golfgpt.quant.quantizer import Quantizer
from golfgpt.score.evaluate import evaluate
from golfgpt.train.step import TrainStep

RESULTS = "penalty.jsonl"
BITS = (4, 5, 6, 7, 8)
STEPS, FORK = 800, 560
"""Steps of a run, and those that a seed's runs share."""
CPU = Ranks(0, 1, torch.device("cpu"))


class Kind(NamedTuple):
    """What tells an artifact of a seed from the others."""

    bits: int
    matrices: str
    """all, or body: the embedding has int8."""
    method: str


BASE = vary(
    STACK,
    schedule=dict(max_steps=STEPS),
    data=dict(batch_tokens=2048),
    average=dict(ema_decay=1 - 17 / STEPS),
    quant=dict(compressor="lzma"),
    eval=dict(max_tokens=32_768),
    runtime=dict(dtype="bfloat16", compile="on"),
)


def run_config(seed: int, bits: int | None) -> RunConfig:
    """The run of `seed` with fake quantization to `bits` bits in its last steps, or without any."""
    config = replace(BASE, seed=seed)
    return config if bits is None else vary(config, quant=dict(bits=bits, qat="export", qat_start=FORK / STEPS))


def weights_file(out: Path, seed: int, bits: int | None) -> Path:
    return out / f"seed{seed}-{'plain' if bits is None else f'qat{bits}'}.safetensors"


def advance(trainer: TrainStep, start: int, stop: int) -> None:
    for step in range(start, stop):
        pending = trainer.launch(step)
        trainer.update(pending)
        trainer.wait(pending)


def train(seed: int, bits: int | None, data: Path, out: Path) -> None:
    """Write the weights of a run, and the state from which the runs of its seed go on, unless `out` has them."""
    shared = out / f"seed{seed}-shared.safetensors"
    if weights_file(out, seed, bits).exists():
        return
    trainer = TrainStep(run_config(seed, bits), open_part(data, seed), CPU)
    trainer.average.begin()
    if not shared.exists():
        advance(trainer, 0, FORK)  # fake quantization is still off
        parts = trainer.model.state_dict(), trainer.optimizers.state(), trainer.average.state()
        state = {f"{i}.{name}": value.contiguous() for i, part in enumerate(parts) for name, value in part.items()}
        save_file(state, shared)
    parts = [{}, {}, {}]
    for name, value in load_file(shared).items():
        parts[int(name[0])][name[2:]] = value
    trainer.model.load_state_dict(parts[0])
    trainer.optimizers.load_state(parts[1])
    trainer.average.load_state(parts[2])
    trainer.prepare(FORK)
    advance(trainer, FORK, STEPS)
    trainer.check_finite()
    trainer.data.close()
    state = trainer.model.state_dict() | trainer.average.weights()
    save_file({name: w.contiguous() for name, w in state.items()}, weights_file(out, seed, bits))
    print(f"{time.process_time():.0f} CPU s: {weights_file(out, seed, bits)}", flush=True)


def as_large(target: int, size: Callable[[float], int], elements: int) -> float:
    """Deviations for which `size` of them is within 0.2 percent of `target` bytes: twice as many deviations save about
    one bit of each of `elements` codes."""
    deviations = 8.0
    for _ in range(12):
        found = size(deviations)
        if abs(found / target - 1) < 0.002:
            break
        deviations = round(deviations * 2 ** (8 * (found - target) / elements), 3)
    return deviations


def measure(seed: int, trained: int | None, data: Path, out: Path) -> None:
    """Add the lines of a run that the file lacks."""
    lines, dataset = rows(out), Dataset.open(data)
    stored = {"model": BASE.model, "tokenizer_sha256": dataset.need_tokenizer().digest, "seq_len": BASE.data.seq_len}

    def score(state: Mapping[str, Tensor]) -> float:
        model = GPT(BASE.model)
        model.load_state_dict(state)
        return evaluate(model, dataset, BASE, CPU, dtype=torch.float32).val_bpb

    state, model = load_file(weights_file(out, seed, trained)), GPT(BASE.model)
    model.load_state_dict(state)
    before, hessians = None, None  # computed when a line is missing

    def write(kind: Kind, quant: QuantConfig, state: dict = state, model: GPT = model) -> int:
        """Bytes of the artifact of this kind, which is made if its line is missing."""
        nonlocal before, hessians
        for row in lines:
            if (row["seed"], row["bits"], row["matrices"], row["method"]) == (seed, *kind):
                return row["bytes"]
        if before is None:
            before = score(state)
            config = vary(BASE, quant=dict(method="gptq", calibration_tokens=131_072))
            hessians = calibration.calibrate(config, model, open_part(data, seed), CPU, torch.float32)
        by_gptq = hessians if quant.method == "gptq" else None

        def encode(quant: QuantConfig) -> dict[str, QuantizedTensor]:
            return Quantizer(BASE.model, quant).encode(state, by_gptq)

        if quant.clip == "deviation":

            def size(deviations: float) -> int:
                changed = replace(quant, deviations=deviations)
                return len(artifact.seal(encode(changed), quant=changed, **stored))

            as_max = replace(quant, bits=kind.bits, clip="max", deviations=0.0, method="gptq")
            target = write(kind._replace(method="gptq"), as_max)
            quant = replace(quant, deviations=as_large(target, size, model.num_parameters()))
        cpu = time.process_time()
        encoded = encode(quant)
        seconds = time.process_time() - cpu
        blob = artifact.seal(encoded, quant=quant, **stored)
        row = dict(zip(("seed", *Kind._fields), (seed, *kind), strict=True))
        row |= dict(deviations=quant.deviations, bytes=len(blob), before=before)
        row |= dict(bpb=score(artifact.unpack(blob).state), seconds=round(seconds, 2))
        with open(out / RESULTS, "a") as file:
            file.write(json.dumps(row | {"dataset": dataset.digest, **environment()}) + "\n")
        print(f"seed {seed} {tuple(kind)}: {len(blob):,} bytes, {row['bpb'] - before:+.5f}", flush=True)
        lines.append(row)
        return len(blob)

    for bits in BITS if trained is None else (trained,):
        quant = replace(BASE.quant, bits=bits)
        body = replace(quant, rules=("tok_emb.weight=int8@max",))
        gptq = dict(method="gptq")
        if trained is not None:
            write(Kind(bits, "all", "qat"), quant)
            write(Kind(bits, "all", "qat, gptq"), replace(quant, **gptq))
            continue
        for matrices, base in (("body", body), ("all", quant)):
            write(Kind(bits, matrices, "rtn"), base)
            write(Kind(bits, matrices, "gptq"), replace(base, **gptq))
        write(Kind(bits, "all", "gptq as published"), replace(quant, embed_damping=0.01, **gptq))
        if bits < 6:
            deviation = replace(body, bits=8, clip="deviation", deviations=8.0)
            write(Kind(bits, "body", "rtn, deviation"), deviation)
            write(Kind(bits, "body", "gptq, deviation"), replace(deviation, **gptq))


def rows(out: Path) -> list[dict]:
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(lines: Sequence[dict]) -> str:
    """Penalties by kind: mean over seeds, least and largest, bytes, and the ratio to the better rounding."""
    header = ("bits", "of", "method", "seeds", "penalty", "of rounding's", "least to largest", "score", "bytes")
    found: dict[Kind, list[dict]] = {}
    for row in lines:
        found.setdefault(Kind(*(row[field] for field in Kind._fields)), []).append(row)
    penalties = {kind: [row["bpb"] - row["before"] for row in group] for kind, group in found.items()}
    out = []
    for kind, group in sorted(found.items()):
        values = penalties[kind]
        rounded = [penalties.get(kind._replace(method=method)) for method in ("rtn", "rtn, deviation")]
        best = min((statistics.mean(other) for other in rounded if other), default=None)
        ratio = f"{statistics.mean(values) / best:.2f}" if best else "–"
        spread = f"{min(values):.4f} to {max(values):.4f}"
        size, score = (statistics.mean(row[name] for row in group) for name in ("bytes", "bpb"))
        mean = f"{statistics.mean(values):.4f}"
        out.append((*map(str, kind), str(len(group)), mean, ratio, spread, f"{score:.4f}", f"{size:,.0f}"))
    return markdown(header, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help=f"prepared folder, vocabulary {BASE.model.vocab_size}")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of weights and {RESULTS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", action="store_true", help="train and measure nothing")
    args = parser.parse_args(argv)
    if not args.report:
        if args.data is None:
            parser.error("--data names the prepared folder")
        args.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        for bits in (None, *BITS):
            for seed in args.seeds:
                train(seed, bits, args.data, args.out)
                measure(seed, bits, args.data, args.out)
    print(table(rows(args.out)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
