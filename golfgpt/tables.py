"""Plain text tables for terminals and logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table of `data prepare` does not wait for torch
    from golfgpt.config import BudgetConfig
    from golfgpt.quant.artifact import ArtifactInfo
    from golfgpt.quant.formats import TensorReport
    from golfgpt.score.evaluate import Score
    from golfgpt.score.ttt.evaluate import AdaptedScore


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns: text to the left, whole numbers to the right, also where some cells are empty."""
    rows = [list(row) for row in rows]
    cells = [list(head)] + [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [not any(isinstance(row[i], str) and row[i] for row in rows) for i in range(len(head))]
    lines = []
    for line in cells:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def plural(count: int, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def tensor_table(reports: Iterable[TensorReport]) -> str:
    """The per-tensor byte table, with errors if they are known."""
    rows = []
    for r in reports:
        errors = () if r.snr_db is None else (f"{r.relative_rms_error:.2e}", f"{r.snr_db:.1f}")
        rows.append((r.name, r.format, r.elements, r.value_bytes, r.scale_bytes, *errors))
    head = ["tensor", "format", "elements", "value bytes", "scale bytes", "rel. error", "SNR dB"]
    return table(head[: len(rows[0])], rows)


def budget_lines(info: ArtifactInfo, budget: BudgetConfig) -> str:
    """Sizes of an artifact against its budget."""
    from golfgpt.quant.budget import budget_report

    return (
        f"payload {info.payload_bytes:,} bytes -> {info.packing}: {info.compressed_bytes:,}, "
        f"header {info.file_bytes - info.compressed_bytes:,}, model.golf {info.file_bytes:,} bytes\n"
        f"{budget_report(info.file_bytes, budget)}"
    )


COMPRESSORS = {"gzip": "gzip -9", "xz": "xz", "zstd": "zstd -22", "bigram": "token bigram, fitted on train"}


def score_lines(score: Score, compressors: dict[str, float] | None) -> str:
    """The checks of a score, the reference compressors or why there are none, and last the score."""
    lines = [str(score.checks)]
    if score.partial:
        lines.append(
            "gzip, xz, zstd and bigram are not shown: they are measured on the whole text, and only a part was scored"
        )
    elif compressors:
        rows = [("this model", f"{score.val_bpb:.4f}")]
        rows += [(COMPRESSORS[name], f"{value:.4f}") for name, value in compressors.items()]
        lines.append(table(("bits per byte of the same text", score.label), rows))
    if score.published_bpb is not None:
        lines.append(f"val_bpb (published bytes) {score.published_bpb:.4f}   {score.published_bytes:,} bytes")
    lines.append(
        f"{score.label} {score.val_bpb:.4f}   val_loss {score.val_loss:.4f}   window {score.window} stride "
        f"{score.stride}   {score.dtype}   {score.tokens:,} tokens, {score.bytes:,} bytes, {score.seconds:.1f} s"
    )
    return "\n".join(lines)


def adapted_lines(score: Score, adapted: AdaptedScore) -> str:
    """A score with test-time training, what it is, and next to it the plain one."""
    lines = [
        f"{adapted.label} {adapted.val_bpb:.4f}   val_loss {adapted.val_loss:.4f}   {adapted.tokens:,} tokens, "
        f"{adapted.bytes:,} bytes, {adapted.seconds:.1f} s of at most {adapted.max_seconds:g}",
        str(adapted.compliance),
        f"ledger {adapted.ledger_sha256} (SHA-256 of when each token was scored and learned)",
    ]
    if adapted.published_bpb is not None:
        lines.insert(1, f"val_bpb (published bytes) {adapted.published_bpb:.4f}")
    if adapted.stopped:
        lines.insert(1, f"stopped: {adapted.stopped}; the score is of what came before")
    elif not adapted.compliance.learned_after_scored:
        part, what = ("sgd", "the text is") if adapted.kind == "sgd" else ("lora", "all documents are")
        chunk = f"eval.ttt.{part}.chunk_tokens {adapted.settings[part]['chunk_tokens']:,}"
        lines.insert(1, f"warning: nothing was learned: {what} not longer than {chunk}: lower it, or score more text")
    elif adapted.tokens == score.tokens:
        gain = score.val_bpb - adapted.val_bpb
        lines.insert(
            1, f"{score.label} {score.val_bpb:.4f} without it: a gain of {gain:.4f} for {adapted.seconds:.1f} s"
        )
    return "\n".join(lines)
