"""The end of a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golfgpt.distributed import lost_peers
from golfgpt.errors import LostPeerError

WORKER = """
import importlib, os, time
from pathlib import Path

import torch
import torch.distributed as dist

from golfgpt.distributed import start


def gloo_threads(patience=0.0):
    # A joined thread can be listed a moment longer.
    end = time.monotonic() + patience
    while True:
        count = sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
        if not count or time.monotonic() >= end:
            return count
        time.sleep(0.01)


ranks = start("cpu")
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports torch.distributed.nn.functional
ranks.sum_(torch.ones(1))
during = gloo_threads()
ranks.close()
after = gloo_threads(patience=10)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
importlib.reload(importlib.import_module("torch.distributed.nn.functional"))  # as if it were imported only now
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
held = gloo_threads()
os.write(1, f"gloo {during > 0} {after} {held > 0}\\n".encode())
os._exit(0)  # the held threads could abort the process
"""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:1] Connection closed by peer"), LostPeerError),
        (torch.distributed.DistStoreError("1/2 clients joined"), LostPeerError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(raised, expected):
    with pytest.raises(expected) as caught, lost_peers(lambda: " Go on."):
        raise raised
    assert type(caught.value) is expected
    assert expected is RuntimeError or (caught.value.exit_code == 8 and str(caught.value).endswith(". Go on."))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted through Linux's /proc")
def test_close_ends_gloo_threads(tmp_path):
    """A thread left at the end of the interpreter aborts now and then, after the work is done (tests/exit_race.py). The
    second process group shows what `start` avoids: it is older than torch.distributed.nn.functional, which holds it."""
    (tmp_path / "main.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "main.py"], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["gloo True 0 True"] * 2
