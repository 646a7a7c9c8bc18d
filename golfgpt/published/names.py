"""Banks to and from the published scripts' tensors, one a layer; and a model's configuration from such tensors.

The names are those of `golfgpt.model.parameters`. PR #65 calls its "before_norm" gate smeargate.gate and its "linear"
pairs bigram_hash.table.weight and bigram_hash.proj.weight, which are read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from golfgpt.config import BigramConfig, ModelConfig
from golfgpt.errors import InputError
from golfgpt.model.parameters import PUBLISHED_NAMES, parameter_table

_PR65_NAMES = {
    "smeargate.gate": "smear.gate",
    "bigram_hash.table.weight": "bigram.embed.weight",
    "bigram_hash.proj.weight": "bigram.proj.weight",
}


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter of the model."""
    table = parameter_table(config).values()
    return {name: param.shape[param.layered :] for param in table for name in param.published_names}


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError naming missing, unexpected or mis-shaped tensors of `state`."""
    if missing := shapes.keys() - state.keys():
        raise InputError(f"missing tensors: {listed(missing)}")
    if unexpected := state.keys() - shapes.keys():
        raise InputError(f"unexpected tensors: {listed(unexpected)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise InputError(f"tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}")


def listed(names: Iterable[object]) -> str:
    """At most eight of the names, sorted, escaped: names from files may hold control characters."""
    names = sorted(ascii(name)[1:-1] if isinstance(name, str) else ascii(name) for name in names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published per-layer tensors, as views of the banks in `state`; InputError for an unknown bank."""
    if unknown := state.keys() - PUBLISHED_NAMES.keys():
        raise InputError(f"unexpected tensors: {listed(unknown)}")
    out = {}
    for bank, tensor in state.items():
        name = PUBLISHED_NAMES[bank]
        out |= {name.format(i=i): w for i, w in enumerate(tensor)} if "{i}" in name else {name: tensor}
    return out


def from_published(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Banks stacked from published per-layer tensors, dtypes unchanged.

    Strict: raises InputError naming missing, unexpected or mis-shaped tensors. A one-layer published model
    holds skip_weights of zero rows, which is dropped.
    """
    state = _one_spelling(state)
    check_state(state, published_shapes(config))
    banks = {}
    for bank, param in parameter_table(config).items():
        tensors = [state[name] for name in param.published_names]
        banks[bank] = torch.stack(tensors) if param.layered else tensors[0]
    return banks


def canonical_name(name: str) -> str:
    """The name in `golfgpt.model.parameters` of a tensor that PR #65 calls otherwise."""
    return _PR65_NAMES.get(name, name)


_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}
"""Published banks, and the matrices that lie in them: those of all layers one after another."""


def split_banks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the banks of the records that have some (2026-03-25, and from 2026-04-10 on) as single matrices."""
    out = {}
    for name, tensor in state.items():
        kinds = _BANKS.get(name)
        if kinds is None:
            out[name] = tensor
            continue
        for kind, matrices in zip(kinds, tensor.chunk(len(kinds)), strict=True):
            out |= {f"blocks.{i}.{kind}.weight": w for i, w in enumerate(matrices)}
    return out


def _one_spelling(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under this module's names, without the empty skip_weights of a one-layer model."""
    state = split_banks(state)
    out = {canonical_name(name): tensor for name, tensor in state.items()}
    if len(out) < len(state):
        twice = [name for name, other in _PR65_NAMES.items() if name in state and other in state]
        raise InputError(f"tensors under two names: {listed(twice)}")
    if "skip_weights" in out and out["skip_weights"].numel() == 0:
        del out["skip_weights"]
    return out


def infer_config(
    state: Mapping[str, Tensor],
    *,
    logit_softcap: float = 30.0,
    rope_base: float = 10_000.0,
    rope_reference_len: int | None = None,
    smear_gate: Literal["after_norm", "before_norm"] | None = None,
    document_start: int | None = None,
) -> ModelConfig:
    """The configuration of the model that the published per-layer tensors `state` belong to.

    The tensors show every size; the keywords are what they do not show (`assumed_fields` says which, and what
    was published). `smear_gate` None takes after_norm, or before_norm beside tensors of PR #65: its names, or
    pairs without a scale. What only initializes a model keeps its default.

    Raises InputError naming missing, unexpected or mis-shaped tensors, or saying why no model has these sizes.
    """
    tensors = _one_spelling(state)

    def sizes(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in tensors:
            raise InputError(f"missing tensors: {name}")
        shape = tuple(tensors[name].shape)
        if len(shape) != dimensions:
            raise InputError(f"tensor {name} has shape {shape}, expected {dimensions} dimensions")
        return shape

    vocab_size, dim = sizes("tok_emb.weight", 2)
    (heads,) = sizes("blocks.0.attn.q_gain", 1)
    (hidden, _), (kv_dim, _) = sizes("blocks.0.mlp.fc.weight", 2), sizes("blocks.0.attn.c_k.weight", 2)
    rows, columns = sizes("bigram.embed.weight", 2) if "bigram.embed.weight" in tensors else (0, 0)
    linear = rows > 0 and "bigram.scale" not in tensors
    if "smear.gate" not in tensors:
        if smear_gate is not None:
            raise InputError(f"smear_gate {smear_gate} was asked for, and there is no tensor smear.gate: choose none")
        smear_gate = "none"
    elif smear_gate is None:
        smear_gate = "before_norm" if "smeargate.gate" in state or linear else "after_norm"
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            model_dim=dim,
            num_heads=heads,
            num_kv_heads=kv_dim // max(dim // max(heads, 1), 1),
            mlp_hidden=hidden,
            tie_embeddings="lm_head.weight" not in tensors,
            logit_softcap=logit_softcap,
            rope_base=rope_base,
            rope_reference_len=rope_reference_len,
            smear_gate=smear_gate,
            bigram=BigramConfig(rows=rows, dim=columns, hash="linear" if linear else "xor"),
            document_start=document_start,
        )
    except ValueError as error:
        raise InputError(f"these tensors are not a model that golfgpt has: {error}") from None
    check_state(tensors, published_shapes(config))
    return config


def assumed_fields(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Keyword of `infer_config` -> what published models have, for each field that `state` does not show."""
    out = {
        "logit_softcap": "30 in every published recipe",
        "rope_base": "10000 in every published recipe",
        "rope_reference_len": "1024 in warmdown-int8, long-context and int6-mlp3x, 2048 in int5-int6-swa, "
        "None in the others",
    }
    gate = {"smear.gate", "smeargate.gate"} & state.keys()
    if gate:
        out["smear_gate"] = "after_norm in int5-int6-swa and int5-int6-swa-base, before_norm in PR #65"
    if gate or {"bigram.embed.weight", "bigram_hash.table.weight"} & state.keys():
        out["document_start"] = "None in every published recipe: the token before is mixed in across documents"
    return out
