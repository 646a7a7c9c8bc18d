"""Every document survives a tokenizer trained here; what SentencePiece would lose or drop is caught."""

import functools
import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from golfgpt.data.tokenizer import Tokenizer, _even_sample, _sentences, train_tokenizer
from golfgpt.errors import InputError

TEXT = [
    "the quick brown fox\n    jumps over the lazy dog; 12 34 <s> <s> <0x41>\r\n",
    "def f(x):\n\treturn x  # a comment\n\n\nif f(1):\n\tpass\n",
] * 20
HOSTILE = {
    "newlines": "a\nb\n\n\nc\n",
    "tabs": "\ta\t\tb\t",
    "crlf": "a\r\nb\r\r\n",
    "nul": "a\x00b\x00",
    "leading-space": " a",
    "trailing-space": "a ",
    "runs-of-spaces": "   a     b        ",
    "only-spaces": "   ",
    "u2581": "▁a ▁ b▁▁c ▁",
    "only-u2581": "▁",
    "u2585": "a▅b",
    "unknown-surface": "a ⁇ b ⁇",
    "replacement": "a\ufffdb",
    "bom": "\ufeffa",
    "emoji": "👩‍👩‍👧‍👦 🙂🏽",
    "private-use": "\ue000\U000f0000\U0010fffd",
    "noncharacter": "\uffff\U0010ffff",
    "combining": "e\u0301 \u0301\u0327a ｆｕｌｌ ﬁ Ⅳ",
    "spaces-of-unicode": "a\u00a0b\u3000c\u2028d\u200be\x85f",
    "control-pieces": "<s></s><pad><unk>",
    "byte-pieces": "<0x41><0xE2><0x96><0x81>",
    "long": "x" * 100_000 + " y" * 50_000,
}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(train_tokenizer(TEXT, 330))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_round_trips(text):
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert b"".join(tokenizer().pieces[i] for i in ids) == text.encode()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_round_trips(text):
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_special_ids_and_properties():
    t = tokenizer()
    assert (t.bos_id, t.vocab_size, len(t.digest)) == (1, 330, 64)
    assert t.is_boundary[:4].all() and t.is_boundary.sum() == 4
    assert not t.strips_leading_space and t.has_space_piece
    assert t.decode([1, 2, 0]) == ""


def test_training_is_deterministic():
    assert train_tokenizer(iter(TEXT), 330) == tokenizer().model_bytes


@pytest.mark.parametrize(("text", "at"), [("\ud800", 0), ("a\udfffb", 1)])
def test_lone_surrogate(text, at):
    with pytest.raises(InputError, match=f"lone surrogate at character {at}"):
        tokenizer().encode(text)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (TEXT, 262, r"262 is too small for this text: with \d+ .* such as 512"),
        (TEXT, 9000, r"9000 is too large for this text: choose at most \d+"),
        (TEXT, 65_537, r"65537 is not in 1\.\.65536"),
        ([], 300, "no text"),
    ],
)
def test_vocabulary_bounds_are_named(texts, vocab_size, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer(texts, vocab_size)


def test_no_text_is_dropped_in_training():
    """U+2585 makes SentencePiece skip a sentence, and so does its default length limit of 4,192 bytes."""
    common = ["abcdefgh ijkl mnop"] * 50
    rare = ["qwzx▅ qwzx qwzx " * 500] * 5
    assert b"qwzx" in train_tokenizer(common + rare, 290)
    broken = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(common + rare), model_writer=broken, model_type="bpe", vocab_size=280, minloglevel=3,
        byte_fallback=True, normalization_rule_name="identity",
    )  # fmt: skip
    assert b"qwzx" not in broken.getvalue()


@given(st.lists(st.text("ab▁▅ \n", max_size=30)), st.integers(1, 60))
def test_sample_is_even_and_bounded(texts, max_chars):
    sentences = list(_sentences(texts))
    assert "".join(sentences) == "".join(texts).replace("▁", "").replace("▅", "")
    samples = [sentences[:: 2**k] for k in range(12)]
    fits = [sample for sample in samples if sum(map(len, sample)) <= max_chars or len(sample) <= 1]
    assert _even_sample(sentences, max_chars) == fits[0]


def test_unusable_models(tmp_path):
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        Tokenizer.from_bytes(b"garbage")
    with pytest.raises(InputError, match="0 pieces"):
        Tokenizer.from_bytes(b"")
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*No such file"):
        Tokenizer.from_file(tmp_path / "none.model")
    (tmp_path / "half.model").write_bytes(tokenizer().model_bytes[:2000])
    with pytest.raises(InputError, match=r"half\.model is not a SentencePiece model"):
        Tokenizer.from_file(tmp_path / "half.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=60, model_type="bpe", bos_id=-1, minloglevel=3
    )
    with pytest.raises(InputError, match="no BOS piece"):
        Tokenizer.from_bytes(model.getvalue())
