"""How fast text becomes tokens, and tokens reach the trainer.

    python bench/data.py TEXT.jsonl.zst [--tokenizer FILE] [--workers N] [--megabytes N]

Prints the tokenizer's own rate (the same processes do nothing but SentencePiece's encode on text that they
already hold), prepare's rate with that tokenizer, start-up and files included, their ratio (at least 0.7 is
wanted) by the clock and by CPU time, which other load on the machine does not move much, and the tokens per
second of the training stream. MB are 10^6 bytes of UTF-8.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import sentencepiece

from golfgpt.data.documents import read_documents
from golfgpt.data.orders import step_spans
from golfgpt.data.prepare import prepare
from golfgpt.data.shards import Dataset
from golfgpt.data.stream import TokenStream
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer


def encode_share(model_bytes: bytes, texts: list[str], ready, seconds) -> None:
    """Encode one worker's share between two barriers, so that only encoding is timed."""
    model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    ready.wait()
    start, start_cpu = time.perf_counter(), time.process_time()
    for text in texts:
        model.encode(text)
    seconds.put((time.perf_counter() - start, time.process_time() - start_cpu))


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in usage)


def encode_alone(model_bytes: bytes, texts: list[str], workers: int) -> tuple[float, float]:
    """Seconds of SentencePiece in `workers` processes: of the slowest by the clock, of all by CPU time."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(workers), context.Queue()
    shares = [texts[i::workers] for i in range(workers)]
    processes = [context.Process(target=encode_share, args=(model_bytes, share, ready, seconds)) for share in shares]
    for process in processes:
        process.start()
    clock, cpu = zip(*[seconds.get() for _ in processes], strict=True)
    for process in processes:
        process.join()
    return max(clock), sum(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="default: 1024 pieces trained on the text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--megabytes", type=float, default=1000, help="use this much of the text at most")
    options = parser.parse_args()

    texts, size = [], 0
    for text in read_documents([options.text]):
        texts.append(text)
        size += len(text.encode())
        if size >= options.megabytes * 1e6:
            break
    start = time.perf_counter()
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(options.tokenizer)
    else:
        tokenizer = Tokenizer.from_bytes(train_tokenizer(texts, 1024))
        print(f"train_tokenizer  {time.perf_counter() - start:8.1f} s    1024 pieces, {size / 1e6:.1f} MB offered")
    alone, alone_cpu = encode_alone(tokenizer.model_bytes, texts, options.workers)
    print(f"encode alone     {size / alone / 1e6:8.2f} MB/s  {options.workers} processes, {alone_cpu:.1f} s of CPU")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "text.jsonl")
        with open(source, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        start, start_cpu = time.perf_counter(), cpu_seconds()
        manifest = prepare([source], Path(folder, "data"), tokenizer=tokenizer, workers=options.workers)
        took, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
        print(
            f"prepare          {size / took / 1e6:8.2f} MB/s  {cpu:.1f} s of CPU, lossless={manifest.lossless}, "
            f"ratio {alone / took:.3f} by the clock, {alone_cpu / cpu:.3f} by CPU time"
        )
        stream = TokenStream(Dataset.open(Path(folder, "data")).train)
        batch, spans, steps = 524_288, 8, 100
        start = time.perf_counter()
        for step in range(steps):
            for position in step_spans(step, batch, spans):
                stream.read(position, batch // spans + 1)
        print(f"stream           {steps * batch / (time.perf_counter() - start) / 1e6:8.0f} M tokens/s")


if __name__ == "__main__":
    main()
