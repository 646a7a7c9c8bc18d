"""The table of all parameters of a model: shape, kind, initial values and published name.

A golfgpt model stores the matrices of one kind of all L layers in one bank of shape (L, out, in). The published scripts
have one tensor per layer. This table determines initialization, optimizer groups, storage formats, the order in
artifacts, import and export. To add a parameter, add one line to `_rows` and use it. Parameters of optional mechanisms
come last, so that models with the same seed have equal initial values in all other parameters.

    kind        use                      optimizer (golfgpt.optim)        stored by default (golfgpt.quant)
    matrix      multiplies activations   Muon, matrix_lr                  integers, small ones float16
    embedding   lookup table             Adam, tied_embed_lr or embed_lr  the same; published ones train in bfloat16
    head        computes logits          Adam, head_lr                    the same
    control     gains, scales, gates     Adam, scalar_lr                  quant.control_dtype

The published names are those in the scripts of the recipes, of PRs #162 and #180, and of the later records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from golfgpt.config import ModelConfig

Kind = Literal["matrix", "embedding", "head", "control"]


def constant(w: Tensor, generator: torch.Generator, value: float = 0.0) -> None:
    w.fill_(value)


def normal(w: Tensor, generator: torch.Generator, std: float) -> None:
    w.normal_(0.0, std, generator=generator)


def matrices(w: Tensor, generator: torch.Generator, kind: str, scale: float = 1.0) -> None:
    """Fill w (..., out, in): orthogonal if `kind` is "orthogonal" and both dimensions are at least 64, else
    U(±1/sqrt(in)); then multiply by `scale`. The published scripts with orthogonal initialization leave smaller
    matrices as torch initializes them, or zero."""
    if kind == "orthogonal" and min(w.shape[-2:]) >= 64:
        for matrix in w.view(-1, *w.shape[-2:]):
            nn.init.orthogonal_(matrix, generator=generator)
    else:
        bound = w.size(-1) ** -0.5
        w.uniform_(-bound, bound, generator=generator)
    w *= scale


def mix(w: Tensor, generator: torch.Generator, kind: str) -> None:
    """Fill the weights of x and x0 in each layer, (L, 2, D): (1, 0), or with "phase" (p, 1 - p) with p rising over
    depth."""
    depth = torch.arange(len(w)) / max(len(w) - 1, 1)
    share = torch.sigmoid(3 * (depth - 0.5)) if kind == "phase" else torch.ones(len(w))
    w[:, 0] = share[:, None]
    w[:, 1] = 1 - share[:, None]


@dataclass(frozen=True)
class Param:
    """One parameter: a bank with the tensors of all layers, or a tensor that the model has once."""

    published_name: str
    """Name of the tensor in the published scripts. In the name of a bank, {i} stands for the layer."""
    shape: tuple[int, ...]
    kind: Kind
    init: Callable[[Tensor, torch.Generator], None] = constant
    """Fills a float32 tensor of this shape in place; by default with zeros."""
    present: bool = True
    """Whether a model with this config has the parameter."""

    @property
    def layered(self) -> bool:
        """Whether it is a bank. The first dimension of a bank is the layer, and each layer has its own published
        name."""
        return "{i}" in self.published_name

    @property
    def by_layer(self) -> bool:
        """Whether row i belongs to layer i."""
        return self.published_name.startswith(("blocks.", "parallel_"))

    @property
    def published_names(self) -> list[str]:
        return [self.published_name.format(i=i) for i in range(self.shape[0] if self.layered else 1)]


def parameter_table(c: ModelConfig) -> dict[str, Param]:
    """Name -> parameter of a model, in the order of initialization and of storage in artifacts."""
    return {name: param for name, param in _rows(c).items() if param.present}


def parameter_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of the table."""
    return {name: param.shape for name, param in parameter_table(c).items()}


def of_kind(table: Mapping[str, Param], *kinds: Kind) -> list[str]:
    """Names of the parameters of these kinds, in the order of the table."""
    return [name for name, param in table.items() if param.kind in kinds]


# fmt: off
def _rows(c: ModelConfig) -> dict[str, Param]:
    """Every parameter that any config has."""
    L, D, H, KV, V, F = c.num_layers, c.model_dim, c.num_heads, c.kv_dim, c.vocab_size, c.mlp_hidden
    pairs, pair_dim = c.bigram.rows, c.bigram.dim
    xor = c.bigram.hash == "xor"
    smear, smears = 3.0 if c.smear_gate == "before_norm" else 0.0, c.smear_gate in ("after_norm", "before_norm")
    window, gate, from_input = c.gate_window, c.attn_gate, c.smear_gate == "input"
    sigmoid, inputs = gate in ("dense", "sparse"), D if gate == "dense" else window
    gate_init = partial(normal, std=0.01) if gate == "dense" else constant
    routed, merged, windowed = c.parallel.kind == "routed", c.parallel.kind == "merged", gate == "window"
    half, tenth, more = (partial(constant, value=value) for value in (0.5, 0.1, 1.1))
    ve, ve_layers = c.value_embedding.dim, len(c.value_embedding.layers)
    values, small = ve > 0, partial(normal, std=0.01)
    drawn, one = partial(matrices, kind=c.matrix_init), partial(constant, value=1.0)
    embed_std = c.tied_embed_init_std if c.tie_embeddings else 1.0
    # One factor of BigramHash starts at zero, the table ("xor") or the projection, so that it adds nothing at first.
    pair_table = constant if xor else partial(normal, std=0.01)
    deep = partial(drawn, scale=(2 * L) ** -0.5 if c.projection_init == "by_depth" else 1.0)
    pair_proj = deep if xor else constant
    return {
        "tok_emb":      Param("tok_emb.weight", (V, D), "embedding", partial(normal, std=embed_std)),
        "lm_head":      Param("lm_head.weight", (V, D), "head", present=not c.tie_embeddings),
        "c_q":          Param("blocks.{i}.attn.c_q.weight", (L, D, D), "matrix", drawn),
        "c_k":          Param("blocks.{i}.attn.c_k.weight", (L, KV, D), "matrix", drawn),
        "c_v":          Param("blocks.{i}.attn.c_v.weight", (L, KV, D), "matrix", drawn),
        "attn_proj":    Param("blocks.{i}.attn.proj.weight", (L, D, D), "matrix"),
        "mlp_fc":       Param("blocks.{i}.mlp.fc.weight", (L, F, D), "matrix", drawn),
        "mlp_proj":     Param("blocks.{i}.mlp.proj.weight", (L, D, F), "matrix"),
        "attn_scale":   Param("blocks.{i}.attn_scale", (L, D), "control", one),
        "mlp_scale":    Param("blocks.{i}.mlp_scale", (L, D), "control", one),
        "resid_mix":    Param("blocks.{i}.resid_mix", (L, 2, D), "control", partial(mix, kind=c.resid_mix_init)),
        "q_gain":       Param("blocks.{i}.attn.q_gain", (L, H), "control", partial(constant, value=c.qk_gain_init)),
        "skip_weights": Param("skip_weights", (c.num_skips, D), "control", one, present=c.num_skips > 0),
        "smear_gate":   Param("smear.gate", (D,), "control", partial(constant, value=smear), present=smears),
        "bigram_table": Param("bigram.embed.weight", (pairs, pair_dim), "embedding", pair_table, present=pairs > 0),
        "bigram_proj":  Param("bigram.proj.weight", (D, pair_dim), "matrix", pair_proj, present=pairs > 0),
        "bigram_scale": Param("bigram.scale", (), "control", partial(constant, value=0.05), present=xor and pairs > 0),
        "skip_gates":   Param("skip_gates", (c.num_skips, D), "control", present=c.skip_gates and c.num_skips > 0),
        "smear_window": Param("smear_gate.weight", (1, window), "control", present=from_input),
        "smear_lambda": Param("smear_lambda", (1,), "control", present=from_input),
        "window_gate":  Param("blocks.{i}.attn.attn_gate_proj.weight", (L, H, window), "control", present=windowed),
        "attn_gate":    Param("blocks.{i}.attn.attn_gate_w", (L, H, inputs), "control", gate_init, present=sigmoid),
        "lane_merge":   Param("lane_merge", (), "control", half, present=merged),
        "resid_lambdas": Param("parallel_resid_lambdas", (L, 2), "control", more, present=routed),
        "post_lambdas": Param("parallel_post_lambdas", (L, 2, 2), "control", one, present=routed),
        "value_table":  Param("ve_shared.embed.weight", (V, ve), "embedding", small, present=values),
        "value_proj":   Param("ve_shared.proj.weight", (KV, ve), "matrix", deep, present=values),
        "value_scale":  Param("ve_shared.scale", (), "control", tenth, present=values),
        "value_layer_scales": Param("ve_layer_scales.{i}", (ve_layers, 1), "control", one, present=values),
    }
# fmt: on


PUBLISHED_NAMES = {name: param.published_name for name, param in _rows(ModelConfig()).items()}
"""The published name of every parameter that any config has."""
