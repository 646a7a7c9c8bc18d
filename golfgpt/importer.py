"""Published model files as runs: evaluated, sampled and exported like models trained here.

A quantized file keeps its codes and scales; nothing is quantized twice. The run's checkpoint holds the weights as
upstream's model has them, so that `golfgpt export --to golf` can store them in another format.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golfgpt.config import ModelConfig, RunConfig, to_dict
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import InputError
from golfgpt.files import write_bytes
from golfgpt.model.parameters import parameter_table
from golfgpt.published import (
    Export,
    canonical_name,
    from_published,
    infer_config,
)
from golfgpt.quant import artifact
from golfgpt.quant.quantizer import DTYPES, QuantizedTensor, Quantizer, TensorFormat, group_name
from golfgpt.train import checkpoint
from golfgpt.train.run_folder import RunFolder


def import_model(export: Export, tokenizer: Tokenizer, config: RunConfig, path: Path) -> artifact.ArtifactInfo:
    """Write the run folder `path` of an upstream file: checkpoint, tokenizer, and model.golf.

    `config.model` gives what no tensor shows (see `model_of`), the rest of `config` goes into the run as it is; a file
    that is not quantized is exported under config.quant. Raises InputError for a tokenizer of another vocabulary and
    for a folder that holds a run.
    """
    model = model_of(export, config.model)
    if tokenizer.vocab_size != model.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}")
    config = replace(config, model=model)
    state = from_published(export.state, model)
    encoded = parts_of(export, model) if export.codes else Quantizer(model, config.quant).encode(state)
    blob = artifact.seal(
        encoded, model=model, quant=config.quant, tokenizer_sha256=tokenizer.digest, seq_len=config.data.seq_len
    )
    folder = RunFolder.create(path, config, tokenizer.model_bytes)
    try:
        write_bytes(folder.artifact, blob)
        saved = checkpoint.Checkpoint(0, True, {"train": 0.0}, to_dict(config), "", state, {}, {})
        checkpoint.save(folder.checkpoints, saved)
    except BaseException:
        folder.discard()
        raise
    finally:
        folder.close()
    return artifact.inspect(folder.artifact)


def model_of(export: Export, like: ModelConfig) -> ModelConfig:
    """Sizes from the tensors, and from `like` what they do not show: softcap, rotary base and reference length, the
    place of the smear gate ("none": as published beside such tensors), document_start where the model mixes tokens."""
    mixes = any(name.startswith(("smear", "bigram")) for name in export.state)
    return infer_config(
        export.state,
        logit_softcap=like.logit_softcap,
        rope_base=like.rope_base,
        rope_reference_len=like.rope_reference_len,
        smear_gate=None if like.smear_gate == "none" else like.smear_gate,
        document_start=like.document_start if mixes else None,
    )


def parts_of(export: Export, model: ModelConfig) -> dict[str, QuantizedTensor]:
    """The file's own codes, scales and kept tensors as parts of an artifact; bfloat16 tensors become float32.

    Decoding gives the file's weights but for upstream's rounding of embeddings to bfloat16, which a forward in bfloat16
    repeats.
    """
    codes, kept = ({canonical_name(name): v for name, v in part.items()} for part in (export.codes, export.passthrough))
    out: dict[str, QuantizedTensor] = {}
    for bank, param in parameter_table(model).items():
        names, pack = param.published_names, torch.stack if param.layered else itemgetter(0)
        if flat := [name for name in names if name in codes and codes[name][0].ndim != 2]:
            raise InputError(f"{flat[0]} is quantized and no matrix: artifacts keep such tensors as they are")
        bits = max((_bits(codes[name][0]) for name in names if name in codes), default=0)
        kinds = [_kind(name, codes, kept, bits) for name in names]
        start = 0
        for (format, scale), run in itertools.groupby(kinds):
            stop = start + len(list(run))
            layers = names[start:stop]
            values = [codes[name][0] if scale else kept[name].to(DTYPES[format]) for name in layers]
            out[group_name(bank, start, stop, len(names))] = QuantizedTensor(
                TensorFormat((stop - start, *param.shape[1:]) if param.layered else param.shape, format, scale),
                pack(values),
                pack([_row_scales(*codes[name]) for name in layers]) if scale else None,
            )
            start = stop
    return out


def _bits(codes: Tensor) -> int:
    low, high = (int(bound) for bound in codes.aminmax())
    return max(2, (max(-low - 1, high)).bit_length() + 1)


def _kind(name: str, codes: dict[str, Any], kept: dict[str, Tensor], bits: int) -> tuple[str, str | None]:
    """(format, scale dtype) of one of upstream's tensors."""
    stored = (codes[name][1] if name in codes else kept[name]).dtype
    number = "float16" if stored == torch.float16 else "float32"
    return (f"int{bits}", number) if name in codes else (number, None)


def _row_scales(codes: Tensor, scale: Tensor) -> Tensor:
    """One scale a row; upstream has one in all for tensors that are not matrices."""
    scale = scale if scale.dtype == torch.float16 else scale.float()
    return scale.expand(codes.shape[:1]).contiguous()
