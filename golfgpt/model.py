"""The GPT of the published recipes, with its parameters in banks.

Shapes: B sequences, T tokens, D model_dim, H query heads, K key-value heads, h head_dim, L layers.
Same-shaped matrices of all layers are one parameter (L, out, in), unbound once per forward, so that the
optimizer orthogonalizes batches without copies and a cast to the compute dtype is one launch per role.

    x0 = x = norm(tok_emb[ids])
    per layer:  x = mix[0] x + mix[1] x0
                x = x + attn_scale * attention(norm(x))
                x = x + mlp_scale * relu(norm(x) fcT)^2 projT
    the first half pushes its outputs; the second half adds skip_weights * pop() before each of its layers
    logits = softcap * tanh(norm(x) headT / softcap)

x0 can mix in the token before (prev its id, x' its x, g = sigmoid(smear_gate)). First, instead of tok_emb[ids],
    bigram_hash "xor"         x = tok_emb[ids] + bigram_scale * table[(36313 ids ^ 27191 prev) mod (rows - 1)] projT
                "linear"      x = tok_emb[ids] + table[(92821 prev + ids) mod rows] projT
and then, instead of norm(x),
    smear_gate "after_norm"   x = norm(x); x0 = (1 - g) x + g x'
               "before_norm"  x0 = norm(g x + (1 - g) x')
A sequence's first token has no prev: x' is 0, and the row is rows - 1 ("xor") or that of prev 0 ("linear").
With model.document_start this holds for the first token of every document in it.

Norms have no weight and return their input's dtype (torch >= 2.12 puts rms_norm on autocast's float32 list;
here nothing runs under autocast: weights are cast explicitly). Parameters are float32 masters.
Sources: the published scripts of openai/parameter-golf; U-Net skips and relu^2 from modded-nanogpt; NTK-aware
scaling of the rotary base from bloc97's note of 2023 on LLaMA's context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from golfgpt_kernels import fake_quantize_rows, relu2_mlp, round_to_dtype, softcap_cross_entropy, straight_through
from torch import Tensor, nn

from golfgpt.config import ModelConfig
from golfgpt.upstream import parameter_shapes

LAYER_MATRICES = ("c_q", "c_k", "c_v", "attn_proj", "mlp_fc", "mlp_proj")
MATRIX_BANKS = (*LAYER_MATRICES, "bigram_proj")
"""Banks that multiply activations."""
EMBEDDINGS = frozenset({"tok_emb", "bigram_table"})
"""Banks that are looked up; the published scripts keep them in bfloat16."""

FakeQuant = Mapping[str, dict[str, Any] | Sequence[tuple[int, dict[str, Any] | None]]]
"""Bank -> options, or (layers, options) of its consecutive parts; `GPT.forward` says which options."""


@dataclass
class KVCache:
    """Keys and values of the last `window` tokens per layer, and what the next token's embedding mixes in. Rotary
    embedding is relative, so a model trained on sequences of `window` tokens never meets a distance it has not
    seen, however long the text grows."""

    window: int
    seen: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    """The last token's "ids" (B, 1), and its embedding "x" (B, 1, D) before the smear gate."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, h) of a layer and return all that its queries may see."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.layers[layer] = k[:, :, -self.window :], v[:, :, -self.window :]
        return self.layers[layer]


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last dimension; keeps the dtype, eps is float32's 1.19e-7."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def rope_table(start: int, length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim / 2) in float32 for positions start .. start + length - 1."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the half-split pairs of x (..., T, head_dim) by minus the table's angles."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def visible(ids: Tensor, queries: int, document_start: int | None) -> Tensor:
    """Which of the tokens ids (B, T) each of the last `queries` ones may attend to: itself and those before it, with
    `document_start` only those of its own document. Bool (queries, T), or (B, 1, queries, T) with documents."""
    position = torch.arange(ids.size(1), device=ids.device)
    mask = position[-queries:, None] >= position
    if document_start is None:
        return mask
    document = (ids == document_start).cumsum(1)
    return mask & (document[:, -queries:, None] == document[:, None, :])[:, None]


def one_later(x: Tensor, before: Tensor | None, fill: int) -> Tensor:
    """x (B, T, ...) moved by one token, behind `before` (B, 1, ...) or, where that is None, `fill`."""
    return torch.cat((torch.full_like(x[:, :1], fill) if before is None else before, x[:, :-1]), dim=1)


def pair_rows(ids: Tensor, prev: Tensor, config: ModelConfig) -> Tensor:
    """Rows of the pair table for token ids (B, T) after prev (B, T), -1 where there is no previous token."""
    rows = config.bigram_vocab_size
    if config.bigram_hash == "xor":
        return torch.where(prev < 0, rows - 1, ((36313 * ids) ^ (27191 * prev)) % (rows - 1))
    return (92821 * prev.clamp(min=0) + ids) % rows


class GPT(nn.Module):
    """A compact GPT. `forward` gives hidden states; `loss` and `logits` put the softcapped head on top."""

    def __init__(self, config: ModelConfig, *, seed: int = 1337):
        """Initialize on CPU from `seed`: embedding N(0, std^2), projections back to the residual stream and
        an untied head zero, other matrices as config.matrix_init says, gains and scales constant.

        Of BigramHash one factor starts at zero, so that it adds nothing at first: the table ("xor", bigram_proj
        being a matrix as above times 1 / sqrt(2 L)), or bigram_proj ("linear", the table being N(0, 0.01^2)).
        Published scripts leave an "xor" bigram_proj narrower than 64 zero as well, and so without a gradient.
        """
        super().__init__()
        self.config = config
        self._head = "tok_emb" if config.tie_embeddings else "lm_head"
        generator = torch.Generator().manual_seed(seed)
        for name, shape in parameter_shapes(config).items():
            value = torch.zeros(shape)
            if name == "tok_emb":
                std = config.tied_embed_init_std if config.tie_embeddings else 1.0
                value.normal_(0.0, std, generator=generator)
            elif name in ("c_q", "c_k", "c_v", "mlp_fc"):
                _init_matrices(value, config.matrix_init, generator)
            elif name in ("attn_scale", "mlp_scale", "skip_weights"):
                value.fill_(1.0)
            elif name == "resid_mix":
                value[:, 0] = 1.0
                if config.resid_mix_init == "phase":
                    depth = torch.arange(config.num_layers) / max(config.num_layers - 1, 1)
                    value[:, 0] = torch.sigmoid(3 * (depth - 0.5))[:, None]
                    value[:, 1] = 1 - value[:, 0]
            elif name == "q_gain":
                value.fill_(config.qk_gain_init)
            elif name == "smear_gate" and config.smear_gate == "before_norm":
                value.fill_(3.0)
            elif name == "bigram_table" and config.bigram_hash == "linear":
                value.normal_(0.0, 0.01, generator=generator)
            elif name == "bigram_proj" and config.bigram_hash == "xor":
                _init_matrices(value, config.matrix_init, generator)
                value *= (2 * config.num_layers) ** -0.5
            elif name == "bigram_scale":
                value.fill_(0.05)
            self.register_parameter(name, nn.Parameter(value))

    @property
    def head_weight(self) -> Tensor:
        """Output head (vocab_size, D), float32."""
        return getattr(self, self._head)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        ids: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        cache: KVCache | None = None,
        fake_quant: FakeQuant | None = None,
        suffix: int | None = None,
        document_start: int | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) in `dtype` after the final norm for token ids (B, T).

        With `suffix` only those of the last `suffix` tokens, (B, suffix, D): the last layer makes keys and values of
        all tokens and everything else of these. With `document_start`, a token id, attention ends at the last such
        token; what SmearGate and BigramHash mix in is the model's own `config.document_start`.

        With `cache` the ids continue the cached tokens (up to a window into an empty cache, then one at a
        time), and the cache is extended in place; neither of the two goes with it.

        `fake_quant`, as `Quantizer.fake_quant` makes it, maps banks to what they go through: the options of
        `golfgpt_kernels.fake_quantize_rows`, or {"keep": torch.float16} (and "enabled") for rounding to it, or a
        list of (layers, options or None) of its parts. Raises ValueError for a bank that is not here.
        """
        if cache is not None and (suffix is not None or document_start is not None):
            raise ValueError("a cache continues one text: it goes with neither suffix nor document_start")
        if suffix is not None and not 1 <= suffix <= ids.size(1):
            raise ValueError(f"suffix must lie in 1..{ids.size(1)} (the tokens given), got {suffix}")
        return self._hidden(ids, self._weights(fake_quant), dtype, cache, suffix, document_start)

    def _weights(self, fake_quant: FakeQuant | None) -> dict[str, Tensor]:
        """Every bank as this forward uses it, float32."""
        weights = dict(self.named_parameters())
        for name, parts in (fake_quant or {}).items():
            if name not in weights:
                raise ValueError(f"fake_quant names {name!r}; this model's banks are {', '.join(weights)}")
            w = weights[name].float()
            if isinstance(parts, dict):
                weights[name] = fake_quantized(w, parts)
            else:
                layers = w.split([layers for layers, _ in parts])
                weights[name] = torch.cat(
                    [fake_quantized(part, options) for part, (_, options) in zip(layers, parts, strict=True)]
                )
        return weights

    def _hidden(
        self,
        ids: Tensor,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        cache: KVCache | None = None,
        suffix: int | None = None,
        document_start: int | None = None,
    ) -> Tensor:
        c = self.config
        past = cache.seen if cache is not None else 0
        base = c.rope_base_at(cache.window if cache is not None else ids.size(1))
        cos, sin = rope_table(past, ids.size(1), c.head_dim, base, ids.device)
        cos, sin = cos.to(dtype), sin.to(dtype)
        names = (*LAYER_MATRICES, "attn_scale", "mlp_scale", "resid_mix", "q_gain")
        layers = zip(*(weights[name].to(dtype).unbind(0) for name in names), strict=True)
        skip_weights = weights["skip_weights"].to(dtype) if c.num_skips else None

        x = x0 = self._embed(ids, weights, dtype, cache.last if cache is not None else {})
        stack: list[Tensor] = []
        mask = None if document_start is None else visible(ids, ids.size(1), document_start)
        for i, (c_q, c_k, c_v, attn_proj, mlp_fc, mlp_proj, attn_scale, mlp_scale, mix, q_gain) in enumerate(layers):
            if i >= c.num_encoder_layers and stack:
                x = x + skip_weights[i - c.num_encoder_layers] * stack.pop()
            x = mix[0] * x + mix[1] * x0
            n = rms_norm(x)
            k, v = (self._heads(F.linear(n, w)) for w in (c_k, c_v))
            k = rotate(rms_norm(k), cos, sin)
            if cache is not None:
                k, v = cache.extend(i, k, v)
            if suffix not in (None, ids.size(1)) and i == c.num_layers - 1:
                x, n, cos, sin = x[:, -suffix:], n[:, -suffix:], cos[-suffix:], sin[-suffix:]
                mask = visible(ids, suffix, document_start)  # is_causal aligns few queries with the first keys
            q = rotate(rms_norm(self._heads(F.linear(n, c_q))), cos, sin) * q_gain[:, None, None]
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and not past, enable_gqa=True
            )
            x = x + attn_scale * F.linear(attended.transpose(1, 2).flatten(2), attn_proj)
            x = x + mlp_scale * relu2_mlp(rms_norm(x), mlp_fc, mlp_proj)
            if i < c.num_encoder_layers:
                stack.append(x)
        if cache is not None:
            cache.seen += ids.size(1)
        return rms_norm(x)

    def _embed(self, ids: Tensor, weights: dict[str, Tensor], dtype: torch.dtype, last: dict[str, Tensor]) -> Tensor:
        """x0 (B, T, D) of ids (B, T); `last` is that of a KVCache, renewed here, empty where a sequence starts."""
        c = self.config
        x = F.embedding(ids, weights["tok_emb"]).to(dtype)
        prev = one_later(ids, last.get("ids"), -1)
        if c.document_start is not None:
            prev = prev.masked_fill(ids == c.document_start, -1)
        if c.bigram_hash != "none":
            pairs = F.embedding(pair_rows(ids, prev, c), weights["bigram_table"]).to(dtype)
            pairs = F.linear(pairs, weights["bigram_proj"].to(dtype))
            x = x + (pairs * weights["bigram_scale"].to(dtype) if c.bigram_hash == "xor" else pairs)
        if c.smear_gate != "before_norm":
            x = rms_norm(x)
        if c.smear_gate != "none":
            prev_x = one_later(x, last.get("x"), 0) * (prev >= 0)[..., None]
            last["x"] = x[:, -1:]
            gate = weights["smear_gate"].sigmoid().to(dtype)
            x = (1 - gate) * x + gate * prev_x if c.smear_gate == "after_norm" else gate * x + (1 - gate) * prev_x
        last["ids"] = ids[:, -1:]
        return rms_norm(x) if c.smear_gate == "before_norm" else x

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * h) -> (B, heads, T, h)."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        fake_quant: FakeQuant | None = None,
        shadows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Mean cross entropy in nats, float32, of targets (B, T) given ids (B, T); `fake_quant` as in `forward`.

        `shadows` maps banks to tensors of their shape that stand in for them, in `dtype`; gradients go to the banks.
        """
        weights = self._weights(fake_quant)
        for name, shadow in (shadows or {}).items():
            weights[name] = straight_through(weights[name], shadow)
        hidden = self._hidden(ids, weights, dtype)
        # The head goes in as float32, so that its gradient meets the embedding's unrounded.
        return softcap_cross_entropy(hidden, weights[self._head], targets, softcap=self.config.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped logits (..., vocab_size) in float32 of hidden states (..., D)."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, self.head_weight.to(hidden.dtype)).float() / cap)

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        window: int,
        temperature: float = 0.8,
        top_k: int | None = 50,
        stop_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Sample a continuation of ids (T,) token by token, each seeing the last `window` tokens.

        temperature 0 takes the likeliest token. Stops early at `stop_id`. Returns the new ids only.
        """
        cache, out = KVCache(window), []
        hidden = self(ids[None, -window:], cache=cache)
        for _ in range(max_new_tokens):
            logits = self.logits(hidden[0, -1])
            if temperature == 0:
                token = int(logits.argmax())
            else:
                if top_k is not None and top_k < logits.numel():
                    logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
                token = int(
                    torch.multinomial(((logits - logits.max()) / temperature).softmax(0), 1, generator=generator)
                )
            if token == stop_id:
                break
            out.append(token)
            hidden = self(torch.tensor([[token]], device=ids.device), cache=cache)
        return out


def fake_quantized(w: Tensor, options: dict[str, Any] | None) -> Tensor:
    """w as the artifact will hold it, with straight-through gradient."""
    if options is None:
        return w
    if "keep" not in options:
        return fake_quantize_rows(w, **options)
    kept = round_to_dtype(w.detach(), options["keep"])
    if options.get("enabled") is not None:
        kept = torch.where(options["enabled"], kept, w.detach())
    return straight_through(w, kept)


def _init_matrices(bank: Tensor, kind: str, generator: torch.Generator) -> None:
    """Fill bank (..., out, in): orthogonal matrices where both sides are at least 64, or U(±1/sqrt(in))."""
    if kind == "orthogonal" and min(bank.shape[-2:]) >= 64:
        for matrix in bank.view(-1, *bank.shape[-2:]):
            nn.init.orthogonal_(matrix, generator=generator)
    else:
        bound = bank.size(-1) ** -0.5
        bank.uniform_(-bound, bound, generator=generator)
