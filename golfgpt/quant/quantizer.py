"""How a model's weights become the numbers of an artifact: one quantizer for training, probes and export.

Formats, decided for each published tensor (a layer of a bank) by the first that applies:

    a rule of QuantConfig.rules           what the rule says: float32, float16, or int2 to int8
    control tensors, any size             float32 (QuantConfig.control_dtype)
    matrices up to keep_numel elements    float16
    other matrices                        codes int8 in -m-1..m, m = 2^(bits-1) - 1, and one scale per row
                                          or per `group` columns

Neighbouring layers of one format are one layer group, which the artifact stores as one tensor: "c_k", or "c_k[0:7]" and
"c_k[7:9]" if the last two layers are stored in float16. Tensors in float32 and float16 are passed through.

A decoded weight is fp32(code) * fp32(stored scale). With qat="export" training computes the same product from
the same codes, and rounds passthrough tensors to float16 as the artifact will, so what was trained is what ships.
Codes take a byte each whatever their bits; the entropy coder of the artifact earns the difference.

Left out on purpose: bit packing, which costs the compressor more than it saves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial

import numpy as np
import torch
from golfgpt_kernels import RowQuant, quantize_rows
from torch import Tensor

from golfgpt.config import ModelConfig, QuantConfig, QuantRule
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.model.parameters import Param, parameter_shapes, parameter_table
from golfgpt.published import quantizers
from golfgpt.published.names import check_state
from golfgpt.published.quirks import export_quirks, published_fake_quant
from golfgpt.quant.formats import (
    DTYPES,
    QuantizedTensor,
    TensorFormat,
    TensorReport,
    layer_groups,
    layers_of,
    parse_layer_group,
    payload_bytes,
    tensor_report,
)
from golfgpt.quant.gptq import solve

PRUNED_NUMEL = 65_536
"""Published pruning leaves matrices of at most this many elements alone."""

UNIT_LAYERS = 4
"""Matrices that GPTQ solves at once, whatever the number of ranks: a batch of another size rounds otherwise."""

ALONE = Ranks(0, 1, torch.device("cpu"))

Rounding = RowQuant | torch.dtype | None
"""What training rounds a weight to: codes and scales, a dtype, or nothing."""

FakeQuant = Mapping[str, Sequence[tuple[int, Rounding]]]
"""Bank -> (number of layers, rounding) of each of its layer groups."""


def plan_formats(table: Mapping[str, Param], config: QuantConfig) -> dict[str, TensorFormat]:
    """Format of each layer group of the parameters in `table`, in the same order.

    Raises InputError for a rule that decides nothing, or that asks for what a tensor's shape does not have.
    """
    return {name: format for name, (format, _) in _plan(table, config).items()}


Clip = str | float
"""max, quantile, search, or a number of standard deviations."""


def _plan(table: Mapping[str, Param], config: QuantConfig) -> dict[str, tuple[TensorFormat, Clip]]:
    """Layer group -> its format and its clip."""
    rules = [QuantRule.parse(text) for text in config.rules]
    formats, deciding = {}, set()
    for bank, param in table.items():
        names = param.published_names
        first = [next((r for r in rules if matches(r.pattern, name, len(names))), None) for name in names]
        deciding.update(first)
        kinds = [_kind(param, rule, config) for rule in first]
        for group, shape, members, kind in layer_groups(bank, param, kinds):
            try:
                formats[group] = TensorFormat(shape, *kind[:-1]), kind[-1]
            except InputError as error:
                raise InputError(f"quant.rules: {members[0]} ({group}): {error}") from None
    by_row = "search", float if config.hessian_clip else None
    if grouped := [n for n, (f, clip) in formats.items() if f.group and (clip in by_row or type(clip) in by_row)]:
        raise InputError(
            f"quant.rules: {grouped[0]} has groups of columns; expected a scale per row with clip search and with "
            "quant.hessian_clip"
        )
    if idle := [rule.pattern for rule in rules if rule not in deciding]:
        some = ", ".join(param.published_names[0] for param in table.values())
        raise InputError(
            f"quant.rules: {idle[0]!r} decides nothing: it matches no tensor of this model, or rules before it "
            f"match the same ones (the first that matches decides). Names are like {some}"
        )
    return formats


def matches(pattern: str, name: str, num_layers: int) -> bool:
    """Whether the glob fits a published name or, if it begins with blocks.-, that with the layer counted from the
    end."""
    if pattern.startswith("blocks.-"):
        name = re.sub(r"^blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) - num_layers}.", name)
    return fnmatchcase(name, pattern)


def _kind(param: Param, rule: QuantRule | None, config: QuantConfig) -> tuple[str, str | None, int | None, Clip]:
    """(format, scale dtype, columns per scale, clip) of a published tensor."""
    clip = config.deviations if config.clip == "deviation" else config.clip
    if rule is not None and rule.format.startswith("int"):
        return rule.format, config.scale_dtype, rule.group, rule.clip or clip
    if rule is not None:
        return rule.format, None, None, ""
    if param.kind == "control":
        return config.control_dtype, None, None, ""
    if math.prod(param.shape[param.layered :]) <= config.keep_numel:
        return "float16", None, None, ""
    return f"int{config.bits}", config.scale_dtype, None, clip


# Pruning


def prune_threshold(w: Tensor, fraction: float) -> float:
    """The quantile `fraction` of |w|, over all elements (any number: torch.quantile ends at 2^24), interpolated."""
    return float(np.quantile(w.detach().abs().float().cpu().numpy(), fraction))


def pruned(param: Param, w: Tensor, fraction: float) -> Tensor:
    """w, some layers of `param` or all of it, with the smallest `fraction` of the magnitudes of each published matrix
    above PRUNED_NUMEL set to zero."""
    if fraction == 0 or param.kind == "control":
        return w
    matrices = [
        m.masked_fill(m.abs() < prune_threshold(m, fraction), 0.0) if m.numel() > PRUNED_NUMEL else m
        for m in (w if param.layered else [w])
    ]
    return torch.stack(matrices).view_as(w)


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of one model under one QuantConfig."""

    model: ModelConfig
    config: QuantConfig

    @cached_property
    def parameters(self) -> dict[str, Param]:
        """The model's parameter table."""
        return parameter_table(self.model)

    @cached_property
    def formats(self) -> dict[str, TensorFormat]:
        """Layer group -> format, known before any training. Raises InputError as `plan_formats`."""
        return {name: format for name, (format, _) in self._plan.items()}

    @cached_property
    def _plan(self) -> dict[str, tuple[TensorFormat, Clip]]:
        plan, config = _plan(self.parameters, self.config), self.config
        coded = [format for format, _ in plan.values() if format.quantized]
        narrow = [format.shape[-1] for format in coded if format.bits < 8 and not format.group]
        for field, most, what in (
            (
                "wide_columns",
                max(narrow, default=0),
                "the most columns of a matrix below int8 with a scale per row",
            ),
            ("low_rank", max((min(f.shape[-2:]) for f in coded), default=0), "the largest rank of an integer matrix"),
        ):
            if getattr(config, field) > most:
                raise InputError(f"quant.{field} is {getattr(config, field)}; expected at most {most}, {what}")
        if config.method == "gptq" and not coded:
            raise InputError("quant.method is gptq, but no matrix is stored as integers; expected rtn, or fewer bits")
        if narrow := [
            name for name, (f, clip) in plan.items() if isinstance(clip, float) and (f.group or f.shape[-1]) < 2
        ]:
            raise InputError(f"quant.clip deviation: {narrow[0]} has one column per scale, which has no deviation")
        return plan

    @property
    def payload_bytes(self) -> int:
        """Bytes of all codes, scales and passthrough values before compression: exact, but at most so many with
        corrections or wide columns, whose matrices are chosen by the weights."""
        return payload_bytes(self.formats) + sum(self.extra_bytes)

    @property
    def extra_bytes(self) -> tuple[int, int]:
        """Bytes before compression, at most, of wide columns' scales, and of corrections."""
        coded = [format for format in self.formats.values() if format.quantized]
        number = DTYPES[self.config.scale_dtype].itemsize
        rank, rows = self.config.low_rank, max((f.shape[-2] for f in coded), default=0)
        # Of a matrix: two factors, and a scale per row of each or, if that is more, for each group of codes.
        sizes = []
        for f in coded:
            height, width = f.shape[-2:]
            scales = max(height + rank, 1 + rank * width // (self.config.low_rank_group or rank * width or 1))
            sizes += [rank * (height + width) + number * scales] * math.prod(f.shape[:-2])
        corrections = sum(sorted(sizes)[-self.config.low_rank_tensors :]) if rank else 0
        return (rows * number if self.config.wide_columns else 0), corrections

    @property
    def label(self) -> str:
        """The integer formats, as int8 or int5/int6; float16 if there is none."""
        return "/".join(sorted({f.format for f in self.formats.values() if f.quantized})) or "float16"

    @property
    def solves(self) -> bool:
        """Whether anything but rounding to the nearest may choose codes."""
        c = self.config
        searched = any(clip == "search" for _, clip in self._plan.values())
        return c.method == "gptq" or searched or bool(c.wide_columns or c.low_rank)

    def spec(self, name: str) -> RowQuant:
        """How a quantized layer group becomes codes and scales; of a clip that is searched, the widest."""
        c, (format, clip) = self.config, self._plan[name]
        by_deviation = isinstance(clip, float)
        spec = RowQuant(
            bits=format.bits,
            clip="deviation" if by_deviation else "max" if clip == "search" else clip,
            deviations=clip if by_deviation else 0.0,
            code_range=c.code_range,
            scale_dtype=DTYPES[format.scale],
            scale_floor=c.scale_floor,
            group_size=format.group,
        )
        return export_quirks(spec, c)

    def fake_quant(self) -> FakeQuant:
        """What the banks go through in quantization-aware training; those that it leaves alone are not in it.

        Raises InputError for qat that changes nothing, and for qat="export" with pruning: the artifact would hold zeros
        that training never saw.
        """
        if self.config.qat == "off":
            return {}
        if self.config.qat == "export" and self.config.prune:
            raise InputError(
                f"quant.qat export trains with the weights that the artifact will hold, and quant.prune "
                f"{self.config.prune:g} changes them afterwards; prune without it, or export a pruned copy later"
            )
        banks: dict[str, list[tuple[int, Rounding]]] = {}
        for name, format in self.formats.items():
            num_layers = format.shape[0] if format.shape else 1
            banks.setdefault(parse_layer_group(name)[0], []).append((num_layers, self._rounding(name, format)))
        banks = {bank: groups for bank, groups in banks.items() if any(rounding for _, rounding in groups)}
        if not banks:
            raise InputError(
                f"quant.qat {self.config.qat} changes no weight: with this quant.bits, rules and keep_numel, none of "
                "the matrices that it quantizes is stored as integers"
            )
        return banks

    def _rounding(self, name: str, format: TensorFormat) -> Rounding:
        if self.config.qat == "export":
            if format.quantized:
                return self.spec(name)
            return None if format.format == "float32" else DTYPES[format.format]
        if not format.quantized:
            return None
        return published_fake_quant(self.config.qat, self.parameters[parse_layer_group(name)[0]], format.bits)

    def encode(
        self,
        state: Mapping[str, Tensor],
        hessians: Mapping[str, Tensor] | None = None,
        ranks: Ranks = ALONE,
        progress: Callable[[str], None] = lambda text: None,
    ) -> dict[str, QuantizedTensor]:
        """Prune and quantize the model's banks (any float dtype, any device); layer group -> tensor, on the CPU. Groups
        that have `hessians` (golfgpt.quant.calibration) get their codes from GPTQ, on the device of these, all others
        are rounded. With wide columns or corrections, groups are split where one layer differs.

        `ranks` share the work, UNIT_LAYERS matrices at a time; all must call it, and all get the result. Raises
        InputError naming a tensor that is missing, unexpected, mis-shaped or not finite, whose float16 passthrough
        values exceed it, or whose Hessian is not positive definite.
        """
        weights, hessians = self.weights(state), hessians or {}
        if not self.solves:
            return {name: self._rounded(name, w) for name, w in weights.items()}
        encoded = {name: self._rounded(name, w) for name, w in weights.items() if self._by_rounding(name, hessians)}
        with ranks.raise_on_any():
            solved = self._solved(weights, hessians, ranks, progress)
        for name, pair in solved.items():  # all but one rank's are zero
            pair = (ranks.sum_(part.to(ranks.device)).cpu() for part in pair)
            encoded[name] = QuantizedTensor(self.formats[name], *pair)
        encoded = {name: encoded[name] for name in self.formats}
        if not self.config.wide_columns and not self.config.low_rank:
            return encoded
        banks = {}
        for name, w in weights.items():
            banks.setdefault(parse_layer_group(name)[0], []).append(w)
        banks = {bank: parts[0] if len(parts) == 1 else torch.cat(parts) for bank, parts in banks.items()}
        return quantizers.refined(self.config, banks, encoded, self.spec, partial(self._inputs, hessians))

    def weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer group -> its pruned float32 weights, on the CPU. Raises InputError as `encode`."""
        check_state(state, parameter_shapes(self.model))
        found = {}
        for name in self.formats:
            w = layers_of(state, name).detach().float().cpu()
            if not w.isfinite().all():
                raise InputError(f"tensor {name} has {int((~w.isfinite()).sum())} non-finite weights")
            found[name] = pruned(self.parameters[parse_layer_group(name)[0]], w, self.config.prune)
        return found

    def _by_rounding(self, name: str, hessians: Mapping[str, Tensor]) -> bool:
        return not self.formats[name].quantized or (name not in hessians and self._plan[name][1] != "search")

    def _rounded(self, name: str, w: Tensor) -> QuantizedTensor:
        format = self.formats[name]
        if format.quantized:  # eager, also for CPU tensors of a run with runtime.kernels triton
            return QuantizedTensor(format, *quantize_rows(w, self.spec(name), impl="eager"))
        values = w.to(DTYPES[format.format])
        if not values.isfinite().all():
            raise InputError(f"tensor {name} has magnitudes up to {w.abs().max():.3g}: float16 ends at 65504")
        return QuantizedTensor(format, values)

    def _solved(
        self, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], ranks: Ranks, progress: Callable
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and scales of the groups that are not simply rounded. Each rank computes its units of layers."""
        found, units = {}, []
        for name, w in weights.items():
            if self._by_rounding(name, hessians):
                continue
            format = self.formats[name]
            scale = torch.zeros(format.scale_shape, dtype=DTYPES[format.scale])
            found[name] = torch.zeros(format.shape, dtype=torch.int8), scale
            count = len(w) if w.ndim == 3 else 1
            units += [(name, range(i, min(i + UNIT_LAYERS, count))) for i in range(0, count, UNIT_LAYERS)]
        for number, (name, layers) in enumerate(units):
            if number % ranks.world != ranks.rank:
                continue
            progress(f"solving for the codes: {number} of {len(units)} units")
            some = slice(layers.start, layers.stop)
            w = weights[name] if weights[name].ndim == 3 else weights[name][None]
            hessian = hessians[name][some] if name in hessians else None
            try:
                pair = self._quantize(name, w[some], hessian)
            except (InputError, torch.linalg.LinAlgError) as error:
                raise InputError(f"tensor {name}, layers from {layers.start} on: {error}") from None
            for whole, part in zip(found[name], pair, strict=True):
                (whole[some] if w is weights[name] else whole[None]).copy_(part)
        return found

    def _quantize(self, name: str, w: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of matrices (n, rows, columns) of a layer group, by GPTQ if there are Hessians."""
        spec, clip = self.spec(name), self._plan[name][1]
        solver = None
        if hessian is not None:
            w = w.to(hessian.device)
            solver = self._solver(name, hessian)
        if clip == "search":
            return quantizers.clip_search(w, spec, solver)
        scale = quantize_rows(w, spec, impl="eager")[1]
        if self.config.hessian_clip and isinstance(clip, float):
            scale = quantizers.hessian_scales(w, hessian, spec, self.config.hessian_clip, self.config.damping)
        columns = scale.float()
        columns = columns[..., None] if spec.group_size is None else columns.repeat_interleave(spec.group_size, -1)
        return solver(w, columns), scale

    def _solver(self, name: str, hessian: Tensor) -> Callable[..., Tensor]:
        """GPTQ for matrices with these Hessians: (w, scale of columns, largest code) -> codes."""
        spec, config = self.spec(name), self.config
        damping = config.embed_damping if name == "tok_emb" else config.damping

        def solver(w: Tensor, scale: Tensor, largest: Tensor | int = spec.qmax) -> Tensor:
            least = -largest - int(spec.code_range == "full")
            w, scale = w.to(hessian.device), scale.to(hessian.device)
            return solve(w, hessian, scale, largest, least=least, damping=damping)

        return solver

    def _inputs(self, hessians: Mapping[str, Tensor], bank: str, layer: int) -> tuple[Tensor, Callable] | None:
        """Of a layer of a bank: root mean squares of its inputs times a factor common to all banks, and its solver."""
        for name, found in hessians.items():
            group, layers = parse_layer_group(name)
            start = layers.start or 0
            if group == bank and start <= layer < start + len(found):
                passes = self.model.layer_order().count(layer) if self.parameters[bank].layered else 1
                hessian = found[layer - start : layer - start + 1]
                return (hessian[0].diagonal() / passes).sqrt().cpu(), self._solver(name, hessian)
        return None

    def projected_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Forecast of the compressed payload: the order-0 entropy of the codes of each tensor, if they are rounded,
        scales and passthrough values at full size. Compressors end within about two percent of it on trained weights.
        """
        bits = 8.0 * sum(self.extra_bytes)
        for tensor in (self._rounded(name, w) for name, w in self.weights(state).items()):
            if tensor.scale is None:
                bits += 8 * tensor.format.value_bytes
            else:
                bits += 8 * tensor.format.scale_bytes + tensor.format.elements * code_entropy(tensor.values)
        return math.ceil(bits / 8)

    def table(
        self, state: Mapping[str, Tensor] | None = None, encoded: Mapping[str, QuantizedTensor] | None = None
    ) -> list[TensorReport]:
        """One report per layer group; with `state`, the error that pruning and quantizing it makes, or that of
        `encoded`, which was made from it."""
        if state is None:
            return [tensor_report(name, format) for name, format in self.formats.items()]
        return [
            tensor_report(name, tensor.format, _relative_error(layers_of(state, name).cpu(), tensor.dequantize().cpu()))
            for name, tensor in (encoded or self.encode(state)).items()
        ]


def code_entropy(codes: Tensor) -> float:
    """Order-0 entropy of int8 codes, bits per code."""
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256).double()
    frequencies = counts[counts > 0] / counts.sum()
    return -(frequencies * frequencies.log2()).sum().item()


def _relative_error(w: Tensor, decoded: Tensor) -> float:
    error, norm = (decoded - w).double().norm().item(), w.double().norm().item()
    return error / norm if norm else 0.0 if error == 0 else math.inf
