"""The guard against MKL's first calls. The fault itself comes in a few of a hundred processes and is not waited for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from golfgpt import vector_math
from golfgpt.config import RunConfig
from golfgpt.train.preflight import preflight
from golfgpt.train.run_folder import load
from golfgpt.train.train import train
from golfgpt.vector_math import FUNCTIONS

BEFORE_A_FORWARD = """
import sys, torch
from torch.overrides import TorchFunctionMode
from golfgpt.config import ModelConfig
from golfgpt.model.gpt import GPT
from golfgpt.vector_math import FUNCTIONS, resolve

calls = []

class Calls(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        calls.append((function.__name__, args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0))
        return function(*args, **(kwargs or {}))

with Calls():
    resolve()
assert {name for name, size in calls if size == 1} >= set(FUNCTIONS)
with Calls():
    config = ModelConfig(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1)
    GPT(config)(torch.ones(1, 8, dtype=int))
print(*{name for name, _ in calls})
"""


def test_every_function_of_vector_math_is_called_on_one_element_first():
    """And rotary embedding needs two of them: the names are those that a forward calls."""
    found = subprocess.run([sys.executable, "-c", BEFORE_A_FORWARD], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert {"cos", "sin"} <= set(found.stdout.split())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_half_is_in_the_domain(name):
    assert getattr(torch, name)(torch.tensor(0.5)).isfinite()


@pytest.mark.parametrize(
    "use",
    [
        lambda path: train(RunConfig(), path),
        lambda path: preflight(RunConfig(), lambda config: config),
        load,  # of eval, sample and exports
    ],
    ids=["train", "preflight", "load"],
)
def test_what_computes_resolves_it_first(use, tmp_path, monkeypatch):
    class ResolvedError(Exception):
        pass

    def resolve():
        raise ResolvedError

    monkeypatch.setattr(vector_math, "resolve", resolve)
    with pytest.raises(ResolvedError):
        use(tmp_path / "run")
    assert not (tmp_path / "run").exists()
