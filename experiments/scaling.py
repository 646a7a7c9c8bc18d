"""What twice the data cost in preparing, training and scoring, and the memory of a loader that goes around ten times.

    python -m experiments.scaling --text FILE --data DIR --out DIR

DIR of --data is FILE prepared, vocabulary 1024. Costs are CPU seconds of this process on one thread, because wall time
depends on what else the machine does. Each row of the first table has what 1, 2 and 4 parts cost; the second half of 4
parts costs as much as 2 if the cost grows linearly, whatever it is for none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.experiment_report import markdown
from experiments.soak import sample
from golfgpt import recipes
from golfgpt.config import DataConfig
from golfgpt.data.documents import read_documents
from golfgpt.data.prepare import prepare
from golfgpt.data.shards import TOKENIZER, Dataset
from golfgpt.data.stream import Prefetcher
from golfgpt.distributed import Ranks
from golfgpt.score.evaluate import evaluate
from golfgpt.train.step import TrainStep

CPU = Ranks(0, 1, torch.device("cpu"))
PARTS = (1, 2, 4)
PREPARED, STEPS, SCORED = 24_000_000, 60, 65_536
"""One part: characters to prepare, steps of the recipe `demo` to take, tokens to score with it."""
PASSES, STEP_TOKENS = 10, 65_536


def costs(work: Callable[[int], object]) -> list[float]:
    """CPU seconds of work(parts)."""
    out = []
    for parts in PARTS:
        begun = time.process_time()
        work(parts)
        out.append(time.process_time() - begun)
    return out


def first(text: Path, characters: int, file: Path) -> Path:
    """Write the first documents of `text`, about so many characters, to `file`."""
    with open(file, "w", encoding="utf-8") as lines:
        for document in read_documents([text]):
            lines.write(json.dumps({"text": document}) + "\n")
            characters -= len(document)
            if characters <= 0:
                return file
    raise SystemExit(f"{text} has too few documents: {characters:,} characters are missing")


def growth(text: Path, data: Path, out: Path) -> str:
    """The table of costs."""
    config = recipes.get("demo").config
    config = replace(config, data=replace(config.data, path=str(data)))
    dataset = Dataset.open(data)
    files = {parts: first(text, parts * PREPARED, out / f"text{parts}.jsonl") for parts in PARTS}
    options = dict(tokenizer=data / TOKENIZER, workers=1, overwrite=True)
    step = TrainStep(config, dataset, CPU)

    def train(parts: int) -> None:
        for number in range(parts * STEPS):
            pending = step.launch(number)
            step.update(pending)
            step.wait(pending)

    def score(parts: int) -> None:
        part = replace(config, eval=replace(config.eval, max_tokens=parts * SCORED))
        evaluate(step.model, dataset, part, CPU, dtype=torch.float32)

    train(1), score(1)  # first calls allocate
    rows = []
    for name, part, work in (
        (
            "prepare",
            f"{PREPARED / 1e6:.0f} M characters",
            lambda parts: prepare([files[parts]], out / "data", **options),
        ),
        ("train", f"{STEPS} steps", train),
        ("score", f"{SCORED:,} tokens", score),
    ):
        one, two, four = costs(work)
        rows.append((name, part, f"{one:.2f}", f"{two:.2f}", f"{four:.2f}", f"{(four - two) / (two - one):.2f}"))
    step.data.close()
    return markdown(("", "one part", "1 part, CPU s", "2 parts", "4 parts", "(4 − 2) / (2 − 1), linear: 2"), rows)


def loader(data: Path) -> str:
    """The table of memory by order of the data, in MB after the first and the last pass."""
    dataset, rows = Dataset.open(data), []
    for order in ("sequential", "shuffled", "coprime", "packed"):
        start = 1 if order == "packed" else None
        config = DataConfig(batch_tokens=STEP_TOKENS, seq_len=1024, spans=1, order=order, document_start=start)
        with contextlib.closing(Prefetcher(dataset.train, config, range(1), pin=False)) as reader:
            steps, begun, memory = dataset.train_tokens // STEP_TOKENS, time.process_time(), []
            for number in range(PASSES * steps):
                reader.read(number)
                if (number + 1) % steps == 0:
                    memory.append(sample(os.getpid()))
        first, last = memory[0], memory[-1]
        both = [f"{first[kind] / 1e6:.1f} → {last[kind] / 1e6:.1f}" for kind in ("anonymous", "rss")]
        counts = [f"{first[kind]} → {last[kind]}" for kind in ("handles", "threads")]
        spent = time.process_time() - begun
        rows.append((order, f"{PASSES * steps * STEP_TOKENS:,}", *both, *counts, f"{spent:.1f}"))
    return markdown(("order", "tokens read", "private MB", "resident MB", "handles", "threads", "CPU s"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="documents, at least 4 parts of them")
    parser.add_argument("--data", type=Path, required=True, help="prepared folder, vocabulary 1024")
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(loader(args.data), flush=True)
    print("\n" + growth(args.text, args.data, args.out))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
