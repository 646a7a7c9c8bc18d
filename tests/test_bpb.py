"""Bytes are counted right: the table agrees with SentencePiece's decoder, and each mistake that published
scores made is shown to disagree. Every regression test runs the broken formula."""

import functools
import io
import math

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
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
    """The protobuf of a SentencePiece model less one piece (field 1: message whose field 1 is the text)."""
    out, at = b"", 0
    key = bytes([10, len(piece.encode())]) + piece.encode()
    while at < len(model):
        start, size, shift = at, 0, 0
        at += 1  # tag of one byte, always length-delimited at the top level
        while True:
            size |= (model[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if model[at - 1] < 128:
                break
        if not (model[start] == 10 and model[at : at + size].startswith(key)):
            out += model[start : at + size]
        at += size
    return out


def stream_of(t: Tokenizer, texts=TEXTS) -> np.ndarray:
    return np.array([i for text in texts for i in (BOS, *t.encode(text))], dtype=np.uint16)


def counted(t: Tokenizer, ids: np.ndarray) -> int:
    return int(ByteCounts(t).count_stream(ids).sum())


KINDS = ["ours", "stripping", "words", "spaceless"]


@pytest.mark.parametrize("kind", KINDS)
def test_table_agrees_with_the_decoder(kind):
    t = tokenizer(kind)
    assert counted(t, stream_of(t)) == decoded_bytes(t, [stream_of(t)])


@pytest.mark.parametrize("kind", ["ours", "spaceless"])
def test_lossless_counts_are_the_raw_bytes(kind):
    t = tokenizer(kind)
    assert counted(t, stream_of(t)) == sum(len(text.encode()) for text in TEXTS)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.lists(st.text("ab ▁\n🙂é\tthe", max_size=20), max_size=5), st.integers(1, 7))
def test_any_documents_in_any_chunks(kind, texts, chunk):
    t = tokenizer(kind)
    ids = stream_of(t, texts)
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    table = ByteCounts(t)
    piecewise = sum(
        int(table.count_stream(part, int(ids[i * chunk - 1]) if i else None).sum()) for i, part in enumerate(parts)
    )
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


@pytest.mark.parametrize("kind", ["ours", "stripping"])
def test_decoding_token_by_token_is_caught(kind):
    """A byte piece alone decodes to U+FFFD, three bytes."""
    t = tokenizer(kind)
    ids = stream_of(t)
    broken = sum(len(t.decode([i]).encode()) for i in ids)
    assert broken != decoded_bytes(t, [ids]) == counted(t, ids)


def test_replacement_character_of_the_text_counts_three():
    t = tokenizer("ours")
    ids = stream_of(t, ["\ufffd"])
    assert counted(t, ids) == decoded_bytes(t, [ids]) == 3


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


def test_unknown_pieces_hold_no_text():
    t = tokenizer("words")
    ids = stream_of(t, ["the 🙂 fox"])
    assert 3 in ids
    assert counted(t, ids) == decoded_bytes(t, [ids])


def test_counts_keep_shape_and_dtype():
    ids = np.array([[5, 6], [300, 301]], dtype=np.uint16)
    counts = ByteCounts(tokenizer("ours")).count(ids, ids)
    assert counts.shape == (2, 2) and counts.dtype == np.uint16
    assert decoded_bytes(tokenizer("ours"), []) == 0


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    with pytest.raises(InputError, match="decode to 0 bytes"):
        bits_per_byte(1.0, 0)
