"""Matrices as the forward multiplies with them, kept up to date by the optimizer: no forward casts or quantizes them.

A shadow is a bank in the compute dtype, fake-quantized where training is quantization-aware. Muon writes it in the
launch that writes the weights (`golfgpt_kernels.muon_update_`); `refresh` writes it from the weights where it cannot:
at the start, after weights were loaded, for banks whose layers differ in format, and for sharded weights, which
arrive from other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from golfgpt_kernels import fake_quantize_banks, fake_quantize_rows, straight_through
from torch import Tensor

from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import of_kind
from golfgpt.quant import FakeQuant


class Shadows:
    """Shadows of a model's matrix banks, by name; empty where the weights themselves are what the forward needs."""

    def __init__(self, model: GPT, fake_quant: FakeQuant, dtype: torch.dtype):
        """`fake_quant` as `Quantizer.fake_quant` makes it; what it says of other parameters is done in each forward."""
        self._parameters = parameters = dict(model.named_parameters())
        self._parts = {name: fake_quant.get(name) for name in of_kind(model.table, "matrix")}
        self.banks = {
            name: torch.empty_like(parameters[name], dtype=dtype, requires_grad=False)
            for name, parts in self._parts.items()
            if parts is not None or dtype != parameters[name].dtype
        }
        self._in_forward = {name: parts for name, parts in fake_quant.items() if name not in self.banks}
        self.quantized = [name for name, parts in self._parts.items() if parts is not None]
        """Banks whose shadows are fake-quantized."""
        self._seen: list[int] = []

    def stand_ins(self) -> dict[str, Tensor]:
        """What a forward multiplies with in place of the parameters: shadows, and embeddings and small tensors
        fake-quantized here and now; gradients go to the parameters."""
        out = {name: straight_through(self._parameters[name], shadow) for name, shadow in self.banks.items()}
        for name, parts in self._in_forward.items():
            out[name] = fake_quantized_bank(self._parameters[name], parts)
        return out

    def written_by_muon(self) -> dict[str, dict[str, Any] | None]:
        """Bank -> options of its quantizer (None: rounded only), of those that Muon can write with the weights."""
        whole = {name: parts for name, parts in self._parts.items() if name in self.banks}
        return {
            n: parts for n, parts in whole.items() if parts is None or (isinstance(parts, dict) and "bits" in parts)
        }

    @torch.no_grad()
    def refresh(self, names: Iterable[str] | None = None) -> None:
        """Write the shadows of `names` (None: all) from the weights."""
        groups: dict[tuple, list[str]] = {}
        for name in self.banks if names is None else names:
            parts, w = self._parts[name], self._parameters[name].detach()
            if isinstance(parts, dict) and "bits" in parts:
                groups.setdefault(tuple((k, v) for k, v in parts.items() if k != "bits"), []).append(name)
            else:
                self.banks[name].copy_(fake_quantized_bank(w, parts))
        for options, members in groups.items():
            fake_quantize_banks(
                [self._parameters[name].detach() for name in members],
                [self.banks[name] for name in members],
                bits=[self._parts[name]["bits"] for name in members],
                **dict(options),
            )
        self.mark()

    def mark(self) -> None:
        """Take the shadows as those of the weights as they are now."""
        self._seen = self._versions()

    def stale(self) -> bool:
        """Whether weights were changed in place, by load_state_dict say, since the last `refresh` or `mark`."""
        return bool(self.banks) and self._seen != self._versions()

    def _versions(self) -> list[int]:
        return [self._parameters[name]._version for name in self.banks]


def fake_quantized_bank(w: Tensor, parts: dict[str, Any] | list | None) -> Tensor:
    """A bank as the artifact will hold it, with straight-through gradient; `parts` is its entry in a FakeQuant."""
    if not isinstance(parts, list):
        return fake_quantized(w, parts)
    layers = w.split([layers for layers, _ in parts])
    return torch.cat([fake_quantized(part, options) for part, (_, options) in zip(layers, parts, strict=True)])


def fake_quantized(w: Tensor, options: dict[str, Any] | None) -> Tensor:
    """w as the artifact will hold it, with straight-through gradient."""
    if options is None:
        return w
    if "keep" not in options:
        return fake_quantize_rows(w, **options)
    kept = _rounded(w.detach(), options["keep"])
    if options.get("enabled") is not None:
        kept = torch.where(options["enabled"], kept, w.detach())
    return straight_through(w, kept)


@torch.library.custom_op("golfgpt::rounded", mutates_args=())
def _rounded(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w after a round trip through dtype; an opaque op, for Inductor removes such round trips."""
    return w.to(dtype, copy=True).to(w.dtype)


@_rounded.register_fake
def _(w: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(w)
