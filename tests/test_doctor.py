"""golfgpt doctor: its judgements on answers that are given, and the command on this machine."""

from __future__ import annotations

import json
import os
import sys
import types
from functools import partial

import pytest
import torch
from models import tiny_config

from golfgpt.cli import main
from golfgpt.doctor import Row, checks, diagnose, exit_code, probe, text
from golfgpt.doctor.checks import Machine
from golfgpt.doctor.probe import Gpu
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.train.attention_backend import Selection
from golfgpt.train.compute_dtype import DtypeChoice
from golfgpt.train.forecast import Forecast

H100 = Gpu("NVIDIA H100 80GB HBM3", 700, 3000, 1410, 1980, 700, 700, 0x4, 18, 26.5)


def given(asked: str = "auto", devices: int = 0, **facts) -> Machine:
    """A machine that nobody asks: `devices` GPUs for torch, all H100s, and other `facts`."""
    machine = Machine("cpu")
    found = [torch.device("cuda", i) for i in range(devices)]
    known = {"asked": asked, "devices": found, "best": [*found, torch.device("cpu")][0], "gpus": [H100] * devices}
    vars(machine).update(known | facts)
    return machine


def judged(name: str, machine: Machine | None = None) -> list[Row]:
    return checks.run_check(name, machine or given())


def only(name: str, machine: Machine | None = None) -> Row:
    (row,) = judged(name, machine)
    return row


# ---- GPUs


@pytest.mark.parametrize(
    "asked, devices, listed, error, build, visible, word",
    [
        ("cuda", 0, 0, None, "13.0", None, "rent one"),
        ("cuda", 0, 0, None, None, None, "built for CPUs"),
        ("auto", 0, 1, None, None, None, "built for CPUs"),
        ("auto", 0, 8, None, "13.0", None, "update the driver"),
        ("auto", 7, 8, "GPU 3: ECC", "13.0", None, "GPU 3"),
        ("cuda", 0, 8, None, "13.0", "", "unset it"),
        ("auto", 0, 0, None, None, None, ""),
        ("auto", 0, 8, None, "13.0", "", ""),
        ("cpu", 0, 0, None, None, None, ""),
        ("cuda", 2, 0, None, "13.0", None, ""),
    ],
)
def test_gpus_that_torch_cannot_use(monkeypatch, asked, devices, listed, error, build, visible, word):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PATH", "")  # without nvidia-smi
    row = only("GPUs", given(asked, devices, listed=["NVIDIA A"] * listed, error=error))
    assert row.broken == bool(word) and row.verdict == ("missing" if word else "ok") and word in row.advice


@pytest.mark.parametrize(
    "script, listed",
    [
        ("echo 'GPU 0: NVIDIA A (UUID: GPU-2d2b)'; echo 'GPU 1: NVIDIA B (UUID: GPU-2d2c)'", ["NVIDIA A", "NVIDIA B"]),
        ("echo 'No devices were found'", []),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", []),
        ("echo garbage; echo 'GPU x:'", []),
        ("exec sleep 600", []),
    ],
    ids=["two kinds", "none", "no driver", "garbage", "no answer"],
)
def test_what_nvidia_smi_lists(smi, monkeypatch, script, listed):
    smi(script)
    monkeypatch.setattr(probe, "usable_gpus", lambda: ([torch.device("cuda")] * len(listed), None))
    monkeypatch.setattr(probe, "run", partial(probe.run, timeout=1))
    machine = Machine("auto")
    assert machine.listed == listed and not Machine("cpu").listed
    row = only("GPUs", machine)
    names = "torch can use 2 of 2: 1 x NVIDIA A, 1 x NVIDIA B, driver None"
    assert row.value == (names if listed else "none; runs use the CPU")
    assert row.verdict == ("slow" if listed else "unknown") and not row.broken


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """smi(script) puts an nvidia-smi of these shell lines first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(script: str) -> None:
        file = folder / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        file.chmod(0o755)

    return write


@pytest.mark.parametrize(
    "changed, word",
    [
        ({}, ""),
        ({"watts": 450}, "nvidia-smi -pl 700"),
        ({"clock_mhz": 960}, "low clock"),
        ({"reasons": 0x24}, "too hot"),
        ({"reasons": 0x4C}, "too hot for full clocks: improve the cooling or change the machine; its heat or power"),
        ({"reasons": 0x2}, "nvidia-smi -rac"),
        ({"reasons": 0x200}, "nvidia-smi -q"),
        ({"watts": float("nan"), "default_watts": float("nan")}, ""),
        ({"links": 17}, "fewer active NVLinks"),
    ],
)
def test_one_bad_gpu_is_named(changed, word):
    rows = judged("GPU state", given(devices=2, gpus=[H100, H100._replace(**changed)]))
    verdict = "unknown" if "-q" in word else "slow" if word else "ok"
    assert [row.verdict for row in rows] == ["ok", verdict]
    assert rows[0].value == (
        "GPU 0: clock 1,410 of 1,980 MHz under load, limited by the power cap; power cap 700 W, default 700 W; "
        "18 NVLinks of 26.5 GB/s each"
    )
    assert rows[1].advice.startswith("GPU 1: " if word else "") and word in rows[1].advice


@pytest.mark.parametrize("version, word", [(None, "pip install nvidia-ml-py"), ("13", "run nvidia-smi")])
def test_without_nvml_one_row_says_so(monkeypatch, version, word):
    monkeypatch.setattr(checks, "package_version", lambda name: version)
    row = only("GPU state", given(gpus=[Gpu("NVIDIA A", 1, 1)] * 2))
    assert row.verdict == "unknown" and word in row.advice


def test_gpus_without_nvlink():
    alone = H100._replace(links=0)
    assert only("GPU state", given(devices=1, gpus=[alone])).verdict == "ok"
    assert [row.verdict for row in judged("GPU state", given(devices=2, gpus=[alone, alone]))] == ["slow", "slow"]


def test_speeds_against_the_datasheet():
    measured = [("NVIDIA H200", 788, 4300), ("NVIDIA H200", 500, 4200), ("NVIDIA H200", 788, 3000), ("NVIDIA X", 1, 1)]
    rows = judged("GPU speed", given(gpus=[Gpu(*each) for each in measured]))
    assert [row.verdict for row in rows] == ["ok", "slow", "slow", "unknown"]
    assert rows[0].value == (
        "GPU 0: matrix products 788 TFLOP/s in bfloat16, memory copy 4,300 GB/s: 80% and 90% of the datasheet"
    )
    assert "GPU 1: a slow product" in rows[1].advice and "GPU 2: a slow copy" in rows[2].advice


class NVMLError(Exception):
    pass


def refuse(*_):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """nvidia-ml-py as its documentation has it, with the answers of an H100."""
    field = types.SimpleNamespace
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": {"GPU-2d2b": "handle"}.__getitem__,
        "nvmlDeviceGetClockInfo": lambda gpu, clock: 1410,
        "nvmlDeviceGetMaxClockInfo": lambda gpu, clock: 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x4,
        "nvmlDeviceGetPowerManagementLimit": lambda gpu: 700_000,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: 700_000,
        "nvmlDeviceGetFieldValues": lambda gpu, ids: [field(value=field(uiVal={91: 18, 90: 26500}[i])) for i in ids],
        "nvmlDeviceGetNvLinkState": lambda gpu, link: int(link != 3),
    }
    constants = {"NVML_CLOCK_SM": 1, "NVML_FI_DEV_NVLINK_LINK_COUNT": 91, "NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON": 90}
    module = types.ModuleType("pynvml")
    vars(module).update(answers | constants | {"NVMLError": NVMLError})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: field(uuid="2d2b"))
    return module


def test_what_nvml_says(nvml, monkeypatch):
    device = torch.device("cuda", 0)
    everything = H100._replace(links=17)._asdict()
    del everything["name"], everything["tflops"], everything["copy_gbps"]
    assert probe.read_nvml(device) == everything
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 4096, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100.name)
    gpu = probe.measure_gpu(torch.device("cpu"), size=64, products=2)
    assert gpu == H100._replace(links=17, tflops=gpu.tflops, copy_gbps=gpu.copy_gbps) and min(gpu[1:3]) > 0
    nvml.nvmlDeviceGetFieldValues = refuse
    assert probe.read_nvml(device) == {name: everything[name] for name in everything if "link" not in name}
    nvml.nvmlInit = refuse
    assert probe.read_nvml(device) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probe.read_nvml(device) == {}


def test_a_step_is_timed(corpus, monkeypatch):
    model, cpu = GPT(tiny_config(corpus).model), torch.device("cpu")
    assert probe.time_steps(model, 128, 64, cpu) > 0
    assert all(p.grad is not None for p in model.parameters())
    monkeypatch.setattr(probe, "time_steps", lambda model, *shape: (model.config.num_layers, *shape))
    assert probe.baseline_step(cpu) == (9, 65_536, 1024, cpu)
    assert probe.expected_step("no such GPU") is None, "the committed file is read"


# ---- other judgements

PROBE, CHECKS = "golfgpt.doctor.probe", "golfgpt.doctor.checks"
STEP = {"eager": 80.0, "golfgpt": 30.0, "torch": "2.12.0", "date": "2026-01-02"}


def usage(gigabytes: float) -> dict:
    return {"shutil.disk_usage": types.SimpleNamespace(total=gigabytes * 1e9, free=gigabytes * 1e9)}


def cpus(count: int, quota: float = float("inf")) -> dict:
    return {"os.sched_getaffinity": range(count), f"{PROBE}.cpu_quota": quota}


def memory(total: str, available: str) -> dict:
    return {"pathlib.Path.read_text": f"MemTotal:   {total} kB\nMemFree: 1 kB\nMemAvailable:   {available} kB\n"}


def triton(line: str, version: str | None, cuda: str | None = "13.0") -> dict:
    answers = {f"{CHECKS}.metadata.requires": ["numpy", line], f"{CHECKS}.package_version": version}
    return answers | {"torch.version.cuda": cuda}


def packages(*installed: str) -> dict:
    return {f"{CHECKS}.package_version": lambda name: "1.2" if name in installed else None}


def step(ms: float | Exception, expected: dict | None) -> dict:
    answers = {f"{PROBE}.baseline_step": ms, f"{PROBE}.expected_step": expected}
    return answers | {"torch.cuda.get_device_name": "NVIDIA A"}


def choices(refused: str = "", bf16: bool = True) -> dict:
    selection = Selection("efficient", {}, False, dict.fromkeys(refused.split(), "no such chip"))
    dtype = DtypeChoice(torch.bfloat16 if bf16 else torch.float32)
    return {f"{PROBE}.choose_attention": selection, f"{PROBE}.choose_dtype": dtype}


def forecast(seconds: float, load: float = 0.0) -> dict:
    answers = {f"{PROBE}.small_step": Forecast(seconds, 4096, 2048, "float32")}
    return answers | {"os.getloadavg": (load, 0.0, 0.0), "os.cpu_count": 2}


@pytest.mark.parametrize(
    "check, gpus, answers, verdict, word",
    [
        ("disk", 0, usage(50), "ok", ""),
        ("disk", 0, usage(0.5), "broken", "free some"),
        ("/dev/shm", 8, usage(8), "ok", ""),
        ("/dev/shm", 8, usage(0.06), "missing", "--shm-size"),
        ("/dev/shm", 1, usage(0.06), "unknown", "--shm-size"),
        ("CPUs", 8, cpus(16), "ok", ""),
        ("CPUs", 8, cpus(12), "slow", "16"),
        ("CPUs", 0, cpus(64, 2.5), "slow", "--runtime.threads 2"),
        ("CPUs", 2, cpus(64, 2.5), "slow", "together 4"),
        ("memory", 0, memory("24690000", "14690000"), "ok", ""),
        ("memory", 0, memory("9690000", "900000"), "broken", "0.9 GB"),
        ("memory", 0, memory("lots", "1"), "unknown", "not read"),
        ("all-reduce", 8, {f"{PROBE}.all_reduce": (250.0, "nccl")}, "ok", ""),
        ("all-reduce", 8, {f"{PROBE}.all_reduce": (60.0, "nccl")}, "slow", "below 119 GB/s"),
        ("all-reduce", 2, {f"{PROBE}.all_reduce": (0.5, "gloo")}, "ok", ""),
        ("all-reduce", 2, {f"{PROBE}.all_reduce": probe.CommandFailed("NCCL error")}, "broken", "NCCL error"),
        ("baseline step", 1, step(90, STEP), "ok", ""),
        ("baseline step", 1, step(100, STEP), "slow", "1.25 x the committed time (torch 2.12.0)"),
        ("baseline step", 1, step(90, None), "unknown", "nothing to compare"),
        ("baseline step", 1, step(torch.OutOfMemoryError("CUDA out of memory"), None), "unknown", "out of memory"),
        ("dtype", 1, choices(), "ok", ""),
        ("dtype", 1, choices(bf16=False), "slow", "--runtime.dtype float32"),
        ("dtype", 0, choices(bf16=False), "ok", ""),
        ("training speed", 0, forecast(0.75, load=0.5), "ok", ""),
        ("training speed", 0, forecast(0.75, load=64.0), "slow", "load 64.0 on 2 CPUs"),
        ("training speed", 0, forecast(4.0, load=0.5), "slow", "--recipe demo"),
        ("attention", 1, choices("cudnn"), "ok", ""),
        ("attention", 1, choices("cudnn flash"), "slow", "sm_80"),
        ("attention", 0, choices("cudnn flash"), "ok", ""),
        ("versions", 0, packages(), "broken", "pip install brotli zstandard huggingface_hub"),
        ("versions", 0, packages("brotli", "zstandard"), "missing", "pip install huggingface_hub"),
        ("triton", 1, triton('triton==3.7.1; platform_system == "Linux"', "3.7.1"), "ok", ""),
        ("triton", 1, triton("triton (==3.7.1) ; platform_system == 'Linux'", "3.7.0"), "ok", ""),
        ("triton", 1, triton("triton==3.7.1", "3.6.0"), "broken", "pip install 'triton==3.7.*'"),
        ("triton", 1, triton("triton==3.7.1", "3.70.0"), "broken", "pip install 'triton==3.7.*'"),
        ("triton", 1, triton("triton==3.7.1", None), "broken", "pip install 'triton==3.7.*'"),
        ("triton", 1, triton("filelock", "3.7.1"), "unknown", "does not name"),
        ("triton", 0, triton("filelock", None, cuda=None), "ok", ""),
    ],
)
def test_judgements(monkeypatch, tmp_path, check, gpus, answers, verdict, word):
    def answer(value, *arguments):
        if isinstance(value, Exception):
            raise value
        return value(*arguments) if callable(value) else value

    monkeypatch.chdir(tmp_path)
    machine = given(devices=gpus)
    for target, value in answers.items():
        monkeypatch.setattr(target, value if target == "torch.version.cuda" else partial(answer, value))
    row = only(check, machine)
    assert (row.verdict, row.broken) == ("missing" if verdict == "broken" else verdict, verdict == "broken")
    assert word in row.advice and not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_said_of_it():
    for check in ("GPU speed", "GPU state", "all-reduce", "baseline step", "tuning"):
        assert not judged(check)
    for check in ("CPU speed", "training speed"):
        assert not judged(check, given(devices=1))


def test_what_decides_the_dtype_of_a_cpu_is_named():
    choice = DtypeChoice(torch.bfloat16, "bfloat16 5.0 us, float32 9.0 us a token, measured now")
    value = only("dtype", given(dtype=choice)).value
    assert value.startswith(
        "a run computes in bfloat16 (forward and backward of recipe small are clearly faster than in"
    )


def test_the_tightest_cgroup_counts(tmp_path):
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text("0::/a/b\n", encoding="utf-8")
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("1 100000\n", encoding="utf-8")  # above the root
    for content in ("max 100000\n", "", "-1 100000", "1 0"):
        (root / "a" / "b" / "cpu.max").write_text(content, encoding="utf-8")
        assert probe.cpu_quota(root, own) == float("inf")
    (root / "a" / "cpu.max").write_text("150000 100000\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) == 1.5
    (root / "a" / "b" / "cpu.max").write_text("50000 100000\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) == 0.5
    own.write_text("4:memory:/c\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) == probe.cpu_quota(root, tmp_path / "nothing") == float("inf")


def test_kernel_answers_are_grouped(monkeypatch):
    answers = {
        "a": ("eager", "the kernel was never measured on X; `python -m golfgpt_kernels tune` does"),
        "b": ("triton", "X, 2026-01-01: at worst 0.80 x the faster of eager and torch.compile"),
        "d": ("eager", "X, 2026-01-01: the kernel failed its check"),
    }
    answers["c"] = answers["a"]
    cases = [types.SimpleNamespace(op=op, dtype=torch.bfloat16) for op in "abcd"]
    monkeypatch.setattr(checks.tuning, "QUICK", cases)
    monkeypatch.setattr(checks, "implementation", lambda op, device, dtype: answers[op])
    rows = judged("kernels", given(best=torch.device("cuda")))
    assert [row.verdict for row in rows] == ["unknown", "ok", "slow"]
    assert rows[0].value.startswith("a, c: PyTorch (")


def test_tuning(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(checks.tuning, "tune", lambda device, **options: calls.append(options["say"]))
    monkeypatch.setattr(checks.tuning, "tuned_file", lambda device: tmp_path / "tuned.json")
    gpu = {"best": torch.device("cuda"), "say": "say"}
    assert not judged("tuning", given(**gpu)) and not calls
    assert only("tuning", given(retune=True, **gpu)).value == f"kept in {tmp_path / 'tuned.json'}" and calls == ["say"]


def test_every_verdict_but_ok_says_what_to_do():
    rows = [Row("a", "1"), Row("b", "2", "do this", "slow"), Row("c", "3", "do that", "missing", broken=True)]
    lines = text(rows).splitlines()
    assert lines[1:4] == ["a      ok       1", "b      slow     2", "c      missing  3"]
    assert lines[5:] == [
        "c (a run needs it): do that",
        "b: do this",
        "3 checks: 1 ok, 1 slow, 1 missing, 0 unknown",
        lines[-1],
    ]
    assert lines[-1] == "next: mend what a run needs, then golfgpt doctor again"
    assert text(rows[:2]).splitlines()[-1].startswith("next: golfgpt demo ")
    assert exit_code(rows) == 3 and exit_code(rows[:2]) == 0


# ---- the command


@pytest.fixture
def no_gpu(tmp_path, smi, monkeypatch):
    """A machine without GPUs, and an empty folder."""
    smi("echo 'No devices were found'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(probe, "usable_gpus", lambda: ([], None))
    monkeypatch.setattr(probe, "small_step", lambda: Forecast(0.75, 4096, 2048, "float32"))
    return tmp_path / "here"


def test_the_command_on_a_cpu(no_gpu, capsys):
    assert main(["doctor", "--tune", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("check ") and "nothing to tune" in out and out.splitlines()[-2].endswith("0 unknown")
    assert list(no_gpu.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, folder, broken", [([], ".", []), (["--device", "cuda"], "/proc", ["GPUs", "disk"])]
)
def test_json_and_exit_code(no_gpu, monkeypatch, capsys, arguments, folder, broken):
    monkeypatch.chdir(folder)
    code = main(["doctor", "--json", *arguments])
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == code == (3 if broken else 0)
    rows = {row["name"]: row for row in result["rows"]}
    expected = (
        "GPUs, disk, CPUs, CPU speed, memory, /dev/shm, versions, triton, dtype, training speed, attention, kernels"
    )
    assert list(rows) == expected.split(", "), "nothing of GPUs that are not there"
    assert [name for name, row in rows.items() if row["broken"]] == broken
    assert all(bool(row["advice"]) == (row["verdict"] != "ok") for row in rows.values())
    assert not [row for row in rows.values() if row["value"] == "not available"]


def test_misuse(monkeypatch):
    for count in (0, 65):
        with pytest.raises(InputError, match="1 to 64"):
            diagnose(processes=count)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        diagnose()


@pytest.mark.slow
def test_all_reduce_of_two_processes():
    gbps, backend = probe.all_reduce("cpu", 2)
    assert backend == "gloo" and gbps > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_reduce_that_fails_says_why():
    with pytest.raises(probe.CommandFailed, match="InputError"):
        probe.all_reduce("cuda", 1)
