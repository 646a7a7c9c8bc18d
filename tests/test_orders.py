"""Data orders: every rank count reads the same tokens, a run resumes from the step number, and each order's promise.
That they are the published ones, the conformance vectors say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golfgpt.config import DataConfig, ModelConfig, RunConfig
from golfgpt.data.orders import boundaries, steps, window_tokens
from golfgpt.data.stream import Prefetcher
from golfgpt.errors import InputError

START = 1
SHARDS = [
    np.where(np.arange(n) % 37 == n % 5, START, 2 + np.arange(n) % 900).astype(np.uint16) for n in (700, 901, 640)
]
FIRSTS = np.cumsum([0, *map(len, SHARDS)])
DATA = DataConfig(batch_tokens=128, seq_len=16, spans=2)
ORDERS = {
    order: replace(DATA, order=order, document_start=START if order == "packed" else None)
    for order in ("sequential", "shuffled", "coprime", "packed")
}
orders = pytest.mark.parametrize("config", ORDERS.values(), ids=ORDERS.keys())


def taken(config: DataConfig, count: int, assigned: range | None = None) -> list[np.ndarray]:
    return list(itertools.islice(steps(config, SHARDS, assigned or range(config.spans)), count))


@orders
def test_a_rank_reads_its_spans_of_the_whole_and_a_later_step_without_the_earlier(config):
    whole = taken(config, 60)
    assert all(step.shape == (2, config.span_tokens // window_tokens(config)) for step in whole)
    for span in range(2):
        alone = taken(config, 60, range(span, span + 1))
        assert all(np.array_equal(a[0], b[span]) for a, b in zip(alone, whole, strict=True))
        read = Prefetcher(SHARDS, config, range(span, span + 1), pin=False)
        again = Prefetcher(SHARDS, config, range(span, span + 1), pin=False)
        stream, count = np.concatenate(SHARDS), window_tokens(config) + 1
        for step in (0, 0, 1, 2, 0, 17, 3):
            windows = read.read(step).windows
            assert windows.equal(again.read(step).windows)
            starts = whole[step][span]
            assert windows.tolist() == [stream.take(range(s, s + count), mode="wrap").tolist() for s in starts]
        read.close()
        again.close()


@pytest.mark.parametrize("name", ["shuffled", "coprime"])
def test_every_sequence_of_a_shard_comes_once_before_any_comes_again(name):
    """Windows of seq_len + 1 tokens at multiples of seq_len, from a phase on; shuffled keeps to the span's shards."""
    config, seen = ORDERS[name], {}
    sequences = [(len(shard) - 16) // 16 for shard in SHARDS]  # at least: the phase may cost one
    for step in taken(config, 12):
        for (span, _), start in np.ndenumerate(step):
            shard = int(np.searchsorted(FIRSTS, start, side="right")) - 1
            assert start + 17 <= FIRSTS[shard + 1], "a window lies in one shard"
            assert name == "coprime" or shard % 2 == span
            seen.setdefault(shard, []).append(int(start - FIRSTS[shard]))
    assert len(seen) == len(SHARDS)
    for shard, starts in seen.items():
        first = starts[: sequences[shard]]
        assert len(set(first)) == len(first) and len({start % 16 for start in first}) == 1
        assert first != sorted(first)


def test_coprime_steps_mix_shards():
    assert all(
        len({int(np.searchsorted(FIRSTS, s, side="right")) for s in step.flat}) == 3
        for step in taken(ORDERS["coprime"], 20)
    )


def test_packed_rows_follow_each_other_and_skip_what_is_left_of_a_shard():
    config = replace(ORDERS["packed"], microbatch_tokens=32)
    begins = [int(np.flatnonzero(shard == START)[0]) for shard in SHARDS]
    assert len(set(begins)) > 1
    expected = [
        FIRSTS[i] + at
        for i, (begin, shard) in enumerate(zip(begins, SHARDS, strict=True))
        for at in range(begin, len(shard) - 2 * 33 + 1, 2 * 33)
    ]
    rows = np.concatenate(taken(config, 30), axis=1)
    assert rows[0].tolist() == list(itertools.islice(itertools.cycle(expected), 60))
    assert np.array_equal(rows[1], rows[0] + 33)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=90), st.integers(1, 40), st.integers(1, 9))
def test_boundaries_cut_documents_and_long_ones_again(tokens, longest, multiple):
    row = np.array(tokens, dtype=np.uint16)
    found = boundaries(row, START, longest, multiple)
    assert len(found) % multiple == 0 and found.dtype == np.int32
    cuts = [int(c) for c in found if c < len(row)]
    assert set(found[len(cuts) :]) == {len(row)} and cuts[0] == 0
    begun = 0
    for at in range(len(row)):
        begun = at if at == 0 or row[at] == START or at - begun == longest else begun
        assert (at in cuts) == (at == begun)


def test_the_tensors_of_a_captured_step_have_room_for_more_documents():
    config, none = replace(ORDERS["packed"], batch_tokens=1024), SHARDS[0].copy()
    none[1:] = 5  # a single document, cut every 16 tokens
    data = Prefetcher([np.tile(none, 9)], config, range(2), pin=False)
    first, many = data.read(0), data.read(0)
    data.close()
    assert [len(part) for part in first.boundaries] == [64, 64]
    room = first.with_room()
    many = many._replace(boundaries=[torch.arange(100, dtype=torch.int32)] * 2, windows=many.windows + 1)
    assert room.hold(many) and room.hold(first) and not first.hold(many)
    room.copy_(many)
    for part in room.boundaries:
        assert part[:100].tolist() == list(range(100)) and set(part[100:].tolist()) == {512} and len(part) == 192
    room.copy_(first)
    for part, its in zip(room.boundaries, first.boundaries, strict=True):
        assert torch.equal(part[:64], its) and set(part[64:].tolist()) == {512}
    assert torch.equal(room.windows, first.windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(order="shuffled", spans=4), r"found no sequence for span 3: each of data\.spans = 4 expected a shard"),
        (dict(order="shuffled", seq_len=1024, batch_tokens=2048), r"of more than data\.seq_len = 1024 tokens"),
        (dict(order="coprime", seq_len=1024, batch_tokens=2048), r"no shard of more than data\.seq_len = 1024"),
        (dict(order="packed", document_start=2000), r"no token 2000 \(data\.document_start\) in training shard 0"),
        (dict(order="packed", document_start=1, batch_tokens=2048), r"2 x|= 2050 tokens after its first document"),
    ],
)  # fmt: skip
def test_shards_that_do_not_suffice_are_named(change, message):
    with pytest.raises(InputError, match=message):
        taken(replace(DATA, **change), 1)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"data\.document_start is None and data\.order is packed"):
        replace(DATA, order="packed")
    with pytest.raises(ValueError, match=r"data\.document_start is 1 and data\.order is shuffled"):
        replace(DATA, order="shuffled", document_start=1)
    with pytest.raises(ValueError, match=r"data\.microbatch_tokens is 48; expected a divisor of the span's 64"):
        replace(ORDERS["packed"], microbatch_tokens=48)
    for start, mixes in ((None, "input"), (2, "input"), (None, "after_norm")):
        model = ModelConfig(smear_gate=mixes, document_start=start)
        with pytest.raises(ValueError, match=r"model\.document_start is (None|2); expected data\.document_start 1"):
            RunConfig(model=model, data=ORDERS["packed"])
    RunConfig(data=ORDERS["packed"])
