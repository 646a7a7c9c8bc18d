"""The size of the code that ships with an artifact: of the train_gpt.py that `golfgpt submit pack` makes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import golfgpt_kernels

import golfgpt
from golfgpt.config import RunConfig, to_dict
from golfgpt.files import write_json


def counted(config: RunConfig) -> RunConfig:
    """`config` with the size of its program in budget.code_bytes, if no number is given. It takes some ten seconds,
    once for each configuration: the size is kept under $XDG_CACHE_HOME/golfgpt/code, by configuration and version of
    the package. Raises ImportError if python-minifier is not installed."""
    if config.budget.code_bytes is not None:
        return config
    from golfgpt.submit.bundle import resolved, source
    from golfgpt.submit.pack import packed

    run = resolved(config)
    program = replace(run, seed=0, data=replace(run.data, path=None), budget=replace(run.budget, code_bytes=0))
    facts = json.dumps({"config": to_dict(program), "package": package_digest()}, sort_keys=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "golfgpt" / "code"
    file = cache / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
    size = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        size = int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
    if size is None:
        size = len(packed(source(program)))
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            write_json(file, {"bytes": size})
    return replace(config, budget=replace(config.budget, code_bytes=size))


@functools.cache
def package_digest() -> str:
    """SHA-256 of both packages' Python files."""
    digest = hashlib.sha256()
    for package in (golfgpt, golfgpt_kernels):
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
