"""CaseOps: the codec against the published one, bytes counted twice for any ids, from text to a sample."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

import golfgpt
from golfgpt.bpb import ByteCounts, decoded_bytes
from golfgpt.cli import main
from golfgpt.config import RunConfig
from golfgpt.data import caseops
from golfgpt.data.caseops import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE
from golfgpt.data.documents import document_hash
from golfgpt.data.manifest import Manifest
from golfgpt.data.prepare import prepare
from golfgpt.data.shards import Dataset, open_shard, verify, write_shard
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer
from golfgpt.errors import InputError, VerificationError
from golfgpt.score.compressors import compressors_bpb
from golfgpt.train.train import train

FOLDERS = [Path(folder) for folder in os.environ.get("GOLFGPT_CONFORMANCE", "").split(os.pathsep) if folder]
DOCUMENTS = [
    f"Document {i} of NASA, by McX é▁🙂: DON'T {'MORE ' * (i % 7)}iPhone \ue001\ue004\ue003X\n\tAÉ" for i in range(90)
]


# 1 The published codec


def vectors(kind: str):
    paths = [path for folder in FOLDERS for path in sorted(folder.glob("q_caseops*.jsonl"))]
    found = [path for path in paths if re.fullmatch(f"{kind}(?!_(decode|bytes)).*", path.stem)]
    skip = pytest.mark.skip(reason=f"GOLFGPT_CONFORMANCE names no folder with {kind}.jsonl")
    return pytest.mark.parametrize("path", found or [pytest.param(None, marks=skip)])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@vectors("q_caseops")
def test_published_encodings(path):
    for row in rows(path):
        assert caseops.encode(row["text"]) == row["lossless_caps_v2"]
        assert caseops.decode(row["lossless_caps_v2"]) == row["text"]


@vectors("q_caseops_decode")
def test_published_decodings(path):
    """To the decoders of v3 and v4 some operators are ordinary characters, as U+F0000 and U+F0001 are to ours."""
    for row in rows(path):
        for key, ordinary in (("caseops_v1", ""), ("v3", CAPNEXT), ("v4", CAPNEXT + TITLE)):
            there = {ord(c): 0xF0000 + i for i, c in enumerate(ordinary)}
            decoded = None
            with contextlib.suppress(InputError):
                decoded = caseops.decode(row["encoded"].translate(there))
                decoded = decoded.translate({there[c]: c for c in there})
            assert decoded == row[key], row


@vectors("q_caseops_bytes")
def test_published_byte_counts(path):
    tokenizer = Tokenizer.from_file(path.with_name(path.stem.replace("_bytes", "_sp") + ".model"))
    assert tokenizer.case_ops
    for row in rows(path):
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.original_bytes(row["text"]) == row["bytes"]
        assert len(row["text"].encode()) == row["raw_bytes"] >= sum(row["bytes"]) == row["sum_bytes"]


# 2 The codec

texts = st.text(st.one_of(st.sampled_from("aAbBz1' é日" + OPERATORS), st.characters(exclude_categories=["Cs"])))


@settings(deadline=None)
@given(texts)
@example("DON'T McX iPhone ABc aB AÉ École \ue001\ue004\ue004")
@example("x" * 300_000 + "X" * 300_000)  # slow if a search is quadratic
def test_decode_inverts_encode(text):
    encoded = caseops.encode(text)
    assert caseops.decode(encoded) == caseops.decode(encoded, strict=False) == text
    assert not re.search("[A-Z]", encoded)
    assert caseops.original_bytes(encoded).sum() == len(text.encode())


@given(st.text("aB1é" + 2 * OPERATORS, max_size=12))
def test_the_lenient_decoder_takes_anything_and_keeps_the_count(text):
    lenient = caseops.decode(text, strict=False)
    assert len(lenient.encode()) == caseops.original_bytes(text).sum()
    with contextlib.suppress(InputError):
        assert caseops.decode(text) == lenient


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"ab {TITLE}", "character 4: the end after TITLE"),
        (f"ab{TITLE}c", "character 2: TITLE after a letter"),
        (f"{ALLCAPS}1", "character 1: '1' after ALLCAPS"),
        (f"a{CAPNEXT}{CAPNEXT}b", "character 2: CAPNEXT twice"),
        (f"{TITLE}{ESC}1", "character 2: escaped '1' after TITLE"),
        (f"{TITLE}{ESC}{ESC}", "character 2: an escaped ESC after TITLE"),
    ],
)
def test_malformed_text_is_named(text, message):
    with pytest.raises(InputError, match=f"malformed CaseOps text at {message}"):
        caseops.decode(text)


# 3 Tokenizers


@functools.cache
def tokenizer(lossy: bool = False) -> Tokenizer:
    """Ours, or one with the published settings."""
    if not lossy:
        return Tokenizer.from_bytes(train_tokenizer(DOCUMENTS, 320, case_ops=True))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(caseops.encode, DOCUMENTS), model_writer=model, model_type="bpe", vocab_size=320,
        byte_fallback=True, add_dummy_prefix=False, split_digits=True, user_defined_symbols=list(OPERATORS),
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=3,
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue())


@settings(deadline=None)
@given(texts)
@example(DOCUMENTS[3])
@example("A▁▁B  ▁")
def test_any_text_round_trips(text):
    t = tokenizer()
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert t.operator_ids == [4, 5, 6, 7]
    stream = np.array([1, *ids], dtype=np.uint16)
    raw = len(text.encode())
    assert ByteCounts(t).count_stream(stream).sum() == decoded_bytes(t, [stream]) == sum(t.original_bytes(text)) == raw


@settings(deadline=None)
@given(st.booleans(), st.lists(st.sampled_from([1, 4, 5, 6, 7, 7, *range(264, 320)])), st.integers(1, 5))
def test_both_counts_agree_on_any_ids(lossy, ids, chunk):
    """Malformed sequences, cut anywhere; only byte pieces must be whole characters, as they always had to."""
    t, ids = tokenizer(lossy), np.array(ids, dtype=np.uint16)
    assert t.decode(ids) is not None
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    assert ByteCounts(t).count_stream(ids).sum() == decoded_bytes(t, parts)


def test_operators_are_user_defined_pieces(tmp_path):
    """Characters that training has met are pieces too, but learned ones, which merge with others."""
    learned = Tokenizer.from_bytes(train_tokenizer(["ab " + OPERATORS * 20 + " abc"] * 50, 290))
    assert not any(learned.is_boundary[i] for i in learned.operator_ids) and not learned.case_ops
    for other in (learned, Tokenizer.from_bytes(train_tokenizer(DOCUMENTS, 320))):
        with pytest.raises(InputError, match=r"cannot hold CaseOps text: expected U\+E001 to U\+E004 as pieces"):
            prepared(tmp_path, tokenizer=other, case_ops=True)
        with pytest.raises(InputError, match="original bytes are counted for CaseOps"):
            other.original_bytes("a")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


# 4 Data


def prepared(folder: Path, **options) -> Dataset:
    source = folder / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    prepare([source], folder / "data", val_fraction=0.3, shard_tokens=900, **options)
    return Dataset.open(folder / "data")


def bare(data: Dataset) -> Dataset:
    for path in [data.path / "manifest.json", *data.path.glob("*.bytes")]:
        path.unlink()
    return Dataset.open(data.path)


def trained(config: RunConfig, data: Dataset) -> tuple[Path, dict]:
    """A run folder and its score."""
    config = replace(
        config,
        model=replace(config.model, vocab_size=320),
        data=replace(config.data, path=str(data.path), batch_tokens=512),
        eval=replace(config.eval, max_tokens=None),
        schedule=replace(config.schedule, max_steps=2),
    )
    run = data.path.with_name("run")
    return run, train(config, run, quiet=True)["score"]


@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_folder(tmp_path, workers):
    data = prepared(tmp_path, tokenizer=tokenizer(), workers=workers)
    manifest = data.manifest
    assert manifest.text_codec == "caseops" and manifest.lossless
    assert not data.published  # they would say what the sidecars say
    ids = data.val_ids(0, data.val_tokens)
    val = [data.tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]
    raw = sum(len(text.encode()) for text in val)
    assert set(val) <= set(DOCUMENTS) and raw == manifest.val.raw_bytes == verify(data.path).val_bytes
    sidecar, compressed = data.byte_counts(0, data.val_tokens), compressors_bpb(data)
    data = bare(data)
    assert data.tokenizer.case_ops and data.prove_val_bytes() == raw and compressors_bpb(data) == compressed
    for step in (1, 2, 7):
        parts = [data.byte_counts(start, start + step) for start in range(0, data.val_tokens, step)]
        assert (np.concatenate(parts) == sidecar).all()
    assert [data.prove_val_bytes(stop) for stop in range(1, 200)] == sidecar.cumsum()[:199].tolist()


def test_manifests_before_caseops_open(tmp_path):
    data = prepared(tmp_path, vocab_size=320, workers=1)
    path = data.path / "manifest.json"
    values = json.loads(path.read_text())
    assert values.pop("text_codec") is None and values.pop("published_bytes") == []
    path.write_text(json.dumps(values))
    assert Dataset.open(data.path).manifest == data.manifest
    path.write_text(json.dumps(values | {"text_codec": "rot13"}))
    with pytest.raises(InputError, match="text_codec = 'rot13'"):
        Manifest.load(path)


def test_published_bytes_of_a_lossy_tokenizer(tmp_path, tiny):
    """val_bpb keeps the decoded text as its divisor; the published figure stands beside it."""
    data = prepared(tmp_path, tokenizer=tokenizer(lossy=True), case_ops=True, workers=1)
    manifest, published = data.manifest, np.concatenate(data.published)
    assert not manifest.lossless and len(manifest.published_bytes) == len(data.val) > 1
    below = bytes.fromhex(manifest.val_below)
    val = [text for text in DOCUMENTS if document_hash(text.encode()) < below]
    assert published.tolist() == [count for text in val for count in (0, *data.tokenizer.original_bytes(text))]
    report = verify(data.path)
    assert report.val_bytes == manifest.val.decoded_bytes != report.published_bytes == published.sum()
    data = bare(data)
    for path in data.published_files:
        path.rename(path.with_name(path.name.replace("golf", "fineweb")))
    run, score = trained(tiny, data)
    assert score["published_bytes"] == published[1:].sum() and score["bytes"] == manifest.val.decoded_bytes
    assert score["published_bpb"] * score["published_bytes"] == pytest.approx(score["val_bpb"] * score["bytes"])
    assert f"\nval_bpb (published bytes) {score['published_bpb']:.4f}" in (run / "train.log").read_text()

    data = Dataset.open(data.path)
    counts = open_shard(data.published_files[0])[:].copy()
    counts[at := int(np.flatnonzero(data.val[0][:] == 4)[0])] = 3
    write_shard(data.published_files[0], counts)
    with pytest.raises(VerificationError, match=f"count 3 bytes for val token {at}, which holds no text"):
        Dataset.open(data.path).published_bytes(0, data.val_tokens)
    write_shard(data.published_files[0], counts[:-1])
    with pytest.raises(InputError, match=r"\*_val_bytes_\*\.bin hold counts of \[899, .*expected \[900, "):
        Dataset.open(data.path)


def test_from_text_to_a_sample(tmp_path, tiny, monkeypatch, capsys):
    """The run folder knows CaseOps from its tokenizer alone."""
    source = prepared(tmp_path, tokenizer=tokenizer()).path.with_name("docs.jsonl")
    out = tmp_path / "new"
    assert main(["data", "prepare", str(source), "--out", str(out), "--vocab-size", "320", "--case-ops"]) == 0
    data = Dataset.open(out)
    assert data.tokenizer.operator_ids == [4, 5, 6, 7]
    run, score = trained(tiny, data)
    assert score["bytes"] == data.manifest.val.raw_bytes and score["label"] == "val_bpb"
    assert score["published_bpb"] is None and "published" not in (run / "train.log").read_text()
    loaded = golfgpt.load(run)[1]
    assert loaded.decode(loaded.encode("NASA McX")) == "NASA McX"
    assert main(["sample", str(run), "--prompt", "NASA", "--tokens", "60", "--temperature", "9"]) == 0
    capsys.readouterr()
    letters = loaded.encode("LLO")[1:]  # without ALLCAPS
    monkeypatch.setattr("golfgpt.model.gpt.GPT.generate", lambda *args, **options: letters)
    assert main(["sample", str(run), "--prompt", "HE"]) == 0
    assert capsys.readouterr().out == "HELLO\n"
