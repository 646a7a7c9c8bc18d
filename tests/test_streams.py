"""Every rank count reads the same tokens; the stream wraps and resumes from a position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golfgpt.data.orders import step_spans
from golfgpt.data.stream import TokenStream, spans_of_rank
from golfgpt.errors import InputError

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def shards_of(lengths):
    return np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])


@given(lengths, st.integers(0, 200), st.integers(0, 60))
def test_read_is_the_endless_repetition(lengths, position, count):
    total = sum(lengths)
    got = TokenStream(shards_of(lengths)).read(position, count)
    assert got.dtype == np.uint16
    assert got.tolist() == [(position + i) % total for i in range(count)]


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 5))
def test_spans_tile_the_stream(step, span_tokens, spans):
    batch = span_tokens * spans
    covered = [
        token
        for s in range(step + 1)
        for start in step_spans(s, batch, spans)
        for token in range(start, start + span_tokens + 1)
    ]
    assert covered == list(range((step + 1) * (batch + spans)))


@given(st.integers(1, 20), st.integers(1, 20))
def test_every_span_has_one_rank(world, spans):
    dealt = [spans_of_rank(rank, world, spans) for rank in range(world)]
    assert [i for part in dealt for i in part] == list(range(spans))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_three_ranks_take_3_3_2():
    assert [list(spans_of_rank(rank, 3, 8)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_upstream_order():
    """One rank with 8 micro-steps and 8 ranks read the same spans: world * (local + 1) tokens a step."""
    assert step_spans(2, 524_288, 8)[:2] == [2 * 524_296, 2 * 524_296 + 65_537]


def test_bad_values():
    with pytest.raises(InputError, match="stream is empty"):
        TokenStream([np.empty(0, dtype=np.uint16)])
    with pytest.raises(InputError, match="batch_tokens 10 is not a positive multiple of spans 4"):
        step_spans(0, 10, 4)
    with pytest.raises(InputError, match=r"rank 3 is not in 0\.\.2"):
        spans_of_rank(3, 3, 8)
