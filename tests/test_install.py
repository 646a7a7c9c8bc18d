"""The distribution as a user has it: built, installed where the checkout is not, and used.

Offline: wheel and sdist, in environments that see torch, triton and what those require, as symbolic links to this
interpreter's packages, and in one that sees what [train] requires too. `make test-install` adds one from an index.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from golfgpt_kernels.tuning import NEEDS_GPU

requirements = pytest.importorskip("packaging.requirements")
pytest.importorskip("setuptools")

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """In an environment that tells it nothing of this checkout and this process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON_", "PYTEST_"))}
    environment |= {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, f"{done.args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """A wheel built from the source, and one built from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for name in ("golfgpt", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    run(sys.executable, "-c", build, cwd=source)
    (sdist,) = (folder / "sdist").glob("golfgpt-*.tar.gz")
    built = {}
    for name, path in (("wheel", source), ("sdist", sdist)):
        run(*PIP, "wheel", "--quiet", *OFFLINE, "--wheel-dir", folder / name, path, cwd=folder)
        (built[name],) = (folder / name).glob("golfgpt-*.whl")
    return built


def required(wheel: Path, extra: str) -> dict[str, requirements.Requirement]:
    """Requirements of the wheel on this machine, by name."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        text = file.read(name).decode()
    found = map(requirements.Requirement, re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE))
    return {each.name: each for each in found if not each.marker or each.marker.evaluate({"extra": extra})}


def with_all_they_require(names: Iterable[str]) -> set[str]:
    """Those of the names that are installed here, and all that they require."""
    found, ahead = set(), list(names)
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for each in map(requirements.Requirement, requires):
            if not each.marker or each.marker.evaluate({"extra": ""}):
                ahead.append(each.name)
    return found


def make_environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """A virtual environment that sees the wheel and, of this interpreter's packages, what it requires."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in with_all_they_require(required(wheel, extra)):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    python = folder / "bin" / "python"
    run(*PIP, "--python", python, "install", "--quiet", *OFFLINE, wheel, cwd=folder)
    return python


EAGER = """
import golfgpt_kernels, golfgpt_kernels.testing, torch
x, w_fc, w_proj = torch.ones(2, 8), torch.ones(16, 8), torch.ones(8, 16)
print(golfgpt_kernels.relu2_mlp(x, w_fc, w_proj, impl="eager").sum().item(), golfgpt_kernels.__file__)
"""


def use_kernels(python: Path) -> None:
    """What the base installation can do, and what it says of the rest."""
    folder = python.parent.parent
    value, file = run(python, "-c", EAGER, cwd=folder).stdout.split()
    assert float(value) == 2 * 8 * 16 * 8**2 and Path(file).is_relative_to(folder)
    if not torch.cuda.is_available():
        said = run(python, "-m", "golfgpt_kernels", "tune", cwd=folder, code=1).stderr
        assert said.splitlines()[-1] == NEEDS_GPU, "after torch's warning that there is no numpy"
    said = run(folder / "bin" / "golfgpt", "demo", cwd=folder, code=3).stderr
    assert re.fullmatch(r'golfgpt: \w+ is not installed: pip install "golfgpt\[train\]"\n', said)
    load = "import golfgpt; print(golfgpt.__version__, flush=True); golfgpt.load"
    done = run(python, "-c", load, cwd=folder, code=1)
    assert done.stdout == "0.1.0\n" and 'pip install "golfgpt[train]"' in done.stderr.splitlines()[-1]


def use_trainer(python: Path) -> None:
    """The demo, on a small corpus and for eight steps, without a clock: a busy machine has no limit."""
    folder = python.parent.parent
    golfgpt = folder / "bin" / "golfgpt"
    assert "golfgpt demo" in run(golfgpt, "--help", cwd=folder).stdout
    text = folder / "text.txt"
    text.write_text("\n\n".join((ROOT / "tests" / name).read_text() for name in ("test_train.py", "test_muon.py")))
    options = "--out data/demo --vocab-size 512 --val-fraction 0.2"
    run(golfgpt, "data", "prepare", text, *options.split(), cwd=folder)
    steps = "--schedule.max-steps 8 --schedule.max-seconds None"
    options = f"--name first --model.vocab-size 512 --runtime.threads 1 {steps}"
    said = run(golfgpt, "demo", *options.split(), cwd=folder).stdout
    assert "val_bpb" in said and (folder / "runs" / "first" / "model.golf").exists()
    load = "import golfgpt; print(golfgpt.load('runs/first').__class__)"
    run(python, "-c", load, cwd=folder)


def test_the_wheel_holds_what_the_packages_read(wheels):
    """All files of the two packages, and nothing else."""
    expected = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "golfgpt"), (ROOT / "kernels", "golfgpt_kernels"))
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"golfgpt_kernels/measured.json", "golfgpt/doctor/steps.json"} <= expected
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as file:
            assert {name for name in file.namelist() if ".dist-info/" not in name} == expected


def test_what_it_requires(wheels):
    assert {name: str(each.specifier) for name, each in required(wheels["wheel"], "").items()} == {
        "torch": ">=2.10",
        **({"triton": ""} if sys.platform == "linux" else {}),
    }
    assert "numpy" in required(wheels["wheel"], "train")


@pytest.mark.parametrize("built", ["wheel", "sdist"])
def test_kernels_need_torch_only(wheels, built, tmp_path):
    python = make_environment(tmp_path / "environment", wheels[built])
    assert "No module named 'numpy'" in run(python, "-c", "import numpy", cwd=tmp_path, code=1).stderr
    use_kernels(python)


def test_the_trainer_trains_the_demo(wheels, tmp_path):
    use_trainer(make_environment(tmp_path / "environment", wheels["wheel"], "train"))


@pytest.mark.download
def test_as_an_index_resolves_it(wheels, tmp_path):
    """Gigabytes on Linux, where an index has CUDA builds of torch. Options for pip come from PIP_ARGS."""
    run(sys.executable, "-m", "venv", tmp_path / "environment", cwd=tmp_path)
    python, options = tmp_path / "environment" / "bin" / "python", shlex.split(os.environ.get("PIP_ARGS", ""))
    run(python, "-m", "pip", "install", *options, wheels["wheel"], cwd=tmp_path)
    use_kernels(python)
    run(python, "-m", "pip", "install", *options, f"golfgpt[train] @ {wheels['wheel'].as_uri()}", cwd=tmp_path)
    use_trainer(python)
    run(python, "-m", "pip", "check", cwd=tmp_path)
