"""How the training step is compiled, and what torch.compile made of it, kept from run to run.

One file per GPU, torch, triton and shape of training. Compiling a full-size step takes minutes, which do not count as
training time but are paid for. The files are torch's own (`torch.compiler.save_cache_artifacts`), under
$XDG_CACHE_HOME/golfgpt/compile. Like torch's other caches they hold code: carry them between your own machines, and
take none from strangers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from golfgpt.config import RunConfig, to_dict
from golfgpt.files import write_bytes
from golfgpt.train.machine_cache import kept_file

# Inductor writes an intermediate result to memory when its expression has many operations or reads. On a GPU the norms,
# rotations and gains of attention are cheaper to compute where they are used: with these limits the compiled step moves
# 5.6 GB less of 54.0 (bench.step_counts, baseline). The gradients of up to 16 layers are stacked by one kernel for each
# bank, not by one for each layer (24 launches less); column sums share a kernel with row-wise work up to 32 reads, not
# 10 (0.3 GB less).
_GPU_OPTIONS = {
    "realize_opcount_threshold": 200,
    "realize_acc_reads_threshold": 64,
    "max_pointwise_cat_inputs": 16,
    "triton.mix_order_reduction_max_reads": 32,
}


def compile_loss(loss: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The loss of a training step, compiled for `device`. Each call compiles anew: torch would share what was compiled
    of one function, but does not see all that the result depends on, such as the attention backend."""

    def program(*args: Tensor | bool) -> Tensor:
        return loss(*args)

    program.__code__ = program.__code__.replace()  # torch keeps compiled programs with the code object
    known = torch._inductor.list_options() if device.type == "cuda" else ()
    options = {name: value for name, value in _GPU_OPTIONS.items() if name in known}  # not all torch versions have both
    return torch.compile(program, dynamic=False, fullgraph=True, options=options or None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, what a CPU compiles adds in a fixed order. Otherwise its threads add the gradients of embeddings with
    atomics, and equal steps differ by rounding (LOG.md)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def cache_file(config: RunConfig, dtype: torch.dtype, device: torch.device) -> Path:
    """The file of the compiled step of `config`; all that it computes is in the name's digest. It holds what the last
    run compiled, of all kernels and attention backends that it tried."""
    facts = {
        "model": to_dict(config.model),
        "quant": to_dict(config.quant),
        "data": {"seq_len": config.data.seq_len, "tokens": config.data.microbatch, "order": config.data.order},
        "dtype": str(dtype),
    }
    return kept_file("compile", device, facts, ".bin")


def load(file: Path) -> bool:
    """Hand the file to torch before anything is compiled; False if there is none that torch can read."""
    with contextlib.suppress(OSError):
        return torch.compiler.load_cache_artifacts(file.read_bytes()) is not None
    return False


def save(file: Path) -> None:
    """Write what was compiled so far, if anything was and the file can be written."""
    if artifacts := torch.compiler.save_cache_artifacts():
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, artifacts[0])


def graphs() -> int:
    """How many graphs this process has compiled so far."""
    utils = sys.modules.get("torch._dynamo.utils")  # not imported before something is compiled: it takes seconds
    return utils.counters["stats"]["unique_graphs"] if utils else 0
