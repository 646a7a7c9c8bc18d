"""Names and shapes of a model's parameters, here and upstream.

A golfgpt model keeps the same-shaped matrices of all L layers in one bank of shape (L, out, in); upstream
names one tensor per layer. `parameter_shapes` is the one statement of what a model holds.

    bank           shape                     upstream name
    tok_emb        (vocab, dim)              tok_emb.weight
    lm_head        (vocab, dim), untied      lm_head.weight
    c_q            (L, dim, dim)             blocks.{i}.attn.c_q.weight
    c_k, c_v       (L, kv_dim, dim)          blocks.{i}.attn.c_k.weight, blocks.{i}.attn.c_v.weight
    attn_proj      (L, dim, dim)             blocks.{i}.attn.proj.weight
    mlp_fc         (L, hidden, dim)          blocks.{i}.mlp.fc.weight
    mlp_proj       (L, dim, hidden)          blocks.{i}.mlp.proj.weight
    attn_scale     (L, dim)                  blocks.{i}.attn_scale
    mlp_scale      (L, dim)                  blocks.{i}.mlp_scale
    resid_mix      (L, 2, dim)               blocks.{i}.resid_mix
    q_gain         (L, heads)                blocks.{i}.attn.q_gain
    skip_weights   (skips, dim), skips > 0   skip_weights
    smear_gate     (dim,), smear_gate        smear.gate
    bigram_table   (rows, pair dim)          bigram.embed.weight         these with bigram_hash,
    bigram_proj    (dim, pair dim)           bigram.proj.weight
    bigram_scale   ()                        bigram.scale                this with "xor" only

The banks of SmearGate and BigramHash come last, so that models of one seed agree in the others. The upstream
names are those of PRs #162, #180 and R5; PR #65 calls its "before_norm" gate smeargate.gate and its "linear"
pairs bigram_hash.table.weight and bigram_hash.proj.weight, which are read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from golfgpt.config import ModelConfig
from golfgpt.errors import InputError

_LAYER_NAMES = {
    "c_q": "attn.c_q.weight",
    "c_k": "attn.c_k.weight",
    "c_v": "attn.c_v.weight",
    "attn_proj": "attn.proj.weight",
    "mlp_fc": "mlp.fc.weight",
    "mlp_proj": "mlp.proj.weight",
    "attn_scale": "attn_scale",
    "mlp_scale": "mlp_scale",
    "resid_mix": "resid_mix",
    "q_gain": "attn.q_gain",
}
_MODEL_NAMES = {
    "tok_emb": "tok_emb.weight",
    "lm_head": "lm_head.weight",
    "skip_weights": "skip_weights",
    "smear_gate": "smear.gate",
    "bigram_table": "bigram.embed.weight",
    "bigram_proj": "bigram.proj.weight",
    "bigram_scale": "bigram.scale",
}
_PR65_NAMES = {
    "smeargate.gate": "smear.gate",
    "bigram_hash.table.weight": "bigram.embed.weight",
    "bigram_hash.proj.weight": "bigram.proj.weight",
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Bank name -> shape of every parameter of the model, in the order in which artifacts store them."""
    layers, dim, hidden = config.num_layers, config.model_dim, config.mlp_hidden
    shapes = {
        "tok_emb": (config.vocab_size, dim),
        "lm_head": (config.vocab_size, dim),
        "c_q": (layers, dim, dim),
        "c_k": (layers, config.kv_dim, dim),
        "c_v": (layers, config.kv_dim, dim),
        "attn_proj": (layers, dim, dim),
        "mlp_fc": (layers, hidden, dim),
        "mlp_proj": (layers, dim, hidden),
        "attn_scale": (layers, dim),
        "mlp_scale": (layers, dim),
        "resid_mix": (layers, 2, dim),
        "q_gain": (layers, config.num_heads),
        "skip_weights": (config.num_skips, dim),
        "smear_gate": (dim,),
        "bigram_table": (config.bigram_vocab_size, config.bigram_dim),
        "bigram_proj": (dim, config.bigram_dim),
        "bigram_scale": (),
    }
    absent = {
        "lm_head": config.tie_embeddings,
        "skip_weights": config.num_skips == 0,
        "smear_gate": config.smear_gate == "none",
        "bigram_table": config.bigram_hash == "none",
        "bigram_proj": config.bigram_hash == "none",
        "bigram_scale": config.bigram_hash != "xor",
    }
    return {name: shape for name, shape in shapes.items() if not absent.get(name)}


def is_layered(bank: str) -> bool:
    """Whether a bank holds one of upstream's tensors for each layer, or is one itself."""
    return bank in _LAYER_NAMES


def upstream_names(bank: str, shape: tuple[int, ...]) -> list[str]:
    """Upstream's names of the tensors in a bank; raises InputError for an unknown bank."""
    if bank in _MODEL_NAMES:
        return [_MODEL_NAMES[bank]]
    if bank not in _LAYER_NAMES:
        raise InputError(f"unexpected tensors: {bank}")
    return [f"blocks.{i}.{_LAYER_NAMES[bank]}" for i in range(shape[0])]


def upstream_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Upstream name -> shape of every parameter of the model."""
    return {
        name: shape[is_layered(bank) :]
        for bank, shape in parameter_shapes(config).items()
        for name in upstream_names(bank, shape)
    }


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


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's per-layer tensors, as views of the banks in `state`; InputError for an unknown bank."""
    out = {}
    for bank, tensor in state.items():
        out |= zip(upstream_names(bank, tensor.shape), tensor if is_layered(bank) else [tensor], strict=True)
    return out


def from_upstream(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Banks stacked from upstream's per-layer tensors, dtypes kept.

    Strict: raises InputError naming missing, unexpected or mis-shaped tensors. A one-layer upstream model
    holds skip_weights of zero rows, which is dropped.
    """
    state = _one_spelling(state)
    check_state(state, upstream_shapes(config))
    banks = {}
    for bank, shape in parameter_shapes(config).items():
        tensors = [state[name] for name in upstream_names(bank, shape)]
        banks[bank] = torch.stack(tensors) if is_layered(bank) else tensors[0]
    return banks


def canonical_name(name: str) -> str:
    """The name that `upstream_names` has for a tensor which PR #65 calls otherwise."""
    return _PR65_NAMES.get(name, name)


def _one_spelling(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under this module's names, without the empty skip_weights of a one-layer model."""
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
    """The configuration of the model that upstream's per-layer tensors `state` belong to.

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
    bigram_hash = "none" if not rows else "xor" if "bigram.scale" in tensors else "linear"
    if "smear.gate" not in tensors:
        if smear_gate is not None:
            raise InputError(f"smear_gate {smear_gate} was asked for, and there is no tensor smear.gate: choose none")
        smear_gate = "none"
    elif smear_gate is None:
        smear_gate = "before_norm" if "smeargate.gate" in state or bigram_hash == "linear" else "after_norm"
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
            bigram_hash=bigram_hash,
            bigram_vocab_size=rows,
            bigram_dim=columns,
            document_start=document_start,
        )
    except ValueError as error:
        raise InputError(f"these tensors are not a model that golfgpt has: {error}") from None
    check_state(tensors, upstream_shapes(config))
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
