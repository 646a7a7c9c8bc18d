"""The search of tiles on a CPU: candidates, their order, recorded launches, and the lines for the tables."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from fake_gpu import made_up
from golfgpt_kernels._jit import INTERPRETING
from golfgpt_kernels._tiles import TABLES, TileTable

from bench import cases, tune

CPU = torch.device("cpu")
TINY = {case.name: case for case in cases.bench_cases(64, 32, ((64, 96),), 1)}
LINEAR = TINY["linear_relu2 64 x 32 x 64 forward"]
MLP = TINY["relu2_mlp 64 x 32 x 64 forward+backward"]
interpreted = pytest.mark.skipif(not INTERPRETING, reason="calls kernels on CPU tensors")

GEMM = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def test_candidates_are_powers_of_two_that_fit():
    tiles = tune.candidates(GEMM, 2, 227 * 1024)
    assert GEMM in tiles and len(tiles) > 100
    assert all(value & (value - 1) == 0 for tile in tiles for name, value in tile.items() if name != "num_stages")
    for tile in tiles:
        m, n, k = (tile[f"BLOCK_{axis}"] for axis in "MNK")
        assert (m + n) * k * 2 * tile["num_stages"] <= 227 * 1024
        assert m * n / (32 * tile["num_warps"]) <= 128, "accumulators in registers"
    assert len(tune.candidates(GEMM, 2, 99 * 1024)) < len(tiles)
    assert tune.candidates({"BLOCK": 4096, "num_warps": 1}, 4, 0)[0] == {"BLOCK": 1024, "num_warps": 1}


def test_search_starts_with_the_shipped_tile_and_walks_downhill():
    target = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    tiles = tune.candidates(GEMM, 2, 227 * 1024)

    def evaluate(batch):
        for tile in batch:
            yield "spills" if tile["num_stages"] == 6 else 100 + tune.distance(tile, target)

    steps = list(tune.best_first(GEMM, tiles, evaluate, 60))
    assert steps[0][0] == GEMM and len(steps) == len(tiles)
    tried = [tile for tile, _ in steps]
    assert tried.index(target) < len(tiles) / 2
    assert [tile for tile, _ in tune.best_first(GEMM, tiles, evaluate, -1)] == [GEMM], "when the time is up it ends"


@interpreted
def test_recorded_launches_are_those_of_the_table_with_its_tile():
    found = tune.units([LINEAR, MLP], CPU)
    assert {unit.kernel for unit in found} == {"linear_relu2_fwd", "relu2_mlp_dz", "weight_grad"}
    unit = next(unit for unit in found if unit.kernel == "linear_relu2_fwd")
    assert found[unit] == [LINEAR], "the case without backward is enough"
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    inputs = MLP.make(CPU, 0)
    with tune.recording({unit: tile}, run=True) as launches:
        out = MLP.run(inputs, "triton")
    (ours,) = (launch for launch in launches if launch.unit == unit)
    assert ours.options == tile and len(launches) > 1
    assert torch.equal(out["out0"], MLP.run(inputs, "triton")["out0"]), "and afterwards all is as before"
    select = TABLES["linear_relu2_fwd"].select(CPU, torch.bfloat16, 64)
    assert "unit" not in select


@interpreted
def test_evaluation_refuses_wrong_results_and_survives_errors(monkeypatch):
    monkeypatch.setattr(tune, "time_launches", lambda calls, device: float(len(calls)))
    monkeypatch.setattr(tune.Evaluation, "compile", lambda self, tiles: None)
    (unit,) = tune.units([LINEAR], CPU)
    evaluation = tune.Evaluation(unit, [LINEAR], CPU)
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    good, bad = evaluation([tile, {**tile, "BLOCK_M": 24}])
    assert good == 2.0 and isinstance(bad, str)
    evaluation.eager = [{"out0": torch.zeros_like(evaluation.eager[0]["out0"])}]
    assert "differs from eager" in next(evaluation([tile]))


def module_of(table: TileTable) -> ModuleType:
    """Where a table is, with the names that its tiles can be written with."""
    modules = [module for name, module in sys.modules.items() if name.startswith("golfgpt_kernels.")]
    return next(module for module in modules if any(value is table for value in vars(module).values()))


def searched(kernel: str, itemsize: int, size: int, launch: dict[str, int], stages: int) -> dict:
    this = {"kernel": kernel, "itemsize": itemsize, "size": size, "cases": ["a case"]}
    best = launch | {"num_stages": stages}
    return this | {"shipped": {"launch": launch, "us": 100.0}, "best": {"launch": best, "us": 90.0}}


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("kernel", sorted(TABLES))
def test_printed_tiles_go_into_their_table_as_they_are(kernel, sm, monkeypatch):
    """Where each of three sizes has another winner, two of which share a tile today."""
    table, sizes = TABLES[kernel], (4096, 8192, 2**30)
    searches = [
        searched(kernel, itemsize, size, dict(table.tile(sm, itemsize, size).launch), stages)
        for itemsize in (2, 4)
        for stages, size in enumerate(sizes, 10)
    ]
    result = made_up(gpu="NVIDIA H100 80GB HBM3", sm=sm, command=f"python -m bench.tune {kernel}", searches=searches)
    text = "\n".join(tune.tile_lines(this, result) for this in searches)
    assert max(map(len, text.splitlines())) <= 116, "in a table, within 120 columns"
    pasted = eval(f"[{text}]", vars(module_of(table)))
    assert "NVIDIA H100" in pasted[0].source and "90.0 us at size 4096, shipped 100.0" in pasted[0].source
    monkeypatch.setitem(TABLES, kernel, table)  # which the next line replaces
    new = TileTable(kernel, table.measure, *(tile for tile in table.tiles if tile.sm != sm), *pasted)
    for this in searches:
        assert new.tile(sm, this["itemsize"], this["size"]).launch == this["best"]["launch"]
    assert new.tile(sm, 2, 2**40).launch == searches[2]["best"]["launch"], "and there is one for larger sizes"
