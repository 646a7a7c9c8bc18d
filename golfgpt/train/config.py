"""Where and how a run executes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, CountOrZero, NotNegative, Section

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """Where and how a run executes; no field changes what is computed beyond rounding."""

    device: Device = "auto"
    """auto: cuda where available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of activations and of all matmuls, Newton-Schulz's too; auto: bfloat16 on cuda; on a CPU bfloat16 where it
    is clearly faster than float32, timed at the start and remembered. Parameters are float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward and backward; auto: on cuda only."""
    optimizer: Literal["replicated", "sharded"] = "replicated"
    """replicated: gradients are all-reduced and every rank orthogonalizes every matrix; sharded: each rank gets the
    gradients of its share of the matrices, steps those and hands out the new weights."""
    optimizer_graph: bool = False
    """Replay the whole optimizer step as one CUDA graph, captured in the warm-up; needs a GPU and warmup_steps."""
    kernels: Literal["auto", "eager", "triton"] = "auto"
    """Implementation of the ops of golfgpt_kernels; auto: the Triton kernel where a measurement shows it winning;
    eager: PyTorch; triton: the kernel, or an error if it cannot run."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"] = "auto"
    """Backend of scaled_dot_product_attention; auto: of those that agree with math the fastest, timed at the start on
    a GPU and remembered; on a CPU the first."""
    warmup_steps: CountOrZero = 20
    """Steps run and undone before the clock starts when compiling."""
    threads: CountOrZero = 0
    """CPU threads for torch; 0: torch's default."""
    checkpoint_seconds: NotNegative = 60.0
    """Seconds between checkpoints, off the training clock; 0: only at the end or on a signal."""
    log_every: Count = 50
    """Steps between train lines (the first ten steps are always logged)."""
    val_every: CountOrZero = 0
    """Steps between validations of the unquantized weights, off the training clock; 0: none."""
    probe: bool = False
    """Whether a validation also exports: the score of the weights as decoded, and the artifact's bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe and not self.val_every:
            raise ValueError("runtime.probe is part of validations: set runtime.val_every")
