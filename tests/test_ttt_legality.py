"""Each published way to a wrong score, tried against the scorer: refused, or it cannot be expressed.

The list is that of openai/parameter-golf, by pull request: train, then score (#1082, #677); score again (#991, #1001);
a gate that knows the target (#1785); probabilities that do not sum to one (#886, #1147); warm-up on validation tokens
(#1530); leaks across documents (#1855).
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_ttt import KINDS, LORA, adapted, short_documents

from golfgpt.config import TTTConfig
from golfgpt.data.shards import Dataset
from golfgpt.errors import VerificationError
from golfgpt.model.gpt import GPT
from golfgpt.model.linear import rms_norm
from golfgpt.score import windows as scoring
from golfgpt.score.ttt import adapter as loop
from golfgpt.score.ttt import compliance, plan
from golfgpt.score.ttt import evaluate as evaluation
from golfgpt.score.ttt.adapter import Scored, Step
from golfgpt.score.ttt.evaluate import make_adapter
from golfgpt.score.ttt.ledger import Ledger
from golfgpt.score.ttt.lora import DocumentLoRA


@pytest.fixture(params=["sgd", "lora", "phased"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def config(tiny, monkeypatch):
    return short_documents(tiny, monkeypatch)


def refused(config, ttt: TTTConfig, message: str, **options) -> None:
    with pytest.raises(VerificationError, match=message) as caught:
        adapted(config, ttt, **options)
    assert caught.value.exit_code == 6


# 1 Train, then score


def learned_first(steps):
    """Every text is learned before its chunk is scored."""
    for step in steps:
        if step.text:
            yield Step(text=step.text, part=step.part)
        yield step._replace(text=())


def test_a_plan_that_learns_before_it_scores_is_refused(config, monkeypatch):
    sliding = plan.sliding
    monkeypatch.setattr(plan, "sliding", lambda *args: learned_first(sliding(*args)))
    refused(config, KINDS["sgd"], "token 1 of the validation text would be learned before it is scored: no score")


def test_a_plan_that_learns_the_chunk_after_is_refused(config, monkeypatch):
    sliding = plan.sliding

    def ahead(*args):
        for step in sliding(*args):
            yield step._replace(text=tuple(range(run.start, run.stop + 1) for run in step.text))

    monkeypatch.setattr(plan, "sliding", ahead)
    refused(config, KINDS["sgd"], "token 65 of the validation text would be learned before it is scored")


def test_phases_that_learn_documents_to_come_are_refused(config, monkeypatch):
    texts = plan.phase_texts
    everything = [plan.Document(0, 600)]
    monkeypatch.setattr(plan, "phase_texts", lambda *args: dict.fromkeys(texts(*args), everything))
    refused(config, KINDS["phased"], r"token \d+ of the validation text would be learned before it is scored")


def test_a_ledger_that_was_changed_is_refused():
    ledger = Ledger(4)
    ledger.score(np.array([0, 1]))
    ledger.learn(np.array([0]))
    ledger.check(all_scored=False)
    digest = ledger.digest
    with pytest.raises(VerificationError, match="token 3 of the validation text was never scored"):
        ledger.check(all_scored=True)
    ledger.learned[1] = 0
    assert ledger.digest != digest
    with pytest.raises(VerificationError, match="token 2 of the validation text was learned before it was scored"):
        ledger.check(all_scored=False)


class Ahead:
    """An adapter that gets hold of the text and learns the tokens after those that it is given."""

    def __init__(self, inner, tokens: int):
        self.inner, self.tokens, self.seen = inner, tokens, 0
        self.reset, self.weights = inner.reset, inner.weights

    def adapt(self, scored: Scored) -> None:
        if scored.text is None:
            return self.inner.adapt(scored)
        self.seen += len(scored.text) - 1
        more = self.read(self.seen + 1, self.seen + 1 + self.tokens)[0]
        self.inner.adapt(scored._replace(text=torch.cat((scored.text[self.tokens :], more))))


@pytest.mark.parametrize("tokens", [1, 20])
def test_an_adapter_that_reads_ahead_is_caught(config, monkeypatch, tokens):
    """By one token too: what is scored next is exchanged while its score is not."""

    def make(*args):
        return Ahead(make_adapter(*args), tokens)

    def lends_the_text(steps, scorer, adapter, ledger, read, *args, **options):
        adapter.read = read
        return loop.run(steps, scorer, adapter, ledger, read, *args, **options)

    for module in (compliance, evaluation):
        monkeypatch.setattr(module, "run", lends_the_text)
    refused(config, KINDS["sgd"], "depends on later tokens: the adapter or the model reads ahead", make=make)


def test_a_model_that_sees_ahead_is_caught(config, monkeypatch, kind):
    forward = GPT.forward

    def peeks(self, ids, **options):
        hidden = forward(self, ids, **options)
        return hidden + 1e-2 * self.tok_emb[ids.roll(-1, 1)[:, -hidden.size(1) :]]

    monkeypatch.setattr(GPT, "forward", peeks)
    refused(config, KINDS[kind], "depends on later tokens")


class Watched:
    """An adapter that checks that nothing it is given is a view of something longer."""

    def __init__(self, inner):
        self.inner, self.learned = inner, 0
        self.reset, self.weights = inner.reset, inner.weights

    def adapt(self, scored: Scored) -> None:
        for given in (scored.text, scored.again):
            if given is not None:
                assert given._base is None and given.untyped_storage().nbytes() == given.numel() * given.itemsize
        self.learned += 1
        self.inner.adapt(scored)


def test_what_an_adapter_gets_holds_no_other_token(config, monkeypatch, kind):
    """Neither in a longer storage behind it, nor before anything is scored: adapters are made without a text, so there
    is nothing to warm up on."""
    made = []

    def make(*args):
        assert [type(value).__name__ for value in args] == ["GPT", "RunConfig", "dtype", "int", "Ranks"]
        made.append(Watched(make_adapter(*args)))
        return made[-1]

    adapted(config, KINDS[kind], make=make)
    assert made[-1].learned > 3
    assert list(inspect.signature(make_adapter).parameters) == ["model", "config", "dtype", "document_start", "ranks"]
    for method in ("reset", "weights"):
        parameters = list(inspect.signature(getattr(loop.Adapter, method)).parameters)
        assert parameters in (["self"], ["self", "rows"])


# 2 Score again


def test_scoring_again_is_refused(config, monkeypatch):
    """The better of two scores, or the one after learning."""
    documents = plan.documents
    monkeypatch.setattr(
        plan, "documents", lambda *args, **k: (step for _ in range(2) for step in documents(*args, **k))
    )
    refused(config, KINDS["lora"], "is scored a second time: no score")
    with pytest.raises(VerificationError, match="token 3 of the validation text is scored a second time"):
        Ledger(4).score(np.array([1, 2, 2]))


def test_leaving_tokens_out_is_refused(config, monkeypatch):
    find = plan.find_documents
    monkeypatch.setattr(plan, "find_documents", lambda *args: find(*args)[1:])
    refused(config, KINDS["lora"], "token 1 of the validation text was never scored: no score")


# 3 Gates and probabilities


@pytest.mark.parametrize("keyed", [True, False], ids=["a gate that knows the target", "a blend"])
def test_probabilities_that_do_not_sum_to_one_are_refused(config, monkeypatch, kind, keyed):
    """Adapters return weights, not probabilities, so the scorer itself must be changed for that."""
    honest = scoring.Scorer.logprobs

    def logprobs(self, hidden, targets, mask):
        out = honest(self, hidden, targets, mask)
        better = out + 0.1 * (targets % 2) if keyed else torch.logaddexp(out, torch.full_like(out, -3.0))
        return better.where(mask, 0)

    monkeypatch.setattr(scoring.Scorer, "logprobs", logprobs)
    refused(config, KINDS[kind], "the probabilities over the vocabulary sum to")


# 4 Documents


def test_weights_that_stay_between_documents_are_caught(config, monkeypatch):
    """Documents are said to be independent."""
    reset = DocumentLoRA.reset

    def keeps(self, rows: int) -> None:
        if not hasattr(self, "begun"):
            self.begun = True
            reset(self, rows)

    monkeypatch.setattr(DocumentLoRA, "reset", keeps)
    refused(config, replace(KINDS["lora"], lora=replace(LORA, documents=8)), "depends on another document")


def test_documents_of_a_batch_that_learn_from_each_other_are_caught(config, monkeypatch):
    weights = DocumentLoRA.weights

    def mixed(self):
        got = weights(self)
        head = got.head
        return got._replace(head=head._replace(b=head.b.mean(0, keepdim=True).expand_as(head.b)))

    monkeypatch.setattr(DocumentLoRA, "weights", mixed)
    refused(config, KINDS["lora"], "depends on another document")


def test_what_stays_from_one_evaluation_to_the_next_is_caught(config, monkeypatch, kind):
    forward, seen = GPT.forward, []

    def remembers(self, ids, **options):
        hidden = forward(self, ids, **options)
        seen.append(1)
        return rms_norm(hidden + 1e-3 * len(seen) * hidden[..., :1])

    monkeypatch.setattr(GPT, "forward", remembers)
    refused(config, KINDS[kind], "adapting to the same text twice gives two results")


def test_the_text_is_proved(config, monkeypatch):
    """Bytes that differ between the sums and the ledger's tokens have no score."""
    counts = iter(range(10**6))
    monkeypatch.setattr(Dataset, "byte_counts", lambda self, a, b: np.full(b - a, 1 + next(counts) % 3, np.uint16))
    refused(config, KINDS["sgd"], "no score can be proved")
