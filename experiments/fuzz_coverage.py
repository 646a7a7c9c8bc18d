"""experiments/fuzz.py with a coverage-guided fuzzer, for as long as there is time: pip install atheris.

    python -m experiments.fuzz_coverage TARGET -runs=10000        # further options of libFuzzer

libFuzzer changes the first file of the target, by its own ways and by ours, and keeps what reaches new lines.
It stops at the first exception that is not one of golfgpt.errors, and at a read of 10 s or 1 GB.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["golfgpt"]):
    from experiments.fuzz import TARGETS, make_files
    from golfgpt.errors import GolfError


def main() -> None:
    name, *options = sys.argv[1:]
    target, folder = TARGETS[name], Path(tempfile.mkdtemp())
    make_files(folder)
    file = target.files[0]
    original = (folder / file).read_bytes()

    def read(data: bytes) -> None:
        (folder / file).write_bytes(data)
        with contextlib.suppress(GolfError):
            target.read(folder, file)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, max_size)
        return target.change(rng, original)[:max_size]

    (folder / "corpus").mkdir()
    (folder / "corpus" / "valid").write_bytes(original)
    limits = ["-timeout=10", "-rss_limit_mb=1500", f"-max_len={4 * len(original)}"]
    atheris.Setup([sys.argv[0], str(folder / "corpus"), *limits, *options], read, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
