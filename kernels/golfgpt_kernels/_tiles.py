"""Tiles: the block sizes, warps and pipeline stages that a kernel is launched with, from tables.

They are never searched at run time: a search costs minutes, and eight ranks that search disagree and then sum in
different orders. Each kernel file declares its tables next to its kernels; `python -m bench.tune` searches, and its
winner is pasted there. `source` says where an entry comes from: "offline" was chosen from the compiler's report
(registers, shared memory, spills) and has never been timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

OFFLINE = "offline: fits without spills (bench/results/offline-*.json); never timed"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One row of a table. `launch` holds the block sizes (constexprs, upper case), num_warps and num_stages."""

    sm: int  # least compute capability, 90 for 9.0; 0 is the interpreter
    itemsize: int  # bytes of an operand's element: 2 for fp16 and bf16, 4 for fp32
    launch: Mapping[str, int]
    max_size: int | None = None  # largest problem that it serves, in the table's measure; None: any
    source: str = OFFLINE  # GPU, versions, command and date of the timing that chose it


class TileTable:
    """The tiles of one kernel. `measure` names what max_size counts, such as "rows" or "columns"."""

    def __init__(self, kernel: str, measure: str, *tiles: Tile):
        self.kernel, self.measure, self.tiles = kernel, measure, tiles
        TABLES[kernel] = self

    def select(self, device: torch.device, dtype: torch.dtype, size: int) -> Mapping[str, int]:
        return self.tile(compute_capability(device), dtype.itemsize, size).launch

    def tile(self, sm: int, itemsize: int, size: int) -> Tile:
        """Of the newest architecture that `sm` reaches, the tile of the smallest bucket that holds `size`.

        Consumer Blackwell (sm_120) has the 99 KB of shared memory of sm_86 and gets the tiles of sm_80.
        """
        sm = 80 if sm >= 120 else sm
        reached = [t for t in self.tiles if t.sm <= sm and t.itemsize == itemsize]
        newest = max(t.sm for t in reached)
        fitting = [t for t in reached if t.sm == newest and (t.max_size is None or size <= t.max_size)]
        return min(fitting, key=lambda t: float("inf") if t.max_size is None else t.max_size)


TABLES: dict[str, TileTable] = {}


# What the interpreter takes: small, since the blocks of a test are few.
INTERPRETED_GEMM = (
    Tile(sm=0, itemsize=2, launch={"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}),
    Tile(sm=0, itemsize=4, launch={"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}),
)
INTERPRETED_BLOCK = (
    Tile(sm=0, itemsize=2, launch={"BLOCK": 2048, "num_warps": 4}),
    Tile(sm=0, itemsize=4, launch={"BLOCK": 2048, "num_warps": 4}),
)


def compute_capability(device: torch.device) -> int:
    """90 for 9.0; 0 for CPU tensors, which the interpreter computes."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
