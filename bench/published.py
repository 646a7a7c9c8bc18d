"""The published training step: the yardstick that bench/step.py holds golfgpt's against.

Written here from the description of the published scripts (openai/parameter-golf, recipes R0, R4 and R5); no code of
theirs. What costs them time is kept on purpose:

- one module per layer and one parameter per matrix; each linear layer casts its float32 weight, and fake-quantizes it,
  in every forward; the embeddings are bf16, with bf16 Adam moments
- torch.compile(dynamic=False, fullgraph=True) of the model, flash attention through scaled_dot_product_attention
- Muon in a Python loop, one matrix at a time, with a compiled Newton-Schulz: matrix i belongs to rank i mod `world`,
  which writes its update into a flat bf16 buffer of all matrices; every rank adds every update, parameter by parameter
- a clock that the host reads after every step, which waits for the GPU

On one device there is no all-reduce, of gradients or of that buffer: a figure of `world` ranks is that of rank 0
without its communication. Their autocast is left out, since every operand is cast where it is used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from golfgpt.config import ModelConfig, OptimConfig, RunConfig
from golfgpt.data.orders import step_spans
from golfgpt.data.stream import TokenStream
from golfgpt.optim.schedule import lr_multiplier, muon_momentum
from golfgpt.published.names import to_published

Grid = Literal["off", "r4", "r5"]  # quant.qat of a recipe


# ---- the model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def on_grid(w: Tensor, grid: Grid, levels: int) -> Tensor:
    """w (rows, cols) rounded to `levels` steps a side of what R4 or R5 trains on; the gradient goes to w."""
    rows = w.detach().float()
    if grid == "r4":
        c = torch.quantile(rows.abs(), 0.9999984, dim=1, keepdim=True).clamp_min(1e-8)
        codes = torch.round(rows.clamp(-c, c) / (c / levels))
    else:
        c = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
        codes = torch.round(rows / (c / levels)).clamp(-levels - 1, levels)
    return w + ((codes * (c / levels)).to(w.dtype) - w).detach()


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, grid: Grid, levels: int = 31):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.grid, self.levels = grid, levels

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        return F.linear(x, w if self.grid == "off" else on_grid(w, self.grid, self.levels))


class Rotary(nn.Module):
    def __init__(self, config: ModelConfig, seq_len: int):
        super().__init__()
        frequency = config.rope_base_at(seq_len) ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.arange(seq_len)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, seq_len: int, grid: Grid):
        super().__init__()
        self.c_q = Linear(c.model_dim, c.model_dim, grid)
        self.c_k = Linear(c.model_dim, c.kv_dim, grid)
        self.c_v = Linear(c.model_dim, c.kv_dim, grid)
        self.proj = Linear(c.model_dim, c.model_dim, grid)
        self.q_gain = nn.Parameter(torch.zeros(c.num_heads))
        self.rotary, self.head_dim = Rotary(c, seq_len), c.head_dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.c_q, self.c_k, self.c_v)
        )
        q = self.rotary(norm(q)) * self.q_gain.to(x.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(q, self.rotary(norm(k)), v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig, grid: Grid):
        super().__init__()
        levels = 15 if grid == "r5" else 31
        self.fc = Linear(c.model_dim, c.mlp_hidden, grid, levels)
        self.proj = Linear(c.mlp_hidden, c.model_dim, grid, levels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, c: ModelConfig, seq_len: int, grid: Grid):
        super().__init__()
        self.attn, self.mlp = Attention(c, seq_len, grid), MLP(c, grid)
        self.attn_scale = nn.Parameter(torch.zeros(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.zeros(c.model_dim))
        self.resid_mix = nn.Parameter(torch.zeros(2, c.model_dim))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))


class Smear(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate.sigmoid().to(x.dtype)
        return (1 - g) * x + g * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


class Bigram(nn.Module):
    def __init__(self, c: ModelConfig, grid: Grid):
        super().__init__()
        self.embed = nn.Embedding(c.bigram.rows, c.bigram.dim)
        self.proj = Linear(c.bigram.dim, c.model_dim, grid)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        reserved = self.embed.num_embeddings - 1
        t = ids.to(torch.int32)
        pairs = ((36313 * t[:, 1:]) ^ (27191 * t[:, :-1])) % reserved
        rows = torch.cat((torch.full_like(t[:, :1], reserved), pairs), dim=1)
        e = self.proj(self.embed(rows))
        return e * self.scale.to(e.dtype)


class Model(nn.Module):
    """Loss of targets (B, T) given ids (B, T); parameters are named as upstream's, embeddings in `dtype`."""

    def __init__(self, c: ModelConfig, seq_len: int, grid: Grid, dtype: torch.dtype):
        super().__init__()
        variants = c.smear_gate in ("none", "after_norm") and c.bigram.hash == "xor"
        if not (variants and c.tie_embeddings and c.document_start is None and grid in ("off", "r4", "r5")):
            raise ValueError(
                "bench.published has tied embeddings, SmearGate after the norm, the xor BigramHash, and the grids of "
                f"R4 and R5; got {c} with {grid}"
            )
        self.config = c
        self.tok_emb = nn.Embedding(c.vocab_size, c.model_dim, dtype=dtype)
        self.blocks = nn.ModuleList(Block(c, seq_len, grid) for _ in range(c.num_layers))
        if c.num_skips:
            self.skip_weights = nn.Parameter(torch.zeros(c.num_skips, c.model_dim))
        self.smear = Smear(c.model_dim) if c.smear_gate != "none" else None
        self.bigram = Bigram(c, grid) if c.bigram.rows else None
        if self.bigram is not None:
            self.bigram.embed.to(dtype)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(ids).float(), targets.flatten())

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B * T, vocab_size)."""
        c = self.config
        x = self.tok_emb(ids)
        if self.bigram is not None:
            x = x + self.bigram(ids)
        x = norm(x)
        if self.smear is not None:
            x = self.smear(x)
        x0, stack, half = x, [], c.num_layers // 2
        for i, block in enumerate(self.blocks):
            if i >= half and stack:
                x = x + self.skip_weights[i - half].to(x.dtype) * stack.pop()
            x = block(x, x0)
            if i < half:
                stack.append(x)
        logits = F.linear(norm(x).flatten(0, 1), self.tok_emb.weight)
        return c.logit_softcap * torch.tanh(logits / c.logit_softcap)


# ---- the optimizer


def newton_schulz(u: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The polar factor of one matrix, approximately; in bf16 the rounding is that of b A + (c A) A."""
    x = u.to(dtype)
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + (2.0315 * a) @ a) @ x
    return x.T if tall else x


class Muon:
    """One matrix after another. This is rank 0 of `world`: it orthogonalizes the matrices i with i mod world = 0."""

    def __init__(
        self, matrices: list[nn.Parameter], optim: OptimConfig, dtype: torch.dtype, orthogonalize: Callable[..., Tensor]
    ):
        self.matrices, self.optim, self.dtype, self.orthogonalize = matrices, optim, dtype, orthogonalize
        self.world = 1
        self.buffers: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        total = sum(p.numel() for p in self.matrices)
        flat = torch.zeros(total, dtype=self.dtype, device=self.matrices[0].device)
        views = flat.split([p.numel() for p in self.matrices])
        for i in range(0, len(self.matrices), self.world):
            p = self.matrices[i]
            if i not in self.buffers:
                self.buffers[i] = torch.zeros_like(p)
            buffer = self.buffers[i].mul_(momentum).add_(p.grad)
            o = self.orthogonalize(p.grad.add(buffer, alpha=momentum), self.optim.muon_ns_steps, self.dtype)
            o = o * max(1.0, p.size(0) / p.size(1)) ** 0.5
            views[i].copy_(o.reshape(-1))
        # Here `flat` is summed over the ranks.
        for p, update in zip(self.matrices, views, strict=True):
            if self.optim.weight_decay:
                p.mul_(1 - lr * self.optim.weight_decay)
            p.add_(update.view_as(p).to(p.dtype), alpha=-lr)


class Optimizers:
    """Adam for embeddings and scalars, Muon for matrices."""

    def __init__(self, model: Model, optim: OptimConfig, dtype: torch.dtype, orthogonalize: Callable[..., Tensor]):
        self.optim, named = optim, dict(model.named_parameters())
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        matrices = [p for name, p in named.items() if name.startswith("blocks.") and name.endswith(".weight")]
        if model.bigram is not None:
            matrices.append(model.bigram.proj.weight)
        chosen = {id(p) for p in (*tables, *matrices)}
        scalars = [p for p in named.values() if id(p) not in chosen]
        self.adam = [
            torch.optim.AdamW(
                [{"params": params, "lr": lr, "base_lr": lr}],
                betas=(optim.adam_beta1, optim.adam_beta2),
                eps=optim.adam_eps,
                weight_decay=optim.weight_decay,
                fused=True,
            )
            for params, lr in ((tables, optim.tied_embed_lr), (scalars, optim.scalar_lr))
        ]
        self.muon = Muon(matrices, optim, dtype, orthogonalize)

    def step(self, multiplier: float, momentum: float) -> None:
        for adam in self.adam:
            for group in adam.param_groups:
                group["lr"] = group["base_lr"] * multiplier
            adam.step()
        self.muon.step(self.optim.matrix_lr * multiplier, momentum)


# ---- the loop


class Loop:
    """Model, optimizers and data of one rank; `step` is what the published loop does between two looks at its clock."""

    def __init__(self, config: RunConfig, tokens: np.ndarray, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.stream = TokenStream([tokens])
        self.model = Model(config.model, config.data.seq_len, config.quant.qat, dtype).to(device)
        # Without a GPU this traces and compiles nothing: Inductor takes minutes for these models on a CPU.
        how = {"backend": "inductor" if self.cuda else "eager"}
        self.loss = torch.compile(self.model, dynamic=False, fullgraph=True, **how)
        self.orthogonalize = torch.compile(newton_schulz, **how)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Start over from golfgpt's banks."""
        self.model.load_state_dict(to_published(weights))
        self.optimizers = Optimizers(self.model, self.config.optim, self.dtype, self.orthogonalize)
        self.began = time.perf_counter()

    def step(self, step: int, mark: Callable[[str], None]) -> Tensor:
        """Step number `step`; its loss, 0-d. `mark` is told the phase that begins."""
        data, optim = self.config.data, self.config.optim
        mark("data")
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for position in step_spans(step, data.batch_tokens, data.spans):
            mark("data")
            tokens = torch.from_numpy(self.stream.read(position, data.span_tokens + 1).astype("int64"))
            x, y = (t.reshape(-1, data.seq_len).to(self.device, non_blocking=True) for t in (tokens[:-1], tokens[1:]))
            mark("forward")
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.cuda else contextlib.nullcontext():
                loss = self.loss(x, y)
            mark("backward")
            total += loss.detach() / data.spans
            (loss / data.spans).backward()
        mark("optimizer")
        if optim.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip_norm)
        multiplier = lr_multiplier(step, time.perf_counter() - self.began, self.config.schedule)
        self.optimizers.step(multiplier, muon_momentum(step, optim))
        mark("rest")
        # Has a rank passed the cap? The answer is reduced on the device and read back.
        torch.tensor(time.perf_counter() - self.began > 600.0).to(self.device).item()
        return total
