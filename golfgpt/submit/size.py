"""The size of the code that ships with an artifact: of the train_gpt.py that `golfgpt submit pack` makes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import golfgpt_kernels

import golfgpt
from golfgpt.config import RunConfig, to_dict
from golfgpt.errors import BudgetError
from golfgpt.files import read_json, write_json


def counted(config: RunConfig) -> RunConfig:
    """`config` with the size of its program without kernels in budget.code_bytes, if no number is given. It takes some
    ten seconds, once for each configuration: the size is kept under $XDG_CACHE_HOME/golfgpt/code, by configuration and
    version of the package. Raises ImportError if python-minifier is not installed, BudgetError if the program alone is
    over the budget."""
    if config.budget.code_bytes is not None:
        return config
    from golfgpt.submit.bundle import resolved, source
    from golfgpt.submit.pack import packed

    program = resolved(largest(config))
    facts = {"config": to_dict(program), "versions": versions(), "package": package_digest()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "golfgpt" / "code"
    file = cache / f"{digest}.json"
    size = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        size = read_json(file, dict[str, int])["bytes"]
    if size is None:
        size = len(packed(source(program)))
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            write_json(file, {"bytes": size})
    if size >= config.budget.artifact_bytes:
        raise BudgetError(
            f"the code takes {size:,} bytes and leaves nothing of budget.artifact_bytes "
            f"{config.budget.artifact_bytes:,} for a model; raise it"
        )
    return replace(config, budget=replace(config.budget, code_bytes=size))


@functools.cache
def package_digest() -> str:
    """SHA-256 of both packages' Python files and their paths."""
    digest = hashlib.sha256()
    for package in (golfgpt, golfgpt_kernels):
        root = Path(package.__file__).parent
        for file in sorted(root.rglob("*.py")):
            text = file.read_bytes()
            digest.update(f"{root.name}/{file.relative_to(root)} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def versions() -> list[str]:
    """Of what the size depends on beside the package."""
    return [sys.version, *map(metadata.version, ("python-minifier", "brotli"))]


def largest(config: RunConfig) -> RunConfig:
    """`config` with the longest values of what a run chooses only when it starts, so that no run of it has a larger
    program without kernels."""
    runtime, schedule = config.runtime, config.schedule
    runtime = replace(
        runtime,
        kernels="eager",
        graph="step" if runtime.graph == "auto" else runtime.graph,
        attention="flash3" if runtime.attention == "auto" else runtime.attention,
        compile="on" if runtime.compile == "auto" else runtime.compile,
    )
    if config.quant.method == "gptq" and schedule.max_seconds is not None and schedule.reserve_seconds is None:
        schedule = replace(schedule, reserve_seconds=min(99.999, 0.999 * schedule.max_seconds))
    data = replace(config.data, path="data/" + "x" * 32)
    return replace(config, seed=2**32, data=data, budget=replace(config.budget, code_bytes=0), runtime=runtime,
                   schedule=schedule)  # fmt: skip
