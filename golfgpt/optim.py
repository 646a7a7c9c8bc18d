"""Muon for matrix banks, AdamW for the rest, behind one `Optimizers` that the training loop steps.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon):
    buf <- mu buf + g;   u = g + mu buf (Nesterov);   O = newton_schulz(u) * sqrt(max(1, rows / cols))
    w <- w (1 - lr wd) - lr O
Every rank holds summed gradients and takes the same step, so parameters never need communication.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from golfgpt_kernels import newton_schulz
from torch import Tensor, nn

from golfgpt.config import OptimConfig
from golfgpt.model import EMBEDDINGS, GPT, MATRIX_BANKS


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, over parameters (..., rows, cols) with rows = out features.

    Raises ValueError for a parameter with fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
    ):
        params = list(params)
        for p in params:
            if p.ndim < 2:
                raise ValueError(f"Muon takes matrices or banks of matrices, got shape {tuple(p.shape)}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buf = state["momentum_buffer"]
                buf.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buf, alpha=group["momentum"]) if group["nesterov"] else buf
                update = newton_schulz(update, steps=group["ns_steps"])
                update = update * max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-group["lr"])


class Optimizers:
    """All optimizer groups of a model, with their base learning rates (recipes: tok, head, matrices, scalars)."""

    def __init__(self, model: GPT, config: OptimConfig):
        named = dict(model.named_parameters())
        embed_lr = config.tied_embed_lr if model.config.tie_embeddings else config.embed_lr
        groups = [{"params": [named["tok_emb"]], "lr": embed_lr}]
        if not model.config.tie_embeddings:
            groups.append({"params": [named["lm_head"]], "lr": config.head_lr})
        scalars = [p for name, p in named.items() if name not in (*MATRIX_BANKS, *EMBEDDINGS)]
        groups.append({"params": scalars, "lr": config.scalar_lr})
        self.adam = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.muon = Muon(
            [named[name] for name in MATRIX_BANKS],
            lr=config.matrix_lr,
            ns_steps=config.muon_ns_steps,
            weight_decay=config.weight_decay,
        )
        self._groups = [(group, group["lr"]) for o in (self.adam, self.muon) for group in o.param_groups]
        self._names = {p: name for name, p in named.items()}

    def step(self, multiplier: float, momentum: float) -> None:
        """Update every parameter from its .grad with learning rates base * multiplier."""
        for group, base_lr in self._groups:
            group["lr"] = base_lr * multiplier
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        self.adam.step()
        self.muon.step()

    def state(self) -> dict[str, Tensor]:
        """State tensors by 'parameter.key', for a checkpoint; empty before the first step."""
        return {
            f"{self._names[p]}.{key}": value
            for optimizer in (self.adam, self.muon)
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave; an empty dict resets. Tensors are copied to their parameter's device."""
        for optimizer in (self.adam, self.muon):
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    prefix = self._names[p] + "."
                    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                    if state:
                        optimizer.state[p] = {k: v.to(p.device, copy=True) for k, v in state.items()}
