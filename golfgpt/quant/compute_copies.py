"""Matrices as the forward multiplies with them, kept up to date by the optimizer: no forward casts or quantizes them.

A compute copy is a bank in the compute dtype, fake-quantized if training is quantization-aware. Muon writes it in the
launch that writes the weights (`golfgpt_kernels.muon_update_`). `refresh` writes it from the weights when Muon cannot:
at the start, after weights were loaded, for banks whose layers differ in format, and for sharded weights, which
arrive from other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from golfgpt_kernels import RowQuant, fake_quantize_banks, fake_quantize_rows, round_to_dtype, straight_through
from torch import Tensor

from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import of_kind
from golfgpt.quant.quantizer import FakeQuant, Rounding


class ComputeCopies:
    """Compute copies of a model's matrix banks, by name; empty if the weights themselves are what the forward needs."""

    def __init__(self, model: GPT, fake_quant: FakeQuant | None, dtype: torch.dtype, enabled: Tensor | None = None):
        """`fake_quant` applies here to matrices, and in each forward to other parameters, whenever `enabled` (a 0-d
        bool tensor; None: always) is true."""
        self._parameters = parameters = dict(model.named_parameters())
        self.quantizes, quantized = bool(fake_quant), fake_quant or {}
        self._groups = {name: quantized.get(name) for name in of_kind(model.table, "matrix")}
        self.enabled = enabled
        self.banks = {
            name: torch.empty_like(parameters[name], dtype=dtype, requires_grad=True)
            for name, groups in self._groups.items()
            if groups is not None or dtype != parameters[name].dtype
        }
        self._in_forward = {name: groups for name, groups in quantized.items() if name not in self.banks}
        self._seen: list[int] = []

    @property
    def leaves(self) -> list[Tensor]:
        """For each parameter of the model, the tensor that receives its gradient: its compute copy, if it has one."""
        return [self.banks.get(name, p) for name, p in self._parameters.items()]

    def stand_ins(self) -> dict[str, Tensor]:
        """What a forward multiplies with in place of the parameters: compute copies, and embeddings and small tensors
        fake-quantized here and now. Gradients go to `leaves`."""
        out = dict(self.banks)
        for name, groups in self._in_forward.items() if self.quantizes else ():
            out[name] = fake_quantized(self._parameters[name], groups, self.enabled)
        return out

    def written_by_muon(self) -> dict[str, RowQuant | None]:
        """Bank -> its quantizer (None: rounded only), of those that Muon can write with the weights."""
        if not self.quantizes:
            return dict.fromkeys(self.banks)
        groups = {name: self._groups[name] or [(1, None)] for name in self.banks}
        roundings = {name: group[0][1] for name, group in groups.items() if len(group) == 1}
        return {name: spec for name, spec in roundings.items() if spec is None or isinstance(spec, RowQuant)}

    @torch.no_grad()
    def refresh(self, names: Iterable[str] | None = None) -> None:
        """Write the compute copies of `names` (None: all) from the weights."""
        names, written = list(self.banks if names is None else names), self.written_by_muon()
        whole = [name for name in names if written.get(name) is not None]
        if self.quantizes:
            fake_quantize_banks(
                [self._parameters[name].detach() for name in whole],
                [self.banks[name] for name in whole],
                [written[name] for name in whole],
                enabled=self.enabled,
            )
        for name in names:
            if name not in whole:
                w = self._parameters[name].detach()
                if self.quantizes:
                    w = fake_quantized(w, self._groups[name] or [], self.enabled)
                self.banks[name].copy_(w)
        self.mark()

    def mark(self) -> None:
        """Record that the compute copies match the weights as they are now."""
        self._seen = self._versions()

    def stale(self) -> bool:
        """Whether weights were changed in place, by load_state_dict say, since the last `refresh` or `mark`."""
        return bool(self.banks) and self._seen != self._versions()

    def _versions(self) -> list[int]:
        return [self._parameters[name]._version for name in self.banks]


def fake_quantized(w: Tensor, groups: Sequence[tuple[int, Rounding]], enabled: Tensor | None = None) -> Tensor:
    """A bank as the artifact will hold it, with straight-through gradient; w while `enabled` is false. `groups` is its
    entry in a FakeQuant, empty for none."""
    if len(groups) < 2:
        return _rounded(w, groups[0][1] if groups else None, enabled)
    pieces = w.split([num_layers for num_layers, _ in groups])
    return torch.cat([_rounded(piece, rounding, enabled) for piece, (_, rounding) in zip(pieces, groups, strict=True)])


def _rounded(w: Tensor, rounding: Rounding, enabled: Tensor | None) -> Tensor:
    if rounding is None:
        return w
    if isinstance(rounding, RowQuant):
        return fake_quantize_rows(w, rounding, enabled=enabled)
    rounded = round_to_dtype(w.detach(), rounding)
    if enabled is not None:
        rounded = torch.where(enabled, rounded, w.detach())
    return straight_through(w, rounded)
