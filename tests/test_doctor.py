"""golfgpt doctor: recorded output of nvidia-smi, judgements, and the command on this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from models import tiny_config

import golfgpt
from golfgpt import doctor
from golfgpt.cli import main
from golfgpt.doctor import Row, judge, probe
from golfgpt.doctor.probe import Failed
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.train.attention_backend import Selection

# name, driver, SM clock, its maximum, power limit, its default, reasons
H100 = "NVIDIA H100 80GB HBM3, 550.54.15, 1410, 1980, 700.00, 700.00, 0x4\n"
H200_CAPPED = "NVIDIA H200, 580.159.03, 960, 1980, 450.00, 700.00, 0x0000000000000004\n"
RTX_3090 = "NVIDIA GeForce RTX 3090, 535.183.01, 1095, 2100, 350.00, 350.00, 0x0000000000000020\n"
SILENT = "GRID V100D-8Q, 535.183.01" + ", [N/A]" * 5 + "\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n"
)
NVLINK = "".join(
    f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-2d2bf1a0-0000-4a1c-b8a3-00000000000{gpu})\n"
    + "".join(f"\t Link {link}: 26.562 GB/s\n" for link in range(18))
    for gpu in range(2)
)


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def judged(output: str, loaded: bool = True) -> dict[str, Row]:
    return by_name(judge.gpus(probe.parse_query(output), loaded))


def verdicts(rows: dict[str, Row]) -> dict[str, str]:
    return {name: row.verdict for name, row in rows.items() if row.verdict != "ok"}


# ---- nvidia-smi


def test_healthy_h100s_under_load():
    rows = judged(8 * H100)
    assert verdicts(rows) == {}
    assert rows["GPU"].value == "8 x NVIDIA H100 80GB HBM3"
    assert rows["driver"].value == "550.54.15"
    assert rows["SM clock"].value == "1,410 of 1,980 MHz"
    assert rows["power cap"].value == "700 W, default 700 W"
    assert rows["throttling"].value == "power cap"


def test_one_bad_gpu_is_named():
    hot = H100.replace("1410", "705").replace("0x4", "0x6c")
    rows = judged(3 * H100 + hot)
    assert verdicts(rows) == {"SM clock": "slow", "throttling": "slow"}
    assert rows["SM clock"].value == "705 to 1,410 of 1,980 MHz"
    assert rows["SM clock"].advice.startswith("GPU 3 ")
    assert rows["throttling"].value == "power cap, hardware slowdown, thermal slowdown, hardware thermal slowdown"
    assert rows["throttling"].advice.count("too hot") == 1
    assert "GPU 3" in rows["throttling"].advice


def test_power_cap_below_the_default():
    rows = judged(H200_CAPPED)
    assert verdicts(rows) == {"SM clock": "slow", "power cap": "slow"}
    assert rows["power cap"].value == "450 W, default 700 W"
    assert "nvidia-smi -pl 700" in rows["power cap"].advice


def test_a_card_that_is_hot():
    assert verdicts(judged(RTX_3090)) == {"SM clock": "slow", "throttling": "slow"}


def test_idle_clocks_are_no_verdict():
    idle = H100.replace("1410", "345").replace("0x4", "0x1")
    assert verdicts(judged(idle, loaded=False)) == {}
    assert judged(idle, loaded=False)["SM clock"].value.endswith("idle")
    assert verdicts(judged(H100 + idle)) == {}, "the second is hidden from torch, so it has no load"


def test_gpus_of_two_kinds():
    assert verdicts(judged(H100 + H200_CAPPED.replace("450.00", "700.00").replace("960", "1500"))) == {"GPU": "slow"}


def test_what_is_not_said_is_not_available():
    rows = judged(SILENT)
    silent = set(rows) - {"GPU", "driver"}
    assert verdicts(rows) == dict.fromkeys(silent, "unknown")
    assert {rows[name].value for name in silent} == {"not available"}


def test_reasons_that_are_not_known():
    assert judged(H100.replace("0x4", "0x200"))["throttling"].verdict == "unknown"


@pytest.mark.parametrize("cell", ["", "[Unknown Error]", "[GPU requires reset]", "-5", "1e9", "0x", "nan", "12 W", "٣"])
def test_cells_are_read_strictly(cell):
    cells = ["A"] + [cell] * 6
    gpu = probe.parse_query(", ".join(cells))[0]
    assert gpu.pop("name") == "A" and all(isinstance(value, str) for value in gpu.values())
    assert "power.limit" not in gpu and probe.THROTTLE not in gpu


@pytest.mark.parametrize("output", [NO_DRIVER, "Segmentation fault", H100.replace(", 0x4", ""), 20 * "a, "])
def test_lines_of_another_shape(output):
    with pytest.raises(Failed, match="7 values"):
        probe.parse_query(output)


def test_nvlink():
    links = probe.parse_nvlink(NVLINK)
    assert [len(rates) for rates in links] == [18, 18]
    row = judge.nvlink(links)
    assert row == Row("NVLink", "18 links, 478 GB/s each way")
    lame = probe.parse_nvlink(NVLINK.replace("\t Link 17: 26.562 GB/s\n", "\t Link 17: <inactive>\n", 1))
    assert judge.nvlink(lame).verdict == "slow"
    assert "GPU 0 " in judge.nvlink(lame).advice
    assert judge.nvlink([[], []]).value == "no active links"
    assert probe.parse_nvlink("garbage\n Link 0: 3 GB/s\nGPU x:") == []


# ---- nvidia-smi as a program


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


def test_older_drivers_are_asked_by_older_names(smi):
    smi(
        'case "$1" in\n'
        "*clocks_throttle_reasons.active*) echo 'NVIDIA A, 470.1, 2, 3, N/A, 7, 0x1';;\n"
        "*) echo 'Field \"clocks_event_reasons.active\" is not a valid field to query.'; exit 2;;\n"
        "esac"
    )
    values = ("NVIDIA A", "470.1", 2, 3, None, 7, 1)
    known = {name: value for name, value in zip(probe.QUERY, values, strict=True) if value is not None}
    assert probe.query() == [known]


def test_without_driver(smi):
    smi(f"echo {json.dumps(NO_DRIVER.strip())}; exit 9")
    with pytest.raises(Failed, match="exits with 9: NVIDIA-SMI has failed"):
        probe.query()


def test_no_devices(smi):
    smi("echo 'No devices were found'")
    assert probe.query() == []


def test_missing_program():
    with pytest.raises(Failed, match="cannot be run: No such file"):
        probe.run(["golfgpt-has-no-such-program"], 5)


def test_a_hanging_program_is_killed_with_its_children(smi, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "SMI_SECONDS", 1)
    smi(f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(Failed, match="no answer in 1 s"):
        probe.query()
    child = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of what hung still runs")


# ---- judgements


def usable(asked: str, **facts) -> Row:
    known = {"build": "13.0", "seen": 0, "error": None, "listed": 0, "visible": None}
    return judge.usable(asked, **(known | facts))


@pytest.mark.parametrize(
    "asked, facts, word",
    [
        ("cuda", {}, "rent one"),
        ("cuda", {"build": None}, "built for CPUs"),
        ("auto", {"build": None, "listed": 1}, "built for CPUs"),
        ("auto", {"listed": 8}, "update the driver"),
        ("auto", {"listed": 8, "error": "RuntimeError: too old"}, "too old"),
        ("auto", {"listed": 8, "seen": 7, "error": "GPU 3: ECC"}, "GPU 3"),
        ("cuda", {"listed": 8, "visible": ""}, "unset it"),
    ],
)
def test_gpus_that_torch_cannot_use_are_broken(asked, facts, word):
    row = usable(asked, **facts)
    assert row.broken and row.verdict == "missing" and word in row.advice


@pytest.mark.parametrize(
    "asked, facts",
    [("auto", {}), ("auto", {"build": None}), ("cpu", {"listed": 8}), ("cuda", {"seen": 2, "listed": 2}),
     ("cuda", {"seen": 2}), ("auto", {"listed": 8, "visible": ""})],
)  # fmt: skip
def test_gpus_that_are_there_or_not_asked_for(asked, facts):
    assert usable(asked, **facts).verdict == "ok"


def test_roofs_against_the_datasheet():
    product, copy = judge.roofs("NVIDIA H200", [(788, 4300), (500, 4200)])
    assert product.verdict == "slow" and product.advice.startswith("GPU 1 below 55%")
    assert copy == Row("memory copy", "4,200 to 4,300 GB/s, 88% of the datasheet's 4,800")
    assert {row.verdict for row in judge.roofs("NVIDIA Unheard", [(100, 100)])} == {"unknown"}


def test_expected_step_is_the_newest_of_the_same_gpu(tmp_path):
    step = {"gpu": "NVIDIA H200", "torch": "2.13.0", "date": "2026-01-02", "eager": 90.0, "golfgpt": 40.0}
    newest = step | {"torch": "2.14.0", "date": "2026-03-04", "eager": 80.0}
    other = step | {"gpu": "NVIDIA H100 80GB HBM3", "date": "2027-01-01"}
    file = tmp_path / "steps.json"
    file.write_text(json.dumps([step, newest, other]), encoding="utf-8")
    assert probe.expected_step("NVIDIA H200", file) == newest
    assert probe.expected_step("NVIDIA B200", file) is None
    assert probe.expected_step("no such GPU") is None, "the committed file is read"


def test_measured_against_expected():
    expected = {"eager": 80.0, "golfgpt": 30.0, "torch": "2.12.0", "date": "2026-01-02"}
    assert judge.step(90, expected, "2.13.0").verdict == "ok"
    slow = judge.step(100, expected, "2.13.0")
    assert slow.verdict == "slow" and "1.25 x" in slow.advice and "torch 2.12.0" in slow.advice
    alone = judge.step(90, None, "2.13.0")
    assert alone.verdict == "unknown" and "no committed measurement for this GPU" in alone.value
    assert judge.step(None, expected, "2.13.0").value == "not measured"


def test_a_step_that_does_not_fit_is_no_bug_of_the_check(monkeypatch):
    def time_steps(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "time_steps", time_steps)
    with pytest.raises(Failed, match="do not fit") as failed:
        probe.measure_step(torch.device("cpu"))
    row = judge.refused("baseline step", failed.value)
    assert row.verdict == "unknown" and "do not fit" in row.advice and "report" not in row.advice


def test_a_step_is_timed(corpus):
    model = GPT(tiny_config(corpus).model)
    assert probe.time_steps(model, 128, 64, torch.device("cpu")) > 0
    assert all(p.grad is not None for p in model.parameters())


def test_all_reduce_judgements():
    links = probe.parse_nvlink(NVLINK)
    assert judge.all_reduce(8, "nccl", 250.0, links).verdict == "ok"
    assert judge.all_reduce(8, "nccl", 60.0, links).verdict == "slow"
    assert judge.all_reduce(2, "nccl", 8.0).verdict == "ok"
    assert judge.all_reduce(2, "gloo", 0.5).verdict == "ok"
    failed = judge.refused("all-reduce", Failed("NCCL error"))
    assert failed.broken and "NCCL error" in failed.advice


def test_disk_judgements():
    assert judge.disk(50 * 10**9, 400e6) == Row("disk", "50.0 GB free, writes 400 MB/s")
    assert judge.disk(50 * 10**9, 4e6).verdict == "slow"
    assert judge.disk(5 * 10**8, 400e6).broken


def test_disk_probe_leaves_nothing(tmp_path):
    free, speed = probe.disk(tmp_path, 3_000_000)
    assert free > 0 and speed > 0 and not list(tmp_path.iterdir())


def test_the_tightest_cgroup_counts(tmp_path):
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text("0::/a/b\n", encoding="utf-8")
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("1 100000\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) is None
    for content in ("max 100000\n", "", "-1 100000", "1 0"):
        (root / "a" / "b" / "cpu.max").write_text(content, encoding="utf-8")
        assert probe.cpu_quota(root, own) is None
    (root / "a" / "cpu.max").write_text("150000 100000\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) == 1.5
    (root / "a" / "b" / "cpu.max").write_text("50000 100000\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) == 0.5
    own.write_text("4:memory:/c\n", encoding="utf-8")
    assert probe.cpu_quota(root, own) is None
    assert probe.cpu_quota(root, tmp_path / "nothing") is None


def test_cpu_judgements():
    assert judge.cpus(16, 16, None, 8).verdict == "ok"
    assert "16" in judge.cpus(12, 64, None, 8).advice
    assert "--runtime.threads 2" in judge.cpus(64, 64, 2.5, 0).advice


def test_memory_judgements(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24690000 kB\nMemFree: 1 kB\nMemAvailable:   14690000 kB\n", encoding="utf-8")
    assert judge.memory(*probe.memory(file)) == Row("memory", "15.0 of 25.3 GB available")
    assert judge.memory(10**10, 10**8).broken
    file.write_text("MemTotal: lots", encoding="utf-8")
    with pytest.raises(Failed):
        probe.memory(file)
    assert judge.refused("memory", FileNotFoundError(2, "No such file")).verdict == "unknown"


def test_shared_memory_of_a_container():
    small = os.statvfs_result((65536, 65536, 1024, 1024, 1024, 0, 0, 0, 0, 255))
    assert judge.shared_memory(small, gpus=8).verdict == "missing"
    assert judge.shared_memory(small, gpus=1).verdict == "unknown"
    assert "--shm-size" in judge.shared_memory(small, gpus=1).advice


@pytest.mark.parametrize(
    "torch_version, triton, cuda, verdict",
    [
        ("2.13.0+cu130", "3.7.1", "13.0", "ok"),
        ("2.13.0+cu130", "3.7.0", "13.0", "ok"),
        ("2.11.0", "3.6.0", "13.0", "ok"),
        ("2.10.0", "3.6.0", "12.8", "ok"),
        ("2.11.0", "3.7.1", "13.0", "missing"),
        ("2.13.0", "3.6.0", "13.0", "missing"),
        ("2.13.0", "3.70.0", "13.0", "missing"),
        ("2.13.0", None, "13.0", "missing"),
        ("2.13.0+cpu", None, None, "unknown"),
        ("2.13.0+cpu", "3.9.0", None, "unknown"),
        ("2.99.0", "4.0.0", "13.0", "unknown"),
    ],
)
def test_torch_and_triton_are_a_pair(torch_version, triton, cuda, verdict):
    row = judge.triton(torch_version, triton, cuda)
    assert row.verdict == verdict and row.broken == (verdict == "missing")
    if row.broken:
        assert "pip install 'triton==3." in row.advice


def test_packages():
    found = {"golfgpt": "0.1", "python": "3.11", "torch": "2.99.0", "CUDA": None, "brotli": "1.2"}
    rows = by_name(judge.versions(found))
    assert rows["versions"].value == "golfgpt 0.1, python 3.11"
    assert rows["brotli"].verdict == "ok" and rows["zstandard"].broken
    optional = rows["huggingface_hub"]
    assert optional.verdict == "missing" and not optional.broken
    assert rows["torch"].verdict == "unknown"


def test_kernel_answers_are_grouped():
    never = ("eager", "the kernel was never measured on X; `python -m golfgpt_kernels tune` does")
    wrong = ("eager", "X, 2026-01-01: the kernel failed its check")
    won = ("triton", "X, 2026-01-01: at worst 0.80 x the faster of eager and torch.compile")
    rows = list(judge.kernels({"a": never, "b": won, "c": never, "d": wrong}, cuda=True))
    assert [row.verdict for row in rows] == ["unknown", "ok", "slow"]
    assert rows[0].value.startswith("a, c: eager (")
    assert [row.verdict for row in judge.kernels({"a": never}, cuda=False)] == ["ok"]
    file = Path("kept/tuned.json")
    tuned = judge.tuned(({"a": never, "b": won}, {"a": won, "b": won}, file))
    assert tuned.value == "changed: a eager -> triton; kept in kept/tuned.json"
    assert judge.tuned(({"a": never}, {"a": never}, file)).value == "nothing changed; kept in kept/tuned.json"


def test_tuning_says_where_its_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr(probe.tuning, "tune", lambda device, **options: None)
    monkeypatch.setattr(probe.tuning, "tuned_file", lambda device: tmp_path / "tuned.json")
    monkeypatch.setattr(probe, "kernel_choices", lambda device: {"a": ("eager", "lost")})
    row = judge.tuned(probe.tune(torch.device("cuda"), print))
    assert row == Row("tuning", f"nothing changed; kept in {tmp_path / 'tuned.json'}")


def test_attention_and_bfloat16():
    def row(backend: str, dtype: str = "bfloat16", cuda: bool = True) -> Row:
        return judge.attention(
            dtype,
            Selection(backend, {}, False, {"cudnn": "no such chip"} | ({"flash": "x"} if backend == "math" else {})),
            cuda,
        )

    assert row("math").verdict == "slow" and "cudnn: no such chip" in row("math").value
    assert row("math", "float32", cuda=False).verdict == "ok"
    assert row("flash").verdict == row("efficient").verdict == "ok", "flash works, too; it was slower"
    assert "--runtime.dtype" in row("flash", "float32").advice


def test_every_verdict_but_ok_says_what_to_do():
    rows = [Row("a", "1"), judge.slow("b", "2", "do this"), judge.broken("c", "3", "do that")]
    lines = doctor.text(rows).splitlines()
    assert lines[1:4] == ["a      1      ok", "b      2      slow", "c      3      missing"]
    assert lines[5:] == ["c (a run needs it): do that", "b: do this", "1 ok, 1 slow, 1 missing, 0 unknown"]
    assert doctor.exit_code(rows) == 3 and doctor.exit_code(rows[:2]) == 0


# ---- the whole


@pytest.fixture
def no_gpu(tmp_path, smi, monkeypatch):
    """A machine without GPUs, and an empty folder."""
    smi("echo 'No devices were found'")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if torch.cuda.is_available():
        monkeypatch.setattr(probe, "usable", lambda asked: ([], None))
    return tmp_path / "here"


def test_the_command_on_a_cpu(no_gpu, capsys):
    assert main(["doctor", "--tune"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("check ") and "nothing to tune" in out
    assert f"golfgpt {golfgpt.__version__}, python " in out
    assert list(no_gpu.iterdir()) == []


def test_json_names_every_check(no_gpu, capsys):
    assert main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == 0
    rows = {row["name"]: row for row in result["rows"]}
    expected = "torch's GPUs, disk, CPUs, memory, /dev/shm, versions, torch, triton, brotli, zstandard"
    expected += ", huggingface_hub, tyro, attention, kernels"
    assert set(expected.split(", ")) <= set(rows)
    assert "baseline step" not in rows, "there is nothing to compare a CPU with"
    assert all(bool(row["advice"]) == (row["verdict"] != "ok") for row in rows.values())
    assert not [row for row in rows.values() if row["value"] == "not checked"]


def test_asked_for_a_gpu_that_is_not_there(no_gpu, capsys):
    assert main(["doctor", "--device", "cuda"]) == 3
    assert "torch's GPUs (a run needs it): " in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no file, not even root's")
def test_a_folder_that_takes_no_file(no_gpu, monkeypatch, capsys):
    monkeypatch.chdir("/proc")
    assert main(["doctor", "--json"]) == 3
    row = next(row for row in json.loads(capsys.readouterr().out)["rows"] if row["broken"])
    assert row["name"] == "disk" and "/proc" in row["advice"]


def test_gpus_of_a_machine_whose_torch_cannot_use_them(no_gpu, smi):
    smi(f"cat <<'END'\n{2 * H200_CAPPED}END\n")
    rows = by_name(doctor.diagnose())
    assert rows["torch's GPUs"].broken and rows["power cap"].verdict == "slow"
    assert rows["SM clock"].verdict == "ok", "no load, no verdict"
    assert rows["NVLink"].verdict == "slow"


def test_the_rows_of_two_gpus(no_gpu, smi, monkeypatch):
    """The wiring, with every measurement on a GPU replaced."""
    smi(f"if [ \"$1\" = nvlink ]; then cat <<'END'\n{NVLINK}END\nelse cat <<'END'\n{2 * H100}END\nfi")
    device = torch.device("cpu")
    monkeypatch.setattr(probe, "usable", lambda asked: ([device, device], None))
    monkeypatch.setattr(probe, "roof", lambda device: (700, 3000))
    monkeypatch.setattr(probe, "under_load", lambda devices, roofs: probe.query())
    monkeypatch.setattr(probe, "all_reduce", lambda kind, count: (count, "nccl", 50.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    rows = by_name(doctor.diagnose())
    assert not [row for row in rows.values() if row.value == "not checked"]
    assert rows["torch's GPUs"].value == "2 usable"
    assert rows["matrix product"].value == "700 TFLOP/s, 71% of the datasheet's 989"
    assert rows["NVLink"].verdict == "ok"
    assert rows["all-reduce"].verdict == "slow", "50 of 478 GB/s"


def test_nvidia_smi_hangs_while_torch_has_a_gpu(no_gpu, smi, monkeypatch):
    smi("sleep 600")
    monkeypatch.setattr(probe, "SMI_SECONDS", 1)
    monkeypatch.setattr(probe, "usable", lambda asked: ([torch.device("cpu")], None))
    monkeypatch.setattr(probe, "roof", lambda device: 1 / 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A")
    rows = by_name(doctor.diagnose())
    assert "no answer in 1 s" in rows["nvidia-smi"].advice
    assert rows["roofs"].value == "not checked" and "ZeroDivisionError" in rows["roofs"].advice
    assert doctor.exit_code(rows.values()) == 0


def test_a_driver_that_does_not_answer_is_no_machine_without_gpus(no_gpu, smi, capsys):
    smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    row = by_name(doctor.diagnose())["nvidia-smi"]
    assert row.verdict != "ok" and "Failed to initialize NVML" in row.advice
    assert "nvidia-smi" not in by_name(doctor.diagnose("cpu"))


@pytest.mark.parametrize("count", [0, 65])
def test_how_many_processes(count):
    with pytest.raises(InputError, match="64"):
        doctor.diagnose(processes=count)


def test_not_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 3
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_all_reduce_of_two_processes():
    processes, backend, gbps = probe.all_reduce("cpu", 2)
    assert (processes, backend) == (2, "gloo") and gbps > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_reduce_that_fails_says_why():
    with pytest.raises(Failed, match="InputError"):
        probe.all_reduce("cuda", 1)
