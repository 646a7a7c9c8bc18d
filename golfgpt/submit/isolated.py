"""Run a submission's program as on a machine without golfgpt. This EXECUTES the folder's code with the rights of the
user.

It runs in a copy, by `python -I` with an empty home and few environment variables, in a network namespace of its own
where the system permits one, and cannot import golfgpt, although that is installed here. This shows that an honest
program needs nothing else. It does not protect against a hostile one.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from golfgpt.errors import InputError
from golfgpt.submit.check import Finding, Folder
from golfgpt.submit.folder import ARTIFACT, PROGRAM

TOLERANCE = 1e-6
"""Bits per byte between the score of the artifact here and the one of its run."""
LOSS_TOLERANCE = 0.01
"""Nats between a step here and in the log; other machines round otherwise, and a wrong program differs by more."""

GUARD = """
import runpy, socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"golfgpt", "golfgpt_kernels", "tyro", "rich"}:
            raise ModuleNotFoundError(f"{name} is blocked: a submission runs alone", name=name)

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise OSError("the network is blocked: a submission runs alone")

sys.meta_path.insert(0, Blocked())
if sys.argv[1] == "sockets":
    socket.socket = NoSocket
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(path: Path, data: Path, *, steps: int = 3, seconds: float = 3600) -> list[Finding]:
    """Train `steps` steps, then score the artifact, each for at most `seconds`. Raises InputError if there is nothing
    to run, or no data."""
    if not data.is_dir():
        raise InputError(f"there is no folder {data}; expected the data that the runs were scored on")
    if not (path / PROGRAM).is_file():
        raise InputError(f"there is no {path / PROGRAM} to run")
    network, why = _namespace()
    alone = "python -I, empty home, golfgpt, tyro and rich blocked"
    if network:
        findings = [Finding("isolation", "ok", f"{alone}, own network namespace")]
    else:
        findings = [Finding("isolation", "not checked", f"{alone}; {why}, so only Python's sockets are blocked")]
    with tempfile.TemporaryDirectory(prefix="golfgpt-submit-") as folder:
        work = Path(folder)
        for name, check in (("trains", _trains), ("scores", _scores)):
            here = work / name
            shutil.copytree(path, here, symlinks=True)
            try:
                findings.append(Finding(f"--run {name}", "ok", check(path, here, network, data, steps, seconds)))
            except RunError as error:
                findings.append(Finding(f"--run {name}", "FAILED", str(error)))
    return findings


class RunError(Exception):
    """What went wrong in the program."""


def _trains(path: Path, here: Path, network: list[str], data: Path, steps: int, seconds: float) -> str:
    (here / ARTIFACT).unlink(missing_ok=True)
    output = _python(here, network, data, [], steps, seconds)
    losses = {int(step): float(loss) for step, loss in _losses(output)}
    if sorted(losses) != list(range(1, steps + 1)) or not all(map(math.isfinite, losses.values())):
        raise RunError(f"expected {steps} steps with finite losses, got {losses}: {_tail(output)}")
    if not (here / ARTIFACT).is_file():
        raise RunError(f"it wrote no {ARTIFACT}: {_tail(output)}")
    folder = Folder(path, 0)
    seed = folder.submission.get("artifact_seed")
    wanted = {int(step): float(loss) for step, loss in _losses(folder.logs[seed].text)} if seed in folder.logs else {}
    if not losses.keys() <= wanted.keys():
        return f"{steps} steps; the log of seed {seed} does not have these steps"
    far = {step: loss for step, loss in losses.items() if abs(loss - wanted[step]) > LOSS_TOLERANCE}
    if far:
        step, loss = next(iter(far.items()))
        raise RunError(f"the loss of step {step} is {loss}, that of the log of seed {seed} {wanted[step]}")
    same = "equal to" if all(losses[step] == wanted[step] for step in losses) else "near"
    return f"{steps} steps, losses {' '.join(f'{loss:.4f}' for loss in losses.values())}, {same} the log's"


def _scores(path: Path, here: Path, network: list[str], data: Path, steps: int, seconds: float) -> str:
    if not (here / ARTIFACT).is_file():
        raise RunError(f"there is no {ARTIFACT} to score")
    output = _python(here, network, data, [ARTIFACT], steps, seconds)
    # with test-time training, the adapted score comes last
    found = re.findall(r"^final_\S+ val_loss:\S+ val_bpb\w*:(\S+)", output, re.MULTILINE)
    if not found:
        raise RunError(f"it printed no score: {_tail(output)}")
    folder = Folder(path, 0)
    wanted = folder.results[folder.submission["artifact_seed"]]["val_bpb"]
    if not abs(float(found[-1]) - wanted) <= TOLERANCE:
        raise RunError(f"{ARTIFACT} scores {found[-1]} on {data}; its run scored {wanted:.8f}")
    return f"{ARTIFACT} scores {found[-1]}, its run scored {wanted:.8f}"


def _losses(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", text, re.MULTILINE)


def _namespace() -> tuple[list[str], str]:
    """The command that gives a process a network namespace of its own, or none and the reason."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        try:
            if subprocess.run([*command, "true"], capture_output=True, timeout=20).returncode == 0:
                return command, ""
        except (OSError, subprocess.TimeoutExpired):
            pass
    return [], "no network namespace is permitted here"


_KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LANG", "TRITON_INTERPRET")


def _python(here: Path, network: list[str], data: Path, args: list[str], steps: int, seconds: float) -> str:
    """The output of the program in `here`. Raises RunError if it fails or takes longer than `seconds`."""
    home, guard, log = here.parent / "home", here.parent / "guard.py", here.parent / f"{here.name}.out"
    home.mkdir(exist_ok=True)
    guard.write_text(GUARD, encoding="utf-8")
    env = {name: os.environ[name] for name in _KEPT if name in os.environ}
    env |= {"HOME": str(home), "TMPDIR": str(here.parent), "DATA_PATH": str(data.resolve()), "ITERATIONS": str(steps)}
    command = [*network, sys.executable, "-I", str(guard), "none" if network else "sockets", PROGRAM, *args]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, cwd=here, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RunError(f"{' '.join([PROGRAM, *args])} did not end within {seconds:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log.read_bytes()[-(2**20) :].decode(errors="replace")
    if code:
        raise RunError(f"{' '.join([PROGRAM, *args])} ended with exit code {code}: {_tail(output)}")
    return output


def _tail(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-3:])[-500:] or "no output"
