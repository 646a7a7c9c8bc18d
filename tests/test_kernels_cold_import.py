"""golfgpt_kernels imports and runs eagerly with triton blocked, and importing it starts no GPU driver."""

import subprocess
import sys

import pytest
from golfgpt_kernels._versions import too_old

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


@pytest.mark.parametrize(
    ("package", "version", "least"),
    [("torch", "2.9.1", "2.10"), ("torch", "1.13.1+cu117", "2.10"), ("triton", "3.5.1", "3.6")],
)
def test_older_releases_are_refused_by_version(package, version, least):
    assert too_old(package, version).startswith(f"golfgpt_kernels needs {package} >= {least}, found {version}: pip")


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cpu", "2.13.0a0+git1234567", "3.0.0"])
def test_others_are_not(version):
    assert too_old("torch", version) is None


def test_an_old_torch_is_an_import_error():
    message = _run(
        "import torch; torch.__version__ = '2.9.1'\n"
        "try: import golfgpt_kernels\n"
        "except ImportError as error: print(error)"
    )
    assert "needs torch >= 2.10, found 2.9.1" in message


def test_with_an_old_triton_auto_is_eager_and_triton_names_both_versions():
    pytest.importorskip("triton")
    message = _run(_BLOCKED.replace('sys.modules["triton"] = None', 'import triton; triton.__version__ = "3.5.1"'))
    assert "impl='triton' cannot run: golfgpt_kernels needs triton >= 3.6, found 3.5.1" in message


def test_import_starts_no_driver():
    assert _run(_DRIVER) == "None"
