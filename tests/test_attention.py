"""The choice of the attention backend: on a CPU as it is, on a GPU with given answers."""

import json

import pytest
import torch
from golfgpt_kernels.timing import Timing
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
    for name, state in zip(ENABLED, before, strict=True):
        getattr(torch.backends.cuda, f"enable_{name}")(state)


def enabled() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{name}_enabled")() for name in ENABLED]


def select(choice: str = "auto", ranks: Ranks = CPU, **options) -> attention.Selection:
    return select_backend(choice, SMALL, [(2, 64), (1, 48)], ranks, torch.float32, **options)


def test_on_a_cpu_the_first_that_agrees_with_math():
    selection = select()
    assert selection.backend in ("flash", "math")
    assert selection.ms == {} and set(selection.refused) <= {"flash"}, "the others are for GPUs"
    assert enabled() == [False, selection.backend == "flash", False, True]


@pytest.mark.parametrize("name, why", [("cudnn", "cudnn"), ("flash3", "flash_attn_interface")])
def test_a_named_backend_that_does_not_work(name, why):
    before = enabled()
    with pytest.raises(InputError, match=why):
        select(name)
    assert enabled() == before


def test_a_backend_with_wrong_gradients_is_refused(monkeypatch):
    right = attention._attend

    def wrong(q, k, v, g, longest=0):
        out, dq, dk, dv = right(q, k, v, g, longest)
        return [out, dq, dk * (1.03 if torch.backends.cuda.flash_sdp_enabled() else 1), dv]

    monkeypatch.setattr(attention, "_attend", wrong)
    assert str(select()) == "math (flash: differs from math by 0.03 relative)"


@pytest.mark.parametrize("backward", [True, False])
def test_the_fastest_is_found_and_remembered(monkeypatch, tmp_path, backward):
    """Two real backends are timed; which one wins on a CPU does not matter."""
    facts = ["flash", "math"], SMALL, attention.Shape(2, 64), CPU.device, torch.float32, backward
    ms, kept = attention._measure(*facts)
    assert set(ms) == {"flash", "math"} and min(ms.values()) > 0 and not kept
    assert list(ms) == sorted(ms, key=ms.get)
    monkeypatch.setattr(attention, "time_us", None)  # nothing is timed again
    assert attention._measure(*facts) == (ms, True)
    (file,) = (tmp_path / "golfgpt" / "attention").iterdir()
    assert json.loads(file.read_text())["shape"] == [2, 64, 0]
    monkeypatch.setattr(attention, "time_us", lambda *_: Timing(1.0, 0.0))
    for damaged in ("[]", "", '{"times": []}', '{"times": {"flash": 1}}', '{"times": {"flash": null, "math": 1}}',
                    '{"times": {"flash": NaN, "math": 1}}', '{"times": {"flash": 0, "math": 1}}'):  # fmt: skip
        file.write_text(damaged)
        assert attention._measure(*facts) == ({"flash": 0.001, "math": 0.001}, False)


def test_what_auto_takes_on_a_gpu(monkeypatch):
    """One fast backend is refused; of two that work the faster one is taken, but rank 0 decides."""
    answers = {"cudnn": "NaN", "flash": None, "flash3": "not installed", "efficient": None}
    times = {"flash": 0.7, "efficient": 0.4}
    monkeypatch.setattr(attention, "probe", lambda name, *_: answers[name])
    monkeypatch.setattr(attention, "_probe_in_children", lambda *_: answers)
    monkeypatch.setattr(attention, "_measure", lambda names, *_: ({name: times[name] for name in names}, True))
    monkeypatch.setattr(Ranks, "raise_on_any_rank", lambda self, error: None)  # a tensor on the device
    assert str(select(ranks=Ranks(0, 1, torch.device("cuda")))) == (
        "efficient (flash 0.700 ms, efficient 0.400 ms in an earlier run; cudnn: NaN; flash3: not installed)"
    )
    assert enabled() == [False, False, True, True]
    gpu = Ranks(1, 2, torch.device("cuda"))

    def rank_0_says(best):
        return lambda self, value: answers if value is None else value if isinstance(value, tuple) else best

    monkeypatch.setattr(Ranks, "broadcast_object", rank_0_says("flash"))
    assert select(ranks=gpu).backend == "flash"
    assert enabled() == [False, True, False, True]
    monkeypatch.setattr(Ranks, "broadcast_object", rank_0_says("cudnn"))
    with pytest.raises(InputError, match="cudnn, which rank 0 chose, does not work on rank 1"):
        select(ranks=gpu)


def test_flash3_replaces_the_kernels_of_flash(monkeypatch):
    log = []
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", log.append)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: log.append("own"))
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: (log or [None])[-1])
    assert BACKENDS["flash3"] == BACKENDS["flash"]
    before = enabled()
    assert select("flash3", enable=False).backend == "flash3"
    assert log[0] == "FA3" and log[-1] == "own" and enabled() == before
    select("flash3")
    assert log[-1] == "FA3" and enabled()[1]
