"""SGD of all weights on scored text.

    lr = lr0 (1 + cos(π i / (n - 1))) / 2  at chunk i of n;  per epoch and batch of sequences, in order:
    g = gradient of the mean cross entropy, scaled to a norm of at most grad_clip_norm
    v = momentum v + g;  w = w - lr v

Ranks divide the sequences of a batch, or its documents, and the result is that of one rank but for rounding.
(Published: each rank has batches of its own, which is the same for up to 32 sequences a chunk, and cuts documents at
its edges.) Weights are float32, those that are published in bfloat16 too.

Sources: the published scripts of 2026-03-23, 2026-04-06 and, with documents, 2026-04-13.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

from golfgpt.config import SGDConfig
from golfgpt.data.orders import boundaries
from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError
from golfgpt.model.gpt import GPT
from golfgpt.model.segments import Segments
from golfgpt.score.ttt.adapter import Adapted, Scored, prepared
from golfgpt.score.windows import call_varied


class SGD:
    """An `Adapter` whose weights are copies of the model's, learned in sequences of `length` tokens. With
    `document_start`, a token id, tokens attend only within their document there, cut every `length` tokens."""

    def __init__(
        self,
        model: GPT,
        config: SGDConfig,
        *,
        length: int,
        dtype: torch.dtype,
        ranks: Ranks,
        document_start: int | None = None,
        most: int | None = None,
        compiled: bool = False,
    ):
        """A forward has `most` sequences, or a whole document more; None: all of a step."""
        if config.lr is None or config.epochs is None:
            raise ValueError(f"lr is {config.lr} and epochs {config.epochs}; expected numbers of both")
        self.model, self.config, self.length = model, config, length
        self.dtype, self.ranks, self.document_start = dtype, ranks, document_start
        self.most = most or config.batch_sequences
        self.compiled = compiled
        self._model_loss = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
        self.params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.reset()

    def reset(self, rows: int = 0) -> None:
        """Forget the momentum."""
        self._optimizer = torch.optim.SGD(self.params.values(), lr=self.config.lr, momentum=self.config.momentum)

    def weights(self) -> Adapted:
        return prepared(self.model, self.dtype, self.params)

    def adapt(self, scored: Scored) -> None:
        self.learn(scored.text, *scored.part)

    def learn_text(self, text: Tensor) -> None:
        """Learn text (n,) in chunks, all but the last."""
        size = self.config.chunk_tokens
        num_chunks = -(-(len(text) - 1) // size)
        for i in range(num_chunks - 1):
            self.learn(text[i * size : (i + 1) * size + 1], i, num_chunks)

    def learn(self, text: Tensor, index: int, num_chunks: int) -> None:
        """Learn text (n + 1,), chunk `index` of so many, in whole sequences. Raises NonFiniteError."""
        lr = self.config.lr * 0.5 * (1 + math.cos(math.pi * index / max(num_chunks - 1, 1)))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        sequences = (len(text) - 1) // self.length
        for _ in range(self.config.epochs):
            for low in range(0, sequences, self.config.batch_sequences):
                self._step(text, range(low, min(low + self.config.batch_sequences, sequences)))

    def _step(self, text: Tensor, batch: range) -> None:
        text = text[batch.start * self.length : batch.stop * self.length + 1]
        rank, world = self.ranks.rank, self.ranks.world
        pieces = -(-len(batch) // (world * self.most))  # of each rank
        edges = [self._edge(text, len(batch) * i // (world * pieces)) for i in range(world * pieces + 1)]
        self._optimizer.zero_grad()
        for first, last in pairwise(edges[rank * pieces : (rank + 1) * pieces + 1]):
            if first < last:
                self._loss(text[first : last + 1]).mul((last - first) / (len(text) - 1)).backward()
        for p in self.params.values():
            if self.ranks.world > 1:
                p.grad = self.ranks.sum_(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip_norm)
        if not norm.isfinite():
            raise NonFiniteError("a gradient of test-time training is not finite; lower eval.ttt.sgd.lr")
        self._optimizer.step()

    def _edge(self, text: Tensor, sequences: int) -> int:
        """Inputs of a batch before the edge between two forwards: so many sequences, and what is left of a document
        there, which must not lose its beginning."""
        edge = sequences * self.length
        if self.document_start is None or edge == 0:
            return edge
        starts = (text[edge:-1] == self.document_start).nonzero()
        return edge + int(starts[0]) if len(starts) else len(text) - 1

    def _loss(self, text: Tensor) -> Tensor:
        ids, targets = text[:-1], text[1:]
        if self.document_start is None:
            ids, targets = (t.view(-1, self.length) for t in (ids, targets))
            return self._model_loss(ids, targets, dtype=self.dtype, stand_ins=self.params)
        edges = torch.from_numpy(boundaries(ids.cpu().numpy(), self.document_start, self.length)).to(ids.device)
        segments = Segments.of(edges, len(ids), self.length, self.dtype)
        ids, targets = ids[None], targets[None]
        loss = functools.partial(
            self._model_loss, ids, targets, dtype=self.dtype, stand_ins=self.params, segments=segments
        )
        if not self.compiled:
            return loss()
        masks = [] if segments.mask is None else [(segments.mask, 0)]
        return call_varied(loss, [(ids, 1), (targets, 1), (edges, 0), *masks])
