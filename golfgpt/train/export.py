"""Pack the trained weights into an artifact, on disk or in memory, and load the decoded weights on every rank.

With quant.method "gptq" a plainly rounded artifact is on disk before calibration begins, and is then replaced. Probes
are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.quant import artifact, calibration
from golfgpt.quant.artifact import ArtifactInfo
from golfgpt.quant.formats import QuantizedTensor
from golfgpt.quant.quantizer import Quantizer
from golfgpt.tables import budget_lines, tensor_table
from golfgpt.train.reporter import Reporter
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.step import TrainStep


class Exporter:
    """Packs the weights of `step` on rank 0, which has the folder, and loads the decoded weights on every rank."""

    def __init__(
        self, config: RunConfig, dataset: Dataset, step: TrainStep, folder: RunFolder | None, reporter: Reporter
    ):
        self.config, self.step, self.folder, self.reporter = config, step, folder, reporter
        self.dataset = dataset
        self.quantizer = Quantizer(config.model, config.quant)
        self._options = {
            "model": config.model,
            "quant": config.quant,
            "tokenizer_sha256": dataset.need_tokenizer().digest,
            "seq_len": config.data.seq_len,
        }

    def try_out(self) -> int | None:
        """Pack the current weights in memory and load the decoded weights on every rank. Returns the size in bytes on
        rank 0."""
        blob = None
        with self.step.ranks.raise_on_any():
            if self.folder:
                blob = artifact.pack(self.step.exported(), **self._options)
                artifact.unpack(blob).load_into(self.step.model)
        self._share()
        return None if blob is None else len(blob)

    def write_rounded(self) -> None:
        """Write a plainly rounded model.golf, which stays if calibration fails. All ranks must call it."""
        with self.step.ranks.raise_on_any():
            if self.folder:
                self.reporter.status("quantizing and compressing")
                artifact.write(self.folder.artifact, self.quantizer.encode(self.step.exported()), **self._options)

    def calibrate(self) -> dict[str, Tensor]:
        """The Hessians of the weights to export: layer group -> (matrices, columns, columns), float32. All ranks must
        call it."""
        step = self.step
        step.model.load_state_dict(self.step.exported())
        options = (self.dataset, step.ranks, step.dtype, self.reporter.status)
        return calibration.calibrate(self.config, step.model, *options)

    def export(self, steps: int, hessians: Mapping[str, Tensor] | None = None) -> ArtifactInfo | None:
        """Write model.golf after `steps` steps, print what it holds, and load the weights read back from it on every
        rank. Returns the header on rank 0. An error is raised on all ranks."""
        info, encoded, state = None, None, self.step.exported() if self.folder or hessians is not None else {}
        if hessians is not None:  # all ranks solve
            encoded = self.quantizer.encode(state, hessians, self.step.ranks, self.reporter.status)
        with self.step.ranks.raise_on_any():
            if self.folder:
                info = self._write(steps, state, encoded)
                artifact.read(self.folder.artifact).load_into(self.step.model)
        self._share()
        return info

    def _share(self) -> None:
        for p in self.step.model.parameters():
            self.step.ranks.broadcast_(p.data)

    def _write(self, steps: int, state: dict[str, Tensor], encoded: dict[str, QuantizedTensor] | None) -> ArtifactInfo:
        c, say, log, average = self.config, self.reporter.line, self.reporter.log, self.step.average
        if c.average.kind != "none" and average.ready:
            say(f"{c.average.kind}:exporting the average of {average.count} steps' weights")
        elif c.average.kind != "none":
            say(
                f"warning: {c.average.kind}: {average.count} of {steps} steps are in the average, too few: exporting "
                f"the last weights (swa uses a step every {c.average.swa_every} steps once the learning rate is below "
                f"{c.average.swa_start_lr:g} of its base: average.swa_every, average.swa_start_lr)"
            )
        if encoded is not None:
            again = ", quantized again after fake quantization" if c.quant.qat != "off" else ""
            say(f"gptq:codes chosen on {c.quant.calibration_tokens:,} tokens of {c.quant.calibration}{again}")
        self.reporter.status("quantizing and compressing")
        encoded = self.quantizer.encode(state) if encoded is None else encoded
        info = artifact.write(self.folder.artifact, encoded, **self._options)
        label = f"{self.quantizer.label}+{info.compressor}"
        raw = sum(value.numel() * value.element_size() for value in state.values())
        reports = self.quantizer.table(state, encoded)
        log(tensor_table(reports))
        self.reporter.metric("tensors", tensors=[report._asdict() for report in reports])
        log(f"Serialized model: {raw} bytes")
        log(f"Code size: {'not counted' if c.budget.code_bytes is None else f'{c.budget.code_bytes} bytes'}")
        log(
            f"Serialized model {label}: {info.file_bytes} bytes (payload:{info.payload_bytes} "
            f"payload_ratio:{raw / info.payload_bytes:.2f}x)"
        )
        log(f"Total submission size {label}: {info.file_bytes + (c.budget.code_bytes or 0)} bytes")
        log(budget_lines(info, c.budget))
        return info
