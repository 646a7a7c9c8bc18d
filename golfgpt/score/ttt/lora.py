"""A LoRA for each document, learned while the document is scored.

    y = W x + alpha / rank * B (A x)        q, k, v and the head
    y + alpha / rank * B (A n)              beside the outputs of attention ("o") and MLP ("mlp"), n their normed input

A layer that a loop runs again has LoRAs of its own for each pass. A (r, in) starts at U(±1/√in), B (out, r) at 0. After
each chunk AdamW with beta1 0 learns from the mean loss of each document that goes on, from the forward that scored it.
Weight decay acts on all documents of the batch as long as one goes on, as published. With `warm` only B and the
optimizer start again, in batches of the full size; a smaller batch has LoRAs of its own.

Every document starts with the same random A (published: with one of its own), unless that is warm. So its score does
not depend on other documents, nor on its batch, its place there or its rank.

Sources: the published scripts of 2026-04-10 and 2026-04-27; α/r and warm A from PR #1767.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from golfgpt.config import LoRAConfig, ModelConfig
from golfgpt.model.gpt import Weights
from golfgpt.model.linear import LoRA
from golfgpt.score.ttt.adapter import Adapted, Scored
from golfgpt.score.ttt.sgd import SGD

MATRICES = {"q": "c_q", "k": "c_k", "v": "c_v", "o": "attn_path", "mlp": "mlp_path"}


def first_a(model: ModelConfig, config: LoRAConfig, rows: int, seed: int) -> dict[str, Tensor]:
    """Target -> A at first, (slots, rows, rank, D) float32 on the CPU, the same for all rows; slots are the layers of a
    forward, one for the head."""
    generator = torch.Generator().manual_seed(seed)
    shape, bound = (1, config.rank, model.model_dim), model.model_dim**-0.5
    slots = {target: 1 if target == "head" else len(model.layer_order()) for target in config.targets}
    drawn = {name: torch.empty(n, *shape).uniform_(-bound, bound, generator=generator) for name, n in slots.items()}
    return {name: a.repeat(1, rows, 1, 1) for name, a in drawn.items()}


class DocumentLoRA:
    """An `Adapter` for documents; `base` gives the weights that it adds to, again after each call of `rebuild`."""

    def __init__(
        self,
        model: ModelConfig,
        config: LoRAConfig,
        base: Callable[[], Adapted],
        *,
        device: torch.device,
        seed: int = 0,
        first: Callable[[int], dict[str, Tensor]] | None = None,
    ):
        """`first` replaces `first_a`: rows -> its result."""
        self.model, self.config, self._base_of, self._device = model, config, base, device
        self._first = first or (lambda rows: first_a(model, config, rows, seed))
        self.rebuild()

    def rebuild(self) -> None:
        """Begin again: with the base weights of now, and new LoRAs."""
        self._base = self._base_of()
        self._now = self._full = self._new(self.config.documents) if self.config.warm else None

    def _new(self, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor], torch.optim.AdamW]:
        """A, B and their optimizer."""
        c, m = self.config, self.model
        out = {"k": m.kv_dim, "v": m.kv_dim, "head": m.vocab_size}
        a = {name: w.to(self._device).requires_grad_() for name, w in self._first(rows).items()}
        b = {name: w.new_zeros(len(w), rows, out.get(name, m.model_dim), c.rank) for name, w in a.items()}
        weights = [*a.values(), *(w.requires_grad_() for w in b.values())]
        return a, b, torch.optim.AdamW(weights, c.lr, betas=(0.0, c.beta2), eps=1e-10, weight_decay=c.weight_decay)

    @torch.no_grad()
    def reset(self, rows: int) -> None:
        """`rows` new documents."""
        if not self.config.warm or rows != self.config.documents:
            self._now = self._new(rows)
            return
        self._now = _, b, adam = self._full
        for w in b.values():
            w.zero_()
        adam.state.clear()

    def weights(self) -> Adapted:
        base, head = self._base
        dtype, scale = head.dtype, (self.config.alpha or self.config.rank) / self.config.rank
        a, b, _ = self._now
        a = {name: w.to(dtype).unbind(0) for name, w in a.items()}
        b = {name: (w * scale).to(dtype).unbind(0) for name, w in b.items()}
        passes = []
        for i, row in enumerate(self.model.layer_order()):
            layer, learned = base.layers[row], {}
            for name in (name for name in a if name in MATRICES):
                matrix, up = MATRICES[name], b[name][i]
                if name in ("o", "mlp"):  # outputs are scaled, which `GPT.weights` does to the rows of matrices
                    up = up * layer["attn_scale" if name == "o" else "mlp_scale"].to(dtype)[:, None]
                learned[matrix] = LoRA(layer.get(matrix), a[name][i], up)
            passes.append(learned)
        if "head" in a:
            head = LoRA(head, a["head"][0], b["head"][0])
        return Adapted(Weights(base.model, base.layers, passes), head)

    def adapt(self, scored: Scored) -> None:
        adam = self._now[2]
        adam.zero_grad()
        (-scored.logprobs.sum(1) / self.config.chunk_tokens * scored.again).sum().backward()
        adam.step()


class PhasedLoRA:
    """An `Adapter`: LoRAs on weights that SGD learns from scored documents, in phases. After each, both begin again."""

    def __init__(self, lora: DocumentLoRA, sgd: SGD):
        """The base weights of `lora` are those of `sgd`."""
        self.lora, self.sgd = lora, sgd
        self.reset, self.weights = lora.reset, lora.weights

    def adapt(self, scored: Scored) -> None:
        if scored.text is None:
            self.lora.adapt(scored)
            return
        self.sgd.reset()
        self.sgd.learn_text(scored.text)
        self.lora.rebuild()
