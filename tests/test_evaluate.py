"""Scoring: coverage, context, causality, agreement with one long forward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import lively

from golfgpt.config import EvalConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError, NonFiniteError, VerificationError
from golfgpt.evaluate import Windows, evaluate, score_windows
from golfgpt.model import GPT

CPU = Ranks(0, 1, torch.device("cpu"))


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_every_target_is_scored_once_with_its_context(targets, window, data):
    window = min(window, targets)
    stride = data.draw(st.integers(1, window))
    windows = Windows(targets, window, stride)
    index = np.arange(len(windows))
    start, first = windows.start(index), windows.first_scored(index)
    scored = np.concatenate([np.arange(s + f, s + window) for s, f in zip(start, first, strict=True)])
    assert (scored == np.arange(targets)).all()
    assert (start >= 0).all() and (start + window <= targets).all()
    assert (np.diff(start) <= stride).all()
    assert (first[1:] >= window - stride).all(), "a token has at least window - stride tokens of context"


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [(65, 8, "longer than the text's 64"), (8, 0, "stride must lie in 1..8"), (8, 9, "stride must lie in 1..8")],
)
def test_windows_that_do_not_fit(window, stride, message):
    with pytest.raises(InputError, match=message):
        Windows(64, window, stride)


def nats_of(model: GPT, tokens: np.ndarray, window: int, stride: int, batch: int) -> np.ndarray:
    windows = Windows(len(tokens) - 1, window, stride)
    out = np.full(len(tokens), np.nan)
    with torch.no_grad():
        for positions, nats in score_windows(
            model, model.head_weight, 30.0, lambda a, b: tokens[a:b], windows, range(len(windows)), batch, CPU.device
        ):
            out[positions] = nats
    return out[1:]


def test_a_whole_window_equals_one_forward_and_batches_do_not_matter():
    model = lively()
    tokens = np.random.default_rng(0).integers(0, 97, 201)
    ids = torch.from_numpy(tokens)[None]
    logits = model.logits(model(ids[:, :-1])).double()
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").detach().numpy()
    np.testing.assert_allclose(nats_of(model, tokens, 200, 200, 3), expected, atol=1e-5)
    for stride in (7, 32):
        one, many = (nats_of(model, tokens, 32, stride, batch) for batch in (1, 5))
        np.testing.assert_allclose(one, many, atol=1e-5)


@pytest.mark.parametrize("stride", [5, 16])
def test_changing_a_later_token_changes_no_earlier_score(stride):
    model = lively()
    tokens = np.random.default_rng(1).integers(0, 97, 120)
    changed = tokens.copy()
    changed[70] = (changed[70] + 1) % 97
    a, b = nats_of(model, tokens, 16, stride, 4), nats_of(model, changed, 16, stride, 4)
    assert (a[:69] == b[:69]).all()  # score i belongs to token i + 1
    assert a[69] != b[69]


def test_the_score_divides_by_the_bytes_of_the_text(tiny, corpus):
    dataset = Dataset.open(corpus)
    config = replace(tiny, eval=EvalConfig(window=64))
    score = evaluate(GPT(config.model), dataset, config, CPU, dtype=torch.float32)
    assert score.tokens == dataset.val_tokens - 1
    assert score.bytes == dataset.manifest.val.raw_bytes
    assert score.label == "val_bpb"
    assert score.val_bpb == pytest.approx(score.val_loss / np.log(2) * score.tokens / score.bytes)
    assert score.val_loss == pytest.approx(np.log(384), abs=0.01)
    longer = evaluate(
        GPT(config.model), dataset, replace(config, eval=EvalConfig(max_tokens=500)), CPU, dtype=torch.float32
    )
    assert longer.tokens == 500
    assert longer.label == "val_bpb (first 500 tokens)"


def test_no_score_without_proof(tiny, corpus, monkeypatch):
    """A byte table that counts one byte too many per document ends the evaluation."""
    dataset = Dataset.open(corpus)
    counts = Dataset.byte_counts
    monkeypatch.setattr(Dataset, "byte_counts", lambda self, a, b: counts(self, a, b) + (self.val_ids(a, b) == 1))
    with pytest.raises(VerificationError, match="no score can be proved"):
        evaluate(GPT(tiny.model), dataset, tiny, CPU, dtype=torch.float32)


def test_a_broken_model_is_named_by_its_token(tiny, corpus):
    model = GPT(tiny.model)
    with torch.no_grad():
        model.tok_emb[5] = torch.nan
    with pytest.raises(NonFiniteError, match="token 1 of the validation text"):
        evaluate(model, Dataset.open(corpus), tiny, CPU, dtype=torch.float32)
