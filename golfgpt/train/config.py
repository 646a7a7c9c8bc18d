"""Config of the execution of a run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, CountOrZero, NotNegative, Positive, Section

Device = Literal["auto", "cpu", "cuda"]
Tracker = Literal["none", "wandb", "trackio", "tensorboard"]

KERNELS = {
    "mlp": {"relu2_mlp": "triton", "linear_relu2": "triton"},
    "mlp_gluon": {"relu2_mlp": "gluon", "linear_relu2": "gluon"},
    "loss": {"softcap_cross_entropy": "triton", "token_logprobs": "triton"},
    "optimizer": {"newton_schulz": "triton", "muon_momentum_": "triton", "muon_update_": "triton"},
    "fake_quant": {"fake_quantize_rows": "triton", "quantize_rows": "triton", "muon_update_rows_": "triton"},
}
"""Parts of a step that runtime.kernels can name: ops of golfgpt_kernels, each with its implementation."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """Where and how a run executes. These fields change results only by rounding. What "auto" chose is stored with the
    run, so that a resumed run and its scores use the same; compilation of scores is eval.compile."""

    device: Device = "auto"
    """auto: cuda if available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of activations and of all matmuls, including Newton-Schulz. auto: bfloat16 on cuda; on a CPU, bfloat16 if
    it is clearly faster than float32, which is timed at the start and remembered. Parameters are float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward and backward. auto: on cuda; on a CPU where the run is long enough to repay the
    compilation, if the compiled step is faster. off: nor what is scored on cuda."""
    optimizer: Literal["replicated", "sharded"] = "replicated"
    """replicated: gradients are all-reduced, and every rank updates every matrix. sharded: each rank gets the gradients
    of its shard of the matrices, updates them, and sends the new weights to the other ranks."""
    graph: Literal["auto", "off", "optimizer", "step"] = "auto"
    """What is replayed as a CUDA graph, captured in the warm-up: nothing, the optimizer step, or that and forward and
    backward. Needs a GPU, compile and warmup_steps above 0. auto: the fastest."""
    kernels: str = "auto"
    """Where Triton kernels replace PyTorch in the ops of golfgpt_kernels: triton (everywhere, or an error if they
    cannot run), eager (nowhere), or some of mlp, mlp_gluon (instead of mlp, on an H100), loss, optimizer, fake_quant,
    separated by commas. auto: where the step is faster with them. With eager a run tries no other execution either."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"] = "auto"
    """Backend of scaled_dot_product_attention. auto: on a GPU, the backend with the fastest step of those that agree
    with math; on a CPU, the first that agrees."""
    warmup_steps: CountOrZero = 20
    """Steps to run and undo before the clock starts, if the step is compiled."""
    threads: CountOrZero = 0
    """CPU threads for torch; 0: torch's default, or half of it where a step on a CPU is faster with it."""
    checkpoint_seconds: NotNegative = 60.0
    """Seconds between checkpoints, which are not counted as training time; 0: only at the end or on a signal."""
    peer_seconds: Positive = 600.0
    """Seconds without an answer from another process after which a process ends; a killed one is noticed at once.
    Nothing that rank 0 does alone takes as long."""
    log_every: Count = 50
    """Steps between lines in the log and in the tracker (the first ten steps always have one). metrics.jsonl has every
    step."""
    val_every: CountOrZero = 0
    """Steps between validations of the unquantized weights, which are not counted as training time; 0: none."""
    val_tokens: Count | None = None
    """Tokens of the validation text that such a validation scores at most; None: eval.max_tokens."""
    tracker: Tracker = "none"
    """Where the numbers of metrics.jsonl go too: wandb (offline, unless WANDB_MODE says otherwise), trackio or
    tensorboard, each an extra of the package. A tracker that fails is switched off, and the run goes on."""
    probe: bool = False
    """Whether each validation also exports, and reports the score of the decoded weights and the size of the
    artifact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernels not in ("auto", "eager", "triton") and not set(self.kernels.split(",")) <= KERNELS.keys():
            raise ValueError(
                f"runtime.kernels is {self.kernels!r}; expected auto, eager, triton, or some of {','.join(KERNELS)}"
            )
        if self.probe and not self.val_every:
            raise ValueError(
                "runtime.probe is part of validations, but runtime.val_every is 0; expected val_every >= 1 or no probe"
            )
