"""Published model files as runs: evaluated, sampled and exported like models trained here.

A quantized file keeps its codes, scales, factors and wide columns; nothing is quantized twice. The run's checkpoint
holds the weights as the published model has them, so that `golfgpt export --to golf` can store them in another format.
"""

from __future__ import annotations

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
from golfgpt.published.files import Export
from golfgpt.published.names import canonical_name, from_published, infer_config, split_banks
from golfgpt.quant import artifact
from golfgpt.quant.formats import DTYPES, QuantizedTensor, TensorFormat, layer_groups
from golfgpt.quant.quantizer import Quantizer
from golfgpt.train import checkpoint
from golfgpt.train.run_folder import RunFolder


def import_model(export: Export, tokenizer: Tokenizer, config: RunConfig, path: Path) -> artifact.ArtifactInfo:
    """Write the run folder `path` of a published file: checkpoint, tokenizer, and model.golf.

    `config.model` gives what no tensor shows (`infer_config`), the rest of `config` goes into the run as it is; a file
    that is not quantized is exported under config.quant. Raises InputError for a tokenizer of another vocabulary and
    for a folder that holds a run.
    """
    model = infer_config(export.state, config.model)
    if tokenizer.vocab_size != model.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}")
    try:
        config = replace(config, model=model)
    except ValueError as error:  # such as a recipe's LoRA that is wider than the model
        raise InputError(str(error)) from error
    state = from_published(export.state, model)
    encoded = layer_groups_of(export, model) if export.quantized else Quantizer(model, config.quant).encode(state)
    blob = artifact.seal(
        encoded, model=model, quant=config.quant, tokenizer_sha256=tokenizer.digest, seq_len=config.data.seq_len
    )
    folder = RunFolder.create(path, config, tokenizer.model_bytes)
    try:
        write_bytes(folder.artifact, blob)
        saved = checkpoint.Checkpoint(0, True, {"train": 0.0}, to_dict(config), "", state, {}, {})
        checkpoint.save(folder.checkpoints, saved)
    except BaseException:
        folder.artifact.unlink(missing_ok=True)
        folder.discard()
        raise
    finally:
        folder.close()
    return artifact.inspect(folder.artifact)


def layer_groups_of(export: Export, model: ModelConfig) -> dict[str, QuantizedTensor]:
    """The file's own codes, scales and passthrough tensors as layer groups; bfloat16 and `decoded` tensors become
    float32.

    Decoding gives the file's weights except for the published rounding of embeddings to bfloat16, which a forward in
    bfloat16 repeats. A `decoded` embedding is stored rounded.
    """
    codes = {canonical_name(name): pair for name, pair in export.codes.items()}
    beside = {canonical_name(name): fields for name, fields in export.beside.items()}
    uncoded = split_banks(export.passthrough) | {name: export.state[name] for name in export.decoded}
    passthrough = {canonical_name(name): tensor for name, tensor in uncoded.items()}
    if other := [name for name, (values, _) in codes.items() if values.ndim != 2]:
        raise InputError(f"{other[0]} is quantized, expected a passthrough tensor: it is not a matrix")
    out: dict[str, QuantizedTensor] = {}
    for bank, param in parameter_table(model).items():
        quantized = [name for name in param.published_names if name in codes]
        bits = max((_bits(codes[name][0], beside.get(name, {})) for name in quantized), default=0)
        kinds = []
        for name in param.published_names:
            number = (f"int{bits}", _number(codes[name][1])) if name in codes else (_number(passthrough[name]), None)
            kinds.append((*number, name if name in beside else None))  # in a group of its own
        pack = torch.stack if param.layered else itemgetter(0)
        for group, shape, names, (number, scale, alone) in layer_groups(bank, param, kinds):
            fields = dict(beside.get(alone, {}))
            arrays = {key: pack([fields.pop(key)]) for key, x in [*fields.items()] if isinstance(x, Tensor)}
            format = TensorFormat(shape, number, scale, **fields)
            if format.quantized:
                rows = len(codes[names[0]][0])  # the published per-tensor form has one scale for all
                arrays["scale"] = pack([codes[name][1].expand(rows) for name in names])
                arrays = {name: x if x.dtype == torch.int8 else x.to(DTYPES[scale]) for name, x in arrays.items()}
                values = pack([codes[name][0] for name in names])
                out[group] = QuantizedTensor(format, values, **{name: x.contiguous() for name, x in arrays.items()})
            else:
                out[group] = QuantizedTensor(format, pack([passthrough[name].to(DTYPES[number]) for name in names]))
    return out


def _bits(codes: Tensor, beside: dict[str, Any]) -> int:
    """The fewest bits that hold the codes, those of wide columns aside."""
    if "wide" in beside:
        wide = slice(beside["wide"], beside["wide"] + beside["wide_columns"])
        codes = torch.cat((codes[:, : wide.start], codes[:, wide.stop :]), dim=1)
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    return max(2, (max(-low - 1, high)).bit_length() + 1)


def _number(stored: Tensor) -> str:
    return "float16" if stored.dtype == torch.float16 else "float32"
