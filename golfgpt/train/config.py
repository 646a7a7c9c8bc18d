"""Config of the execution of a run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, CountOrZero, NotNegative, Section

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """Where and how a run executes. These fields change results only by rounding."""

    device: Device = "auto"
    """auto: cuda if available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of activations and of all matmuls, including Newton-Schulz. auto: bfloat16 on cuda; on a CPU, bfloat16 if
    it is clearly faster than float32, which is timed at the start and remembered. Parameters are float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward and backward. auto: on cuda only."""
    optimizer: Literal["replicated", "sharded"] = "replicated"
    """replicated: gradients are all-reduced, and every rank updates every matrix. sharded: each rank gets the gradients
    of its shard of the matrices, updates them, and sends the new weights to the other ranks."""
    optimizer_graph: bool = False
    """Replay the whole optimizer step as one CUDA graph, which is captured in the warm-up. Needs a GPU, compile and
    warmup_steps above 0."""
    kernels: Literal["auto", "eager", "triton"] = "auto"
    """Implementation of the ops of golfgpt_kernels; auto: the Triton kernel where a measurement shows it winning;
    eager: PyTorch; triton: the kernel, or an error if it cannot run."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"] = "auto"
    """Backend of scaled_dot_product_attention. auto: on a GPU, the fastest backend that agrees with math, which is
    timed at the start and remembered; on a CPU, the first that agrees."""
    warmup_steps: CountOrZero = 20
    """Steps to run and undo before the clock starts, if the step is compiled."""
    threads: CountOrZero = 0
    """CPU threads for torch; 0: torch's default."""
    checkpoint_seconds: NotNegative = 60.0
    """Seconds between checkpoints, which are not counted as training time; 0: only at the end or on a signal."""
    log_every: Count = 50
    """Steps between lines in the log (the first ten steps are always logged)."""
    val_every: CountOrZero = 0
    """Steps between validations of the unquantized weights, which are not counted as training time; 0: none."""
    probe: bool = False
    """Whether each validation also exports, and reports the score of the decoded weights and the size of the
    artifact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe and not self.val_every:
            raise ValueError(
                "runtime.probe is part of validations, but runtime.val_every is 0; expected val_every >= 1 or no probe"
            )
