"""Matrices as the forward multiplies with them, kept up to date by the optimizer: no forward casts or quantizes them.

A shadow is a bank in the compute dtype, fake-quantized where training is quantization-aware. Muon writes it in the
launch that writes the weights (`golfgpt_kernels.muon_update_`); `refresh` writes it from the weights where it cannot:
at the start, after weights were loaded, for banks whose layers differ in format, and for sharded weights, which
arrive from other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from golfgpt_kernels import fake_quantize_banks
from torch import nn

from golfgpt.model import MATRIX_BANKS, FakeQuant, fake_quantized


class Shadows:
    """Shadows of a model's matrix banks, by name; empty where the weights themselves are what the forward needs."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], fake_quant: FakeQuant, dtype: torch.dtype):
        """`fake_quant` as `Quantizer.fake_quant` makes it; what it says of other banks is left to the forward."""
        self._parameters = parameters
        self._parts = {name: fake_quant.get(name) for name in MATRIX_BANKS if name in parameters}
        self.banks = {
            name: torch.empty_like(parameters[name], dtype=dtype, requires_grad=False)
            for name, parts in self._parts.items()
            if parts is not None or dtype != parameters[name].dtype
        }
        self.forward_quant = {name: parts for name, parts in fake_quant.items() if name not in self.banks}
        """What the forward still has to fake-quantize: embeddings and small tensors."""
        self.quantized = [name for name, parts in self._parts.items() if parts is not None]
        """Banks whose shadows are fake-quantized."""
        self._seen: list[int] = []

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
            elif isinstance(parts, list):
                pieces = zip(w.split([layers for layers, _ in parts]), parts, strict=True)
                self.banks[name].copy_(torch.cat([fake_quantized(piece, options) for piece, (_, options) in pieces]))
            else:
                self.banks[name].copy_(fake_quantized(w, parts))
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
