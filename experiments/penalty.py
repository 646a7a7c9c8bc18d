"""What quantization costs a model that a CPU trains: rounding, GPTQ, fake quantization, and both, at 4 to 8 bits.

    python -m experiments.penalty --data DIR --out DIR [--seeds 1 2 3]
    python -m experiments.penalty --out DIR --report

The model is the stack of experiments.effects. A seed's runs share their first steps; then each goes on by itself, with
fake quantization to one number of bits or with none. Weights are kept in OUT, lines in OUT/penalty.jsonl; a call goes
on with what they lack.

A line is one artifact: seed, bits, how its codes were chosen, its bytes, and the bits per byte that it loses to the
weights which it was made of. Rounding with the clip at each row's maximum sets the bytes of a number of bits. Clips
by deviation are made as wide as it takes for an artifact of equally many, so penalties compare at equal size.
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

BASE = vary(
    STACK,
    schedule=dict(max_steps=STEPS),
    data=dict(batch_tokens=2048),
    average=dict(ema_decay=1 - 17 / STEPS),
    quant=dict(compressor="lzma"),
    eval=dict(max_tokens=65_536),
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


def train(seed: int, data: Path, out: Path) -> None:
    """Write the weights of the runs of `seed` that `out` lacks."""
    wanted = [bits for bits in (None, *BITS) if not weights_file(out, seed, bits).exists()]
    if not wanted:
        return
    dataset, trunk = open_part(data, seed), None
    for bits in wanted:
        trainer = TrainStep(run_config(seed, bits), dataset, CPU)
        trainer.average.begin()
        if trunk is None:
            advance(trainer, 0, FORK)  # fake quantization is still off
            parts = trainer.model.state_dict(), trainer.optimizers.state(), trainer.average.state()
            trunk = [{name: value.clone() for name, value in part.items()} for part in parts]
        trainer.model.load_state_dict(trunk[0])
        trainer.optimizers.load_state(trunk[1])
        trainer.average.load_state(trunk[2])
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


def measure(seed: int, data: Path, out: Path) -> None:
    """Add the lines of `seed` that the file lacks."""
    lines = rows(out)
    known = {(row["seed"], row["bits"], row["method"]) for row in lines}
    dataset = Dataset.open(data)
    stored = {"model": BASE.model, "tokenizer_sha256": dataset.need_tokenizer().digest, "seq_len": BASE.data.seq_len}

    def score(state: Mapping[str, Tensor]) -> float:
        model = GPT(BASE.model)
        model.load_state_dict(state)
        return evaluate(model, dataset, BASE, CPU, dtype=torch.float32).val_bpb

    def write(bits: int, method: str, before: float, quant: QuantConfig, encode: Callable) -> int:
        """Bytes of the artifact of this kind, which is made if its line is missing."""
        for row in lines:
            if (row["seed"], row["bits"], row["method"]) == (seed, bits, method):
                return row["bytes"]
        cpu = time.process_time()
        encoded, seconds = encode(quant), time.process_time() - cpu
        blob = artifact.seal(encoded, quant=quant, **stored)
        row = dict(seed=seed, bits=bits, method=method, deviations=quant.deviations, bytes=len(blob), before=before)
        row |= dict(bpb=score(artifact.unpack(blob).state), seconds=round(seconds, 2))
        with open(out / RESULTS, "a") as file:
            file.write(json.dumps(row | {"dataset": dataset.digest, **environment()}) + "\n")
        print(f"seed {seed} int{bits} {method}: {len(blob):,} bytes, {row['bpb'] - before:+.5f}", flush=True)
        return len(blob)

    for trained in (None, *BITS):
        kinds = ("rtn", "rtn-deviation", "gptq", "gptq-deviation") if trained is None else ("qat", "qat-gptq")
        todo = [b for b in (BITS if trained is None else (trained,)) if any((seed, b, k) not in known for k in kinds)]
        if not todo:
            continue
        state = load_file(weights_file(out, seed, trained))
        before, model = score(state), GPT(BASE.model)
        model.load_state_dict(state)
        calibration_config = vary(BASE, quant=dict(method="gptq", calibration_tokens=131_072))
        hessians = calibration.calibrate(calibration_config, model, open_part(data, seed), CPU, torch.float32)

        def rounded(quant: QuantConfig, state: Mapping = state) -> dict[str, QuantizedTensor]:
            return Quantizer(BASE.model, quant).encode(state)

        def solved(quant: QuantConfig, state: Mapping = state, hessians: Mapping = hessians) -> dict:
            return Quantizer(BASE.model, quant).encode(state, hessians)

        for bits in todo:
            quant = replace(BASE.quant, bits=bits)
            if trained is not None:
                write(bits, "qat", before, quant, rounded)
                write(bits, "qat-gptq", before, quant, solved)
                continue
            target = write(bits, "rtn", before, quant, rounded)
            write(bits, "gptq", before, quant, solved)
            for method, encode in (("rtn-deviation", rounded), ("gptq-deviation", solved)):

                def size(deviations: float, encode: Callable = encode, quant: QuantConfig = quant) -> int:
                    quant = replace(quant, clip="deviation", deviations=deviations)
                    return len(artifact.seal(encode(quant), quant=quant, **stored))

                found = as_large(target, size, model.num_parameters())
                write(bits, method, before, replace(quant, clip="deviation", deviations=found), encode)


def rows(out: Path) -> list[dict]:
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(lines: Sequence[dict]) -> str:
    """Penalties by bits and method: mean over seeds, least and largest, bytes, and the ratio to the better rounding."""
    header = ("bits", "method", "seeds", "penalty", "least to largest", "bytes", "of rounding's", "CPU seconds")
    found: dict[tuple[int, str], list[dict]] = {}
    for row in lines:
        found.setdefault((row["bits"], row["method"]), []).append(row)
    out = []
    for (bits, method), group in sorted(found.items()):
        penalties = [row["bpb"] - row["before"] for row in group]
        kinds = [[row["bpb"] - row["before"] for row in found.get((bits, k), [])] for k in ("rtn", "rtn-deviation")]
        best = min((statistics.mean(kind) for kind in kinds if kind), default=None)
        ratio = "–" if not best else f"{statistics.mean(penalties) / best:.2f}"
        spread = f"{min(penalties):.4f} to {max(penalties):.4f}"
        size, cpu = (statistics.mean(row[name] for row in group) for name in ("bytes", "seconds"))
        mean = f"{statistics.mean(penalties):.4f}"
        out.append((str(bits), method, str(len(group)), mean, spread, f"{size:,.0f}", ratio, f"{cpu:.1f}"))
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
        for seed in args.seeds:
            train(seed, args.data, args.out)
            measure(seed, args.data, args.out)
    print(table(rows(args.out)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
