"""A GPU that does not exist: what tests put in the place of torch.cuda, and an entry that was measured on it."""

from __future__ import annotations

import contextlib

import torch


class FakeCuda:
    """Streams, events and graphs that do their work on the CPU at once; a capture of `forbidden` fails."""

    def __init__(self, monkeypatch, forbidden=None):
        self.capturing, self.captured, self.replays, self.forbidden = False, 0, 0, forbidden
        nothing = contextlib.nullcontext
        for name, value in {
            "Stream": lambda device: self,
            "current_stream": lambda device: self,
            "Event": lambda enable_timing: self,
            "CUDAGraph": lambda: self,
            "device": lambda device: nothing(),
            "stream": lambda stream: nothing(),
            "graph": self.graph,
            "set_stream": lambda stream: None,
            "synchronize": lambda device: None,
            "is_available": lambda: True,
            "get_device_name": lambda device=None: "Fixture GPU",
            "get_device_capability": lambda device=None: (9, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def call(self, inputs):
        if self.capturing and inputs == self.forbidden:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured += self.capturing

    def replay(self):
        self.replays += 1

    def elapsed_time(self, end):
        return 2.0  # milliseconds

    def wait_stream(self, stream): ...

    record = synchronize = lambda self: None


def made_up(**fields):
    return {
        "op": "relu2_mlp", "sm": 90, "gpu": "Fixture GPU", "dtype": "bfloat16", "rows": 65536,
        "shape": [65536, 512, 1024], "direction": "forward+backward",
        "us": {"eager": 1000.0, "compile": 800.0, "triton": 500.0}, "spread": {}, "how": {}, "failed": {},
        "correct": True, "flops": 200_000_000_000, "bytes": 800_000_000,
        "torch": "2.11.0", "triton": "3.6.0", "command": "fixture", "date": "2026-01-01",
    } | fields  # fmt: skip
