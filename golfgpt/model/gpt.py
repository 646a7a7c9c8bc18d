"""The GPT of the published recipes, with its parameters stored in banks.

Shapes: B sequences, T tokens, D model_dim.

    x0 = x = embed(ids)                                     golfgpt.model.embedding
    per layer of the plan:                                  golfgpt.model.plan
        x = layer(x, x0, skip)                              golfgpt.model.layers
    logits = softcap * tanh(norm(x) headᵀ / softcap)

Matrices of one kind of all layers are one parameter, a bank (layers, out, in). A forward unbinds each bank once. The
optimizer can therefore orthogonalize batches without copies, and a cast to the compute dtype is one kernel launch per
bank. Parameters are float32. Training, scoring and generation use the same forward with different weights.

Sources: the published scripts of openai/parameter-golf; U-Net skips and relu² from modded-nanogpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from golfgpt_kernels import softcap_cross_entropy
from torch import Tensor, nn

from golfgpt.config import ModelConfig
from golfgpt.model.embedding import embed
from golfgpt.model.generate import generate
from golfgpt.model.kv_cache import KVCache
from golfgpt.model.layers import Skip, Tokens, layer, visible
from golfgpt.model.linear import Weight, linear, rms_norm
from golfgpt.model.parameters import parameter_table
from golfgpt.model.plan import layer_plan
from golfgpt.model.rotary import rope_table
from golfgpt.model.segments import Segments
from golfgpt.model.value_embedding import value_embeddings


@dataclass(frozen=True)
class Weights:
    """The weights that a forward uses."""

    model: dict[str, Tensor]
    """Parameters that are not in a bank, by name, in float32. They are cast where they are used, as are vectors."""
    layers: list[dict[str, Weight]]
    """For each row of the banks, its parameters by name, matrices in the compute dtype. A matrix may be wrapped in
    `linear.LoRA` or `linear.Observed`. Row i of attn_proj and mlp_proj is multiplied by element i of attn_scale and
    mlp_scale: their gradients are then sums over a matrix, not over all tokens, and no activation is scaled. A LoRA of
    these matrices needs a b with scaled rows."""
    passes: list[dict[str, Weight]] | None = None
    """For each layer of the plan, matrices in place of those in `layers`, so that the passes of a loop may differ, and
    the paths attn_path and mlp_path (`layers.layer`)."""

    def at(self, index: int, row: int) -> dict[str, Weight]:
        """The weights of layer `index` of the plan, which has row `row` of the banks."""
        return self.layers[row] if self.passes is None else self.layers[row] | self.passes[index]


class GPT(nn.Module):
    """A compact GPT. `forward` returns hidden states; `loss` and `logits` apply the softcapped head to them."""

    def __init__(self, config: ModelConfig, *, seed: int = 1337):
        """Initialize on the CPU from `seed`, as defined in `golfgpt.model.parameters`."""
        super().__init__()
        self.config, self.table = config, parameter_table(config)
        self.plans = {looping: layer_plan(config, looping) for looping in (False, True)}
        self._head = "tok_emb" if config.tie_embeddings else "lm_head"
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.table.items():
            value = torch.zeros(param.shape)
            param.init(value, generator)
            self.register_parameter(name, nn.Parameter(value))

    @property
    def head_weight(self) -> Tensor:
        """Output head (vocab_size, D), float32."""
        return getattr(self, self._head)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def weights(self, dtype: torch.dtype = torch.float32, stand_ins: Mapping[str, Tensor] | None = None) -> Weights:
        """The parameters, prepared for a forward in `dtype`. `stand_ins` replace the parameters of the same names."""
        values = dict(self.named_parameters()) | dict(stand_ins or {})
        if unknown := [name for name in values if name not in self.table]:
            raise ValueError(f"no parameter {unknown[0]} in this model; expected some of {', '.join(self.table)}")
        banks = {name: values[name] for name, param in self.table.items() if param.by_layer}
        banks |= {name: bank.to(dtype) for name, bank in banks.items() if self.table[name].kind == "matrix"}
        for matrix, scale in (("attn_proj", "attn_scale"), ("mlp_proj", "mlp_scale")):
            banks[matrix] = banks[matrix] * banks[scale].to(dtype)[..., None]
        rows = zip(*(bank.unbind(0) for bank in banks.values()), strict=True)
        layers = [dict(zip(banks, row, strict=True)) for row in rows]
        return Weights({name: values[name] for name, param in self.table.items() if not param.by_layer}, layers)

    def forward(
        self,
        ids: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        weights: Weights | None = None,
        cache: KVCache | None = None,
        suffix: int | None = None,
        document_start: int | None = None,
        segments: Segments | None = None,
        looping: bool = True,
    ) -> Tensor:
        """Hidden states (B, T, D) in `dtype` after the final norm for token ids (B, T).

        `weights`: result of the method `weights` in the same `dtype`; None: the parameters.
        `suffix`: return only the last `suffix` tokens, (B, suffix, D). The last layer then computes keys and values for
        all tokens, and everything else only for these.
        `document_start`: token id that starts a document; tokens attend only within their document. What SmearGate and
        BigramHash mix in depends on `config.document_start` instead.
        `segments`: tokens attend only within their segment, as `document_start` does without a mask of T x T.
        `looping`: run all passes of model.loop.
        `cache`: the ids continue the cached tokens. An empty cache takes up to a window of tokens, later calls take one
        token. The cache is extended in place. It cannot be combined with `suffix`, `document_start` or `segments`, nor
        these two with each other or segments with `suffix`.
        """
        if cache is not None and (suffix is not None or document_start is not None or segments is not None):
            raise ValueError("a cache cannot be combined with suffix, document_start or segments; drop one of them")
        if segments is not None and (suffix is not None or document_start is not None):
            raise ValueError("segments cannot be combined with suffix or document_start; drop one of them")
        if suffix is not None and not 1 <= suffix <= ids.size(1):
            raise ValueError(f"suffix is {suffix}; expected 1 to {ids.size(1)}, the number of tokens in ids")
        weights = self.weights(dtype) if weights is None else weights
        c, length = self.config, ids.size(1)
        past = 0 if cache is None else cache.seen
        context = min(segments.longest, length) if segments else length  # of a packed row: of a sequence in it
        base = c.rope_base_at(context if cache is None else cache.window)
        cos, sin = (t.to(dtype) for t in rope_table(past, length, c.rotated_dims, base, ids.device))
        mask = None if document_start is None else visible(ids, length, document_start)
        values = value_embeddings(ids, weights.model, dtype, c)
        tokens = Tokens(c, cos, sin, mask, segments, cache, past, values)

        x = x0 = embed(ids, weights.model, dtype, c, {} if cache is None else cache.last)
        lane, outputs, plan = None, {}, self.plans[looping]
        sources = {planned.skip_source for planned in plan}
        for i, planned in enumerate(plan):
            skip = last = None
            if planned.skip_source is not None:
                skip = self._skip(outputs.pop(planned.skip_source), planned.skip_row, weights.model)
            if suffix not in (None, length) and i == len(plan) - 1:
                last = suffix, visible(ids, suffix, document_start)
            x, lane = layer((x, lane), x0, skip, weights.at(i, planned.row), i, planned, tokens, last)
            if i in sources:
                outputs[i] = x
        if c.parallel.kind in ("merged", "routed"):
            x = self._one_stream(x, lane, weights.model)
        if cache is not None:
            cache.seen += length
        return rms_norm(x)

    def _skip(self, output: Tensor, row: int, weights: Mapping[str, Tensor]) -> Skip:
        weight = weights["skip_weights"][row]
        if not self.config.skip_gates:
            return Skip(output, weight)
        gate = weights["skip_gates"][row].sigmoid()
        return Skip(output, (1 - gate) * weight, gate)

    def _one_stream(self, x: Tensor, lane: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What two lanes end as."""
        if self.config.parallel.kind == "merged":
            return torch.lerp(lane, x, weights["lane_merge"].to(x.dtype))
        return {"mean": (x + lane) / 2, "mlp": lane, "attention": x}[self.config.parallel.final]

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        stand_ins: Mapping[str, Tensor] | None = None,
        segments: Segments | None = None,
        looping: bool = True,
    ) -> Tensor:
        """Mean cross entropy in nats, float32, of targets (B, T) given ids (B, T), computed in `dtype`.

        `stand_ins` replace the parameters of the same names and receive their gradients. `segments` and `looping` as in
        `forward`.
        """
        weights = self.weights(dtype, stand_ins)
        hidden = self.forward(ids, dtype=dtype, weights=weights, segments=segments, looping=looping)
        # The head is passed as float32, so that its gradient is added to the embedding's without rounding.
        head = (stand_ins or {}).get(self._head, self.head_weight)
        return softcap_cross_entropy(hidden, head, targets, softcap=self.config.logit_softcap)

    def logits(self, hidden: Tensor, head: Weight | None = None) -> Tensor:
        """Softcapped logits (..., vocab_size), in float32, of hidden states (..., D); `head`, in their dtype, stands in
        for the model's."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(
            linear(hidden, self.head_weight.to(hidden.dtype) if head is None else head).float() / cap
        )

    def generate(self, ids: Tensor, max_new_tokens: int, **options: Any) -> list[int]:
        """`golfgpt.model.generate.generate` of this model."""
        return generate(self, ids, max_new_tokens, **options)
