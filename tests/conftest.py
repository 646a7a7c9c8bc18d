"""Shared fixtures: a small real corpus prepared once per session, and a configuration that trains on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sysconfig
from collections import Counter
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as golfgpt.__main__ does, before torch is imported

import pytest
import torch
from blas import other_blas

from golfgpt.config import RunConfig

with contextlib.suppress(ImportError):  # bare GPU machines lack it
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)  # the same examples in every run of one version
    settings.load_profile("repeatable")

# A shell starts background jobs with SIGINT ignored, which every process they start inherits.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported


@pytest.fixture
def device() -> str:
    """Where kernels are tested: compiled on a GPU, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _threads():
    """Sums depend on the number of threads and tests compare runs bit for bit; tiny models gain nothing by two."""
    torch.set_num_threads(int(os.environ.get("GOLFGPT_TEST_THREADS", 1)))


@pytest.fixture(autouse=True, scope="session")
def _blas():
    """tests/cpus.py has a row of a BLAS that nobody has."""
    with other_blas() if os.environ.get("GOLFGPT_TEST_BLAS") == "other" else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(items):
    # Workers take whole files, in this order: a slow one at the end would keep one of them waiting.
    slow, tests = {item.path for item in items if "slow" in item.keywords}, Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True, scope="session")
def _cache(shared):
    """What earlier runs of this machine chose or compiled decides nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield


@pytest.fixture(scope="session")
def triton_cache(shared) -> str:
    """TRITON_CACHE_DIR of tests that compile for a GPU, some the same kernels."""
    return os.environ.get("TRITON_CACHE_DIR", str(shared / "triton"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder: some of the standard library's source, 384 tokens, about 60 kB of it for validation."""
    pytest.importorskip("zstandard")  # bare GPU machines lack it
    from golfgpt.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("[a-d]*.py"))
    with open(folder / "text.jsonl", "w", encoding="utf-8") as out:
        for file in files:
            out.write(json.dumps({"text": file.read_text(encoding="utf-8")[:8000]}) + "\n")
    prepare([folder / "text.jsonl"], folder / "data", vocab_size=384, val_fraction=0.2, workers=1)
    return folder / "data"


@pytest.fixture
def tiny(corpus) -> RunConfig:
    from models import tiny_config  # imports kernels, after TRITON_INTERPRET was set

    return tiny_config(corpus)
