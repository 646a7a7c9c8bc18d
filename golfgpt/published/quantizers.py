"""What the records' quantizers do beside GPTQ and clips by deviation, each with what it is worth by their own logs. All
are off by default; `golfgpt.quant.quantizer` calls `clip_search`, `hessian_scales` and `refined`.

    quant.clip search         five clips are tried for a whole matrix (2026-03-22 to 2026-04-04)
    quant.hessian_clip        a row's clip depends on the inputs that it meets (PR #1412)
    quant.wide_columns        64 columns of the model have int8 codes (PR #1908: AWQ-lite)
    quant.low_rank            a correction of low rank for three matrices (PR #1797: LQER)

Published Hessians of 2026-03-25 and 2026-03-29 are damped twice, and so lose sight of inputs that are always zero; here
they are damped once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from golfgpt_kernels import RowQuant, quantize_rows
from torch import Tensor

from golfgpt.config import QuantConfig
from golfgpt.quant.formats import (
    DTYPES,
    QuantizedTensor,
    layer_group_name,
    parse_layer_group,
)

Solve = Callable[..., Tensor]
"""Codes (n, rows, cols) of matrices for scales: `golfgpt.quant.gptq.solve` with the Hessians and damping given."""

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


# Clips


def clip_search(w: Tensor, spec: RowQuant, solve: Solve | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales of matrices (n, rows, cols): of five percentiles of a row's magnitudes, one for all rows of
    a matrix, those with the least squared error. `solve`: as GPTQ gives them.

    "GPTQ-lite" (without `solve`) knows no Hessian. Gain by its author's account 0.0006 bits per byte, from one run;
    with the published floor of 1 for a row's clip it is inert for all rows whose maximum is below 1. With GPTQ, the
    error that is compared is not the one that GPTQ makes small: its feedback raises it, so the choice leans to less
    feedback. Dropped for clips by deviation, which were better and need one solution in place of five.
    """
    least, codes, scale = None, None, None
    for p in PERCENTILES:
        clip = w.abs().amax(-1) if p == 1 else torch.quantile(w.abs(), p, dim=-1)
        tried = _stored((clip / spec.qmax).clamp_min(spec.scale_floor), spec.scale_dtype)
        s = tried.float()[..., None]
        found = solve(w, s) if solve else (w / s).round().clamp(-spec.qmax, spec.qmax).to(torch.int8)
        error = (w - found * s).square().mean((-2, -1))
        if least is None:
            least, codes, scale = error, found, tried
            continue
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better[:, None, None], found, codes)
        scale = torch.where(better[:, None], tried, scale)
    return codes, scale


def hessian_scales(w: Tensor, hessian: Tensor, spec: RowQuant, weight: float, damping: float) -> Tensor:
    """Scales (n, rows) by deviation of matrices (n, rows, cols), changed by `weight` (published: 0.175) times how much
    more than the mean a row's weights meet large inputs.

    Gain at most 0.0003: noise. By the author's own check, a row's importance correlates at 0.12 over seeds. No later
    record has it.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal = diagonal + (diagonal == 0)
    diagonal = (diagonal + damping * diagonal.mean(-1, keepdim=True)).clamp_min(1e-8)
    rho = (w.abs() * (diagonal / diagonal.mean(-1, keepdim=True))[:, None]).mean(-1)
    factor = 1 + weight * (rho / rho.mean(-1, keepdim=True) - 1)
    return _stored((spec.deviations * w.std(-1) * factor / spec.qmax).clamp_min(spec.scale_floor), spec.scale_dtype)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, but above zero."""
    return scale.to(dtype).clamp_min(2.0**-24)


# Wide columns


def group_scores(w: Tensor, input_rms: Tensor, group: int) -> Tensor:
    """Score of each group of neighbouring columns of w (rows, cols), a last shorter one aside: how large inputs (root
    mean square, (cols,)) times weights are in it."""
    columns = input_rms * w.abs().mean(0)
    return columns[: len(columns) // group * group].view(-1, group).sum(1)


def widened(tensor: QuantizedTensor, w: Tensor, columns: slice, spec: RowQuant, solve: Solve) -> QuantizedTensor:
    """`tensor`, one matrix w (1, rows, cols) by GPTQ, again with int8 codes for the `columns`.

    Gain 0.0003 for 85 kB. The group is chosen once for the whole model, not per matrix as the READMEs say; in nine of
    nine published logs it is one of the embedding.
    """
    wide_scale = quantize_rows(w, replace(spec, bits=8), impl="eager")[1]
    scale = tensor.scale.view(w.shape[:-1])[..., None].float().expand(w.shape).clone()
    scale[..., columns] = wide_scale[..., None].float()
    largest = torch.full(w.shape[-1:], spec.qmax)
    largest[columns] = 127
    shape = tensor.values.shape
    return replace(
        tensor,
        format=replace(tensor.format, wide=columns.start, wide_columns=columns.stop - columns.start),
        values=solve(w, scale, largest).cpu().view(shape),
        wide_scale=wide_scale.view(shape[:-1]),
    )


# Corrections of low rank


def factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left (rows, rank) and right (rank, cols) factor of the best approximation of `error` (rows, cols)."""
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def pack_factors(left: Tensor, right: Tensor, group: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fields of QuantizedTensor for a correction. `group` None: 4 bits and a scale for each row of each factor.
    Else: 2 bits and one scale for `left`, 4 bits and a scale for each `group` neighbouring numbers of `right`.

    The latter is published as "asymmetric", which names the widths: there is no zero point. The largest of `left` is
    1.5 scales, so a positive one rounds to 2 and is cut to 1, a negative one is kept: the result depends on signs that
    are arbitrary.
    """

    def codes(x: Tensor, levels: float, low: int, high: int) -> tuple[Tensor, Tensor]:
        scale = _stored(x.abs().amax(-1) / levels, dtype)
        return (x / scale.float()[..., None]).round().clamp(low, high).to(torch.int8), scale

    if group is None:
        (a, a_scale), (b, b_scale) = codes(left, 7, -7, 7), codes(right, 7, -7, 7)
    else:
        (a, a_scale), (b, b_scale) = codes(left.reshape(1, -1), 1.5, -2, 1), codes(right.reshape(-1, group), 7.5, -8, 7)
    return {
        "left": a.view(left.shape),
        "left_scale": a_scale,
        "right": b.view(right.shape),
        "right_scale": b_scale,
    }


def corrected(tensor: QuantizedTensor, w: Tensor, config: QuantConfig) -> QuantizedTensor:
    """`tensor`, one matrix w (rows, cols), with a correction of its error.

    Gain about 0.0003 bits per byte (published README: 0.009): errors of rounding are nearly white, and the four leading
    directions of such a matrix hold 1.2 to 1.8 percent of its energy. The factors are not fitted again after their own
    rounding and know no Hessian.
    """
    layers, cols = tensor.values.shape[:-2], w.size(1)
    group = config.low_rank_group or None
    if group and config.low_rank * cols % group:
        group = None
    error = w - tensor.dequantize().view(w.shape)
    fields = pack_factors(*factors(error, config.low_rank), group, DTYPES[tensor.format.scale])
    fields = {name: x.view(*layers, *x.shape) for name, x in fields.items()}
    return replace(tensor, format=replace(tensor.format, rank=config.low_rank, rank_group=group), **fields)


# The model's tensors


def refined(
    config: QuantConfig,
    banks: Mapping[str, Tensor],
    encoded: dict[str, QuantizedTensor],
    spec: Callable[[str], RowQuant],
    inputs: Callable[[str, int], tuple[Tensor, Solve] | None],
) -> dict[str, QuantizedTensor]:
    """`encoded` with wide columns and corrections, in layer groups of their own; `banks` are the weights it was made
    of. `inputs` of a bank's layer: root mean squares of its inputs, up to a factor common to all, and its solver; None
    for what GPTQ leaves alone."""
    if config.wide_columns:
        best = None
        for name, i, w in _matrices(encoded, banks):
            bank, layer = _place(name, i)
            format, known = encoded[name].format, inputs(bank, layer)
            if known is None or format.bits == 8 or format.group or w.size(1) < config.wide_columns:
                continue
            scores = group_scores(w, known[0], config.wide_columns)
            if best is None or float(scores.max()) > best[0]:
                first = int(scores.argmax()) * config.wide_columns
                best = float(scores.max()), name, i, w, slice(first, first + config.wide_columns), known[1]
        if best:
            _, name, i, w, columns, solve = best
            encoded = _replaced(encoded, banks, name, i, lambda t: widened(t, w[None], columns, spec(name), solve))
    if config.low_rank:
        norms = []
        for name, i, w in _matrices(encoded, banks):
            if config.low_rank <= min(w.shape):
                norms.append((-float((w - _layer(encoded[name], i).dequantize().view(w.shape)).norm()), *_place(name, i)))
        for _, *place in sorted(norms)[: config.low_rank_tensors]:
            name, i, w = next(x for x in _matrices(encoded, banks) if _place(*x[:2]) == tuple(place))
            encoded = _replaced(encoded, banks, name, i, lambda t, w=w: corrected(t, w, config))
    return encoded


def _matrices(encoded: Mapping[str, QuantizedTensor], banks: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """Layer group, index in it, and weights (rows, cols) of each matrix that is stored as integers."""
    for name, tensor in encoded.items():
        if not tensor.format.quantized:
            continue
        bank, layers = parse_layer_group(name)
        w = banks[bank] if banks[bank].ndim == 2 else banks[bank][layers]
        yield from ((name, i, m) for i, m in enumerate(w if w.ndim == 3 else [w]))


def _place(name: str, i: int) -> tuple[str, int]:
    bank, layers = parse_layer_group(name)
    return bank, (layers.start or 0) + i


def _layer(tensor: QuantizedTensor, i: int, stop: int | None = None) -> QuantizedTensor:
    """Layers `i` to `stop` (default: i + 1); a tensor without layers as it is."""
    if tensor.values.ndim == 2:
        return tensor
    some = slice(i, i + 1 if stop is None else stop)
    arrays = {name: x[some] for name, x in tensor.arrays.items()}
    return QuantizedTensor(replace(tensor.format, shape=tuple(arrays["values"].shape)), **arrays)


def _replaced(
    encoded: Mapping[str, QuantizedTensor],
    banks: Mapping[str, Tensor],
    name: str,
    i: int,
    change: Callable[[QuantizedTensor], QuantizedTensor],
) -> dict[str, QuantizedTensor]:
    """`encoded` with layer `i` of a group changed, in a group of its own."""
    out = {}
    for key, tensor in encoded.items():
        if key != name or tensor.values.ndim == 2:
            out[key] = change(tensor) if key == name else tensor
            continue
        (bank, start), count = _place(name, 0), len(tensor.values)
        for first, stop in ((0, i), (i, i + 1), (i + 1, count)):
            if first < stop:
                part = _layer(tensor, first, stop)
                group = layer_group_name(bank, start + first, start + stop, len(banks[bank]))
                out[group] = change(part) if first == i else part
    return out
