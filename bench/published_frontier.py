"""The plain form of the record of 2026-04-27 (recipe `frontier`): what bench/step_counts.py holds golfgpt's against.

Written here from a description of the published scripts (openai/parameter-golf PR #1855); no code of theirs. What
costs them time is kept on purpose, as in bench/published.py:

- matrices in four float32 banks; each layer, and each pass of a looped one, takes its rows and casts them
- separate products for q, k and v; rotary tables of the whole row as buffers; vectors cast to bf16 at use
- torch.compile(dynamic=False, fullgraph=True) of the model
- Muon bank by bank, with a compiled batched Newton-Schulz; a rank orthogonalizes its share of every padded bank, and
  every rank adds every update

The record has Triton kernels for its MLP and its loss. A plain compiled form is without them: leaky_relu²
as torch operations, and a loss of bf16 logits that are capped by tanh and then float32, as the records before it. The
attention within documents is golfgpt's in both forms: FlashAttention on a GPU, a mask elsewhere. Autocast is left out,
since every operand is cast where it is used.

All 17 passes of the looped form. T tokens of one packed row, D model_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import published
from bench.published import norm
from golfgpt.config import ModelConfig, OptimConfig
from golfgpt.model.segments import Segments, attend_within

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
NEWTON_SCHULZ = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express, five steps."""


# ---- the model


class Rotary(nn.Module):
    """Turns the first r channels of a head by tables of all positions of the row."""

    def __init__(self, c: ModelConfig, tokens: int):
        super().__init__()
        r = c.rope_dims
        angle = torch.arange(tokens)[:, None] * c.rope_base ** (-torch.arange(0, r, 2) / r)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        r = 2 * cos.size(-1)
        (x1, x2), rest = x[..., :r].chunk(2, dim=-1), x[..., r:]
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def exclusive(y: Tensor, v: Tensor) -> Tensor:
    """y (1, T, H, h) without its component along the token's own value, v (1, T, K, h)."""
    own = F.normalize(v, dim=-1).unsqueeze(-2)
    groups = y.unflatten(2, (v.size(2), -1))
    return (groups - (groups * own).sum(-1, keepdim=True) * own).flatten(2, 3)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, rotary: Rotary):
        super().__init__()
        self.q_gain = nn.Parameter(torch.zeros(c.num_heads))
        self.attn_gate_w = nn.Parameter(torch.zeros(c.num_heads, c.gate_window))
        self.head_dim, self.gate_scale, self.rotary = c.head_dim, c.attn_gate_scale, rotary

    def forward(self, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, segments: Segments) -> Tensor:
        q, k, v = (F.linear(x, w.to(x.dtype)).unflatten(-1, (-1, self.head_dim)) for w in (w_q, w_k, w_v))
        q = self.rotary(norm(q)) * self.q_gain.to(x.dtype)[:, None]
        k = self.rotary(norm(k))
        y = attend_within(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), segments).transpose(1, 2)
        y = exclusive(y, v)
        window = x[..., : self.attn_gate_w.size(1)].contiguous()
        gate = torch.sigmoid(self.gate_scale * F.linear(window, self.attn_gate_w.to(x.dtype)))
        return F.linear((y * gate[..., None]).flatten(2), w_o.to(x.dtype))


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> Tensor:
    return F.linear(F.leaky_relu(F.linear(x, w_up.to(x.dtype)), slope).square(), w_down.to(x.dtype))


class Block(nn.Module):
    """What a layer has besides its rows of the banks."""

    def __init__(self, c: ModelConfig, rotary: Rotary, index: int):
        super().__init__()
        self.attn = Attention(c, rotary)
        self.attn_scale = nn.Parameter(torch.zeros(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.zeros(c.model_dim))
        self.resid_mix = nn.Parameter(torch.zeros(2, c.model_dim))
        self.input_scale, self.slope = (index + 1) ** -0.5, c.mlp_slope

    def read(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def attended(self, x: Tensor, rows: tuple[Tensor, ...], segments: Segments) -> Tensor:
        return self.attn_scale.to(x.dtype) * self.attn(norm(x) * self.input_scale, *rows[:4], segments)

    def fed(self, x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        return self.mlp_scale.to(x.dtype) * mlp(norm(x) * self.input_scale, *rows[4:], self.slope)

    def forward(self, x: Tensor, x0: Tensor, rows: tuple[Tensor, ...], segments: Segments) -> Tensor:
        x = self.read(x, x0)
        x = x + self.attended(x, rows, segments)
        return x + self.fed(x, rows)

    def routed(
        self, lanes: tuple[Tensor, Tensor], x0: Tensor, rows: tuple[Tensor, ...], keep: Tensor, post: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        a, f = self.attended(self.read(lanes[0], x0), rows, segments), self.fed(lanes[1], rows)
        first, second = (keep[i] * lane + post[0, i] * a + post[1, i] * f for i, lane in enumerate(lanes))
        return first, second


class Model(nn.Module):
    """Loss of targets (1, T) given ids (1, T); parameters are named as upstream's, the embedding in `dtype`.

    Raises ValueError for a config that has other mechanisms than the recipe `frontier`."""

    def __init__(self, c: ModelConfig, tokens: int, dtype: torch.dtype):
        super().__init__()
        wanted = {
            "tie_embeddings": True, "smear_gate": "input", "attn_gate": "sparse", "skip_gates": True, "ln_scale": True,
            "rope_reference_len": None, "xsa_layers": tuple(range(c.num_layers)),
        }  # fmt: skip
        found = {name: getattr(c, name) for name in wanted}
        lanes = (c.parallel.kind, c.parallel.final)
        if found != wanted or lanes != ("routed", "mean") or c.bigram.rows or c.value_embedding.dim or not c.rope_dims:
            raise ValueError(f"bench.published_frontier has the mechanisms of the recipe frontier; got {c}")
        L, D, KV = c.num_layers, c.model_dim, c.kv_dim
        rotary = Rotary(c, tokens)
        self.config = c
        self.tok_emb = nn.Embedding(c.vocab_size, D, dtype=dtype)
        self.qo_bank = nn.Parameter(torch.zeros(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.zeros(2 * L, KV, D))
        self.mlp_up_bank = nn.Parameter(torch.zeros(L, c.mlp_hidden, D))
        self.mlp_down_bank = nn.Parameter(torch.zeros(L, D, c.mlp_hidden))
        self.blocks = nn.ModuleList(Block(c, rotary, i) for i in range(L))
        order = [*range(c.loop.first), *[*range(c.loop.first, c.loop.last + 1)] * c.loop.passes]
        order += range(c.loop.last + 1, L)
        self.encoder, self.decoder = order[: len(order) // 2], order[len(order) // 2 :]
        self.skip_weights = nn.Parameter(torch.zeros(len(self.encoder), D))
        self.skip_gates = nn.Parameter(torch.zeros(len(self.encoder), D))
        self.smear_gate = nn.Linear(c.gate_window, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.parallel_resid_lambdas = nn.Parameter(torch.zeros(L, 2))
        self.parallel_post_lambdas = nn.Parameter(torch.zeros(L, 2, 2))

    def rows(self, i: int) -> tuple[Tensor, ...]:
        """w_q, w_k, w_v, w_o, w_up and w_down of layer i, float32."""
        L = len(self.blocks)
        qo, kv = self.qo_bank, self.kv_bank
        return qo[i], kv[i], kv[L + i], qo[L + i], self.mlp_up_bank[i], self.mlp_down_bank[i]

    def embed(self, ids: Tensor) -> Tensor:
        e = self.tok_emb(ids)
        window = self.smear_gate.weight.to(e.dtype)
        gate = torch.sigmoid(F.linear(e[:, 1:, : window.size(1)].contiguous(), window))
        inside = (ids[:, 1:] != self.config.document_start).to(e.dtype).unsqueeze(-1)
        e = torch.cat((e[:, :1], e[:, 1:] + self.smear_lambda.to(e.dtype) * gate * inside * e[:, :-1]), dim=1)
        return norm(e)

    def forward(self, ids: Tensor, targets: Tensor, segments: Segments) -> Tensor:
        c = self.config
        x = x0 = self.embed(ids)
        stack, lanes = [], None
        for i in self.encoder:
            x = self.blocks[i](x, x0, self.rows(i), segments)
            stack.append(x)
        for k, i in enumerate(self.decoder):
            if i >= c.parallel.first and lanes is None:
                lanes = (x, x)
            if stack:
                gate = torch.sigmoid(self.skip_gates[k].to(x.dtype))
                skipped = self.skip_weights[k].to(x.dtype) * stack.pop()
                x = torch.lerp(skipped, x if lanes is None else lanes[0], gate)
                lanes = lanes and (x, lanes[1])
            if lanes is None:
                x = self.blocks[i](x, x0, self.rows(i), segments)
            else:
                keep, post = self.parallel_resid_lambdas[i].to(x.dtype), self.parallel_post_lambdas[i].to(x.dtype)
                lanes = self.blocks[i].routed(lanes, x0, self.rows(i), keep, post, segments)
        x = 0.5 * (lanes[0] + lanes[1])
        logits = F.linear(norm(x).flatten(0, 1), self.tok_emb.weight)
        logits = c.logit_softcap * torch.tanh(logits / c.logit_softcap)
        return F.cross_entropy(logits.float(), targets.flatten())


# ---- the optimizer


def newton_schulz(u: Tensor) -> Tensor:
    """The polar factors of u (n, rows, cols), approximately."""
    x = u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in NEWTON_SCHULZ:
        product = x @ x.mT
        x = a * x + (b * product + c * (product @ product)) @ x
    return x.mT if tall else x


class Muon:
    """One bank after another, smallest first. This is a rank of `world`: it orthogonalizes its rows of each bank, which
    is padded to a multiple of `world`. Gradients are summed over the ranks, and updates gathered, in `dtype`."""

    def __init__(
        self, banks: list[nn.Parameter], optim: OptimConfig, dtype: torch.dtype, orthogonalize: Callable[..., Tensor]
    ):
        self.banks, self.optim = sorted(banks, key=Tensor.numel), optim
        self.dtype, self.orthogonalize = dtype, orthogonalize
        self.world = 1
        self.buffers: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        for i, p in enumerate(self.banks):
            share = -(-len(p) // self.world)
            # Made once and zero where the bank is padded, so that a step writes the bank's rows only.
            key = (self.world, i)
            if key not in self.buffers:
                shape = (self.world * share, *p.shape[1:])
                self.buffers[key] = torch.zeros(3, *shape, dtype=self.dtype, device=p.device)
            padded, updates, momenta = self.buffers[key]
            padded[: len(p)].copy_(p.grad)
            g, buffer = padded[:share], momenta[:share]  # here `padded` is reduced and scattered
            buffer.mul_(momentum).add_(g)
            u = g.add(buffer, alpha=momentum)
            u.div_(u.norm(dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-7).to(u.dtype))
            updates[:share].copy_(self.orthogonalize(u))  # here `updates` is gathered
            if self.optim.weight_decay:
                p.mul_(1 - lr * self.optim.weight_decay)
            scale = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
            p.add_(updates[: len(p)].to(p.dtype), alpha=-lr * scale)


class Optimizers(published.Optimizers):
    """Adam for the embedding and the rest, Muon for the banks."""

    def __init__(self, model: Model, optim: OptimConfig, dtype: torch.dtype, orthogonalize: Callable[..., Tensor]):
        named = dict(model.named_parameters())
        banks = [named.pop(name) for name in BANKS]
        table = named.pop("tok_emb.weight")
        groups = (
            ([table], optim.tied_embed_lr, optim.embed_weight_decay),
            (list(named.values()), optim.scalar_lr, optim.scalar_weight_decay),
        )
        self.adam = [
            torch.optim.AdamW(
                [{"params": params, "lr": lr, "base_lr": lr}],
                betas=(optim.adam_beta1, optim.adam_beta2),
                eps=optim.adam_eps,
                weight_decay=decay,
                fused=True,
            )
            for params, lr, decay in groups
        ]
        self.optim, self.muon = optim, Muon(banks, optim, dtype, orthogonalize)
