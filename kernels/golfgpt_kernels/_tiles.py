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
        """Of the newest architecture that `device` reaches, the tile of the smallest bucket that holds `size`.

        Consumer Blackwell (sm_120) has the 99 KB of shared memory of sm_86 and gets the tiles of sm_80.
        """
        sm = compute_capability(device)
        sm = 80 if sm >= 120 else sm
        reached = [t for t in self.tiles if t.sm <= sm and t.itemsize == dtype.itemsize]
        newest = max(t.sm for t in reached)
        fitting = [t for t in reached if t.sm == newest and (t.max_size is None or size <= t.max_size)]
        return min(fitting, key=lambda t: float("inf") if t.max_size is None else t.max_size).launch


TABLES: dict[str, TileTable] = {}


def gemm_tile(sm: int, itemsize: int, m: int, n: int, k: int, warps: int, stages: int) -> Tile:
    """The tile of a kernel whose blocks are BLOCK_M x BLOCK_N of output and BLOCK_K along the sum."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    return Tile(sm=sm, itemsize=itemsize, launch=blocks)


INTERPRETED_GEMM = (gemm_tile(0, 2, 32, 32, 32, 4, 1), gemm_tile(0, 4, 32, 32, 32, 4, 1))


def compute_capability(device: torch.device) -> int:
    """90 for 9.0; 0 for CPU tensors, which the interpreter computes."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
