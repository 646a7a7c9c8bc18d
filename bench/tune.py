"""Which tile is a kernel's best on this GPU? Whether the kernel is worth using is `python -m golfgpt_kernels tune`.

    python -m bench.tune [KERNEL ...] [--seconds N] [--out DIR]      search the tiles of all kernels, or of those named

Each tile table is searched at the sizes at which the benchmark's cases use it. Candidates are powers of two around the
shipped tile that fit into shared memory and registers; those nearest to the best so far are tried first, until the time
is up. A candidate counts if it compiles without spills and the op's results agree with eager's. Its time is that of the
kernel's own launches, recorded from a run of the op, in a CUDA graph. DIR/tiles-*.json, written after each candidate,
has all that was tried:

    gpu, sm, torch, triton, date, command
    searches   [{kernel, itemsize, size, cases, shipped, best, tried}]; shipped, best and each of tried are
               {launch: {...}, us} or {launch: {...}, failed: why}

The tiles printed last go into the tables as they are, in place of those that they were measured against.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from golfgpt_kernels import _cases, _jit, timing, tuning
from golfgpt_kernels._dispatch import slug
from golfgpt_kernels._tiles import TABLES, TileTable
from golfgpt_kernels.tuning import Case
from torch import Tensor

from bench.cases import CASES

RESULTS = Path(__file__).parent / "results"
Launch = Mapping[str, int]

# ---- recording launches


class Unit(NamedTuple):
    """What is searched at a time: a table where it serves operands of `itemsize` bytes and problems of `size`."""

    kernel: str
    itemsize: int
    size: int


@dataclass
class Recorded:
    unit: Unit | None  # whose tile it was launched with
    tile: Launch
    kernel: Callable
    grid: Sequence[int]
    device: torch.device
    args: tuple
    options: dict
    spills: int = 0

    def launch(self) -> None:
        _jit.launch(self.kernel, self.grid, self.device, *self.args, **self.options)


@contextlib.contextmanager
def recording(tiles: Mapping[Unit, Launch], run: bool) -> Iterator[list[Recorded]]:
    """Launches made meanwhile, with `tiles` in the place of those in the tables; without `run` they are not made."""
    recorded: list[Recorded] = []
    select, launch = TileTable.select, _jit.launch

    def select_here(table: TileTable, device: torch.device, dtype: torch.dtype, size: int) -> Launch:
        unit = Unit(table.kernel, dtype.itemsize, size)
        tile = tiles.get(unit) or select(table, device, dtype, size)
        return {**tile, "unit": unit}  # a launcher hands its tile on to the launch: that is how they are matched

    def launch_here(kernel, grid, device, *args, **options) -> None:
        unit = options.pop("unit", None)
        tile = tiles.get(unit, {})
        this = Recorded(unit, tile, kernel, grid, device, args, options)
        recorded.append(this)
        if run:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                this.spills = getattr(kernel[tuple(grid)](*args, **options), "n_spills", 0) or 0

    holders = [module for module in list(sys.modules.values()) if getattr(module, "launch", None) is launch]
    TileTable.select = select_here
    for module in holders:
        module.launch = launch_here
    try:
        yield recorded
    finally:
        TileTable.select = select
        for module in holders:
            module.launch = launch


def units(cases: Sequence[Case], device: torch.device) -> dict[Unit, list[Case]]:
    """The cases that meet each unit; those without backward where there are some, since they compute less."""
    found: dict[Unit, list[Case]] = {}
    for case in (case for case in cases if "triton" in case.columns):
        with recording({}, run=False) as launches:
            case.run(case.make(device, 0), "triton")
        for unit in {launch.unit: None for launch in launches if launch.unit}:
            found.setdefault(unit, []).append(case)
    return {unit: [c for c in met if not c.backward] or met for unit, met in found.items()}


# ---- candidates


def candidates(tile: Launch, itemsize: int, shared: int) -> list[dict[str, int]]:
    """Powers of two around `tile`, itself included, that can fit."""
    axes = []
    for name, value in tile.items():
        if name == "num_stages":
            axes.append(range(2, 7) if value > 1 else [value])
        elif name == "num_warps":
            axes.append([warps for warps in (value // 2, value, 2 * value) if 1 <= warps <= 16])
        else:
            least = min(value, 16 if name.startswith("BLOCK") else 1)
            axes.append([size for size in (value // 4, value // 2, value, 2 * value, 4 * value) if size >= least])
    tiles = (dict(zip(tile, values, strict=True)) for values in itertools.product(*axes))
    return [other for other in tiles if other == tile or fits(other, itemsize, shared)]


def fits(tile: Launch, itemsize: int, shared: int) -> bool:
    """For a GEMM: the operands of all stages in `shared` bytes, the accumulator in half of a thread's 255 registers."""
    if "BLOCK_K" not in tile:
        return True
    m, n, k = *(tile.get(name, tile.get("BLOCK")) for name in ("BLOCK_M", "BLOCK_N")), tile["BLOCK_K"]
    return (m + n) * k * itemsize * tile.get("num_stages", 1) <= shared and m * n <= 128 * 32 * tile["num_warps"]


def distance(tile: Launch, other: Launch) -> float:
    """In doublings."""
    return sum(abs(math.log2(value / other[name])) for name, value in tile.items())


Outcome = float | str  # microseconds, or why it failed


def best_first(
    shipped: Launch,
    tiles: Sequence[Launch],
    evaluate: Callable[[Sequence[Launch]], Iterator[Outcome]],
    seconds: float,
    batch: int = 8,
) -> Iterator[tuple[Launch, Outcome]]:
    """`shipped` first, then batches of those nearest to the best so far. What has begun when the time is up is finished
    one candidate later at most."""
    stop = time.monotonic() + seconds
    best, least = shipped, math.inf
    left, now = [tile for tile in tiles if tile != shipped], [shipped]
    while now:
        for tile, outcome in zip(now, evaluate(now), strict=False):
            yield tile, outcome
            if isinstance(outcome, float) and outcome < least:
                best, least = tile, outcome
            if time.monotonic() > stop:
                return
        left.sort(key=lambda tile: distance(tile, best))
        now, left = left[:batch], left[batch:]


# ---- evaluation


class Evaluation:
    """Outcomes of tiles of one unit, over all cases that meet it."""

    def __init__(self, unit: Unit, cases: Sequence[Case], device: torch.device):
        self.unit, self.device = unit, device
        self.cases = list(cases)
        self.sets = [_cases.input_sets(case, device) for case in cases]
        self.eager = [case.run(case.make(device, 0)) for case in cases]
        self.allowed = [_cases.allowed_difference(case, device) for case in cases]

    def __call__(self, tiles: Sequence[Launch]) -> Iterator[Outcome]:
        self.compile(tiles)
        for tile in tiles:
            try:
                yield self.outcome(tile)
            except Exception as error:  # compiler, out of resources, a launcher that refuses: the search goes on
                yield tuning.reason(error)

    def compile(self, tiles: Sequence[Launch]) -> None:
        """All at once, into Triton's cache. What fails here fails again when it is launched, and is reported then."""
        from triton import AsyncCompileMode

        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for tile in tiles:
                with contextlib.suppress(Exception):
                    for this in self.record(self.cases[0], self.sets[0][0], tile, run=False)[1]:
                        this.kernel.warmup(*this.args, grid=tuple(this.grid), **this.options)

    def record(self, case: Case, inputs: tuple[Tensor, ...], tile: Launch, run: bool) -> tuple[dict, list[Recorded]]:
        with recording({self.unit: tile}, run) as launches:
            outputs = case.run(inputs, "triton")
        return outputs, [this for this in launches if this.unit == self.unit]

    def outcome(self, tile: Launch) -> Outcome:
        total = 0.0
        for case, sets, eager, allowed in zip(self.cases, self.sets, self.eager, self.allowed, strict=True):
            outputs, launches = self.record(case, case.make(self.device, 0), tile, run=True)
            if spills := max(this.spills for this in launches):
                return f"spills {spills} registers"
            if wrong := _cases.disagreement(outputs, eager, allowed):
                return wrong
            del outputs
            calls = [self.record(case, inputs, tile, run=True)[1] for inputs in sets]
            total += time_launches(calls, self.device)
        return total


def time_launches(calls: Sequence[Sequence[Recorded]], device: torch.device) -> float:
    def run(launches: Sequence[Recorded]) -> None:
        for this in launches:
            this.launch()

    took = timing.time_us(run, calls, device, seconds=0.1)
    if took.how:
        raise RuntimeError(took.how)
    return took.us


# ---- search


def search(kernels: Sequence[str], device: torch.device, seconds: float, result: dict, file: Path) -> None:
    """Fill result["searches"], and write it after every candidate."""
    stop = time.monotonic() + seconds
    properties = torch.cuda.get_device_properties(device)
    found = [(u, cases) for u, cases in units(CASES, device).items() if not kernels or u.kernel in kernels]
    for done, (unit, cases) in enumerate(found):
        share = (stop - time.monotonic()) / (len(found) - done)
        if share <= 0:
            print(f"{unit.kernel}, size {unit.size}: not searched, the time is up")
            continue
        shipped = dict(TABLES[unit.kernel].select(device, _DTYPE[unit.itemsize], unit.size))
        this = {**unit._asdict(), "cases": [case.name for case in cases], "shipped": None, "best": None, "tried": []}
        result["searches"].append(this)
        tiles = candidates(shipped, unit.itemsize, properties.shared_memory_per_block_optin)
        evaluation = Evaluation(unit, cases, device)
        for tile, outcome in best_first(shipped, tiles, evaluation, share):
            row = {"launch": dict(tile)} | ({"us": outcome} if isinstance(outcome, float) else {"failed": outcome})
            this["tried"].append(row)
            if tile == shipped:
                this["shipped"] = row
            if "us" in row and (this["best"] is None or row["us"] < this["best"]["us"]):
                this["best"] = row
            tuning.write_json(file, result)
        del evaluation
        torch.cuda.empty_cache()
        print(summary(this, len(tiles)), flush=True)
    print("\n" + "\n".join(tile_lines(this, result) for this in result["searches"] if this["best"]))


_DTYPE = {2: torch.bfloat16, 4: torch.float32}


def summary(this: dict, total: int) -> str:
    times = " -> ".join(
        f"{row['us']:.1f} us" if row and "us" in row else "none" for row in (this["shipped"], this["best"])
    )
    failed = sum("failed" in row for row in this["tried"])
    return (
        f"{this['kernel']:24} size {this['size']:<11} {times:24} {len(this['tried'])} of {total} tried, {failed} failed"
    )


def tile_lines(this: dict, result: dict) -> str:
    """The best tile as its table takes it."""
    shipped = this["shipped"].get("us")
    was = f"shipped {shipped:.1f}" if shipped else "the shipped one failed"
    fields = {"sm": result["sm"], "itemsize": this["itemsize"], "launch": this["best"]["launch"]}
    if (max_size := served(this, result)) is not None:
        fields["max_size"] = max_size
    lines = [f"    {name}={json.dumps(value)}," for name, value in fields.items()]
    where = f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}, {result['date']}: "
    how = f"{result['command']}: {this['best']['us']:.1f} us at size {this['size']}, {was}"
    lines += [f"    source={json.dumps(where)}", f"    {json.dumps(how)},"]
    return "\n".join((f"# {this['kernel']}, {', '.join(this['cases'])}", "Tile(", *lines, "),"))


def served(this: dict, result: dict) -> int | None:
    """The largest size that the tile is for: of several sizes that share a tile today each gets its own, the largest of
    them what that tile serves. On an architecture without tiles they share all sizes."""

    def bucket(search: dict) -> tuple[str, int, int | None]:
        tile = TABLES[search["kernel"]].tile(result["sm"], search["itemsize"], search["size"])
        return search["kernel"], search["itemsize"], tile.max_size if tile.sm == result["sm"] else None

    sizes = [search["size"] for search in result["searches"] if search["best"] and bucket(search) == bucket(this)]
    return bucket(this)[-1] if this["size"] == max(sizes) else this["size"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"tables to search: {', '.join(TABLES)}")
    parser.add_argument("--seconds", type=float, default=400.0, help="default: %(default)g")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - TABLES.keys():
        parser.error(f"no table for {', '.join(sorted(unknown))}; expected {', '.join(TABLES)}")
    if not torch.cuda.is_available():
        parser.exit(1, "bench.tune needs a CUDA device: interpreted kernels are never timed\n")
    device = torch.device("cuda", 0)
    command = " ".join(["python -m bench.tune", *options.kernels])
    result = tuning.environment(device) | {"date": time.strftime("%Y-%m-%d"), "command": command}
    file = options.out / f"tiles-{slug(result)}.json"
    search(options.kernels, device, options.seconds, result | {"searches": []}, file)


if __name__ == "__main__":
    main()
