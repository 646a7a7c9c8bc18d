"""The packed program with Triton kernels: equal to the package with them, and its kernels compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_bundle import toy

from golfgpt.config import RunConfig
from golfgpt.errors import InputError
from golfgpt.submit.bundle import decided_by, source
from golfgpt.submit.check import is_wrapper
from golfgpt.submit.facts import UNKNOWN
from golfgpt.submit.pack import packed
from golfgpt.submit.unwrap import read_code
from golfgpt.train.train import train


@pytest.fixture(scope="module")
def config(corpus) -> RunConfig:
    """As small as can be, because the interpreter takes a second for each thousand operations on tiles."""
    c = toy("mixed-qat", corpus)
    return replace(
        c,
        model=replace(c.model, num_layers=2, num_heads=2, num_kv_heads=1, model_dim=16, mlp_hidden=32),
        optim=replace(c.optim, muon_ns_steps=1),
        data=replace(c.data, batch_tokens=32, seq_len=16),
        eval=replace(c.eval, max_tokens=32),
        schedule=replace(c.schedule, max_steps=2),
        runtime=replace(c.runtime, kernels="triton"),
    )


@pytest.fixture(scope="module")
def program(config, tmp_path_factory) -> Path:
    """A folder with the packed file, and readable.py."""
    folder, text = tmp_path_factory.mktemp("program"), source(config)
    (folder / "readable.py").write_text(text)
    (folder / "train_gpt.py").write_bytes(packed(text))
    return folder


@pytest.mark.slow
def test_program_gives_what_the_package_gives(config, program, tmp_path):
    train(config, tmp_path / "run", quiet=True)
    log = (tmp_path / "run" / "train.log").read_text()
    losses = [line.split(" train_time")[0] for line in log.splitlines() if line.startswith("step:")]
    done = subprocess.run([sys.executable, "-I", "train_gpt.py"], cwd=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split(" train_time")[0] for line in done.stdout.splitlines() if line.startswith("step:")]
    assert found == losses and len(found) == 2
    assert (program / "model.golf").read_bytes() == (tmp_path / "run" / "model.golf").read_bytes()


def test_program_holds_the_kernels_that_run(program):
    code, readable = read_code(program), (program / "readable.py").read_text()
    wrapper, text = code.texts
    assert not code.unread and is_wrapper(wrapper) and "\n@" in text
    for kernel in ("linear_relu2_fwd", "relu2_mlp_dz", "softcap_logits_grad", "symmetric", "momentum", "update_rows"):
        assert f"@jit\ndef _{kernel}_kernel(" in readable, kernel
    for absent in (
        "relu2_mlp_ref",
        "newton_schulz_ref",
        "muon_update_ref_",
        "_relu2_dz_kernel",
        "runs_triton",
        "gluon(",
    ):
        assert f"def {absent}" not in readable, absent


COMPILE = """
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from bench.offline import OfflineDriver

names = {"__name__": "__main__", "__file__": "train_gpt.py"}
try:
    exec(open("train_gpt.py").read(), names)
except Exception:  # it has neither data nor a GPU
    pass
(kernel,) = (v for v in names.values() if isinstance(v, JITFunction) and v.arg_names[:3:2] == ["h_desc", "g_desc"])
driver.set_active(OfflineDriver(90))

def block(rows, columns):
    return TensorDescriptor.from_tensor(torch.empty(256, 256, dtype=torch.bfloat16), [rows, columns])

rows, ids = torch.empty(256), torch.empty(256, dtype=torch.int64)
done = kernel.warmup(
    block(128, 64), block(128, 64), block(128, 64), ids, rows, rows, rows, rows, 30.0, 256, 256, 256, -100,
    True, True, "ieee", BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, grid=(4,),
)
print(done.asm["ptx"])
"""


@pytest.mark.slow
def test_packed_kernels_compile_for_a_gpu(program, triton_cache):
    """From the packed file as it is: Triton finds their text, annotations and constants."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": triton_cache, "DATA_PATH": "nowhere", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=program, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ".target sm_90a" in done.stdout and "wgmma.mma_async" in done.stdout
    assert "ex2.approx" in done.stdout  # of a helper


@pytest.mark.parametrize(
    ("kernels", "op", "impl", "form"),
    [
        ("eager", "relu2_mlp", "auto", "eager"),
        ("triton", "relu2_mlp", "auto", "triton"),
        ("triton", "quantize_rows", "eager", "eager"),
        ("loss,optimizer", "token_logprobs", "auto", "triton"),
        ("loss,optimizer", "muon_update_rows_", "auto", "eager"),
        ("triton", UNKNOWN, "auto", UNKNOWN),
        ("triton", "relu2_mlp", UNKNOWN, UNKNOWN),
    ],
)
def test_what_kernels_decide(kernels, op, impl, form):
    decided = decided_by(kernels)
    assert decided["golfgpt_kernels._dispatch:resolve"](op, impl) is form
    runs = decided["golfgpt_kernels._dispatch:runs_triton"](op, impl, UNKNOWN, rows=UNKNOWN)
    assert runs is (UNKNOWN if form is UNKNOWN else form == "triton")


def test_gluon_is_refused(config):
    with pytest.raises(InputError, match="mlp_gluon"):
        source(replace(config, runtime=replace(config.runtime, kernels="mlp_gluon,loss")))
