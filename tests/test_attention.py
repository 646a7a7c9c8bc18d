import json

import pytest
import torch
from golfgpt_kernels.tuning import Timing
from torch.nn import attention as torch_attention

from golfgpt.config import ModelConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.train import attention_backend as attention
from golfgpt.train.attention_backend import BACKENDS, select_backend

SMALL = ModelConfig(vocab_size=97, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, mlp_hidden=48)
CPU = Ranks(0, 1, torch.device("cpu"))
ENABLED = ("cudnn_sdp", "flash_sdp", "mem_efficient_sdp", "math_sdp")


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = enabled()
    yield
    for name, state in before.items():
        getattr(torch.backends.cuda, f"enable_{name}")(state)


def enabled() -> dict[str, bool]:
    return {name: getattr(torch.backends.cuda, f"{name}_enabled")() for name in ENABLED}


def test_on_a_cpu_the_first_that_agrees_with_math():
    selection = select_backend("auto", SMALL, [(2, 64), (1, 48)], CPU, torch.float32)
    assert selection.backend in ("flash", "math")
    assert selection.ms == {} and set(selection.refused) <= {"flash"}, "the others are for GPUs"
    assert enabled() == dict(zip(ENABLED, (False, selection.backend == "flash", False, True), strict=True))


def test_a_named_backend_that_does_not_work():
    before = enabled()
    with pytest.raises(InputError, match="cudnn"):
        select_backend("cudnn", SMALL, [(2, 64)], CPU, torch.float32)
    with pytest.raises(InputError, match="flash_attn_interface"):
        select_backend("flash3", SMALL, [(2, 64)], CPU, torch.float32)
    assert enabled() == before


def test_a_backend_with_wrong_gradients_is_refused(monkeypatch):
    right = attention._attend

    def wrong(q, k, v, g):
        out, dq, dk, dv = right(q, k, v, g)
        return [out, dq, dk * (1.03 if torch.backends.cuda.flash_sdp_enabled() else 1), dv]

    monkeypatch.setattr(attention, "_attend", wrong)
    selection = select_backend("auto", SMALL, [(2, 64)], CPU, torch.float32)
    assert selection.backend == "math"
    assert selection.refused["flash"] == "differs from math by 0.03 relative"


@pytest.mark.parametrize("backward", [True, False])
def test_the_fastest_is_found_and_remembered(monkeypatch, tmp_path, backward):
    """Timed in truth, then told: the order of two real backends on a CPU is no matter of a test."""
    facts = SMALL, (2, 64), torch.device("cpu"), torch.float32, backward
    ms, kept = attention._measure(["flash", "math"], *facts)
    assert set(ms) == {"flash", "math"} and min(ms.values()) > 0 and not kept
    assert list(ms) == sorted(ms, key=ms.get)
    monkeypatch.setattr(attention, "time_us", None)  # nothing is timed again
    assert attention._measure(["flash", "math"], *facts) == (ms, True)
    (file,) = (tmp_path / "golfgpt" / "attention").iterdir()
    assert json.loads(file.read_text())["shape"] == [2, 64]
    monkeypatch.setattr(attention, "time_us", lambda *_: Timing(1.0, 0.0))
    for damaged in ("[]", "", '{"times": []}', '{"times": {"flash": 1.0}}', '{"times": {"flash": null, "math": 1}}',
                    '{"times": {"flash": NaN, "math": 1}}'):  # fmt: skip
        file.write_text(damaged)
        assert attention._measure(["flash", "math"], *facts) == ({"flash": 0.001, "math": 0.001}, False)


def test_what_auto_takes_on_a_gpu(monkeypatch):
    """With the probe's and the clock's answers given: one is fast and refused, of two that work the faster is taken."""
    answers = {"cudnn": "NaN", "flash": None, "flash3": "not installed", "efficient": None}
    times = {"flash": 0.7, "efficient": 0.4}
    monkeypatch.setattr(attention, "_probe", lambda name, *_: answers[name])
    monkeypatch.setattr(attention, "_measure", lambda names, *_: ({name: times[name] for name in names}, True))
    monkeypatch.setattr(Ranks, "raise_on_any_rank", lambda self, error: None)  # a tensor on the device
    gpu = Ranks(0, 1, torch.device("cuda"))
    selection = select_backend("auto", SMALL, [(2, 64)], gpu, torch.bfloat16)
    expected = "efficient (flash 0.700 ms, efficient 0.400 ms in an earlier run; cudnn: NaN; flash3: not installed)"
    assert str(selection) == expected
    assert enabled() == dict(zip(ENABLED, (False, False, True, True), strict=True))
    monkeypatch.setattr(Ranks, "broadcast_object", lambda self, value: "flash" if self.world > 1 else value)
    other = select_backend("auto", SMALL, [(2, 64)], Ranks(1, 2, torch.device("cuda")), torch.bfloat16)
    assert other.backend == "flash", "rank 0 measured something else"


def test_flash3_is_put_behind_flash_and_taken_back(monkeypatch):
    log = []
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", log.append)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: log.append("own"))
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: (log or [None])[-1])
    assert BACKENDS["flash3"] == BACKENDS["flash"]
    selection = select_backend("flash3", SMALL, [(2, 64)], CPU, torch.float32)
    assert selection.backend == "flash3"
    assert log[0] == "FA3" and "own" in log and log[-1] == "FA3", "probed, taken back, chosen"
    assert torch.backends.cuda.flash_sdp_enabled()
