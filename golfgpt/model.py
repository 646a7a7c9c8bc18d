"""The GPT of recipe R0, with its parameters in banks.

Shapes: B sequences, T tokens, D model_dim, H query heads, K key-value heads, h head_dim, L layers.
Same-shaped matrices of all layers are one parameter (L, out, in), unbound once per forward, so that the
optimizer orthogonalizes batches without copies and a cast to the compute dtype is one launch per role.

    x0 = x = norm(tok_emb[ids])
    per layer:  x = mix[0] x + mix[1] x0
                x = x + attn_scale * attention(norm(x))
                x = x + mlp_scale * relu(norm(x) fcT)^2 projT
    the first half pushes its outputs; the second half adds skip_weights * pop() before each of its layers
    logits = softcap * tanh(norm(x) headT / softcap)

Norms have no weight and return their input's dtype (torch >= 2.12 puts rms_norm on autocast's float32 list;
here nothing runs under autocast: weights are cast explicitly). Parameters are float32 masters.
Source: the published naive baseline of openai/parameter-golf; U-Net skips and relu^2 from modded-nanogpt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from golfgpt_kernels import relu2_mlp, softcap_cross_entropy
from torch import Tensor, nn

from golfgpt.config import ModelConfig
from golfgpt.upstream import parameter_shapes

MATRIX_BANKS = ("c_q", "c_k", "c_v", "attn_proj", "mlp_fc", "mlp_proj")
EMBEDDINGS = ("tok_emb", "lm_head")


@dataclass
class KVCache:
    """Keys and values of the last `window` tokens per layer. Rotary embedding is relative, so a model trained
    on sequences of `window` tokens never meets a distance it has not seen, however long the text grows."""

    window: int
    seen: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

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


class GPT(nn.Module):
    """A compact GPT. `forward` gives hidden states; `loss` and `logits` put the softcapped head on top."""

    def __init__(self, config: ModelConfig, *, seed: int = 1337):
        """Initialize on CPU from `seed`: embedding N(0, std^2), projections back to the residual stream and
        an untied head zero, other matrices U(-1/sqrt(fan_in), 1/sqrt(fan_in)), gains and scales constant."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        for name, shape in parameter_shapes(config).items():
            value = torch.zeros(shape)
            if name == "tok_emb":
                std = config.tied_embed_init_std if config.tie_embeddings else 1.0
                value.normal_(0.0, std, generator=generator)
            elif name in ("c_q", "c_k", "c_v", "mlp_fc"):
                bound = shape[-1] ** -0.5
                value.uniform_(-bound, bound, generator=generator)
            elif name in ("attn_scale", "mlp_scale", "skip_weights"):
                value.fill_(1.0)
            elif name == "resid_mix":
                value[:, 0] = 1.0
            elif name == "q_gain":
                value.fill_(config.qk_gain_init)
            self.register_parameter(name, nn.Parameter(value))

    @property
    def head_weight(self) -> Tensor:
        """Output head (vocab_size, D), float32."""
        return self.tok_emb if self.config.tie_embeddings else self.lm_head

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, ids: Tensor, *, dtype: torch.dtype = torch.float32, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, D) in `dtype` after the final norm for token ids (B, T).

        With `cache` the ids continue the cached tokens (up to a window into an empty cache, then one at a
        time), and the cache is extended in place.
        """
        c = self.config
        past = cache.seen if cache is not None else 0
        cos, sin = rope_table(past, ids.size(1), c.head_dim, c.rope_base, ids.device)
        cos, sin = cos.to(dtype), sin.to(dtype)
        names = (*MATRIX_BANKS, "attn_scale", "mlp_scale", "resid_mix", "q_gain")
        layers = zip(*(getattr(self, name).to(dtype).unbind(0) for name in names), strict=True)
        skip_weights = self.skip_weights.to(dtype) if c.num_skips else None

        x = x0 = rms_norm(F.embedding(ids, self.tok_emb).to(dtype))
        stack: list[Tensor] = []
        for i, (c_q, c_k, c_v, attn_proj, mlp_fc, mlp_proj, attn_scale, mlp_scale, mix, q_gain) in enumerate(layers):
            if i >= c.num_encoder_layers and stack:
                x = x + skip_weights[i - c.num_encoder_layers] * stack.pop()
            x = mix[0] * x + mix[1] * x0
            n = rms_norm(x)
            q, k, v = (self._heads(F.linear(n, w)) for w in (c_q, c_k, c_v))
            q = rotate(rms_norm(q), cos, sin) * q_gain[:, None, None]
            k = rotate(rms_norm(k), cos, sin)
            if cache is not None:
                k, v = cache.extend(i, k, v)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=not past, enable_gqa=True)
            x = x + attn_scale * F.linear(attended.transpose(1, 2).flatten(2), attn_proj)
            x = x + mlp_scale * relu2_mlp(rms_norm(x), mlp_fc, mlp_proj)
            if i < c.num_encoder_layers:
                stack.append(x)
        if cache is not None:
            cache.seen += ids.size(1)
        return rms_norm(x)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * h) -> (B, heads, T, h)."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def loss(self, ids: Tensor, targets: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mean cross entropy in nats, float32, of targets (B, T) given ids (B, T)."""
        hidden = self(ids, dtype=dtype)
        return softcap_cross_entropy(hidden, self.head_weight.to(dtype), targets, softcap=self.config.logit_softcap)

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
