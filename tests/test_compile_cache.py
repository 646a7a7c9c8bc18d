"""What one process compiled, another loads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from golfgpt.config import RunConfig
from golfgpt.train import compile_cache

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from golfgpt.train import compile_cache

file, x = Path(sys.argv[1]), torch.randn(64)
print(compile_cache.load(file), end=" ")
before = compile_cache.graphs()
torch.compile(lambda x: (x.sin() * 2 + 1).cumsum(0))(x)
print(compile_cache.graphs() - before, counters["inductor"]["fxgraph_cache_hit"], end=" ")
compile_cache.save(file)
print(file.exists())
"""


@pytest.mark.long
def test_another_process_finds_what_was_compiled(tmp_path):
    def run(cache: str) -> list[str]:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "kept" / "step.bin")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()

    assert run("first") == ["False", "1", "0", "True"]
    assert run("second") == ["True", "1", "1", "True"]


def test_a_file_that_torch_cannot_read_is_no_cache(tmp_path):
    (tmp_path / "bad.bin").write_bytes(b"not an archive")
    assert not compile_cache.load(tmp_path / "bad.bin") and not compile_cache.load(tmp_path / "none.bin")


def test_the_name_depends_on_what_shapes_the_graphs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, cpu = RunConfig(), torch.device("cpu")

    def name(config=config, dtype=torch.bfloat16):
        return compile_cache.cache_file(config, dtype, cpu)

    assert name() == name(replace(config, seed=5)) and name().parent == tmp_path / "golfgpt" / "compile"
    others = [
        name(dtype=torch.float32),
        name(replace(config, model=replace(config.model, mlp_hidden=992))),
        name(replace(config, quant=replace(config.quant, qat="r4"))),
        name(replace(config, data=replace(config.data, seq_len=512))),
    ]
    assert len({name(), *others}) == 5
