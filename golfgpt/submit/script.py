"""What a packed train_gpt.py does: train, write model.golf, read it back, score it. `golfgpt.submit.bundle` starts
here, and makes a program of this and of what it uses of the package, for the configuration of a run.

    torchrun --standalone --nproc-per-node 8 train_gpt.py        as golfgpt train does it; DATA_PATH names the data
    python train_gpt.py model.golf                               score an artifact

Data are a prepared folder or published shards with their tokenizer. ITERATIONS ends training after fewer steps, SEED
draws other initial weights. There are no checkpoints, validations or trials here, and the clock is the only thing that
can differ from golfgpt train: for equal steps, losses and artifact are the same, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from golfgpt import distributed
from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant import artifact, calibration
from golfgpt.quant.formats import TensorFormat, decode, parse_layer_group
from golfgpt.quant.quantizer import Quantizer
from golfgpt.score.evaluate import (
    batch_windows,
    compiles,
    plan_windows,
    read_from,
    scorer_of,
    share,
    within_documents,
)
from golfgpt.score.sums import Sums
from golfgpt.score.ttt.adapter import run
from golfgpt.score.ttt.evaluate import adapted_steps, make_adapter
from golfgpt.score.ttt.ledger import Ledger
from golfgpt.score.ttt.plan import find_documents
from golfgpt.score.windows import Scorer, score_windows
from golfgpt.train import clock
from golfgpt.train.attention_backend import enable_backend
from golfgpt.train.step import Pending, TrainStep, Votes


def main(config: RunConfig) -> None:
    ranks = distributed.start(config.runtime.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    enable_backend(config.runtime.attention)
    dataset = Dataset.bare(os.environ.get("DATA_PATH", config.data.path))
    ledger = clock.Ledger()
    if len(sys.argv) > 1:
        path, dtype = Path(sys.argv[1]), getattr(torch, config.runtime.dtype)
        model = GPT(config.model).to(ranks.device)
    else:
        step = TrainStep(config, dataset, ranks)
        train(config, step, ledger)
        path, model, dtype = Path("model.golf"), step.model, step.dtype
        write(config, step, dataset, ledger, path)
    score(config, model, dataset, ranks, dtype, ledger, path)
    if config.eval.ttt.kind != "off":
        adapt(config, model, dataset, ranks, dtype, ledger)
    ranks.close()


def say(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, flush=True)


def train(config: RunConfig, step: TrainStep, ledger: clock.Ledger) -> None:
    """The steps of golfgpt.train.loop, with its clock."""
    for p in step.model.parameters():
        step.ranks.broadcast_(p.data)
    step.prepare(0)
    step.average.begin()
    if step.compiled and config.runtime.warmup_steps:
        step.warm_up(config.runtime.warmup_steps)
    most = int(os.environ.get("ITERATIONS", config.schedule.max_steps))
    step.data.seek(0)
    step.pace.start(0.0)
    pending: deque[Pending] = deque()
    done, stopping = 0, False
    with ledger.phase("train"):
        while done < most and not stopping:
            number, begun = done + len(pending), ledger.elapsed("train")
            for _ in step.backward(number):
                pass
            crosses = step.pace.crosses_cap(begun, step.layers(number + 1 + step.ahead))
            pending.append(step.sum(number, begun, Votes(crosses)))
            step.update(pending[-1])
            drain = done + len(pending) == most or step.pace.settling
            while pending and (drain or len(pending) > step.ahead):
                oldest = pending.popleft()
                result = step.wait(oldest)
                done, stopping = done + 1, stopping or result.stop
                seconds, settling = ledger.elapsed("train"), step.pace.settling
                duration = step.pace.step_over(seconds, oldest.layers)
                if settling and config.schedule.cap is not None:
                    seconds, each = step.ranks.broadcast_object((seconds, duration / oldest.layers))
                    step.pace.sync(done, seconds)
                    stopping = stopping or seconds + 1.05 * each * step.layers(done) > config.schedule.cap
                drain = drain or stopping
                if done <= 10 or done % config.runtime.log_every == 0:
                    say(
                        step.ranks,
                        f"step:{done}/{config.schedule.max_steps} train_loss:{result.loss:.4f} "
                        f"train_time:{seconds * 1000:.0f}ms step_avg:{seconds / done * 1000:.2f}ms",
                    )
    step.check_finite()
    step.data.close()


def write(config: RunConfig, step: TrainStep, dataset: Dataset, ledger: clock.Ledger, path: Path) -> None:
    """Quantize the weights and write them to `path`."""
    quantizer, state, hessians = Quantizer(config.model, config.quant), step.exported(), None
    if config.quant.method == "gptq":
        with ledger.phase("calibrate"):
            step.model.load_state_dict(state)
            hessians = calibration.calibrate(config, step.model, dataset, step.ranks, step.dtype)
    encoded = quantizer.encode(state, hessians, step.ranks)
    if step.ranks.is_main:
        blob = artifact.seal(
            encoded,
            model=config.model,
            quant=config.quant,
            tokenizer_sha256=dataset.need_tokenizer().digest,
            seq_len=config.data.seq_len,
        )
        path.write_bytes(blob)
        say(step.ranks, f"Total submission size: {len(blob)} + {Path(__file__).stat().st_size} bytes")
    step.ranks.barrier()


def read(config: RunConfig, path: Path) -> dict[str, Tensor]:
    """The weights in an artifact of this model."""
    header, compressed, _ = artifact.sections(path.read_bytes())
    fields = json.loads(header)
    banks = list(parameter_shapes(config.model))

    def place(name: str) -> tuple[int, int]:
        bank, layers = parse_layer_group(name)
        return banks.index(bank), layers.start or 0

    formats = {}
    for name in sorted(fields["tensors"], key=place):  # JSON has them in alphabetical order
        shape, *format = fields["tensors"][name]
        formats[name] = TensorFormat(tuple(shape), *format)
    streams = [artifact.Stream(*stream) for stream in fields["streams"]]
    one = None if config.quant.compressor == "smallest" else config.quant.compressor
    payload = artifact.payload(streams, compressed, one)
    return decode(artifact.split(payload, formats, frozenset(fields["columns"])))


@torch.no_grad()
def score(
    config: RunConfig, model: GPT, dataset: Dataset, ranks: Ranks, dtype: torch.dtype, ledger: clock.Ledger, path: Path
) -> None:
    """The score of the weights in `path`."""
    model.load_state_dict(read(config, path))
    with ledger.phase("eval"):
        windows = plan_windows(dataset, config)
        mine, most = share(windows, config, ranks)
        document_start = dataset.need_tokenizer().bos_id if within_documents(config) else None
        scorer = scorer_of(model, windows, document_start, config, ranks, dtype)
        sums = Sums.start(mine.start, ranks.device)
        for stop, batch, logprobs in score_windows(scorer, read_from(dataset, ranks.device), windows, mine, most):
            sums = sums.plus(stop, batch, logprobs)
        sums.read()  # which raises for a number that is not finite
        nats, tokens, nbytes = ranks.sum_(sums.values).tolist()
    seconds = {name: round(used, 1) for name, used, _ in ledger.report() if used}
    say(
        ranks,
        f"final_roundtrip_exact val_loss:{nats / tokens:.8f} val_bpb:{bits_per_byte(nats, int(nbytes)):.8f}\n"
        f"{tokens:.0f} tokens, {nbytes:.0f} bytes, seconds {seconds}",
    )


def adapt(
    config: RunConfig, model: GPT, dataset: Dataset, ranks: Ranks, dtype: torch.dtype, ledger: clock.Ledger
) -> None:
    """The score with test-time training, of what fits into its time; the record refuses a token that is learned before
    it is scored."""
    windows, bos = plan_windows(dataset, config), dataset.need_tokenizer().bos_id
    by_windows, before, over = config.eval.ttt.kind == "sgd", ledger.elapsed("eval"), False
    record, read, sums = Ledger(windows.targets), read_from(dataset, ranks.device), Sums.start(0, ranks.device)
    start = bos if config.eval.document_aware and by_windows else None
    scorer = Scorer(model, dtype, document_start=start, compiled=compiles(config, ranks), varied=not by_windows)
    documents = [] if by_windows else find_documents(dataset.val_ids(0, windows.targets + 1), bos)
    steps = adapted_steps(config, windows, documents, batch_windows(config, ranks))
    adapter = make_adapter(model, config, dtype, bos, ranks)

    def expired() -> bool:
        return ledger.elapsed("eval") - before > config.eval.ttt.max_seconds

    def late() -> bool:
        nonlocal over
        over = bool(ranks.sum_(torch.tensor(float(expired()), device=ranks.device)))
        return over

    with ledger.phase("eval"):
        for batch, logprobs in run(steps(ranks), scorer, adapter, record, read, ranks, late=late, expired=expired):
            sums = sums.plus(0, batch, logprobs)
        if not over:
            late()
        nats, tokens, nbytes = ranks.sum_(sums.values).tolist()
        record.merge(ranks)
    record.check(all_scored=tokens == windows.targets)
    say(
        ranks,
        f"final_adapted_exact val_loss:{nats / tokens:.8f} val_bpb:{bits_per_byte(nats, int(nbytes)):.8f} "
        f"({config.eval.ttt.kind}, {tokens:.0f} of {windows.targets} tokens)",
    )
