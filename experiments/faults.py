"""Injects faults into runs of a small model, and checks that each goes on to the artifact of a run without one.

    python -m experiments.faults [--out FILE] [--only NAME ...] [--seconds N] [--processes 2]
    python -m experiments.faults --table

A job is what a user types: `golfgpt data prepare`, `golfgpt train`, and after a fault the same again, with --resume if
there is a run. Its steps are counted, not timed, and dtype, threads and kernels are stored, so the artifact and the
score must be, bit for bit, those of the job without a fault. Commands run in forks of this process, which has imported
torch. Each attempt is a line of FILE. A second call goes on: what survived in the same sources is not tried again.

A fault is a function of a folder and the number of the attempt. It asserts what surviving means.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import ctypes
import errno
import fcntl
import io
import itertools
import json
import math
import os
import pkgutil
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import rich.progress  # noqa: F401
import torch
import torch._dynamo  # which AdamW would import, seconds in each fork

from bench.experiment_report import markdown
from bench.experiments import environment, read_rows
from golfgpt.cli import main as golfgpt
from golfgpt.data import prepare  # noqa: F401
from golfgpt.files import sha256_file, write_json
from golfgpt.quant import artifact
from golfgpt.runs import read_config, read_run
from golfgpt.submit import size  # noqa: F401
from golfgpt.train import checkpoint, train  # noqa: F401

STEPS = 6
PREPARE = ["data", "prepare", "text.jsonl", "--out", "data", "--vocab-size", "384", "--val-fraction", "0.2"]
PREPARE += ["--workers", "1", "--shard-tokens", "20000", "--overwrite"]
TRAIN = (
    "train --recipe small --name x --data.path data --model.vocab-size 384 --model.num-layers 2 --model.model-dim 32 "
    "--model.num-heads 2 --model.num-kv-heads 1 --model.mlp-hidden 48 --data.batch-tokens 512 --data.seq-len 64 "
    "--data.microbatch-tokens None --data.spans 4 "
    f"--schedule.max-steps {STEPS} --schedule.max-seconds None --eval.max-tokens 2000 --eval.window 64 "
    "--budget.code-bytes 60000 --quant.compressor zstd "
    "--runtime.device cpu --runtime.dtype float32 --runtime.threads 1 --runtime.kernels eager "
    "--runtime.compile off --runtime.checkpoint-seconds 0.001 --runtime.peer-seconds 15"
).split()
STAGES = {
    "tokenizing": "golfgpt.data.prepare.prepare",
    "a step": "golfgpt.train.loop.Loop._launch",
    "a checkpoint": "golfgpt.train.checkpoint.save",
    "export": "golfgpt.train.export.Exporter.export",
    "scoring": "golfgpt.train.score.evaluate",
}
"""What is entered when a stage begins. A step and a checkpoint come STEPS times."""


# 1 A job in a folder


@dataclass(frozen=True)
class Process:
    """A command that runs in a fork."""

    pid: int
    log: Path

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit code, or minus the signal that ended it."""
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"not over after {seconds} s: {self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def ends(self, *codes: int, sentence: str = "") -> None:
        """It ends by one of `codes`: a positive one with one line of golfgpt's, which contains `sentence`."""
        code, said = self.wait(), self.said()
        assert code in codes, f"exit code {code}, expected {codes}: {said}"
        assert "Traceback" not in said, said
        lines = [line for line in said.splitlines() if line.startswith("golfgpt: ")]
        assert code <= 0 or (len(lines) == 1 and sentence in lines[0]), f"{len(lines)} sentences: {said}"


@dataclass(frozen=True)
class Job:
    """The job in `folder`, wherever it got to."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "x"

    def commands(self) -> list[list[str]]:
        """What is left to type."""
        begun = (self.run / "config.json").exists()
        return [PREPARE] * (not (self.folder / "data" / "manifest.json").exists()) + [
            ["train", "--resume", "runs/x"] if begun else TRAIN
        ]

    def start(
        self,
        *commands: Sequence[str],
        fault: Callable[[], None] = lambda: None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Run `commands` (default: all that is left) in a fork that calls `fault` first."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        commands = commands or self.commands()
        pid = os.fork()
        if pid:
            return Process(pid, log)
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(self.folder)
            os.environ.update(env or {})
            fault()
            for command in commands:
                if code := golfgpt(list(command)):
                    break
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def ranks(
        self, world: int, *commands: Sequence[str], faults: Mapping[int, Callable] | None = None
    ) -> list[Process]:
        """The same on `world` processes; `faults` by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        nothing, commands = (lambda: None), commands or self.commands()
        return [
            self.start(*commands, fault=(faults or {}).get(rank, nothing), env=env | {"RANK": str(rank)})
            for rank in range(world)
        ]

    def finish(self) -> None:
        """Type what is left."""
        self.start().ends(0)

    def outcome(self) -> dict[str, str]:
        """What must not depend on faults."""
        score = read_run(self.run).result["score"]
        return {
            "data": json.loads((self.folder / "data" / "manifest.json").read_text())["train"]["shards"][0]["sha256"],
            "artifact": sha256_file(self.run / "model.golf"),
            "score": f"{score['val_loss']!r} {score['tokens']}",
        }

    def goes_on(self, expected: Mapping[str, str]) -> None:
        """The job is continued to `expected`, and nothing is left over."""
        self.finish()
        assert (found := self.outcome()) == expected, f"{found}, expected {expected}"
        self.whole()
        left = [*self.run.rglob("*.tmp"), *self.folder.glob(".data*")]
        assert not left, f"left over: {left}"

    def whole(self) -> None:
        """Every file that is there is whole."""
        if (self.run / "config.json").exists():
            read_run(self.run), read_config(self.run)
        _, refused = checkpoint.latest(self.run / "checkpoints")
        assert not refused, refused
        if (self.run / "model.golf").exists():
            artifact.inspect(self.run / "model.golf")


@dataclass(frozen=True)
class Reference:
    """The job without a fault."""

    folder: Path
    seconds: Mapping[str, float]
    """How long each stage takes, by its name; of the first step and checkpoint."""
    expected: Mapping[int, Mapping[str, str]]
    """The outcome, by the number of processes."""

    @classmethod
    def make(cls, folder: Path) -> Reference:
        library = Path(sysconfig.get_path("stdlib"))
        with open(folder / "text.jsonl", "w", encoding="utf-8") as out:
            for file in sorted(library.glob("[a-b]*.py")):
                out.write(json.dumps({"text": file.read_text(encoding="utf-8")[:6000]}) + "\n")

        def timed() -> None:
            for stage, target in STAGES.items():
                mock.patch(target, _timed(pkgutil.resolve_name(target), folder / f"{stage}.seconds")).start()

        one = Job(folder)
        one.start(fault=timed).ends(0)
        seconds = {stage: float((folder / f"{stage}.seconds").read_text()) for stage in STAGES}
        two = prepared(folder, folder / "two")
        for process in two.ranks(2):
            process.ends(0)
        return cls(folder, seconds, {1: one.outcome(), 2: two.outcome()})


def _timed(function: Callable, file: Path) -> Callable:
    def timed(*args, **kwargs):
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if not file.exists():
                file.write_text(str(time.perf_counter() - begun))

    return timed


def prepared(reference: Path, folder: Path) -> Job:
    """A job in `folder` whose data are prepared."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(reference / "data", folder / "data")
    return empty(reference, folder)


def empty(reference: Path, folder: Path) -> Job:
    """A job in `folder` that has only its text."""
    folder.mkdir(exist_ok=True)
    shutil.copy(reference / "text.jsonl", folder)
    return Job(folder)


def on_entry(stage: str, act: Callable[[], None], time_of: int = 1) -> Callable[[], None]:
    """A fault: call `act` when a stage is entered for the `time_of`-th time."""

    def fault() -> None:
        target, calls = STAGES[stage], itertools.count(1)
        function = pkgutil.resolve_name(target)

        def entered(*args, **kwargs):
            if next(calls) == time_of:
                act()
            return function(*args, **kwargs)

        mock.patch(target, entered).start()

    return fault


class Moment:
    """A random moment of a job: in a stage, after a part of the time that it takes."""

    def __init__(self, reference: Reference, number: int, stages: Sequence[str] = tuple(STAGES)):
        draw = random.Random(number)
        self.stage = stages[number % len(stages)]
        self.delay = draw.random() * reference.seconds[self.stage]
        self._read, self._write = os.pipe()
        repeated = self.stage in ("a step", "a checkpoint")
        self.fault = on_entry(
            self.stage, lambda: os.write(self._write, b"."), draw.randint(1, STEPS if repeated else 1)
        )

    def wait(self) -> None:
        os.close(self._write)
        os.read(self._read, 1)
        time.sleep(self.delay)


# 2 The faults


@dataclass(frozen=True)
class Fault:
    """`attempt(reference, folder, number)` raises AssertionError if something does not survive."""

    name: str
    promise: str
    attempt: Callable[[Reference, Path, int], None]
    attempts: Callable[[Reference], int]
    alone: bool
    """Not at the same time as another such attempt, which could be given the same free port."""


FAULTS: dict[str, Fault] = {}


def fault(name: str, attempts: int | Callable[[Reference], int], promise: str, *, alone: bool = False) -> Callable:
    def register(attempt: Callable[[Reference, Path, int], None]) -> Callable:
        count = attempts if callable(attempts) else lambda reference: attempts
        FAULTS[name] = Fault(name, promise, attempt, count, alone)
        return attempt

    return register


@fault("SIGKILL", 50, "continued to the same artifact, bit for bit")
def killed(reference: Reference, folder: Path, number: int) -> None:
    job, moment = empty(reference.folder, folder), Moment(reference, number)
    process = job.start(fault=moment.fault)
    moment.wait()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    job.goes_on(reference.expected[1])


@fault("SIGTERM", 20, "state saved, exit code 143, continued to the same artifact")
def terminated(reference: Reference, folder: Path, number: int) -> None:
    job, moment = empty(reference.folder, folder), Moment(reference, number)
    process = job.start(fault=moment.fault)
    moment.wait()
    os.kill(process.pid, signal.SIGTERM)
    process.ends(128 + signal.SIGTERM, -signal.SIGTERM, 0)
    job.goes_on(reference.expected[1])


def _rank_killed(reference: Reference, folder: Path, number: int, world: int) -> None:
    job, victim = prepared(reference.folder, folder), number % world
    moment = Moment(reference, number, ("a step", "a checkpoint", "export", "scoring"))
    if moment.stage in ("a checkpoint", "export") and victim:  # which only rank 0 has
        moment = Moment(reference, number - number % 4, ("a step",))
    processes = job.ranks(world, faults={victim: moment.fault})
    moment.wait()
    os.kill(processes[victim].pid, signal.SIGKILL)
    killed, begun = processes.pop(victim).wait(), time.monotonic()
    for process in processes:
        over = killed == 0 or moment.stage in ("export", "scoring")  # nothing may be left to wait for
        process.ends(8, *[0] * over, sentence="another process of this run died")
    assert time.monotonic() - begun < 60
    for process in job.ranks(world - 1):
        process.ends(0)
    result, (*_, last) = read_run(job.run).result, read_run(job.run).steps()
    assert result["steps"] == STEPS and abs(last["loss"] - reference_loss(reference)) < 2e-3


def reference_loss(reference: Reference) -> float:
    return read_run(Job(reference.folder).run).steps()[-1]["loss"]


@fault("one of 2 ranks killed", 10, "the other ends within 60 s with one sentence, the run resumes on 1", alone=True)
def one_of_two_killed(reference: Reference, folder: Path, number: int) -> None:
    _rank_killed(reference, folder, number, 2)


@fault("one of 3 ranks killed", 10, "the others end in 60 s with one sentence each, the run resumes on 2", alone=True)
def one_of_three_killed(reference: Reference, folder: Path, number: int) -> None:
    _rank_killed(reference, folder, number, 3)


@fault("a rank killed before it joins", 2, "the other ends within 60 s with one sentence", alone=True)
def killed_before_joining(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)
    processes = job.ranks(2, faults={number: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    processes.pop(number).wait()
    processes[0].ends(8, sentence="another process of this run died")
    job.goes_on(reference.expected[1])


WORKER = """
import os, signal, sys
sys.path[:0] = {path!r}
from golfgpt.cli import main
from golfgpt.train.step import TrainStep
launch = TrainStep.backward
def backward(self, step, looping=None):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ({step}, "{rank}", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return launch(self, step, looping)
TrainStep.backward = backward
sys.exit(main(sys.argv[1:]))
"""


@fault("torchrun --max-restarts 1, a rank killed", 4, "recovers by itself, to the same artifact", alone=True)
def restarted(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)
    (folder / "worker.py").write_text(WORKER.format(path=sys.path, step=(0, 4)[number // 2], rank=number % 2))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", "worker.py", *TRAIN, "--runtime.peer-seconds", "90"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.outcome() == reference.expected[2]
    assert len(read_run(job.run).metrics("resume")) == number // 2, "resumed from no checkpoint"


class Disk:
    """Makes the `at`-th call that writes to files under `folder` fail with `code`, and with `lasts` all after it."""

    def __init__(self, folder: Path, code: int, at: float, *, lasts: bool):
        self.folder, self.code, self.at, self.lasts, self.calls = str(folder), code, at, lasts, 0

    def call(self, target: int | str | os.PathLike) -> None:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.abspath(target)
        if not path.startswith(self.folder) or path.endswith(".log"):
            return
        self.calls += 1
        if self.calls == self.at or (self.lasts and self.calls > self.at):
            raise OSError(self.code, os.strerror(self.code))

    def install(self) -> None:
        """In place of what golfgpt writes with, until the process ends."""
        disk, opened, fdopened, os_open = self, builtins.open, os.fdopen, os.open

        class Raw(io.FileIO):
            def write(self, data):
                disk.call(self.fileno())
                return super().write(data)

        def open_(file, mode="r", *args, **kwargs):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened(file, mode, *args, **kwargs)
            disk.call(file)
            return Raw(file, mode)

        def fdopen(fd, mode="r", *args, **kwargs):
            return io.BufferedWriter(Raw(fd, mode)) if "w" in mode else fdopened(fd, mode, *args, **kwargs)

        def low_open(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR):
                disk.call(path)
            return os_open(path, flags, *args, **kwargs)

        def before(function):
            return lambda target, *args, **kwargs: (disk.call(target), function(target, *args, **kwargs))[1]

        builtins.open, os.fdopen, os.open = open_, fdopen, low_open
        for name in ("fsync", "replace", "rename", "mkdir"):
            setattr(os, name, before(getattr(os, name)))

    @classmethod
    def count(cls, job: Job, *command: Sequence[str]) -> int:
        """How many such calls `command` makes."""
        disk = cls(job.folder, 0, math.inf, lasts=False)

        def report() -> None:
            disk.install()
            exit_, file = os._exit, job.folder / "calls.log"
            os._exit = lambda code: (file.write_text(str(disk.calls)), exit_(code))

        job.start(*command, fault=report).ends(0)
        return int((job.folder / "calls.log").read_text())


CODES = {"disk full": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT}


def _disk(reference: Reference, folder: Path, number: int, code: int, *, lasts: bool) -> None:
    job = prepared(reference.folder, folder)
    disk = Disk(folder, code, number + 1, lasts=lasts)
    job.start(TRAIN, fault=disk.install).ends(0, 3, sentence=os.strerror(code))
    job.whole()
    job.goes_on(reference.expected[1])


def _disk_of_prepare(reference: Reference, folder: Path, number: int, code: int) -> None:
    job = prepared(reference.folder, folder)
    smaller = [*PREPARE, "--vocab-size", "370"]
    disk = Disk(folder, code, number + 1, lasts=True)
    job.start(smaller, fault=disk.install).ends(0, 3, sentence=os.strerror(code))
    data = "data" if (folder / "data").exists() else ".data.golfgpt.old"  # the rename back fails too
    vocabulary = json.loads((folder / data / "manifest.json").read_text())["vocab_size"]
    job.start(["data", "verify", data]).ends(0)
    assert vocabulary in (370, 384)
    job.start(PREPARE).ends(0)
    job.goes_on(reference.expected[1])


def _calls(reference: Reference, command: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return Disk.count(prepared(reference.folder, Path(folder)), command)


for _name, _code in CODES.items():
    fault(
        f"{_name} from write call n on, every n of a run",
        lambda reference: _calls(reference, TRAIN),
        "files whole, trains on or ends with a sentence, continued to the same artifact",
    )(lambda reference, folder, number, code=_code: _disk(reference, folder, number, code, lasts=True))
    fault(
        f"{_name} from write call n on, every n of prepare --overwrite",
        lambda reference: _calls(reference, PREPARE),
        "the old data or the new ones are whole, in place or where the next prepare takes them from",
    )(lambda reference, folder, number, code=_code: _disk_of_prepare(reference, folder, number, code))

fault(
    "disk full at write call n only, every n of a run",
    lambda reference: _calls(reference, TRAIN),
    "files whole, trains on or ends with a sentence, continued to the same artifact",
)(lambda reference, folder, number: _disk(reference, folder, number, errno.ENOSPC, lasts=False))


@fault("standard output on a full disk, or its reader gone", 2, "the same artifact")
def nobody_reads(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)

    def fault() -> None:
        closed, pipe = os.pipe()
        os.close(closed)
        os.dup2(pipe if number else os.open("/dev/full", os.O_WRONLY), 1)

    job.start(fault=fault).ends(0)
    job.goes_on(reference.expected[1])


@fault("a file system of 40 to 760 kB", 10, "as above, after the file system was made larger")
def small_disk(reference: Reference, folder: Path, number: int) -> None:
    """In a user namespace of its own, which may mount a tmpfs."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    assert libc.unshare(0x10000000 | 0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWUSER, CLONE_NEWNS
    for file, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path("/proc/self", file).write_text(line)

    def mount(flags: int, kilobytes: int) -> None:
        options = f"size={kilobytes}k".encode()
        assert libc.mount(b"tmpfs", bytes(small), b"tmpfs", flags, options) == 0, os.strerror(ctypes.get_errno())

    small, data = folder / "small", prepared(reference.folder, folder).folder / "data"
    small.mkdir()
    mount(0, 40 + 80 * number)
    (small / "data").symlink_to(data)
    job = Job(small)
    job.start(TRAIN).ends(0, 3, sentence="No space left on device")
    mount(0x20, 100_000)  # MS_REMOUNT
    job.whole()
    job.goes_on(reference.expected[1])


@fault("every read of a shard is short", 1, "the same artifact")
def short_reads(reference: Reference, folder: Path, number: int) -> None:
    job, pread = prepared(reference.folder, folder), os.pread

    def short() -> None:
        os.pread = lambda fd, count, offset: pread(fd, min(count, 100), offset)

    job.start(fault=short).ends(0)
    job.goes_on(reference.expected[1])


@fault("EIO at read n of the shards", 30, "ends with a sentence that names the shard, continued to the same artifact")
def input_output_error(reference: Reference, folder: Path, number: int) -> None:
    job, pread, calls = prepared(reference.folder, folder), os.pread, itertools.count()

    def fails(fd: int, count: int, offset: int) -> bytes:
        if next(calls) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, count, offset)

    job.start(fault=lambda: setattr(os, "pread", fails)).ends(0, 3, sentence="data/golf_")
    job.goes_on(reference.expected[1])


def _shard(job: Job) -> Path:
    return job.folder / "data" / "golf_train_000000.bin"


@fault(
    "a shard cut at a step", STEPS, "ends with a sentence that names it, restored and continued to the same artifact"
)
def shard_cut(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)
    job.start(fault=on_entry("a step", lambda: os.truncate(_shard(job), 1030), number + 1)).ends(
        0, 3, sentence=f"{_shard(job).name} was changed while it was read"
    )
    job.start().ends(3, sentence=_shard(job).name)
    shutil.copy(reference.folder / "data" / _shard(job).name, _shard(job))
    job.goes_on(reference.expected[1])


@fault("a shard overwritten at a step", STEPS, "ends with a sentence that names it, restored and continued")
def shard_changed(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)

    def overwrite() -> None:
        time.sleep(0.01)  # the clock of a file system ticks 100 to 1,000 times a second
        with open(_shard(job), "r+b") as file:
            file.seek(1024)
            file.write(bytes(2000))

    job.start(fault=on_entry("a step", overwrite, number + 1)).ends(
        0, 3, sentence=f"{_shard(job).name} was changed while it was read"
    )
    shutil.copy(reference.folder / "data" / _shard(job).name, _shard(job))
    job.goes_on(reference.expected[1])


@fault("the data folder deleted at a step", STEPS, "the same artifact")
def data_deleted(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)
    job.start(fault=on_entry("a step", lambda: shutil.rmtree(folder / "data"), number + 1)).ends(0)
    shutil.copytree(reference.folder / "data", folder / "data")
    assert job.outcome() == reference.expected[1]


@fault("the wall clock jumps by years at every look", 2, "the same artifact")
def clock_jumps(reference: Reference, folder: Path, number: int) -> None:
    job, draw, now = prepared(reference.folder, folder), random.Random(number), time.time
    job.start(fault=lambda: setattr(time, "time", lambda: max(0.0, now() + draw.uniform(-1e9, 1e9)))).ends(0)
    assert job.outcome() == reference.expected[1]


@fault(
    "a NaN or infinite gradient on one of 2 ranks",
    8,
    "both end with exit code 5, the state saved, continued",
    alone=True,
)
def bad_gradient(reference: Reference, folder: Path, number: int) -> None:
    job, value = prepared(reference.folder, folder), (math.nan, math.inf)[number % 2]
    rank, at = number // 2 % 2, (0, STEPS - 1)[number // 4]

    def spoil() -> None:
        from golfgpt.train.step import TrainStep

        total = TrainStep.sum

        def spoiled(self, step, *args):
            if step == at:
                self.flat.gradients[3] = value
            return total(self, step, *args)

        TrainStep.sum = spoiled

    for process in job.ranks(2, faults={rank: spoil}):
        process.ends(5, sentence=f"step {at}: ")
    assert checkpoint.latest(job.run / "checkpoints")[0].step == at
    for process in job.ranks(2):
        process.ends(0)
    assert job.outcome() == reference.expected[2]


@fault(
    "out of memory in the first step",
    4,
    "ends with advice, on 2 ranks the other with a sentence; starts again",
    alone=True,
)
def out_of_memory(reference: Reference, folder: Path, number: int) -> None:
    world, kind = 1 + number // 2, (torch.OutOfMemoryError, MemoryError)[number % 2]
    job, rank = prepared(reference.folder, folder), world - 1

    def spoil() -> None:
        mock.patch("golfgpt.train.step.TrainStep.backward", side_effect=kind("no room")).start()

    processes = job.ranks(world, faults={rank: spoil}) if world > 1 else [job.start(fault=spoil)]
    processes.pop(rank).ends(3, sentence="out of memory in the first step")
    for process in processes:
        process.ends(8, sentence="another process of this run died")
    job.goes_on(reference.expected[1])


@fault("the run folder copied while it is written", 10, "run and copy end with the same artifact")
def copied(reference: Reference, folder: Path, number: int) -> None:
    job, moment = prepared(reference.folder, folder), Moment(reference, number, ("a checkpoint", "export", "scoring"))
    process = job.start(fault=moment.fault)
    moment.wait()
    other = prepared(reference.folder, folder / "copy")
    with contextlib.suppress(shutil.Error):  # files that vanish meanwhile
        shutil.copytree(job.run, other.run)
    process.ends(0)
    job.goes_on(reference.expected[1])
    other.goes_on(reference.expected[1])


@fault(
    "a second process on the run folder",
    10,
    "it ends with exit code 7 and a sentence, the first with the same artifact",
)
def second_process(reference: Reference, folder: Path, number: int) -> None:
    job = prepared(reference.folder, folder)
    stage = ("a step", "a checkpoint", "export", "scoring")[number % 4]
    first = job.start(fault=on_entry(stage, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(first.pid, os.WUNTRACED)
    for command in (["train", "--resume", "runs/x"], TRAIN):
        job.start(command).ends(7, sentence="in use by another process")
    os.kill(first.pid, signal.SIGCONT)
    first.ends(0)
    job.goes_on(reference.expected[1])


@fault("prepare --overwrite killed at each rename", 2, "the next one leaves whole data and nothing else")
def killed_between_renames(reference: Reference, folder: Path, number: int) -> None:
    job, rename, calls = prepared(reference.folder, folder), os.rename, itertools.count()

    def kill(*args) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)

    process = job.start(PREPARE, fault=lambda: setattr(os, "rename", kill))
    assert process.wait() == -signal.SIGKILL
    job.start(["data", "verify", "data"]).ends(3 * number, sentence="rename it back")
    job.start([*PREPARE, "--vocab-size", "1"]).ends(3)
    job.start(["data", "verify", "data"]).ends(0)
    job.goes_on(reference.expected[1])


SAMPLE = {
    "SIGKILL": range(5),
    "SIGTERM": (1, 3),
    "one of 2 ranks killed": (1,),
    "disk full from write call n on, every n of a run": (2, 30, 60, 88),
    "quota from write call n on, every n of prepare --overwrite": (5, 20),
    "disk full at write call n only, every n of a run": (70,),
    "EIO at read n of the shards": (8,),
    "a shard cut at a step": (3,),
    "the run folder copied while it is written": (0,),
    "prepare --overwrite killed at each rename": (1,),
}
"""What the tests try, in half a minute."""


# 3 All of them


def attempt(each: Fault, reference: Reference, number: int, folder: Path) -> str:
    """Why it does not survive; empty if it does. In a fork and a session of its own."""
    found = folder / "found.json"
    pid = os.fork()
    if not pid:
        os.setsid()
        try:
            with open(reference.folder / "alone", "w") as lock:
                if each.alone:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                each.attempt(reference, folder, number)
            reason = ""
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, AssertionError) else traceback.format_exc()
        write_json(found, reason)
        os._exit(0)
    os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a failure left
    return json.loads(found.read_text()) if found.exists() else "the attempt died"


def attempts(reference: Reference, names: Iterable[str], most: int) -> list[tuple[Fault, int]]:
    """What is to be tried of the faults `names`: `most` attempts of each at most, first the first of each."""
    counts = {name: min(FAULTS[name].attempts(reference), most) for name in names}
    return sorted(
        ((FAULTS[name], number) for name in names for number in range(counts[name])), key=lambda pair: pair[1]
    )


def run(wanted: Callable[[Reference], list[tuple[Fault, int]]], file: Path, processes: int, seconds: float) -> None:
    """Try what `file` lacks of `wanted`, `processes` attempts at a time, and start none after `seconds`."""
    begun, facts, parent = time.monotonic(), environment(), os.getpid()
    with tempfile.TemporaryDirectory(prefix="faults-") as base, open(file, "ab", buffering=0) as out:
        reference = Reference.make(Path(base))
        rows = read_rows(file).items()
        done = {key for key, row in rows if row["survived"] and row["sources"] == facts["sources"]}
        waiting = [(each, number) for each, number in wanted(reference) if f"{each.name} {number}" not in done]
        print(f"{len(waiting)} attempts to go", flush=True)
        for worker in range(processes):
            if os.fork():
                continue
            for index, (each, number) in enumerate(waiting):
                if index % processes != worker:
                    continue
                if time.monotonic() - begun > seconds or os.getppid() != parent:  # which was killed
                    break
                started, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=base))
                why = attempt(each, reference, number, folder)
                row = {"key": f"{each.name} {number}", "fault": each.name, "number": number, "survived": not why}
                row |= {"why": why[-2000:], "seconds": round(time.monotonic() - started, 1), **facts}
                out.write((json.dumps(row) + "\n").encode())
                if why:
                    print(f"{each.name} {number}: {why}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        for _ in range(processes):
            os.wait()


def table(rows: Mapping[str, dict]) -> str:
    """Markdown: each fault with what was tried and what survived."""
    lines = []
    for each in FAULTS.values():
        mine = [row for row in rows.values() if row["fault"] == each.name]
        if mine:
            lines.append((each.name, f"{sum(row['survived'] for row in mine)} / {len(mine)}", each.promise))
    survived = sum(row["survived"] for row in rows.values())
    lines.append(("all", f"{survived} / {len(rows)}", ""))
    facts = {name: ", ".join(sorted({row[name] for row in rows.values()})) for name in ("machine", "torch", "date")}
    seconds = sum(row["seconds"] for row in rows.values())
    return "\n".join(
        (
            markdown(("fault", "survived / tried", "surviving means"), lines),
            "",
            f"{facts['machine']}, torch {facts['torch']}, {facts['date']}; {seconds / 60:.0f} minutes of attempts.",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/faults.jsonl"))
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3500.0, help="start no attempt after that time")
    parser.add_argument("--most", type=int, default=10**6, help="attempts of each fault")
    parser.add_argument("--sample", action="store_true", help="try a fixed sample, in half a minute")
    parser.add_argument("--table", action="store_true", help="print the table, try nothing")
    args = parser.parse_args(argv)
    sample = [(FAULTS[name], number) for name, numbers in SAMPLE.items() for number in numbers]
    if not args.table:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        wanted = partial(attempts, names=args.only, most=args.most)
        run((lambda reference: sample) if args.sample else wanted, args.out, args.processes, args.seconds)
    rows = read_rows(args.out)
    print(table(rows))
    return 0 if all(row["survived"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
