"""The run folder: all files of a run. Only one process at a time writes to it.

config.json      resolved config, read strictly       metrics.jsonl   append-only, one object per line
env.json         versions, hardware, command          train.log       lines in the published scripts' format
checkpoints/     resumable state                      tokenizer.model copy of the tokenizer
model.golf       the artifact                         result.json     score and bytes of model.golf
eval_partial_R.json  partial sums of rank R from an unfinished `golfgpt eval`
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import torch
from torch import nn

from golfgpt import vector_math
from golfgpt.config import RunConfig
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import BusyError, InputError
from golfgpt.files import write_bytes, write_json
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import of_kind, parameter_table
from golfgpt.optim.averaging import Average
from golfgpt.quant import artifact
from golfgpt.runs import RUNS, artifact_file, read_config, taken, torchrun_id, write_config
from golfgpt.train import checkpoint


class RunFolder:
    """A run folder, locked by this process until `close`."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.artifact = path / "model.golf"
        self._lock = filelock.FileLock(path / ".lock")
        self._files: dict[str, BinaryIO] = {}
        self._warned = False
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BusyError(
                f"{path} is in use by another process; wait until it ends (golfgpt watch follows a run), or start "
                "another run under another --name"
            ) from None
        for left in (*path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):  # of a process killed while writing
            left.unlink(missing_ok=True)
        metrics = path / "metrics.jsonl"
        if metrics.exists() and not (data := metrics.read_bytes()).endswith(b"\n"):
            write_bytes(metrics, data[: data.rfind(b"\n") + 1])  # drop a line cut off by a kill or a full disk

    @classmethod
    def create(cls, path: Path, config: RunConfig, tokenizer: bytes) -> RunFolder:
        """Start a new run. Raises InputError if the folder already holds a run, BusyError if it is in use."""
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        if (path / "config.json").exists():
            folder.close()
            raise taken(path)
        folder.checkpoints.mkdir(exist_ok=True)
        write_json(path / "env.json", environment())
        write_bytes(path / "tokenizer.model", tokenizer)
        write_config(path, config)  # last, because a folder with this file is a run
        return folder

    def discard(self) -> None:
        """Delete the run if it has neither checkpoint nor artifact, so that its name can be used again. Files of others
        in its folder stay."""
        if any(self.checkpoints.iterdir()) or self.artifact.exists():
            return
        for name in ("config.json", "metrics.jsonl", "train.log", "env.json", "tokenizer.model", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        above = [folder for folder in self.path.parents if RUNS in folder.parents]  # of a name like FOLDER/NAME
        with contextlib.suppress(OSError):  # one is not empty
            for folder in (self.checkpoints, self.path, *above):
                folder.rmdir()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open and lock an existing run. Raises InputError if there is none, BusyError if it is in use."""
        read_config(path)
        return cls(path)

    def metric(self, kind: str, **values: Any) -> None:
        """Append one object to metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps({"kind": kind, "time": round(time.time(), 3), **values}))

    def log(self, line: str) -> None:
        """Append one line to train.log."""
        self._append("train.log", line)

    def _append(self, name: str, line: str) -> None:
        """Append a line to a file. A full disk must not end the run, so an OSError is only reported, once.

        Files stay open, since a step waits for this: on network file systems closing one waits for the server.
        """
        try:
            if name not in self._files:
                self._files[name] = open(self.path / name, "ab", buffering=0)  # noqa: SIM115
            self._files[name].write(f"{line}\n".encode())
        except OSError as error:
            if not self._warned:
                with contextlib.suppress(OSError):
                    print(f"warning: {self.path / name}: {error.strerror}; the run continues", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._lock.release()


def environment() -> dict[str, Any]:
    """What is needed to repeat the run: versions, hardware, command, time."""
    cuda = torch.cuda.is_available()
    return {
        "golfgpt": __import__("golfgpt").__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "command": ["golfgpt", *sys.argv[1:]],
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "torchrun": torchrun_id(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def load(path: str | os.PathLike) -> tuple[GPT, Tokenizer]:
    """Load the model from `path`/model.golf, and its tokenizer.

    `path` is a run folder, or a .golf file with tokenizer.model in the same folder. The model is in float32 on the CPU.
    Raises InputError if a file is missing or damaged, or if the tokenizer is not the one used in training.
    """
    vector_math.resolve()
    file = artifact_file(Path(path))
    loaded = artifact.read(file)
    tokenizer_file = file.parent / "tokenizer.model"
    if not tokenizer_file.is_file():
        raise InputError(f"there is no {tokenizer_file}; copy tokenizer.model of the run to this path")
    tokenizer = Tokenizer.from_file(tokenizer_file, loaded.info.tokenizer_sha256)
    if tokenizer.digest != loaded.info.tokenizer_sha256:
        raise InputError(
            f"{tokenizer_file} is not the tokenizer that {file} was trained with: its digest is "
            f"{tokenizer.digest[:16]}, expected {loaded.info.tokenizer_sha256[:16]}; copy tokenizer.model of the run "
            "to this path"
        )
    model = GPT(loaded.info.model)
    loaded.load_into(model)
    return model.eval(), tokenizer


def newest_weights(path: Path) -> tuple[checkpoint.Checkpoint, list[str]]:
    """The newest intact checkpoint of the run, its `model` being what an export at that step quantizes: the average of
    the weights if the run averages. And what is to be said about it: damaged newer ones, an average of too few steps.

    Raises InputError if there is no intact checkpoint, or none of the end of a run that has ended.
    """
    saved, refused = checkpoint.latest(path / "checkpoints")
    over = (path / "result.json").exists()
    if saved is None or (over and not saved.finished):
        reasons = f" ({'; '.join(refused.values())})" if refused else ""
        which = f" of its end, only one of step {saved.step}" if saved else ""
        hint = "; use --source artifact" if (path / "model.golf").exists() else ""
        raise InputError(f"{path} has no intact checkpoint{which}{reasons}{hint}")
    config = read_config(path)
    embeddings = of_kind(parameter_table(config.model), "embedding")
    bf16_params = frozenset(embeddings if config.optim.embed_dtype == "bfloat16" else ())
    average = Average({name: nn.Parameter(w) for name, w in saved.model.items()}, config.average, bf16_params)
    average.load_state(saved.average)
    notes = [f"{reason}; an older checkpoint is used" for reason in refused.values()]
    if config.average.kind != "none" and saved.average and not average.ready:
        notes.append(f"{average.count} of {saved.step} steps are in the average, too few: these are the last weights")
    return replace(saved, model=saved.model | average.weights()), notes
