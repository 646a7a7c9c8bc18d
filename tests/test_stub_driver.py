"""The host path of every kernel, from the call to what the CUDA driver is told, through a driver that runs nothing.

The offline gate compiles aligned operands. Here odd shapes and layouts are compiled too, and what triton makes of each
launch and of each TMA descriptor is held against the driver's documented limits.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from stub_driver import CASES, CONTIGUOUS

TESTS = Path(__file__).parent
GCC = shutil.which("gcc")
PYTHON_H = Path(sysconfig.get_path("include"), "Python.h")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="needs Linux on x86-64"),
    pytest.mark.skipif(GCC is None or not PYTHON_H.exists(), reason="triton's launcher needs gcc and Python.h"),
]

# Where the docstrings promise one launch for all matrices of a list; two for one whose specs differ in more than bits.
LAUNCHES = {
    "fake_quantize_banks clip=max": 1,
    "fake_quantize_banks clip=quantile": 1,
    "fake_quantize_banks clip=deviation": 1,
    "muon_momentum sums=False": 1,
    "muon_momentum sums=True": 1,
    "muon_update": 1,
    "muon_update_rows columns=None clip=max": 1,
    **{f"{op} {form}": count for op, count in (("muon_momentum", 1), ("muon_update", 2)) for form in CONTIGUOUS},
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    """libcuda.so.1, in a folder of its own."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # has cuda.h
    library = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    subprocess.run([GCC, "-shared", "-fPIC", "-I", include, TESTS / "stub_driver.c", "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def driven(stub, triton_cache) -> dict[str, dict]:
    """What came of each case, in a process whose libcuda is the stub and that does not interpret kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["LD_LIBRARY_PATH"] = f"{stub.parent}:{env.get('LD_LIBRARY_PATH', '')}"  # where it is loaded from
    env["TRITON_LIBCUDA_PATH"] = str(stub.parent)  # where triton's launcher is linked
    env |= {"TRITON_CACHE_DIR": triton_cache, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, TESTS / "stub_driver.py"], env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {rows[-1:]}: {done.stderr[-2000:]}"
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_the_driver_accepts(case, driven):
    row = driven[case]
    assert not row["raised"] and not row["refused"]
    assert row["launches"] == LAUNCHES.get(case, row["launches"]) > 0


def test_descriptors_were_checked(driven):
    """Triton could make them without the driver, as it does before sm_90."""
    assert driven["linear_relu2_fwd slope=0.0"]["descriptors"] == 3


# ---- the stub has teeth


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


def launch(library, grid=(132, 1, 1), block=(256, 1, 1), shared=232_448) -> int:
    return library.cuLaunchKernelEx(ctypes.byref(LaunchConfig(*grid, *block, shared)), None, None, None)


def encode(library, address=0, dims=(512, 64), stride=1024, box=(64, 128), swizzle=3) -> int:
    """A descriptor of bf16 (data type 9), rows `stride` bytes apart, with a swizzle of 16 << swizzle bytes."""
    buffer = ctypes.create_string_buffer(256)
    aligned = -ctypes.addressof(buffer) % 64 + ctypes.addressof(buffer)
    pointers = ctypes.c_void_p(aligned), 9, 2, ctypes.c_void_p(address)
    sizes = (ctypes.c_uint64 * 2)(*dims), (ctypes.c_uint64 * 1)(stride), (ctypes.c_uint32 * 2)(*box)
    return library.cuTensorMapEncodeTiled(*pointers, *sizes, (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, 0, 0)


@pytest.mark.parametrize(
    ("call", "wrong", "why"),
    [
        (launch, {}, None),
        (launch, {"grid": (0, 1, 1)}, "grid x"),
        (launch, {"grid": (1, 65_536, 1)}, "grid y"),
        (launch, {"block": (2048, 1, 1)}, "threads"),
        (launch, {"shared": 232_449}, "shared memory"),
        (encode, {}, None),
        (encode, {"address": 8}, "address"),
        (encode, {"dims": (0, 64)}, "dimension"),
        (encode, {"stride": 1000}, "multiple of 16"),
        (encode, {"stride": 1 << 40}, "below 2^40"),
        (encode, {"box": (64, 512)}, "side of the box"),
        (encode, {"box": (4, 128)}, "inner side"),
        (encode, {"box": (128, 128)}, "beyond the swizzle"),
        (encode, {"box": (64, 128), "swizzle": 2}, "beyond the swizzle"),
        (encode, {"box": (128, 128), "swizzle": 0}, None),
    ],
)
def test_the_stub_refuses(call, wrong, why, stub):
    library = ctypes.CDLL(str(stub))
    refused, text = ctypes.c_long.in_dll(library, "stub_refused"), ctypes.c_char_p()
    before = refused.value
    assert bool(call(library, **wrong)) == bool(why)
    assert refused.value - before == bool(why)
    library.cuGetErrorString(1, ctypes.byref(text))
    assert not why or why in text.value.decode()
