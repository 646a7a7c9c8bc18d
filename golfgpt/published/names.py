"""Banks to and from the published scripts' tensors, one a layer; and a model's configuration from such tensors.

The names are those of `golfgpt.model.parameters`. Two other spellings are read as well. PR #65 calls its "before_norm"
gate smeargate.gate and its "linear" pairs bigram_hash.table.weight and bigram_hash.proj.weight. The records of
2026-03-25 and from 2026-04-10 on have the matrices of all layers in four banks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from golfgpt.config import BigramConfig, ModelConfig, ParallelConfig, ValueEmbeddingConfig
from golfgpt.errors import InputError
from golfgpt.model.parameters import PUBLISHED_NAMES, parameter_table

_PR65_NAMES = {
    "smeargate.gate": "smear.gate",
    "bigram_hash.table.weight": "bigram.embed.weight",
    "bigram_hash.proj.weight": "bigram.proj.weight",
}
_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}
"""Published banks, and the matrices that lie in them: those of all layers one after another."""
_LOOPS = "layers 4 to 5 in 2026-04-05, 3 to 5 from 2026-04-09 on, in 3 passes"


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter of the model."""
    table = parameter_table(config).values()
    return {name: param.shape[param.layered :] for param in table for name in param.published_names}


def _shapes_beside(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The same, with those published banks that `state` has in place of their matrices."""
    shapes = published_shapes(config)
    for bank in _BANKS.keys() & state.keys():
        rows = [shapes.pop(f"blocks.{i}.{kind}.weight") for kind in _BANKS[bank] for i in range(config.num_layers)]
        shapes[bank] = (len(rows), *rows[0])
    return shapes


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
    """Banks stacked from published tensors, dtypes unchanged.

    Strict: raises InputError naming missing, unexpected or mis-shaped tensors. A one-layer published model
    holds skip_weights of zero rows, which is dropped.
    """
    state = _one_spelling(state)
    check_state(state, _shapes_beside(state, config))
    state, banks = split_banks(state), {}
    for bank, param in parameter_table(config).items():
        tensors = [state[name] for name in param.published_names]
        banks[bank] = torch.stack(tensors) if param.layered else tensors[0]
    return banks


def canonical_name(name: str) -> str:
    """The name in `golfgpt.model.parameters` of a tensor that PR #65 calls otherwise."""
    return _PR65_NAMES.get(name, name)


def split_banks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with its published banks, which must have their shapes, as single matrices: views."""
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
    """`state` under this module's names, without the empty skips of a one-layer model."""
    out = {canonical_name(name): tensor for name, tensor in state.items()}
    if len(out) < len(state):
        twice = [name for name, other in _PR65_NAMES.items() if name in state and other in state]
        raise InputError(f"tensors under two names: {listed(twice)}")
    return {name: w for name, w in out.items() if w.numel() or name not in ("skip_weights", "skip_gates")}


def infer_config(state: Mapping[str, Tensor], like: ModelConfig | None = None) -> ModelConfig:
    """The configuration of the model that the published tensors `state` belong to.

    The tensors show every size and most mechanisms. `like` (default: recipe R0's) gives all other fields;
    `assumed_fields` says which of them matter, and what was published. Where `like` has neither kind of smear.gate, it
    is after_norm, or before_norm beside tensors of PR #65: its names, or pairs without a scale. Where it has no layers
    of value embeddings, they are the last ones.

    Raises InputError naming missing, unexpected or mis-shaped tensors, also those that `like` has and `state` has not,
    or saying why no model has these sizes and fields.
    """
    tensors, like = _one_spelling(state), like or ModelConfig()

    def sizes(name: str, dimensions: int, absent: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if name not in tensors and absent is not None:
            return absent
        if name not in tensors:
            raise InputError(f"missing tensors: {name}")
        shape = tuple(tensors[name].shape)
        if len(shape) != dimensions:
            raise InputError(f"tensor {name} has shape {shape}, expected {dimensions} dimensions")
        return shape

    def rows_of(bank: str, kind: str) -> int:
        return sizes(bank, 3)[1] if bank in tensors else sizes(f"blocks.0.{kind}.weight", 2)[0]

    vocab_size, dim = sizes("tok_emb.weight", 2)
    (heads,) = sizes("blocks.0.attn.q_gain", 1)
    hidden, kv_dim = rows_of("mlp_up_bank", "mlp.fc"), rows_of("kv_bank", "attn.c_k")
    num_layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    skips, _ = sizes("skip_weights", 2, (0, 0))

    pairs, pair_dim = sizes("bigram.embed.weight", 2, (0, 0))
    linear = pairs > 0 and "bigram.scale" not in tensors
    smear_gate, (_, window) = "none", sizes("smear_gate.weight", 2, (1, like.gate_window))
    if "smear_gate.weight" in tensors:
        smear_gate = "input"
    elif "smear.gate" in tensors and like.smear_gate in ("after_norm", "before_norm"):
        smear_gate = like.smear_gate
    elif "smear.gate" in tensors:
        smear_gate = "before_norm" if "smeargate.gate" in state or linear else "after_norm"

    attn_gate = "none"
    if "blocks.0.attn.attn_gate_proj.weight" in tensors:
        attn_gate, (_, window) = "window", sizes("blocks.0.attn.attn_gate_proj.weight", 2)
    elif "blocks.0.attn.attn_gate_w" in tensors:
        _, inputs = sizes("blocks.0.attn.attn_gate_w", 2)
        dense = inputs == dim and (like.attn_gate, like.gate_window) != ("sparse", dim)
        attn_gate, window = ("dense", window) if dense else ("sparse", inputs)

    lanes = {"parallel_post_lambdas": "routed", "lane_merge": "merged"}
    unseen = "one_lane" if like.parallel.kind == "one_lane" else "off"
    parallel = next((kind for name, kind in lanes.items() if name in tensors), unseen)
    _, value_dim = sizes("ve_shared.embed.weight", 2, (0, 0))
    scales = sum(name.startswith("ve_layer_scales.") for name in tensors)
    value_layers = like.value_embedding.layers or tuple(range(num_layers))[-max(scales, 1) :]
    try:
        config = replace(
            like,
            vocab_size=vocab_size,
            num_layers=num_layers,
            model_dim=dim,
            num_heads=heads,
            num_kv_heads=kv_dim // max(dim // max(heads, 1), 1),
            mlp_hidden=hidden,
            tie_embeddings="lm_head.weight" not in tensors,
            smear_gate=smear_gate,
            bigram=BigramConfig(rows=pairs, dim=pair_dim, hash="linear" if linear else "xor"),
            attn_gate=attn_gate,
            gate_window=window,
            skip_gates="skip_gates" in tensors,
            parallel=ParallelConfig() if parallel == "off" else replace(like.parallel, kind=parallel),
            value_embedding=ValueEmbeddingConfig(dim=value_dim, layers=value_layers if value_dim else ()),
            document_start=like.document_start if smear_gate != "none" or pairs else None,
        )
    except ValueError as error:
        raise InputError(f"golfgpt has no model of these sizes with these options: {error}") from None
    wanted = parameter_table(like)
    if lacking := wanted.keys() - parameter_table(config).keys() - {"skip_weights"}:
        raise InputError(
            f"missing tensors: {listed(wanted[name].published_names[0] for name in lacking)}, which the recipe or the "
            "options ask for; choose others"
        )
    shapes = _shapes_beside(tensors, config)
    if tensors.keys() == shapes.keys() and skips != config.num_skips:
        loop = config.loop
        raise InputError(
            f"tensor skip_weights has {skips} rows, expected {config.num_skips}, half of the "
            f"{len(config.layer_order())} layers that run with model.loop.first {loop.first}, last {loop.last} and "
            f"passes {loop.passes}; set these (published: {_LOOPS})"
        )
    check_state(tensors, shapes)
    return config


def assumed_fields(config: ModelConfig) -> dict[str, str]:
    """Field of an imported model -> what published models have, for each that its tensors do not show and that matters
    to it."""
    lanes, looped = config.parallel.kind, config.loop.passes > 1
    record = config.skip_gates or config.value_embedding.dim > 0 or looped or config.attn_gate != "none"
    record = record or config.smear_gate == "input"
    known = {
        "logit_softcap": (True, "30 in every published recipe and record"),
        "rope_base": (True, "10000 in every published recipe and record"),
        "rope_reference_len": (
            True,
            "1024 in warmdown-int8, long-context, int6-mlp3x, 2026-03-22 and 2026-03-25, 2048 in int5-int6-swa, "
            "2026-04-05 and 2026-04-09, None in the others",
        ),
        "smear_gate": (
            config.smear_gate in ("after_norm", "before_norm"),
            "before_norm in PR #65, after_norm in all others that have this tensor",
        ),
        "document_start": (
            config.mixes_tokens,
            "1 in 2026-04-27, None in all others: the token before is mixed in across documents",
        ),
        "mlp_slope": (record, "0 in 2026-03-22, 0.5 in later records"),
        "xsa_layers": (record, "the last 4 in 2026-03-22, all in later records"),
        "rope_dims": (record, "16 in these records"),
        "ln_scale": (record, "True in these records"),
        "value_embedding.layers": (config.value_embedding.dim > 0, "the last 2 in 2026-03-22 and 2026-03-25"),
        "attn_gate_scale": (config.attn_gate == "sparse", "0.5 in 2026-04-27, 1 in PR #1787"),
        **dict.fromkeys(("loop.first", "loop.last", "loop.passes"), (looped, _LOOPS)),
        "parallel.kind": (
            config.skip_gates and lanes in ("off", "one_lane"),
            "one_lane in 2026-04-09, off in 2026-04-05",
        ),
        "parallel.first": (lanes != "off", "7 of 11 layers in 2026-04-09 and PR #1477, 8 from 2026-04-10 on"),
        "parallel.final": (lanes == "routed", "mean in every record"),
    }
    return {name: published for name, (matters, published) in known.items() if matters}
