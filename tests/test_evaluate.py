"""Scoring: coverage, context, agreement with one long forward, proofs, checks, ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, lively

from golfgpt import distributed
from golfgpt.config import BigramConfig, EvalConfig, RunConfig, RuntimeConfig, from_dict, to_dict
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, InputError, Interrupted, NonFiniteError, VerificationError
from golfgpt.model.gpt import GPT
from golfgpt.score import checks
from golfgpt.score import evaluate as evaluation
from golfgpt.score import windows as scoring
from golfgpt.score.evaluate import Score, compiles, evaluate
from golfgpt.score.sums import PartialSums
from golfgpt.score.windows import Scorer, Windows, cut, score_windows

CPU = Ranks(0, 1, torch.device("cpu"))
FORWARD, TOKEN_LOGPROBS = GPT.forward, scoring.token_logprobs


# 1 Windows

RULES = [rule for rule in scoring.RULES if rule != "varlen"]
"""Those with windows of a stride."""


def plain_windows(targets: int, window: int, stride: int, rule: str) -> list[tuple[int, range]]:
    """Start and scored targets of each window, one after another; those of r4 and r4b as the published loops do."""
    out, scored = [], 0
    for start in range(0, targets, stride):
        length = min(window, targets - start)
        if rule == "every_token" and scored < targets:
            start = min(start, targets - window)
            out.append((start, range(scored, start + window)))
            scored = start + window
        elif (rule == "r4" and length == window) or (rule == "r4b" and length >= stride):
            skipped = length - stride if start or rule == "r4" else 0
            out.append((start, range(start + skipped, start + length)))
    return out


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from(sorted(RULES)), st.data())
def test_windows_are_those_of_a_plain_loop(targets, window, rule, data):
    window = min(window, targets)
    stride = data.draw(st.integers(1, window))
    expected = plain_windows(targets, window, stride, rule)
    windows = Windows(targets, window, stride, rule)
    parts = list(map(range, windows.begin.tolist(), windows.end.tolist()))
    assert list(zip(windows.start.tolist(), parts, strict=True)) == expected
    assert windows.table.dtype == np.int64 and (windows.length <= window).all()

    times = Counter(target for part in parts for target in part)
    assert {target: n for run, n in windows.coverage() for target in run} == times
    assert rule != "every_token" or windows.coverage() == [(range(targets), 1)]

    low = data.draw(st.integers(0, len(windows)))
    mine = range(low, data.draw(st.integers(low, len(windows))))
    groups = list(windows.groups(mine))
    assert [i for group, _ in groups for i in group] == list(mine) and len(groups) <= 3
    for group, num_scored in groups:
        assert num_scored in (stride, window)
        assert (windows.first_scored[group] >= window - num_scored).all(), "all of it is computed"
    assert windows.num_targets(mine) == sum(map(len, parts[mine.start : mine.stop]))


def test_published_counts():
    """R4b on the published validation text: the windows of 4096 are followed by 63 short ones, all of which score the
    last 64 targets again."""
    targets = 62_021_632
    for window, short in ((1024, 15), (4096, 63)):
        windows = Windows(targets, window, 64, "r4b")
        assert (len(windows), int((windows.length < window).sum())) == (969_088, short)
        assert windows.num_targets(range(len(windows))) == targets + short * 64
        assert windows.coverage() == [(range(targets - 64), 1), (range(targets - 64, targets), 1 + short)]
    assert len(Windows(targets, 1024, 64, "r4")) == 969_073


# 2 Scores


@torch.no_grad()
def nats_of(model: GPT, tokens: np.ndarray, windows: Windows, batch: int, **options) -> torch.Tensor:
    """Nats of each target, those of targets scored more than once summed."""
    out = torch.zeros(len(tokens), dtype=torch.float64)
    text = torch.from_numpy(np.stack((tokens, tokens)))  # with byte counts that nobody reads
    scorer, counted = Scorer(model, torch.float32, **options), 0
    for _, part, logprobs in score_windows(scorer, lambda a, b: text[:, a:b], windows, range(len(windows)), batch):
        assert (logprobs[~part.scored] == 0).all()
        out.index_add_(0, part.positions.flatten(), -logprobs.flatten().double())
        counted += int(part.scored.sum())
    assert counted == windows.num_targets(range(len(windows)))
    return out[1:].float()


@torch.no_grad()
def nats_alone(model: GPT, tokens: np.ndarray, expected: list[tuple[int, range]], **options) -> torch.Tensor:
    """The same, window by window, each a forward of its own length that gives the logits of all its tokens."""
    out = torch.zeros(len(tokens) - 1, dtype=torch.float64)
    for start, part in expected:
        ids = torch.from_numpy(tokens[start : part.stop + 1])[None]
        logits = model.logits(model(ids[:, :-1], **options))
        losses = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").double()
        out[part.start : part.stop] += losses[part.start - start :]
    return out.float()


GATES = {"smear_gate": "after_norm", "bigram": BigramConfig(rows=50, dim=8)}
MODELS = [SMALL, replace(SMALL, num_layers=1), replace(SMALL, document_start=1, **GATES)]


@pytest.mark.numeric
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("targets", "window", "stride"), [(20, 16, 1), (48, 16, 3), (64, 16, 4), (48, 16, 16), (48, 48, 48)]
)
@pytest.mark.parametrize("rule", RULES)
def test_batches_of_suffixes_score_what_each_window_alone_does(rule, targets, window, stride, documents, monkeypatch):
    """In slabs of any length. Products of fewer rows may be rounded otherwise."""
    tokens = np.random.default_rng(5).integers(0, 97, targets + 1)
    tokens[::11] = 1
    options = {"document_start": 1} if documents else {}
    windows = Windows(targets, window, stride, rule)
    for model in map(lively, MODELS):
        expected = nats_alone(model, tokens, plain_windows(targets, window, stride, rule), **options)
        ours = nats_of(model, tokens, windows, 4, **options)
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "SLAB_TOKENS", 40)
            assert torch.equal(nats_of(model, tokens, windows, 4, **options), ours)
            torch.testing.assert_close(nats_of(model, tokens, windows, 1, **options), ours, atol=2e-5, rtol=0)


def test_a_suffix_has_limits():
    with pytest.raises(ValueError, match=r"suffix is 5; expected 1 to 4"):
        lively()(torch.zeros(1, 4, dtype=torch.int64), suffix=5)


@pytest.mark.numeric
def test_document_aware_scores_are_those_of_the_documents_alone():
    model = lively(replace(SMALL, smear_gate="after_norm", document_start=1))
    rng = np.random.default_rng(3)
    documents = [np.append(1, rng.integers(2, 97, length)) for length in (20, 9, 2, 30)]
    tokens = np.concatenate([*documents, [1]])
    whole = len(tokens) - 1
    together = nats_of(model, tokens, Windows(whole, whole, whole), 1, document_start=1)
    starts = np.cumsum([0, *map(len, documents)])
    alone = nats_alone(model, tokens, [(a, range(a, b)) for a, b in pairwise(starts)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.long), {"document_start": 1}])
def test_the_compiled_forward_scores_alike(options):
    """Two graphs, the first window and the suffix of the others, half a minute to compile on one core."""
    model, windows = lively(replace(SMALL, num_layers=2)), Windows(99, 16, 6)
    tokens = np.random.default_rng(4).integers(0, 97, 100)
    eager, compiled = (nats_of(model, tokens, windows, 4, compiled=on, **options) for on in (False, True))
    torch.testing.assert_close(compiled, eager, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("scoring", "training", "device", "expected"),
    [
        ("auto", "on", "cpu", False),
        ("auto", "on", "cuda", True),
        ("auto", "auto", "cuda", True),
        ("auto", "off", "cuda", False),
        ("on", "off", "cpu", True),
        ("off", "on", "cuda", False),
    ],
)
def test_what_is_compiled(scoring, training, device, expected):
    config = RunConfig(eval=EvalConfig(compile=scoring), runtime=RuntimeConfig(compile=training))
    assert compiles(config, Ranks(0, 1, torch.device(device))) is expected


def score(tiny: RunConfig, model: GPT | None = None, *, ranks=CPU, keep=None, progress=print, **plan) -> Score:
    config = replace(tiny, eval=EvalConfig(**({"window": 64} | plan)))
    model, data = model or lively(config.model), Dataset.open(config.data.path)
    return evaluate(model, data, config, ranks, dtype=torch.float32, keep=keep, progress=progress)


def test_the_score_divides_by_the_bytes_of_the_text(tiny, corpus):
    dataset = Dataset.open(corpus)
    whole = score(tiny, GPT(tiny.model))
    assert whole.tokens == dataset.val_tokens - 1 and not whole.partial
    assert whole.bytes == dataset.manifest.val.raw_bytes
    assert whole.label == "val_bpb"
    assert whole.val_bpb == pytest.approx(whole.val_loss / np.log(2) * whole.tokens / whole.bytes)
    assert whole.val_loss == pytest.approx(np.log(384), abs=0.01)
    within = score(tiny, document_aware=True)
    assert (within.tokens, within.bytes, within.label) == (whole.tokens, whole.bytes, "val_bpb (document-aware)")


@pytest.mark.parametrize(
    ("rule", "stride", "max_tokens", "targets", "label"),
    [
        ("every_token", 64, 500, 500, "val_bpb (first 500 tokens)"),
        ("r4", 10, 364, 364, "val_bpb (first 364 tokens) (R4: first 54 tokens not scored)"),
        ("r4", 10, 369, 369, "val_bpb (first 369 tokens) (R4: first 54 and last 5 tokens not scored)"),
        ("r4b", 16, 1000, 960, "val_bpb (first 960 tokens) (R4b: counts the tail's tokens more than once)"),
        ("r4b", 48, 150, 128, "val_bpb (first 128 tokens) (R4b: last 16 tokens not scored)"),
    ],
)
def test_a_score_names_what_it_leaves_out_or_counts_again(tiny, corpus, rule, stride, max_tokens, targets, label):
    got = score(tiny, rule=rule, stride=stride, max_tokens=max_tokens)
    plain = plain_windows(targets, 64, stride, rule)
    parts = [part for _, part in plain]
    fewest = min(part.start - start for start, part in plain[1:]) + 1
    assert (got.checks.min_context, got.checks.max_context) == (fewest, 64)
    counts = Dataset.open(corpus).byte_counts(1, targets + 1).astype(int)
    assert (got.tokens, got.bytes) == (sum(map(len, parts)), sum(counts[part].sum() for part in parts))
    assert (got.label, got.partial) == (label, True)


@pytest.mark.numeric
def test_varlen_scores_pieces_of_documents_in_the_whole_rows_of_each_eighth(tiny, corpus):
    """Its windows are what the published loop of each of 8 ranks keeps; its nats those of each piece alone."""
    length, targets = 40, 10_999
    expected = []
    for rank in range(8):
        first, last = ((targets // length) * r // 8 for r in (rank, rank + 1))
        expected += [range(i * length, (i + 32) * length) for i in range(first, last - 31, 32)]
    windows = Windows(targets, 32 * length, 32 * length, "varlen")
    assert list(map(range, windows.start.tolist(), windows.end.tolist())) == expected and len(expected) == 8

    tiny = replace(tiny, model=replace(tiny.model, rope_reference_len=length))  # no longer sequence is in a row
    got = score(tiny, rule="varlen", window=length, max_tokens=targets)
    assert got.tokens == 10_240 and got.window == got.stride == got.checks.max_context == length
    assert got.label == "val_bpb (document-aware) (first 10,999 tokens) (Varlen: 759 tokens not scored)" and got.partial
    assert got.checks.other_document_change == 0.0
    tokens = Dataset.open(corpus).val_ids(0, targets + 1).astype(np.int64)
    pieces = []
    for row in expected:
        begins = np.union1d(row.start, row.start + np.flatnonzero(tokens[row.start : row.stop] == 1))
        for low, high in pairwise([*begins.tolist(), row.stop]):
            pieces += [(i, range(i, min(i + length, high))) for i in range(low, high, length)]
    nats = nats_alone(lively(tiny.model), tokens, pieces)
    assert got.nats == pytest.approx(float(nats.double().sum()), rel=1e-6)

    with pytest.raises(InputError, match=r"drops all 9,000 targets: an eighth of them fills no row of 1,280; choose"):
        score(tiny, rule="varlen", window=length, max_tokens=9000)


# 3 Proofs and bad input


@pytest.mark.parametrize("rule", RULES)
def test_a_window_longer_than_the_text(tiny, rule):
    with pytest.raises(InputError, match=r"eval\.window 64 is longer than the 63 tokens to score"):
        score(tiny, rule=rule, max_tokens=63)


def test_windows_that_skip_or_repeat_a_target_have_no_score(tiny, monkeypatch):
    honest = scoring.every_token
    for shift in (1, -1):

        def wrong(*plan, shift=shift):
            start, length, first_scored = honest(*plan)
            first_scored[2] += shift
            return start, length, first_scored

        monkeypatch.setitem(scoring.RULES, "every_token", wrong)
        with pytest.raises(VerificationError, match="do not score each of 500 targets once: no score"):
            score(tiny, stride=48, max_tokens=500)


def test_no_score_without_proof(tiny, monkeypatch):
    """A byte table that counts one byte too many per document ends the evaluation."""
    counts = Dataset.byte_counts
    monkeypatch.setattr(Dataset, "byte_counts", lambda self, a, b: counts(self, a, b) + (self.val_ids(a, b) == 1))
    with pytest.raises(VerificationError, match="no score can be proved"):
        score(tiny)


def broken_from(mark: int):
    """A forward that is NaN from the first token `mark` of a window on."""

    def forward(self, ids, **options):
        hidden = FORWARD(self, ids, **options)
        seen = (ids == mark).cumsum(1)[:, -hidden.size(1) :]
        return hidden.masked_fill((seen > 0)[..., None], torch.nan)

    return forward


@pytest.mark.parametrize("stride", [16, 64])
def test_a_broken_hidden_state_is_named_by_its_token(tiny, monkeypatch, stride):
    ids = Dataset.open(tiny.data.path).val_ids(0, 4001)
    mark = next(token for token in ids[300:] if token not in ids[:300])
    monkeypatch.setattr(GPT, "forward", broken_from(int(mark)))
    with pytest.raises(NonFiniteError, match=f"token {int((ids == mark).argmax()) + 1} of the validation text"):
        score(tiny, stride=stride, max_tokens=4000)


def test_a_token_outside_the_vocabulary_is_named(tiny):
    with pytest.raises(InputError, match=r"golf_val_000000.bin: token \d+ is 3\d\d, the vocabulary has 300"):
        score(replace(tiny, model=replace(tiny.model, vocab_size=300)))


# 4 Checks


def test_checks_of_an_honest_model(tiny):
    flat = score(tiny, stride=16, max_tokens=4000).checks
    assert (flat.min_context, flat.max_context) == (49, 64)
    assert flat.windows == 9 and flat.comparisons > 100
    assert flat.probability_sum_error < 1e-5
    assert flat.later_token_change == flat.outside_context_change == 0
    assert flat.other_document_change is None
    gates = replace(tiny, model=replace(tiny.model, document_start=1, **GATES))
    for config in (tiny, gates):
        within = score(config, **WITHIN).checks
        assert within.other_document_change == 0 and "other documents change nothing" in str(within)


def peeks(self, ids, **options):
    """Every token sees the next one."""
    hidden = FORWARD(self, ids, **options)
    return hidden + 1e-2 * self.tok_emb[ids.roll(-1, 1)[:, -hidden.size(1) :]]


def looks_at_the_window_end(self, ids, **options):
    hidden = FORWARD(self, ids, **options)
    return hidden + 1e-3 * self.tok_emb[ids[:, -1:]]


def peeks_in_short_windows(self, ids, **options):
    """Those of r4b are filled up with repeats of the last token."""
    short = (ids[:, -8:] == ids[:, -1:]).all(1)
    return peeks(self, ids, **options).where(short[:, None, None], FORWARD(self, ids, **options))


def remembers(self, ids, **options):
    """A window sees the batch scored before."""
    hidden = FORWARD(self, ids, **options)
    out = hidden + getattr(self, "last", 0.0)
    self.last = 1e-2 * hidden.mean()
    return out


def mixes_documents(self, ids, **options):
    return FORWARD(self, ids, **(options | {"document_start": None}))


def excess(nats: float):
    return lambda *args, mask, **options: (TOKEN_LOGPROBS(*args, mask=mask, **options) + nats) * mask


FLAT, WITHIN = {"max_tokens": 500}, {"stride": 48, "document_aware": True, "max_tokens": 9000}
AHEAD, UNNORMALIZED = "depends on later tokens: the model sees ahead", "probabilities over the vocabulary sum to"
CHEATS = [
    *(({"forward": peeks}, {}, FLAT | {"stride": stride}, AHEAD) for stride in (1, 16, 64)),
    *(({"forward": looks_at_the_window_end}, {}, FLAT | {"stride": stride}, AHEAD) for stride in (1, 16, 64)),
    ({"forward": peeks_in_short_windows}, {}, FLAT | {"stride": 8, "rule": "r4b"}, AHEAD),
    ({"forward": remembers}, {}, FLAT | {"stride": 16}, "no score"),
    *(({"token_logprobs": excess(nats)}, {}, FLAT | {"stride": 16}, UNNORMALIZED) for nats in (1e-3, -1e-3, 2.0)),
    ({"forward": mixes_documents}, {}, WITHIN, "depends on another document"),
    ({}, {"smear_gate": "after_norm"}, WITHIN, "depends on another document"),
    ({}, {"bigram": BigramConfig(rows=40, dim=8)}, WITHIN, "depends on another document"),
]


@pytest.mark.parametrize(("patches", "gates", "plan", "message"), CHEATS)
def test_a_model_that_cheats_has_no_score(tiny, monkeypatch, patches, gates, plan, message):
    config = replace(tiny, model=replace(tiny.model, **gates))
    if gates:
        score(config, **(plan | {"document_aware": False}))  # as published: without documents there is nothing wrong
    for name, value in patches.items():
        monkeypatch.setattr(GPT if name == "forward" else scoring, name, value)
    with pytest.raises(VerificationError, match=message):
        score(config, **plan)


def test_a_window_that_reads_what_lies_before_it_is_found(tiny, monkeypatch):
    """The cut is wrong by one token."""

    def early(slab, base, table, *shape):
        before = torch.stack(((table[0] - 1).clamp(min=base), *table[1:]))
        return cut(slab, base, table, *shape)._replace(ids=cut(slab, base, before, *shape).ids)

    monkeypatch.setattr(checks, "cut", early)
    with pytest.raises(VerificationError, match="depends on a token before its window"):
        score(tiny, stride=8, max_tokens=500)


# 5 Ranks


def worker(config: RunConfig, plans: list[dict], mark: int, folder: str) -> None:
    """One of the processes: scores all plans, the first again with rank 1 interrupted, once more to continue, and at
    last with a model that is NaN from token `mark` on. Leaves its results in `folder`."""
    ranks, lines = distributed.start("cpu"), []

    def run(keep=None, **plan) -> None:
        try:
            got = score(config, ranks=ranks, keep=keep, **plan)
            lines.append([got.nats, got.tokens, got.bytes, got.label])
        except GolfError as error:
            lines.append([type(error).__name__, str(error)])

    def stops(*args):
        for i, item in enumerate(score_windows(*args)):
            yield item
            if i == 2 and ranks.rank == 1:
                raise Interrupted("stopped by SIGTERM", 15)

    for plan in plans:
        run(**plan)
    for replaced in (stops, score_windows):
        evaluation.score_windows = replaced
        run(PartialSums(Path(folder), ranks.rank, "model", lines.append), **plans[0])
    GPT.forward = broken_from(mark)
    run(max_tokens=4000)
    Path(folder, f"out{ranks.rank}").write_text(json.dumps(lines))
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree_with_one(tiny, tmp_path, world):
    """Also if there are fewer windows than ranks, after the second was interrupted, and if only the last finds a broken
    token."""
    plans = [
        {"stride": 16, "max_tokens": 1000, "batch_tokens": 256},
        {"stride": 16, "max_tokens": 1000, "rule": "r4b"},
        {"max_tokens": 64},
        {"stride": 48, "max_tokens": 1000, "document_aware": True},
    ]
    alone = [score(tiny, **plan) for plan in plans]
    tokens, places = np.unique(Dataset.open(tiny.data.path).val_ids(0, 4000), return_index=True)
    at, mark = int(places.max()), int(tokens[places.argmax()])
    assert at > 4000 * (world - 1) // world
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__]
    arguments = [json.dumps(value) for value in (to_dict(tiny), plans, mark, str(tmp_path))]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for rank in range(world):
        *scores, stopped, said, again, failed = json.loads((tmp_path / f"out{rank}").read_text())
        for got, expected in zip((*scores, again), (*alone, alone[0]), strict=True):
            assert got[0] == pytest.approx(expected.nats, rel=1e-6)
            assert got[1:] == [expected.tokens, expected.bytes, expected.label]
        assert stopped[0] == ("Interrupted" if rank == 1 else "PeerError")
        assert said.startswith("continuing an interrupted evaluation")
        assert failed[0] == ("NonFiniteError" if rank == world - 1 else "PeerError")
        assert rank != world - 1 or f"token {at + 1} of the validation text" in failed[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, *others = map(json.loads, sys.argv[1:])
    worker(from_dict(RunConfig, first), *others)
