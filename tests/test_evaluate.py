"""Scoring: coverage, context, agreement with one long forward, proofs, checks, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, lively

from golfgpt.config import EvalConfig, RunConfig, to_dict
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError, Interrupted, NonFiniteError, VerificationError
from golfgpt.model.gpt import GPT
from golfgpt.score import evaluate as evaluation
from golfgpt.score import windows as scoring
from golfgpt.score.checks import check
from golfgpt.score.evaluate import PartialSums, Score, evaluate
from golfgpt.score.windows import Scorer, Windows, cut, score_windows
from golfgpt.train.signals import Signals

CPU = Ranks(0, 1, torch.device("cpu"))


# 1 Windows


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 64), st.booleans(), st.data())
def test_every_target_is_scored_once_with_its_context(targets, window, r4, data):
    window = min(window, targets)
    stride = data.draw(st.integers(1, window))
    windows = Windows(targets, window, stride, r4)
    index = torch.arange(len(windows))
    start, first = windows.start(index), windows.first_scored(index)
    parts = [range(s + f, s + window) for s, f in zip(start.tolist(), first.tolist(), strict=True)]
    scored = [target for part in parts for target in part]
    assert scored == list(windows.scored(range(len(windows))))
    assert [windows.scoring(target) for target in scored] == [i for i, part in enumerate(parts) for _ in part]
    assert windows.scored(range(1, len(windows))) == range(scored[0] + len(parts[0]), scored[-1] + 1)
    assert (start >= 0).all() and (start + window <= targets).all()
    assert (first[1:] >= window - stride).all() and (first >= 0).all()
    assert all(window - f <= windows.suffix(i) for i, f in enumerate(first.tolist())), "all of it is computed"
    fewest = min(first[1:].tolist() or first.tolist()) + 1
    assert windows.context == (fewest, window)
    if r4:
        assert {len(part) for part in parts} == {stride}
        assert scored[0] == window - stride and targets - scored[-1] - 1 < stride
    else:
        assert scored == list(range(targets))


def published_r4b(targets: int, window: int, stride: int) -> list[tuple[int, range]]:
    """Start and scored targets of each window, as the loop of the published script has them."""
    loop = []
    for start in range(0, targets, stride):
        length = min(window, targets - start)
        if length >= stride:
            loop.append((start, range(start + (length - stride if start else 0), start + length)))
    return loop


@settings(max_examples=200)
@given(st.integers(1, 20), st.integers(1, 24), st.data())
def test_the_windows_of_r4b_are_the_published_ones(chunks, window, data):
    stride = data.draw(st.integers(1, window))
    expected = published_r4b(chunks * window, window, stride)
    windows = Windows(chunks * window, window, stride, r4b=True)
    index = torch.arange(len(windows))
    ends = windows.start(index) + windows.length(index)
    begins = windows.start(index) + windows.first_scored(index)
    parts = list(map(range, begins.tolist(), ends.tolist()))
    assert list(zip(windows.start(index).tolist(), parts, strict=True)) == expected
    low = data.draw(st.integers(0, len(windows)))
    share = range(low, data.draw(st.integers(low, len(windows))))
    counted = sorted(target for part, times in windows.counts(share) for target in [*part] * times)
    assert counted == sorted(target for part in parts[share.start : share.stop] for target in part)
    assert {*windows.scored(share)} == {*counted}
    for i, part in enumerate(parts):
        assert windows.scoring(part[-1]) <= i and part[-1] in parts[windows.scoring(part[-1])]
        assert windows.suffix(i) == (window if i == 0 or i >= windows.full else stride)


def test_published_counts():
    """recipe R4b on the published validation text, windows of 4096 and 64 apart: 63 short ones, 4,032 tokens again."""
    for window, short in ((1024, 15), (4096, 63)):
        windows = Windows(62_021_632, window, 64, r4b=True)
        assert (len(windows), len(windows) - windows.full) == (969_088, short)
        counted = sum(len(part) * times for part, times in windows.counts(range(len(windows))))
        assert counted == 62_021_632 + short * 64
        assert windows.context == (1, window)
    assert len(Windows(62_021_632, 1024, 64, r4=True)) == 969_073


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [(65, 8, "longer than the text's 64"), (8, 0, "stride must lie in 1..8"), (8, 9, "stride must lie in 1..8")],
)
def test_windows_that_do_not_fit(window, stride, message):
    with pytest.raises(InputError, match=message):
        Windows(64, window, stride)


# 2 Scores


def reader(tokens: np.ndarray):
    slab = torch.stack((torch.from_numpy(tokens), torch.zeros(len(tokens), dtype=torch.int64)))
    return lambda start, stop: slab[:, start:stop].clone()


def nats_of(model: GPT, tokens: np.ndarray, window: int, stride: int, batch: int, **options) -> torch.Tensor:
    windows = Windows(len(tokens) - 1, window, stride)
    out = torch.full((len(tokens),), torch.nan)
    scorer = Scorer(model, torch.float32, **options)
    with torch.no_grad():
        for _, part, logprobs in score_windows(scorer, reader(tokens), windows, range(len(windows)), batch):
            assert out[part.positions[part.scored]].isnan().all()
            assert (logprobs[~part.scored] == 0).all()
            out[part.positions[part.scored]] = -logprobs[part.scored]
    return out[1:]


@pytest.mark.numeric
def test_a_whole_window_equals_one_forward_and_batches_do_not_matter(monkeypatch):
    model = lively()
    tokens = np.random.default_rng(0).integers(0, 97, 201)
    ids = torch.from_numpy(tokens)[None]
    logits = model.logits(model(ids[:, :-1])).double()
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").float()
    torch.testing.assert_close(nats_of(model, tokens, 200, 200, 3), expected.detach(), atol=1e-5, rtol=0)
    for stride in (7, 32):
        one, many = (nats_of(model, tokens, 32, stride, batch) for batch in (1, 5))
        torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
        monkeypatch.setattr(scoring, "SLAB_TOKENS", 100)
        assert torch.equal(nats_of(model, tokens, 32, stride, 2), nats_of(model, tokens, 32, stride, 2))
        torch.testing.assert_close(nats_of(model, tokens, 32, stride, 2), many, atol=1e-5, rtol=0)


@pytest.mark.numeric
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_a_suffix_scores_what_the_whole_window_scores(stride, documents, monkeypatch):
    """In the variants of the recipes too. Products of fewer rows may be rounded otherwise."""
    gates = {"smear_gate": "after_norm", "bigram_hash": "xor", "bigram_vocab_size": 50, "bigram_dim": 8}
    for config in (SMALL, replace(SMALL, num_layers=1), replace(SMALL, document_start=1, **gates)):
        model = lively(config)
        tokens = np.random.default_rng(2).integers(0, 97, 65 + 20 * stride)
        tokens[::13] = 1
        options = {"document_start": 1} if documents else {}
        fast = nats_of(model, tokens, 32, stride, 4, **options)
        with monkeypatch.context() as patch:
            whole = lambda self, ids, suffix: model(ids, document_start=self.document_start)[:, -suffix:]  # noqa: E731, B023
            patch.setattr(Scorer, "hidden", whole)
            slow = nats_of(model, tokens, 32, stride, 4, **options)
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=0)
        assert float(fast.double().sum()) == pytest.approx(float(slow.double().sum()), rel=1e-7)


def test_a_suffix_has_limits():
    with pytest.raises(ValueError, match="suffix is 5; expected 1 to 4"):
        lively()(torch.zeros(1, 4, dtype=torch.int64), suffix=5)


@pytest.mark.numeric
@pytest.mark.parametrize("stride", [5, 16])
def test_changing_a_later_token_changes_no_earlier_score(stride):
    model = lively()
    tokens = np.random.default_rng(1).integers(0, 97, 120)
    changed = tokens.copy()
    changed[70] = (changed[70] + 1) % 97
    a, b = nats_of(model, tokens, 16, stride, 4), nats_of(model, changed, 16, stride, 4)
    assert torch.equal(a[:69], b[:69])  # to the bit, as the checks promise; score i belongs to token i + 1
    assert a[69] != b[69]


@pytest.mark.numeric
def test_document_aware_scores_are_those_of_the_documents_alone():
    model = lively(replace(SMALL, smear_gate="after_norm", document_start=1))
    rng = np.random.default_rng(3)
    documents = [np.append(1, rng.integers(2, 97, length)) for length in (20, 9, 2, 30)]
    tokens = np.concatenate(documents)
    together = nats_of(model, tokens, len(tokens) - 1, len(tokens) - 1, 1, document_start=1)
    begin = 0
    for document, following in zip(documents, [*documents[1:], [1]], strict=True):
        alone = nats_of(model, np.append(document, following[0]), len(document), len(document), 1)
        count = min(len(document), len(tokens) - 1 - begin)
        torch.testing.assert_close(together[begin : begin + count], alone[:count], atol=2e-5, rtol=0)
        begin += len(document)
    assert begin == len(tokens)


@pytest.mark.numeric
@pytest.mark.slow
def test_the_compiled_forward_scores_alike():
    """Two graphs, the first window and the suffix of the others; within documents two more."""
    model = lively(replace(SMALL, num_layers=2))
    tokens = np.random.default_rng(4).integers(0, 97, 100)
    for options in ({}, {"document_start": 1}):
        eager = nats_of(model, tokens, 16, 6, 4, **options)
        torch.testing.assert_close(nats_of(model, tokens, 16, 6, 4, compiled=True, **options), eager, atol=2e-5, rtol=0)


def score(tiny: RunConfig, model: GPT | None = None, ranks: Ranks = CPU, keep=None, **eval) -> Score:
    config = replace(tiny, eval=EvalConfig(**eval))
    model = model or GPT(config.model)
    return evaluate(model, Dataset.open(config.data.path), config, ranks, dtype=torch.float32, keep=keep)


def test_the_score_divides_by_the_bytes_of_the_text(tiny, corpus):
    dataset = Dataset.open(corpus)
    whole = score(tiny, window=64)
    assert whole.tokens == dataset.val_tokens - 1 and not whole.partial
    assert whole.bytes == dataset.manifest.val.raw_bytes
    assert whole.label == "val_bpb"
    assert whole.val_bpb == pytest.approx(whole.val_loss / np.log(2) * whole.tokens / whole.bytes)
    assert whole.val_loss == pytest.approx(np.log(384), abs=0.01)
    part = score(tiny, max_tokens=500)
    assert part.tokens == 500
    assert part.label == "val_bpb (first 500 tokens)"
    within = score(tiny, window=64, document_aware=True)
    assert (within.tokens, within.bytes, within.label) == (whole.tokens, whole.bytes, "val_bpb (document-aware)")


def test_the_r4_variant_names_what_it_leaves_out(tiny, corpus):
    dataset = Dataset.open(corpus)
    r4 = score(tiny, window=64, stride=10, rule="r4")
    last = (dataset.val_tokens - 1 - 64) % 10
    assert r4.tokens == dataset.val_tokens - 1 - 54 - last and r4.partial
    stop = dataset.val_tokens - last
    assert r4.bytes == int(dataset.byte_counts(55, stop).sum())
    assert r4.label == f"val_bpb (R4: first 54 and last {last} tokens not scored)"
    first = score(tiny, window=64, stride=10, rule="r4", max_tokens=64 + 300)
    assert first.label == "val_bpb (first 364 tokens) (R4: first 54 tokens not scored)"


@pytest.mark.numeric
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("stride", [3, 4, 16])
def test_the_r4b_variant_sums_what_the_published_loop_does(stride, documents, monkeypatch):
    """Window by window, each cut to its own length, against batches of one length."""
    model = lively(replace(SMALL, smear_gate="after_norm", document_start=1))
    tokens = np.random.default_rng(5).integers(0, 97, 16 * 6 + 1)
    tokens[::11] = 1
    options = {"document_start": 1} if documents else {}
    times = 0
    nats, ours = torch.zeros(97, dtype=torch.float64), torch.zeros(97, dtype=torch.float64)
    with torch.no_grad():
        for start, part in published_r4b(96, 16, stride):
            stop = part.stop
            ids, targets = (torch.from_numpy(tokens[a:b])[None] for a, b in ((start, stop), (start + 1, stop + 1)))
            logits = model.logits(model(ids, **options))
            losses = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none").double()
            nats[part.start + 1 : stop + 1] += losses[part.start - start :]
            times += len(part)
        windows, scorer = Windows(96, 16, stride, r4b=True), Scorer(model, torch.float32, **options)
        for slab, batch in ((scoring.SLAB_TOKENS, 4), (40, 2)):
            monkeypatch.setattr(scoring, "SLAB_TOKENS", slab)
            ours.zero_()
            for _, part, logprobs in score_windows(scorer, reader(tokens), windows, range(len(windows)), batch):
                ours.index_add_(0, part.positions.flatten(), -logprobs.flatten().double())
                times -= int(part.scored.sum()) if batch == 4 else 0
            torch.testing.assert_close(ours, nats, atol=5e-5, rtol=0)
    assert times == 0


def test_the_r4b_variant_says_what_it_counts_again(tiny, corpus):
    dataset = Dataset.open(corpus)
    targets = (dataset.val_tokens - 1) // 64 * 64
    r4b = score(tiny, lively(tiny.model), window=64, stride=16, rule="r4b")
    nbytes = dataset.byte_counts(1, targets + 1).astype(int)
    assert (r4b.tokens, r4b.bytes) == (targets + 3 * 16, nbytes.sum() + 3 * nbytes[-16:].sum())
    assert r4b.label == f"val_bpb (first {targets:,} tokens) (R4b: counts the tail's tokens more than once)"
    assert r4b.partial and (r4b.checks.min_context, r4b.checks.max_context) == (1, 64)
    uneven = score(tiny, window=64, stride=48, rule="r4b", max_tokens=150)
    assert uneven.label == "val_bpb (first 128 tokens) (R4b: last 16 tokens not scored)" and uneven.tokens == 64 + 48
    with pytest.raises(InputError, match=r"eval\.window 64 is longer than the text's 63"):
        score(tiny, window=64, rule="r4b", max_tokens=63)


def test_later_tokens_are_checked_in_short_windows_too(monkeypatch):
    """A model that sees ahead in a short window only, which starts with token 40."""
    tokens = np.random.default_rng(0).integers(0, 96, 65)
    tokens[40], honest = 96, GPT.forward

    def cheat(self, ids, **options):
        hidden = honest(self, ids, **options)
        return hidden + 1e-2 * self.tok_emb[ids.roll(-1, 1)[:, -hidden.size(1) :]] * (ids[0, 0] == 96)

    scorer, windows = Scorer(lively(), torch.float32), Windows(64, 32, 8, r4b=True)
    with torch.no_grad():
        check(scorer, windows, reader(tokens), range(len(windows)), 4)
        monkeypatch.setattr(GPT, "forward", cheat)
        with pytest.raises(VerificationError, match=r"score of token [56]\d of .* depends on tokens behind it"):
            check(scorer, windows, reader(tokens), range(len(windows)), 4)


@pytest.mark.numeric
@pytest.mark.parametrize("rule", [{"stride": 48, "max_tokens": 4000}, {"stride": 16, "max_tokens": 320, "rule": "r4b"}])
def test_ranks_deal_the_windows(tiny, rule):
    """Each of three ranks sums its share; together they are one rank's sums."""
    alone = score(tiny, lively(tiny.model), window=64, **rule)
    total = torch.zeros(3, dtype=torch.float64)

    class Silent:
        def __init__(self, rank):
            self.rank, self.world, self.device, self.is_main = rank, 3, CPU.device, False

        def sum_(self, tensor):
            total.add_(tensor)
            return torch.tensor([alone.nats, alone.tokens, alone.bytes])

        def raise_on_any_rank(self, error):
            assert error is None

        def all_gather(self, tensor):
            return tensor

    for rank in range(3):
        score(tiny, lively(tiny.model), Silent(rank), window=64, **rule)
    assert total[1:].tolist() == [alone.tokens, alone.bytes]
    assert float(total[0]) == pytest.approx(alone.nats, rel=1e-6)


# 3 Proofs and bad input


def test_no_score_without_proof(tiny, monkeypatch):
    """A byte table that counts one byte too many per document ends the evaluation."""
    counts = Dataset.byte_counts
    monkeypatch.setattr(Dataset, "byte_counts", lambda self, a, b: counts(self, a, b) + (self.val_ids(a, b) == 1))
    with pytest.raises(VerificationError, match="no score can be proved"):
        score(tiny, window=64)


@pytest.mark.parametrize("stride", [48, 64])
def test_a_broken_model_is_named_by_its_token(tiny, stride):
    model = GPT(tiny.model)
    with torch.no_grad():
        model.tok_emb[5] = torch.nan
    with pytest.raises(NonFiniteError, match="token 1 of the validation text"):
        score(tiny, model, window=64, stride=stride)


def test_one_broken_hidden_state_is_named_by_its_token(tiny, monkeypatch):
    """Not the window's first, not in its tied embedding: the model is NaN from where token 300 is read."""
    forward = GPT.forward

    def broken(self, ids, **options):
        hidden = forward(self, ids, **options)
        seen = (ids == mark).cumsum(1)[:, -hidden.size(1) :]
        return hidden.masked_fill((seen > 0)[..., None], torch.nan)

    ids = Dataset.open(tiny.data.path).val_ids(0, 4001)
    mark = next(token for token in ids[300:] if token not in ids[:300])
    at = int((ids == mark).argmax())
    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(NonFiniteError, match=f"token {at + 1} of the validation text"):
        score(tiny, window=64, stride=16, max_tokens=4000)


def test_a_token_outside_the_vocabulary_is_named(tiny, monkeypatch):
    ids = Dataset.val_ids

    def damaged(self, start, stop):
        out = ids(self, start, stop)
        if start <= 700 < stop:
            out[700 - start] = 999
        return out

    monkeypatch.setattr(Dataset, "val_ids", damaged)
    with pytest.raises(
        InputError, match="token 700 of the validation text is 999, outside the model's vocabulary of 384"
    ):
        score(tiny, window=64)


# 4 Checks


@pytest.mark.numeric
def test_checks_of_an_honest_model(tiny):
    model = lively(tiny.model)
    flat = score(tiny, model, window=64, stride=16, max_tokens=4000).checks
    assert (flat.min_context, flat.max_context) == (49, 64)
    assert flat.windows == 9 and flat.comparisons > 100
    assert flat.probability_sum_error < 1e-5
    assert flat.later_token_change == flat.outside_context_change == 0
    assert flat.other_document_change is None
    within = score(tiny, model, window=64, stride=48, document_aware=True, max_tokens=9000)
    assert within.checks.other_document_change == 0 and "other documents change nothing" in str(within.checks)


def peeks(self, ids, **options):
    """Every token sees the one behind it."""
    hidden = FORWARD(self, ids, **options)
    ahead = torch.cat((ids[:, 1:], ids[:, :1]), dim=1)[:, -hidden.size(1) :]
    return hidden + 1e-3 * self.tok_emb[ahead]


def looks_at_the_window_end(self, ids, **options):
    hidden = FORWARD(self, ids, **options)
    return hidden + 1e-3 * self.tok_emb[ids[:, -1:]]


def remembers(self, ids, **options):
    """A window sees the batch scored before."""
    hidden = FORWARD(self, ids, **options)
    out = hidden + getattr(self, "last", 0.0)
    self.last = 1e-2 * hidden.mean()
    return out


FORWARD = GPT.forward


@pytest.mark.parametrize("stride", [1, 16, 64])
@pytest.mark.parametrize("cheat", [peeks, looks_at_the_window_end])
def test_a_model_that_sees_ahead_has_no_score(tiny, monkeypatch, cheat, stride):
    monkeypatch.setattr(GPT, "forward", cheat)
    with pytest.raises(VerificationError, match="depends on tokens behind it: the model sees ahead"):
        score(tiny, lively(tiny.model), window=64, stride=stride, max_tokens=500)


def test_a_model_with_a_memory_has_no_score(tiny, monkeypatch):
    monkeypatch.setattr(GPT, "forward", remembers)
    with pytest.raises(VerificationError, match="no score"):
        score(tiny, lively(tiny.model), window=64, stride=16, max_tokens=500)


@pytest.mark.parametrize("excess", [1e-3, -1e-3, 2.0])
def test_a_scorer_that_is_not_normalized_has_no_score(tiny, monkeypatch, excess):
    honest = scoring.token_logprobs
    monkeypatch.setattr(scoring, "token_logprobs", lambda *a, **k: (honest(*a, **k) + excess) * k["mask"])
    with pytest.raises(VerificationError, match="the probabilities over the vocabulary sum to"):
        score(tiny, lively(tiny.model), window=64, stride=16, max_tokens=500)


@pytest.mark.parametrize(
    "gates", [{"smear_gate": "after_norm"}, {"bigram_hash": "xor", "bigram_vocab_size": 40, "bigram_dim": 8}]
)
def test_a_gate_that_smears_across_documents_has_no_document_aware_score(tiny, gates):
    """As published, without model.document_start: flat scores are fine, document-aware ones are not."""
    for start in (None, 1):
        config = replace(tiny, model=replace(tiny.model, document_start=start, **gates))
        model = lively(config.model)
        flat = score(config, model, window=64, stride=16, max_tokens=4000)
        assert flat.checks.other_document_change is None
        if start is None:
            with pytest.raises(VerificationError, match="depends on another document"):
                score(config, model, window=64, stride=48, document_aware=True, max_tokens=9000)
        else:
            assert (
                score(
                    config, model, window=64, stride=48, document_aware=True, max_tokens=9000
                ).checks.other_document_change
                == 0
            )


def test_attention_across_documents_has_no_document_aware_score(tiny, monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda self, ids, **o: FORWARD(self, ids, **(o | {"document_start": None})))
    with pytest.raises(VerificationError, match="depends on another document"):
        score(tiny, lively(tiny.model), window=64, stride=48, document_aware=True, max_tokens=9000)


def test_a_window_that_reads_what_lies_in_front_of_it_is_found(monkeypatch):
    """The cut is wrong by one token: it is the context check that says so."""
    from golfgpt.score import checks as compliance

    tokens = np.random.default_rng(0).integers(0, 97, 300)
    windows = Windows(299, 32, 8)
    scorer = Scorer(lively(), torch.float32)
    with torch.no_grad():
        assert check(scorer, windows, reader(tokens), range(len(windows)), 4)[4] == 0

        def early(slab, base, windows, index, suffix):
            part = cut(slab, base, windows, index, suffix)
            start = (windows.start(index)[:, None] - base - 1).clamp(min=0)
            return part._replace(ids=slab[0, start + torch.arange(windows.window)])

        monkeypatch.setattr(compliance, "cut", early)
        with pytest.raises(VerificationError, match="in front of its window"):
            check(scorer, windows, reader(tokens), range(len(windows)), 4)


# 5 Interruption


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupt scoring after some batches, by whatever `how` does, once; always look at the clock."""
    monkeypatch.setattr(evaluation, "PROGRESS_SECONDS", 0.0)

    def arm(batches: int, how) -> SimpleNamespace:
        seen = SimpleNamespace(batches=0, armed=True)

        def some(*args):
            for item in score_windows(*args):
                yield item
                seen.batches += 1
                if seen.armed and seen.batches == batches:
                    seen.armed, seen.batches = False, 0
                    how()

        monkeypatch.setattr(evaluation, "score_windows", some)
        return seen

    return arm


def kill(kind: int):
    return lambda: os.kill(os.getpid(), kind)


PLAN = {"window": 64, "stride": 16, "max_tokens": 2000, "batch_tokens": 640}


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_evaluation_continues(tiny, tmp_path, interrupted, kind):
    model, said = lively(tiny.model), []
    whole = score(tiny, model, **PLAN)
    seen = interrupted(7, kill(kind))
    with Signals(tmp_path), pytest.raises(Interrupted):
        score(tiny, model, keep=PartialSums(tmp_path, 0, "model"), **PLAN)
    again = score(tiny, model, keep=PartialSums(tmp_path, 0, "model", said.append), **PLAN)
    assert said == [f"continuing an interrupted evaluation: {64 + 6 * 16 * 10:,} tokens are scored already"]
    assert seen.batches == -(-(2000 - 64) // 160) + 1 - 7
    assert (again.nats, again.tokens, again.bytes) == (whole.nats, whole.tokens, whole.bytes)
    assert not list(tmp_path.iterdir()), "the file goes with the finished score"


def test_ctrl_c_and_running_out_of_memory_keep_the_sums(tiny, tmp_path, interrupted):
    def stop():
        raise error

    for error in (KeyboardInterrupt(), MemoryError()):
        interrupted(3, stop)
        with pytest.raises(type(error)):
            score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN)
        stored = json.loads((tmp_path / "eval_partial_0.json").read_text())
        assert stored["next"] == 21 and stored["values"][1] == 64 + 20 * 16
        smaller = score(
            tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **(PLAN | {"batch_tokens": 64})
        )
        assert smaller.nats == pytest.approx(score(tiny, lively(tiny.model), **PLAN).nats, rel=1e-7)


def test_a_signal_during_the_checks_loses_nothing(tiny, tmp_path, interrupted, monkeypatch):
    interrupted(3, kill(signal.SIGTERM))
    monkeypatch.setattr(evaluation, "check", check)
    for _ in range(2):
        with Signals(tmp_path), pytest.raises(Interrupted):
            score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN)
        assert json.loads((tmp_path / "eval_partial_0.json").read_text())["next"] == 21
        monkeypatch.setattr(evaluation, "check", lambda *args: kill(signal.SIGTERM)())


@pytest.mark.parametrize(
    ("model", "plan", "why"),
    [
        ("other", {}, "is of another evaluation (model changed)"),
        ("model", {"stride": 32}, "is of another evaluation (stride changed)"),
        ("model", {"document_aware": True}, "is of another evaluation (document_start changed)"),
        (None, {}, "is damaged"),
    ],
)
def test_another_evaluation_starts_over(tiny, tmp_path, interrupted, model, plan, why):
    interrupted(2, kill(signal.SIGTERM))
    with Signals(tmp_path), pytest.raises(Interrupted):
        score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN)
    if model is None:
        (tmp_path / "eval_partial_0.json").write_text('{"key": 3')
    said = []
    got = score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, model or "model", said.append), **(PLAN | plan))
    assert len(said) == 1 and said[0].endswith(f"{why}: starting over")
    assert got.nats == score(tiny, lively(tiny.model), **(PLAN | plan)).nats


def test_seconds_before_an_interruption_count(tiny, tmp_path, interrupted):
    interrupted(3, kill(signal.SIGTERM))
    with Signals(tmp_path), pytest.raises(Interrupted):
        score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN)
    file = tmp_path / "eval_partial_0.json"
    stored = json.loads(file.read_text())
    assert 0 < stored["seconds"] < 600
    file.write_text(json.dumps(stored | {"seconds": 1000.0}))
    interrupted(3, kill(signal.SIGTERM))
    with Signals(tmp_path), pytest.raises(Interrupted):
        score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN)
    assert 1000 < json.loads(file.read_text())["seconds"] < 1600
    assert 1000 < score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN).seconds < 1600


def test_sums_are_saved_as_time_goes_by(tiny, tmp_path, interrupted, monkeypatch):
    """What a SIGKILL leaves behind."""
    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0.0)
    files = []
    interrupted(5, lambda: files.append(json.loads((tmp_path / "eval_partial_0.json").read_text())))
    score(tiny, lively(tiny.model), keep=PartialSums(tmp_path, 0, "model"), **PLAN)
    assert files[0]["next"] == 1 + 4 * 10


def test_a_folder_that_cannot_be_written_is_a_warning(tiny, tmp_path, interrupted):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SAVE_SECONDS", 0.0)
        patch.setattr(evaluation, "PROGRESS_SECONDS", 0.0)
        score(tiny, lively(tiny.model), keep=PartialSums(tmp_path / "gone", 0, "model", said.append), **PLAN)
    assert len(said) == 1 and said[0].startswith("warning:")


def test_the_progress_line(tiny, monkeypatch):
    monkeypatch.setattr(evaluation, "PROGRESS_SECONDS", 0.0)
    lines = []
    config = replace(tiny, eval=EvalConfig(**PLAN))
    dataset = Dataset.open(tiny.data.path)
    got = evaluate(lively(tiny.model), dataset, config, CPU, dtype=torch.float32, progress=lines.append)
    assert lines[0].startswith("64 of 2,000 tokens, ") and lines[0].endswith(" s left")
    assert lines[-1].startswith(f"2,000 of 2,000 tokens, {got.val_bpb:.4f} bits per byte so far, ")
    assert lines[-1].endswith(" tokens/s, 0 s left")


# 6 Ranks


WORKER = """
import json, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from golfgpt import distributed
from golfgpt.score import evaluate as evaluation
from golfgpt.config import EvalConfig, RunConfig, from_dict
from golfgpt.data.shards import Dataset
from golfgpt.errors import Interrupted
from golfgpt.score.evaluate import PartialSums, evaluate
from golfgpt.model.gpt import GPT
from models import lively

config = from_dict(RunConfig, json.loads({config!r}))
ranks = distributed.start("cpu")
dataset, out = Dataset.open(config.data.path), []


def score(model, folder=None, **plan):
    keep = PartialSums(Path(folder), ranks.rank, "model", out.append) if folder else None
    plan = replace(config, eval=EvalConfig(window=64, **plan))
    try:
        got = evaluate(model, dataset, plan, ranks, dtype=torch.float32, keep=keep)
        out.append([got.nats, got.tokens, got.bytes, got.label])
    except Exception as error:
        out.append([type(error).__name__, str(error)])


def stops(*args):
    for count, item in enumerate(score_windows(*args)):
        yield item
        if count == 2 and ranks.rank == 1:
            raise Interrupted("stopped by SIGTERM", 15)


def breaks(self, ids, **options):
    hidden = forward(self, ids, **options)
    return hidden.masked_fill((ids == {mark}).cumsum(1)[:, -hidden.size(1) :, None] > 0, torch.nan)


for plan in {plans!r}:
    score(lively(config.model), **plan)
evaluation.score_windows, score_windows = stops, evaluation.score_windows
score(lively(config.model), {folder!r}, **{plans!r}[0])
evaluation.score_windows = score_windows
score(lively(config.model), {folder!r}, **{plans!r}[0])
GPT.forward, forward = breaks, GPT.forward
score(lively(config.model), max_tokens=4000)
with open({out!r} + str(ranks.rank), "w") as file:
    json.dump(out, file)
ranks.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree_with_one(tiny, tmp_path, world):
    """Also where there are fewer windows than ranks, after the second was interrupted, and where only the last finds a
    broken token."""
    plans = [
        {"stride": 16, "max_tokens": 1000, "batch_tokens": 256},
        {"stride": 16, "max_tokens": 1000, "rule": "r4b"},
        {"max_tokens": 64},
        {"stride": 48, "max_tokens": 1000, "document_aware": True},
    ]
    alone = [score(tiny, lively(tiny.model), window=64, **plan) for plan in plans]
    ids = Dataset.open(tiny.data.path).val_ids(0, 4000)
    first = {int(token): at for at, token in reversed(list(enumerate(ids)))}
    mark = max(first, key=first.get)
    assert first[mark] > 4000 * (world - 1) // world
    file = tmp_path / "main.py"
    values = {"config": json.dumps(to_dict(tiny)), "plans": plans, "mark": mark, "folder": str(tmp_path)}
    file.write_text(WORKER.format(tests=os.path.dirname(__file__), out=str(tmp_path / "out"), **values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), file]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for rank in range(world):
        *scores, stopped, said, again, failed = json.loads((tmp_path / f"out{rank}").read_text())
        for got, expected in zip((*scores, again), (*alone, alone[0]), strict=True):
            assert got[0] == pytest.approx(expected.nats, rel=1e-6)
            assert got[1:] == [expected.tokens, expected.bytes, expected.label]
        assert stopped[0] == ("Interrupted" if rank == 1 else "PeerError")
        assert said.startswith("continuing an interrupted evaluation")
        assert failed[0] == ("NonFiniteError" if rank == world - 1 else "PeerError")
        assert rank != world - 1 or f"token {first[mark] + 1} of the validation text" in failed[1]
