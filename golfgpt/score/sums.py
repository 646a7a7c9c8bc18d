"""Sums of an evaluation under way, and the file from which an interrupted one continues."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from golfgpt.errors import NonFiniteError
from golfgpt.files import read_json, write_json
from golfgpt.score.windows import Batch


class Sums(NamedTuple):
    """What the windows before `next` gave, on the device. Never changed in place: a signal may come at any time."""

    next: int
    values: Tensor
    """float64 (3,): nats, tokens, bytes; the last two are exact up to 2^53."""
    bad: Tensor
    """Position of the first token without a finite log probability; a huge number if there is none."""

    @classmethod
    def start(cls, next: int, device: torch.device, values: Sequence[float] = (0, 0, 0)) -> Sums:
        none = torch.tensor(torch.iinfo(torch.int64).max, device=device)
        return cls(next, torch.tensor(values, dtype=torch.float64, device=device), none)

    def plus(self, next: int, batch: Batch, logprobs: Tensor) -> Sums:
        """With the batch that ends before window `next`; the order of additions is fixed."""
        nbytes = batch.nbytes.where(batch.scored, 0)
        added = torch.stack((-logprobs.double().sum(), batch.scored.sum().double(), nbytes.sum().double()))
        bad = batch.positions.where(~logprobs.isfinite(), self.bad).min()
        return Sums(next, self.values + added, torch.minimum(bad, self.bad))

    def read(self) -> tuple[float, int, int]:
        """Nats, tokens, bytes. Raises NonFiniteError naming the first bad token."""
        nats, tokens, nbytes = self.values.tolist()
        if not math.isfinite(nats):
            raise NonFiniteError(f"the model gives token {int(self.bad)} of the validation text no finite probability")
        return nats, int(tokens), int(nbytes)


@dataclass(frozen=True)
class _Stored:
    """The file of `PartialSums`."""

    key: dict[str, Any]
    next: int
    values: tuple[float, ...]
    seconds: float


class PartialSums:
    """One rank's sums in `folder`/eval_partial_RANK.json while an evaluation runs; folder None: nowhere.

    The file belongs to one evaluation: of one model (its digest), text, plan of windows, dtype and number of ranks.
    That of another evaluation of the same model stays until this one has something to save in its place. `say` gets
    lines for the user.
    """

    def __init__(
        self, folder: Path | None, rank: int = 0, model_digest: str = "", say: Callable[[str], None] = lambda line: None
    ):
        self._file = folder and folder / f"eval_partial_{rank}.json"
        self._model, self._say, self._warned = model_digest, say, False
        self._mine = True
        """Whether the file, if there is one, is not of another evaluation that can still continue."""
        self._begun = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the evaluation began, with those before it was interrupted."""
        return time.monotonic() - self._begun

    def open(self, key: dict[str, Any], fresh: Sums) -> Sums:
        """Begin the evaluation that `key` tells apart; returns the sums of the file, or `fresh` ones."""
        self._key, self._begun = {"model": self._model, **key}, time.monotonic()
        if not self._file or not self._file.exists():
            return fresh
        try:
            stored = read_json(self._file, _Stored)
            changed = [name for name, value in self._key.items() if stored.key.get(name) != value]
            self._mine = not changed or "model" in changed
            problem = f"is of another evaluation ({', '.join(changed)} changed)" if changed else ""
            _, tokens, nbytes = stored.values
            if min(stored.next, stored.seconds, tokens, nbytes) < 0:
                problem, self._mine = "is damaged", True
        except (OSError, ValueError):
            problem = "is damaged"
        if problem:
            then = "starting over" if self._mine else "kept until this one is stopped or takes 10 s"
            self._say(f"{self._file} {problem}: {then}")
            return fresh
        sums = Sums.start(stored.next, fresh.values.device, stored.values)
        self._begun -= stored.seconds
        self._say(f"continuing an interrupted evaluation: {int(sums.values[1]):,} tokens are scored already")
        return sums

    def save(self, sums: Sums, every: float = 0.0) -> None:
        """Write the file, unless that was less than `every` seconds ago. One that fails is one warning."""
        if not self._file or time.monotonic() - self._saved < every:
            return
        self._saved, values = time.monotonic(), sums.values.tolist()
        if not values[1] or not math.isfinite(values[0]):
            return
        try:
            write_json(self._file, asdict(_Stored(self._key, sums.next, tuple(values), self.seconds)))
            self._mine = True
        except OSError as error:
            if not self._warned:
                self._say(f"warning: {self._file}: {error.strerror}; an interrupted evaluation would start over")
            self._warned = True

    def clear(self) -> None:
        """Delete the file, unless it is of another evaluation."""
        if self._file and self._mine:
            with contextlib.suppress(OSError):
                self._file.unlink()
