"""bench.step_counts: what is committed bounds what this code launches and moves, and an added copy shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COUNTED = "2.13"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.__version__.startswith(COUNTED), reason=f"counts are of torch {COUNTED}, this is {torch.__version__}"
    ),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch without CUDA"),
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"),
]


def run(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_phase_launches_or_moves_more_than_committed():
    committed = json.loads((ROOT / "bench" / "results" / "step-counts.json").read_text())["baseline triton"]["phases"]
    counted = run("-m", "bench.step_counts", "baseline", "triton", "--json")
    assert counted.keys() == committed.keys()
    for phase, bound in committed.items():
        for figure in ("launches", "bytes", "flops"):
            assert counted[phase][figure] <= bound[figure], (phase, figure)


TEETH = """
import json
from dataclasses import replace

from bench import step_counts  # before torch
import golfgpt.model.layers as layers
from golfgpt.recipes import get

config = get("baseline").config
config = replace(config, model=replace(config.model, num_layers=1), data=replace(config.data, batch_tokens=65536))
before = step_counts.summary(step_counts.count(config, "eager"))
size = 2 * 65536 // step_counts.WORLD * config.model.model_dim
multiply = layers.linear
layers.linear = lambda x, w: multiply(x.transpose(1, 2).contiguous().transpose(1, 2), w)
after = step_counts.summary(step_counts.count(config, "eager"))
print(json.dumps({"before": before["forward"], "after": after["forward"], "size": size}))
"""


def test_a_copy_is_seen():
    """The attention's output, transposed on its way to the product, is read and written at least once more."""
    counted = run("-c", TEETH)
    more = {figure: counted["after"][figure] - counted["before"][figure] for figure in ("launches", "bytes")}
    assert more["launches"] >= 1 and more["bytes"] >= 2 * counted["size"]


LOST = """
from dataclasses import replace

from bench import step_counts  # before torch
from golfgpt.model.gpt import GPT
from golfgpt.recipes import get


def unbound(model, *args, weights=GPT.weights):
    out = weights(model, *args)
    for layer in out.layers:
        layer["resid_mix"] = layer["resid_mix"].unbind(0)
    return out


GPT.weights = unbound
config = get("baseline").config
step_counts.count(replace(config, model=replace(config.model, num_layers=3)), "eager")
"""


@pytest.mark.long
def test_a_column_sum_that_inductor_loses_is_an_error():
    """Unbound, the gradients of a layer's two mixing vectors are stacked; torch 2.13 compiles that wrongly."""
    done = subprocess.run([sys.executable, "-c", LOST], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "a column sum that is concatenated" in done.stderr
