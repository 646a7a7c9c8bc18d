"""The launch templates: their syntax, their pins, every golfgpt option in them, and two hosts for real."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from golfgpt import cli
from golfgpt.config import RunConfig
from golfgpt.errors import UsageError

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FILES = sorted(p for p in EXAMPLES.iterdir() if p.name != "README.md" and p.is_file())
SHELL = [p for p in FILES if p.suffix in (".sh", ".sbatch")]
CALL = re.compile(r"((?:torchrun_nodes|two_hosts)\.sh \S+|golfgpt (?:data )?[a-z]+)( +--[^\n\"'#`]+)")


def commands(path: Path) -> list[list[str]]:
    """Every golfgpt command line with options in a file, also in its comments, as arguments of `golfgpt`."""
    text = re.sub(r"\\\n[# ]*", " ", path.read_text(encoding="utf-8"))
    found = []
    for program, options in CALL.findall(text):
        script, _, rest = program.partition(" ")
        found.append([*(["train", "--name", rest] if script.endswith(".sh") else rest.split()), *shlex.split(options)])
    return found


def parses(argv: list[str]) -> bool:
    name = next(name for name in cli.COMMANDS if argv[: len(name.split())] == name.split())
    command = cli.COMMANDS[name]
    try:
        cli._parse(command.args, name, argv[len(name.split()) :], RunConfig() if command.start else None)
    except UsageError:
        return False
    return True


def test_every_template_says_whether_it_was_run():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        head = path.read_text(encoding="utf-8")[:600]
        assert re.search(r"[Nn]ot run|Run with torch", head), path
        row = next(line for line in table.splitlines() if f"({path.name})" in line)
        assert ("not run" in row) == ("Not run." in head), path


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_syntax(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text() and (path.suffix == ".sbatch" or os.access(path, os.X_OK))


def test_yaml_python_and_dockerfile_syntax():
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    ast.parse((EXAMPLES / "modal_app.py").read_text())
    lines = re.sub(r"\\\n", " ", (EXAMPLES / "Dockerfile").read_text()).splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert words[0] == "FROM" and set(words) <= {"FROM", "RUN", "COPY", "WORKDIR"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_option_exists_and_every_version_is_pinned(path, capsys):
    assert commands(path)
    for argv in commands(path):
        assert parses(argv), f"{argv}: {capsys.readouterr().err}"
    for line in re.findall(r".*pip install (?!modal).*", path.read_text()):
        assert re.search(r"-c (/golfgpt/)?constraints\.txt", line), line


def test_an_unknown_option_is_found(tmp_path):
    file = tmp_path / "x.sh"
    file.write_text("examples/torchrun_nodes.sh first --recipe baseline \\\n  --data.pth data/x # why\n")
    (argv,) = commands(file)
    assert argv == ["train", "--name", "first", "--recipe", "baseline", "--data.pth", "data/x"] and not parses(argv)


@pytest.fixture
def launched(tmp_path) -> list[str]:
    """What torchrun_nodes.sh passes to torchrun, for a stand-in that prints its arguments."""
    stand_in = tmp_path / "bin" / "torchrun"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)

    def run(*args: str, **env: str) -> list[str]:
        env = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", **env}
        done = subprocess.run(
            [str(EXAMPLES / "torchrun_nodes.sh"), *args], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_a_run_that_exists_is_resumed(launched, tmp_path):
    new = launched("first", "--recipe", "small", "--data.path", "a b")
    assert new[new.index("-m") :] == [
        "-m",
        "golfgpt",
        "train",
        "--name",
        "first",
        "--recipe",
        "small",
        "--data.path",
        "a b",
    ]
    assert "--local-addr" not in new and new[new.index("--rdzv-conf") + 1] == "is_host=true"
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.json").touch()
    again = launched("first", "--recipe", "small", NODES="2", NODE="1", HEAD="h", ADDRESS="10.0.0.2")
    assert again[again.index("-m") :] == ["-m", "golfgpt", "train", "--resume", "runs/first"]
    assert again[again.index("--local-addr") + 1] == "10.0.0.2" and again[again.index("--nnodes") + 1] == "2"
    assert again[again.index("--rdzv-conf") + 1] == "is_host=false"


def namespaces_permitted() -> bool:
    if not shutil.which("ip") or os.geteuid() != 0:
        return False
    name = f"golf{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return True


@pytest.mark.long
def test_two_hosts_train_as_two_processes_do(tmp_path, corpus):
    """Network namespaces, gloo: the same model.golf, byte for byte."""
    if not namespaces_permitted():
        pytest.skip("needs root, iproute2 and the right to create network namespaces")
    torchrun = shutil.which("torchrun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert torchrun, "torchrun comes with torch"
    env = os.environ | {
        "PATH": f"{Path(torchrun).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }  # fmt: skip
    options = {
        "data.path": corpus, "runtime.device": "cpu", "model.vocab-size": 384, "model.num-layers": 2,
        "model.model-dim": 32, "model.num-heads": 2, "model.num-kv-heads": 1, "model.mlp-hidden": 48,
        "schedule.max-steps": 4, "schedule.max-seconds": None, "data.batch-tokens": 512, "data.seq-len": 64,
        "eval.window": 64, "eval.stride": 64, "eval.max-tokens": 1000, "runtime.compile": "off",
        "runtime.dtype": "float32",
        "budget.code-bytes": 60_000,
    }  # fmt: skip
    argv = ["--recipe", "demo", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    one = [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "golfgpt", "train", "--name", "one"]
    for command in ([str(EXAMPLES / "two_hosts.sh"), "two", *argv], [*one, *argv]):
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert '"world_size": 2' in (tmp_path / "runs" / "two" / "env.json").read_text()
    assert (tmp_path / "runs/two/model.golf").read_bytes() == (tmp_path / "runs/one/model.golf").read_bytes()
