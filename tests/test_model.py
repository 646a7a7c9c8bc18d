"""The model: counts, causality, cache, dtypes, attention backends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import SMALL, lively

from golfgpt.attention import select_backend
from golfgpt.config import ModelConfig
from golfgpt.errors import InputError
from golfgpt.model import GPT, KVCache, rms_norm
from golfgpt.upstream import from_upstream, to_upstream


def test_baseline_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in GPT(ModelConfig()).parameters()) == 17_059_912


def test_initial_loss_is_uniform():
    model = GPT(ModelConfig(num_layers=2))
    ids = torch.randint(0, 1024, (2, 65), generator=torch.Generator().manual_seed(0))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(6.9315, abs=0.05)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_later_token_changes_no_earlier_hidden_state(layers):
    model = lively(replace(SMALL, num_layers=layers))
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 97
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :25], b[:, :25])
    assert not torch.allclose(a[:, 25:], b[:, 25:])


def test_upstream_names_round_trip():
    model = lively(replace(SMALL, tie_embeddings=False))
    state = {k: v.detach() for k, v in model.state_dict().items()}
    upstream = to_upstream(state)
    assert upstream["blocks.3.attn.c_q.weight"].shape == (48, 48)
    assert upstream["lm_head.weight"].shape == (97, 48)
    back = from_upstream(upstream, model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_cache_gives_the_same_hidden_states():
    model = lively()
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(2))
    cache = KVCache(window=64)
    parts = [model(ids[:, :12], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(12, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=2e-5, rtol=1e-4)


def test_generation_goes_on_past_the_window_and_is_repeatable():
    model = lively()
    ids = torch.arange(10)

    def generate(**options):
        return model.generate(ids, 40, window=16, generator=torch.Generator().manual_seed(3), **options)

    assert generate() == generate()
    assert len(generate()) == 40
    greedy = model.generate(ids, 5, window=16, temperature=0)
    assert greedy[0] == model.logits(model(ids[None]))[0, -1].argmax()
    assert model.generate(ids, 5, window=16, temperature=0, stop_id=greedy[2]) == greedy[: greedy.index(greedy[2])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_keeps_its_dtype_under_autocast(dtype):
    """torch 2.12 put rms_norm on autocast's float32 list."""
    x = torch.randn(3, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x).dtype == dtype


def test_bfloat16_activations():
    model = lively()
    ids = torch.randint(0, 97, (1, 32))
    hidden = model(ids, dtype=torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    assert model.loss(ids, ids, dtype=torch.bfloat16).dtype == torch.float32
    torch.testing.assert_close(hidden.float(), model(ids), atol=0.2, rtol=0.1)


def test_a_backend_is_chosen_by_probing():
    name, refused = select_backend("auto", SMALL, [64, 48], torch.device("cpu"), torch.float32)
    assert name in ("flash", "math")
    assert "cudnn" in refused
    with pytest.raises(InputError, match="cudnn"):
        select_backend("cudnn", SMALL, [64], torch.device("cpu"), torch.float32)
