"""Write a model as a folder for transformers' AutoModelForCausalLM and AutoTokenizer, with trust_remote_code.

    config.json               GolfGPTConfig: the ModelConfig, the window, and where the classes are
    generation_config.json    generation ends at BOS, which starts the next document
    model.safetensors         decoded weights, float32, by golfgpt's names
    tokenizer.model           as in the run
    tokenizer_config.json
    *_golfgpt.py              the code of the model and of the tokenizer (golfgpt.hf.source)
    README.md                 model card

Each file is whole or absent, and config.json comes last: without it the folder does not load.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import safetensors.torch

import golfgpt
from golfgpt.config import to_dict
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import InputError
from golfgpt.files import write_bytes, write_json
from golfgpt.hf.source import standalone
from golfgpt.model.gpt import GPT

CONFIGURATION, MODELING, TOKENIZATION = "configuration_golfgpt", "modeling_golfgpt", "tokenization_golfgpt"


@functools.cache
def sources() -> dict[str, str]:
    """The Python files of an export, by name."""
    header = f"# Written by golfgpt {golfgpt.__version__}. Copyright (c) 2026 golfgpt contributors. License: MIT.\n\n"
    configuration, defined = standalone(f"golfgpt.hf.{CONFIGURATION}")
    modeling, _ = standalone(f"golfgpt.hf.{MODELING}", dict.fromkeys(defined, CONFIGURATION))
    tokenization, _ = standalone(f"golfgpt.hf.{TOKENIZATION}")
    texts = {CONFIGURATION: configuration, MODELING: modeling, TOKENIZATION: tokenization}
    return {f"{name}.py": header + text for name, text in texts.items()}


def write_folder(
    out: Path, model: GPT, tokenizer: Tokenizer, *, window: int, card: str, overwrite: bool = False
) -> dict[str, int]:
    """Write the folder `out`; returns the bytes of each file. `window`: tokens per training sequence; `card`:
    README.md.

    Raises InputError if `out` exists, unless it is an export and `overwrite` is given.
    """
    if out.exists() and not (overwrite and (out / f"{MODELING}.py").is_file()):
        advice = "choose another --out" if overwrite else "choose another --out, or replace an export with --overwrite"
        raise InputError(f"{out} already exists{' and is not an export' if overwrite else ''}; {advice}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    for name, text in {**sources(), "README.md": card}.items():
        write_bytes(out / name, text.encode())
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    write_bytes(out / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    write_bytes(out / "tokenizer.model", tokenizer.model_bytes)
    for name, value in _configs(model, tokenizer, window).items():
        write_json(out / name, value)
    return {file.name: file.stat().st_size for file in sorted(out.iterdir()) if file.is_file()}


def _configs(model: GPT, tokenizer: Tokenizer, window: int) -> dict[str, Any]:
    bos, pad = tokenizer.bos_id, tokenizer.pad_id
    tokens = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos if pad < 0 else pad}
    return {
        "generation_config.json": tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "GolfGPTTokenizer",
            "auto_map": {"AutoTokenizer": [f"{TOKENIZATION}.GolfGPTTokenizer", None]},
            "model_max_length": window,
        },
        "config.json": {
            "architectures": ["GolfGPTForCausalLM"],
            "model_type": "golfgpt",
            "auto_map": {
                "AutoConfig": f"{CONFIGURATION}.GolfGPTConfig",
                "AutoModelForCausalLM": f"{MODELING}.GolfGPTForCausalLM",
            },
            "golf": to_dict(model.config),
            "max_position_embeddings": window,
            "dtype": "float32",
            **tokens,
        },
    }


def model_card(model: GPT, *, window: int, artifact_sha256: str, result: dict[str, Any] | None, license: str) -> str:
    """README.md with its license field. `result`: result.json of the run, None without a score of these weights."""
    score = result and result["score"]
    scored = (
        f"**{score['label']} {score['val_bpb']:.4f}** (val_loss {score['val_loss']:.4f} nats per token), by golfgpt: "
        f"{score['tokens']:,} tokens and {score['bytes']:,} bytes of decoded validation text, "
        f"windows of {score['window']} tokens at stride {score['stride']}, computed in {score['dtype']}. Bits per "
        "byte = sum of token losses in nats / ln 2 / UTF-8 bytes of the decoded text."
        if score
        else "These weights have no score in their run folder."
    )
    return f"""---
license: {license}
library_name: transformers
pipeline_tag: text-generation
---

# A golfgpt model

{model.num_parameters():,} parameters in float32, decoded from model.golf (SHA-256 {artifact_sha256}).

{scored}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("It was a", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

- `trust_remote_code` executes the three Python files of this folder: {CONFIGURATION}.py, {MODELING}.py and
  {TOKENIZATION}.py. They import torch, transformers, numpy, sentencepiece and the standard library, read
  tokenizer.model, and access no network.
- The tokenizer puts BOS before a text, as training did before every document. A text ends at the next BOS.
- Training sequences had {window} tokens; generation attends to as many.
- Padding on the right is for scoring. Prompts with padding are refused; generate from one prompt at a time.
"""
