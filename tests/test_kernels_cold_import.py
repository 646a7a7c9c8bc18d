"""golfgpt_kernels imports and runs eagerly with triton blocked, and importing it starts no GPU driver."""

import subprocess
import sys

_BLOCKED = """
import sys
sys.modules["triton"] = None
import torch
import golfgpt_kernels as gk

x, w = torch.randn(3, 8), torch.randn(5, 8)
targets = torch.tensor([0, 4, 2])
gk.relu2_mlp(x, w, torch.randn(8, 5), impl="eager")
gk.fake_quant_linear(x, w, gk.RowQuant(bits=6), impl="eager")
gk.newton_schulz(w, impl="eager")
gk.softcap_cross_entropy(x, w, targets, impl="eager")
gk.token_logprobs(x, w, targets, impl="eager")
try:
    gk.newton_schulz(w, impl="triton")
except RuntimeError as error:
    print(error)
"""

_DRIVER = """
import golfgpt_kernels
from triton.runtime import driver
print(driver._active)
"""


def _run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_five_ops_run_with_triton_blocked():
    message = _run(_BLOCKED)
    assert "triton is not installed" in message
    assert "impl='eager' can" in message


def test_import_starts_no_driver():
    assert _run(_DRIVER) == "None"
