"""Hessians of a model's matrices from text, for GPTQ: H = Σ xᵀ x over the inputs x of a matrix.

c_q, c_k and c_v of a layer share their input, and with it H. A looped layer adds the inputs of all its passes. The
tied embedding is a matrix at the head, with the hidden states after the final norm as inputs.

The products are float32, their sums float64. Sums of so few float32 numbers are exact there, unless their magnitudes
differ by 2^20 and more, so codes do not depend on how many ranks share the text. They take twice the bytes of float32
Hessians, which then take their place.

The text is that of the first training steps, or the model's own samples: sequences that begin with a token drawn from
the whole vocabulary and go on at temperature 0.8. Published from 64 samples of 2,048 tokens: 0.0003 bits per byte worse
than from validation text, on one model (PR #756).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.data.stream import Prefetcher, spans_of_rank
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError, NonFiniteError
from golfgpt.model.generate import sample
from golfgpt.model.gpt import GPT
from golfgpt.model.linear import Observed
from golfgpt.model.segments import Segments
from golfgpt.quant.formats import parse_layer_group
from golfgpt.quant.quantizer import Quantizer

_SOURCE = {bank: bank for bank in ("c_q", "attn_proj", "mlp_fc", "mlp_proj")} | dict.fromkeys(("c_k", "c_v"), "c_q")
"""Bank -> the bank whose inputs are observed for it."""
SAMPLES = 8
"""Sequences that are sampled at a time, as published."""
Batch = tuple[Tensor, Segments | None]
"""Token ids (B, T) and their segments."""


@torch.no_grad()
def hessians(
    model: GPT, batches: Iterable[Batch], quantizer: Quantizer, ranks: Ranks, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Quantized layer group -> (matrices, columns, columns), float32, of the inputs that all `batches` of all ranks
    give in a forward in `dtype`. Groups of lookup tables have none. Raises NonFiniteError naming the first layer group
    whose inputs are not finite."""
    head = "tok_emb" if model.config.tie_embeddings else "lm_head"
    groups = {name: parse_layer_group(name) for name, format in quantizer.formats.items() if format.quantized}
    groups = {name: place for name, place in groups.items() if place[0] in _SOURCE or place[0] == head}
    sums: dict[tuple[str, int], Tensor] = {}

    def add(key: tuple[str, int], x: Tensor) -> None:
        x = x.reshape(-1, x.size(-1)).float()
        product = (x.mT @ x).double()
        sums[key] = product if key not in sums else sums[key].add_(product)

    columns = {_SOURCE.get(bank, bank): quantizer.formats[name].shape[-1] for name, (bank, _) in groups.items()}
    with ranks.raise_on_any():
        for ids, segments in batches:
            weights = model.weights(dtype)
            for row, layer in enumerate(weights.layers):
                for source in columns.keys() - {head}:
                    layer[source] = Observed(layer[source], partial(add, (source, row)))
            hidden = model(ids, dtype=dtype, weights=weights, segments=segments)
            if head in columns:
                add((head, 0), hidden)
    # From the least on, each in place of its sums: never more than twice the bytes of all in float32.
    found = {}
    for source, width in sorted(columns.items(), key=lambda item: item[1]):
        for row in range(1 if source == head else model.config.num_layers):
            if (source, row) not in sums:  # a rank without text
                sums[source, row] = torch.zeros(width, width, dtype=torch.float64, device=ranks.device)
            ranks.sum_(sums[source, row])
        found[source] = torch.stack([sums.pop(key).float() for key in sorted(sums) if key[0] == source])
    out = {name: found[_SOURCE.get(bank, bank)][layers] for name, (bank, layers) in groups.items()}
    for name, hessian in out.items():
        if not hessian.isfinite().all():
            raise NonFiniteError(f"calibration: the inputs of {name} are not finite; nothing was quantized")
    return out


def check_tokens(tokens: int, dataset: Dataset) -> None:
    """Raise InputError for training data of fewer tokens."""
    if tokens > dataset.train_tokens:
        raise InputError(
            f"quant.calibration_tokens is {tokens:,}; expected at most the {dataset.train_tokens:,} tokens of the "
            "training data"
        )


def calibrate(
    config: RunConfig,
    model: GPT,
    dataset: Dataset,
    ranks: Ranks,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Tensor]:
    """`hessians` of `model`, whose weights are not quantized, from the text that quant.calibration asks for; all ranks
    must call it. Raises InputError for training data that are too short, and as `hessians`."""
    if config.quant.calibration == "train":
        check_tokens(config.quant.calibration_tokens, dataset)
        text = training_text(config, steps_of(config), dataset, ranks, dtype, progress)
    else:
        text = samples(config, config.data.seq_len, model, ranks, dtype, progress)
    return hessians(model, text, Quantizer(config.model, config.quant), ranks, dtype)


def seconds_needed(config: RunConfig, model: GPT, dataset: Dataset, ranks: Ranks, dtype: torch.dtype) -> float:
    """How long `calibrate` will take, from a small one, the second of two: the text of one training step, or samples of
    a quarter of the length. A tenth is added for text, a quarter for samples, whose attention takes longer with the
    length; the slowest rank counts. The model's weights do not matter."""
    quantizer, length = Quantizer(config.model, config.quant), max(config.data.seq_len // 4, 1)
    for _ in range(2):
        if config.quant.calibration == "train":
            text, parts = training_text(config, 1, dataset, ranks, dtype), 1.1 * steps_of(config)
        else:
            text, parts = samples(config, length, model, ranks, dtype), 1.25 * config.data.seq_len / length
        ranks.synchronize()
        begun = time.perf_counter()
        hessians(model, text, quantizer, ranks, dtype)
        ranks.synchronize()
    took = torch.zeros(ranks.world, dtype=torch.float64, device=ranks.device)
    took[ranks.rank] = time.perf_counter() - begun
    return parts * float(ranks.sum_(took).max())


def steps_of(config: RunConfig) -> int:
    """Training steps whose tokens calibration reads."""
    return -(-config.quant.calibration_tokens // config.data.batch_tokens)


def training_text(
    config: RunConfig,
    steps: int,
    dataset: Dataset,
    ranks: Ranks,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterable[Batch]:
    """This rank's part of the tokens of the first `steps` training steps, a span's row after another."""
    data = config.data
    assigned = spans_of_rank(ranks.rank, ranks.world, data.spans)
    reader, length = Prefetcher(dataset.train, data, assigned, pin=False), data.row_tokens
    try:
        for step in range(steps):
            progress(f"calibrating: {step} of {steps} steps' tokens")
            windows, boundaries = reader.read(step).to(ranks.device)
            # Rows of one span at a time: the same products on any number of ranks.
            rows = windows[:, :-1].reshape(len(assigned), -1, length)
            for i, ids in enumerate(rows):
                if boundaries is None:
                    yield ids, None
                    continue
                of_span = boundaries[i * len(ids) : (i + 1) * len(ids)]
                for row, starts in zip(ids, of_span, strict=True):
                    yield row[None], Segments.of(starts, length, data.seq_len, dtype)
    finally:
        reader.close()


def samples(
    config: RunConfig,
    length: int,
    model: GPT,
    ranks: Ranks,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterable[Batch]:
    """This rank's part of the model's own text: batches of SAMPLES sequences of `length` tokens, as many as
    quant.calibration_tokens make with sequences of data.seq_len. Batch i is on rank i modulo their number, each with a
    generator of its own, so that they are the same on any number of ranks."""
    total = -(-config.quant.calibration_tokens // (SAMPLES * config.data.seq_len))
    for batch in range(ranks.rank, total, ranks.world):
        progress(f"calibrating: {batch} of {total} batches of samples")
        generator = torch.Generator(ranks.device).manual_seed((config.seed << 20) + batch)
        vocabulary = model.config.vocab_size
        first = torch.randint(vocabulary, (SAMPLES, 1), generator=generator, device=ranks.device)
        yield sample(model, first, length, temperature=0.8, generator=generator, dtype=dtype), None
