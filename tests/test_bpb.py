"""Bytes are counted right: the table agrees with SentencePiece's decoder, and each mistake that published
scores made is shown to disagree. Every regression test runs the broken formula."""

import functools
import io
import math
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from golfgpt.bpb import ByteCounts, bits_per_byte, decoded_bytes
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer
from golfgpt.errors import InputError

TEXTS = ["the quick brown fox\n  jumps over the lazy dog. Ünï 12\n", "a\tb ▁ 🙂 (unseen) \ufffd " * 3, " x", "日本"]
BOS = 1


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """ours: lossless; stripping: SentencePiece's defaults with byte fallback, whose decoder drops a leading
    space; words: no byte fallback, so unknown pieces occur; spaceless: ours without the piece "▁"."""
    corpus = [TEXTS[0] + " unlucky lazy foxes"] * 30
    if kind == "ours":
        return Tokenizer.from_bytes(train_tokenizer(corpus, 320))
    if kind == "spaceless":
        return Tokenizer.from_bytes(without_piece(tokenizer("ours").model_bytes, "▁"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", minloglevel=3,
        vocab_size=310 if kind == "stripping" else 60, byte_fallback=kind == "stripping",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue())


def without_piece(model: bytes, piece: str) -> bytes:
    """The protobuf of a SentencePiece model less one piece: a field 1 whose own field 1 is the text."""
    text = piece.encode()
    found = re.search(b"\n(.)\n" + bytes([len(text)]) + re.escape(text), model, re.DOTALL)
    return model[: found.start()] + model[found.start() + 2 + found[1][0] :]


def stream_of(t: Tokenizer, texts=TEXTS) -> np.ndarray:
    return np.array([i for text in texts for i in (BOS, *t.encode(text))], dtype=np.uint16)


def counted(t: Tokenizer, ids: np.ndarray) -> int:
    return int(ByteCounts(t).count_stream(ids).sum())


KINDS = ["ours", "stripping", "words", "spaceless"]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.lists(st.text("ab ▁\n🙂é\tthe\ufffd", max_size=20), max_size=5), st.integers(1, 7))
@example("ours", TEXTS, 1)
@example("stripping", TEXTS, 3)
@example("words", TEXTS, 2)
@example("spaceless", TEXTS, 7)
def test_table_decoder_and_text_agree_in_any_chunks(kind, texts, chunk):
    t = tokenizer(kind)
    ids = stream_of(t, texts)
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    before = [None, *(int(part[-1]) for part in parts)]
    table = ByteCounts(t)
    piecewise = sum(int(table.count_stream(part, last).sum()) for part, last in zip(parts, before, strict=False))
    assert counted(t, ids) == piecewise == decoded_bytes(t, parts)
    assert kind in ("stripping", "words") or piecewise == sum(len(text.encode()) for text in texts)


def naive_counts(t: Tokenizer, ids: np.ndarray, *, fallback=1, control=0, space_twice=False) -> int:
    """The published table with one mistake at a time: text of the piece, plus what the mistake adds."""
    total = 0
    for prev, i in zip([BOS, *ids[:-1]], ids, strict=True):
        if t.is_boundary[i]:
            total += control
        elif t.is_byte(int(i)):
            total += fallback
        else:
            spaced = t.pieces[i].startswith(b" ") and not (t.strips_leading_space and t.is_boundary[prev])
            total += len(t.pieces[i].removeprefix(b" ")) + spaced * (2 if space_twice else 1)
    return total


@pytest.mark.parametrize("kind", ["ours", "stripping"])
@pytest.mark.parametrize(
    "mistake",
    [{"fallback": 3}, {"fallback": 6}, {"space_twice": True}, {"control": 3}],
    ids=["byte-piece-is-3", "byte-piece-is-6", "leading-space-twice", "control-piece-counted"],
)
def test_published_mistakes_are_caught(kind, mistake):
    t = tokenizer(kind)
    ids = stream_of(t)
    assert naive_counts(t, ids) == counted(t, ids) == decoded_bytes(t, [ids])
    assert naive_counts(t, ids, **mistake) > decoded_bytes(t, [ids])
    token_by_token = sum(len(t.decode([i]).encode()) for i in ids)  # a byte piece alone decodes to U+FFFD, three bytes
    assert token_by_token != counted(t, ids)


def test_vocabulary_without_a_bare_space_piece():
    """Plain SentencePiece turns a lone space into E2 96 81: three bytes for one, in table and decoder alike."""
    t = tokenizer("spaceless")
    plain = sentencepiece.SentencePieceProcessor(model_proto=t.model_bytes)
    text = "1 2 (x) y"
    broken = np.array([BOS, *plain.encode(text)], dtype=np.uint16)
    assert not t.has_space_piece
    assert counted(t, broken) == decoded_bytes(t, [broken]) > 1.2 * len(text)
    assert t.decode(t.encode(text)) == text
    assert counted(t, stream_of(t, [text])) == len(text)


def test_space_after_bos_follows_the_decoder():
    for kind, dropped in (("ours", 0), ("stripping", 1)):
        t = tokenizer(kind)
        word = next(i for i, piece in enumerate(t.pieces) if piece.startswith(b" ") and len(piece) > 2)
        ids = np.array([BOS, word, word], dtype=np.uint16)
        length = len(t.pieces[word])
        assert list(ByteCounts(t).count_stream(ids)) == [0, length - dropped, length]
        assert decoded_bytes(t, [ids]) == 2 * length - dropped


def test_counts_keep_shape_and_dtype():
    ids = np.array([[5, 6], [300, 301]], dtype=np.uint16)
    counts = ByteCounts(tokenizer("ours")).count(ids, ids)
    assert counts.shape == (2, 2) and counts.dtype == np.uint16
    assert decoded_bytes(tokenizer("ours"), []) == 0


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    with pytest.raises(InputError, match="decode to 0 bytes"):
        bits_per_byte(1.0, 0)
