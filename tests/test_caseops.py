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


def vectors(kind: str) -> list:
    paths = [path for folder in FOLDERS for path in sorted(folder.glob(f"{kind}*.jsonl"))]
    wanted = [path for path in paths if re.fullmatch(rf"{kind}(?!_(decode|bytes)).*", path.stem)]
    return [pytest.param(path, id=path.stem) for path in wanted] or [
        pytest.param(None, marks=pytest.mark.skip(reason=f"GOLFGPT_CONFORMANCE names no folder with {kind}*.jsonl"))
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def cousin(version: int, text: str) -> str:
    """Encodings of the other published transforms; all but the first treat CAPNEXT as an ordinary character."""
    if version == 1:
        return re.sub("[A-Z\ue000]", lambda m: "\ue000" + m[0].lower(), text)
    least_title = {3: 2, 5: 7}.get(version)
    least_caps = {6: 3, 7: 4}.get(version, 2)

    def word(match: re.Match) -> str:
        w = match[0]
        if w in OPERATORS:
            return ESC + w
        if w.isupper() and len(w) >= least_caps:
            return ALLCAPS + w.lower()
        title = least_title and len(w) >= least_title and w[0].isupper() and w[1:].islower()
        return TITLE + w.lower() if title else w

    return re.sub(f"[A-Za-z]+|[{ALLCAPS}{ESC}{TITLE if least_title else ''}]", word, text)


@pytest.mark.parametrize("path", vectors("q_caseops"))
def test_published_encodings(path):
    for row in read(path):
        assert caseops.encode(row["text"]) == row["lossless_caps_v2"]
        assert caseops.decode(row["lossless_caps_v2"]) == row["text"]
        for version in (1, 3, 4, 5, 6, 7):
            assert cousin(version, row["text"]) == row[f"lossless_caps_v{version}"], version


@pytest.mark.parametrize("path", vectors("q_caseops_decode"))
def test_published_decodings(path):
    """To the decoders of v3 and v4 some operators are ordinary characters, as private use U+F0000 is to ours."""
    for row in read(path):
        for key, ordinary in (("caseops_v1", ""), ("v3", CAPNEXT), ("v4", CAPNEXT + TITLE)):
            text = row["encoded"]
            for i, operator in enumerate(ordinary):
                text = text.replace(operator, chr(0xF0000 + i))
            decoded = None
            with contextlib.suppress(InputError):
                decoded = caseops.decode(text)
                for i, operator in enumerate(ordinary):
                    decoded = decoded.replace(chr(0xF0000 + i), operator)
            assert decoded == row[key], row


@pytest.mark.parametrize("path", vectors("q_caseops_bytes"))
def test_published_byte_counts(path):
    tokenizer = Tokenizer.from_file(path.with_name(path.stem.replace("_bytes", "_sp") + ".model"))
    assert tokenizer.case_ops
    for row in read(path):
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
        (f"{TITLE}{ALLCAPS}a", "character 1: ALLCAPS after TITLE"),
        (f"{ALLCAPS}1", "character 1: '1' after ALLCAPS"),
        (f"a{CAPNEXT}{CAPNEXT}b", "character 2: CAPNEXT twice"),
        (f"{TITLE}{ESC}1", "character 2: escaped '1' after TITLE"),
        (f"{TITLE}{ESC}{ESC}", "character 2: an escaped ESC after TITLE"),
        (f"{CAPNEXT}{ESC}ab{CAPNEXT}{ESC}1", "character 7: the end after CAPNEXT"),
        (f"{ESC}", "character 1: the end after ESC"),
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
    source = write(tmp_path / "docs.jsonl")
    for given_tokenizer in (learned, Tokenizer.from_bytes(train_tokenizer(DOCUMENTS, 320))):
        with pytest.raises(InputError, match=r"cannot hold CaseOps text: expected U\+E001 to U\+E004 as pieces"):
            prepare([source], tmp_path / "out", tokenizer=given_tokenizer, case_ops=True, workers=1)
        with pytest.raises(InputError, match="original bytes are counted for CaseOps"):
            given_tokenizer.original_bytes("a")
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


# 4 Data


def write(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return path


def prepared(folder: Path, **options) -> Dataset:
    prepare([write(folder / "docs.jsonl")], folder / "data", val_fraction=0.3, shard_tokens=900, **options)
    return Dataset.open(folder / "data")


def bare(data: Dataset) -> Dataset:
    for path in [data.path / "manifest.json", *data.path.glob("*.bytes")]:
        path.unlink()
    return Dataset.open(data.path)


def test_prepared_folder(tmp_path):
    data = prepared(tmp_path, vocab_size=320, case_ops=True, workers=2)
    manifest = data.manifest
    assert manifest.text_codec == "caseops" and manifest.lossless
    (tmp_path / "again").mkdir()
    again = prepared(tmp_path / "again", tokenizer=data.tokenizer, workers=1)
    names = [{path.name for path in folder.iterdir()} for folder in (data.path, again.path)]
    assert again.manifest == manifest and names[0] == names[1]
    ids = data.val_ids(0, data.val_tokens)
    val = [data.tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]
    raw = sum(len(text.encode()) for text in val)
    assert set(val) <= set(DOCUMENTS) and raw == manifest.val.raw_bytes == verify(data.path).val_bytes
    sidecar = data.byte_counts(0, data.val_tokens)
    proved = [data.prove_val_bytes(stop) for stop in range(1, 200)]
    compressed = compressors_bpb(data)["xz"]
    data = bare(data)
    assert data.tokenizer.case_ops and data.prove_val_bytes() == raw
    assert compressors_bpb(data)["xz"] == compressed
    for step in (1, 2, 7):
        parts = [data.byte_counts(start, start + step) for start in range(0, data.val_tokens, step)]
        assert (np.concatenate(parts) == sidecar).all()
    assert proved == [data.prove_val_bytes(stop) for stop in range(1, 200)] == sidecar.cumsum()[:199].tolist()


def test_manifests_before_caseops_open(tmp_path):
    data = prepared(tmp_path, vocab_size=320, workers=1)
    path = data.path / "manifest.json"
    values = json.loads(path.read_text())
    assert values.pop("text_codec") is None and values.pop("published_bytes") == []
    path.write_text(json.dumps(values))
    assert Manifest.load(path) == data.manifest and Dataset.open(data.path).digest == data.digest
    path.write_text(json.dumps(values | {"text_codec": "rot13"}))
    with pytest.raises(InputError, match="text_codec = 'rot13'"):
        Manifest.load(path)


def test_published_bytes_of_a_lossy_tokenizer(tmp_path, tiny):
    """val_bpb keeps the decoded text as its divisor; the published figure stands beside it."""
    data = prepared(tmp_path, tokenizer=tokenizer(lossy=True), case_ops=True, workers=1)
    manifest = data.manifest
    assert not manifest.lossless and len(manifest.published_bytes) == len(data.val) > 1
    published = np.concatenate(data.published)
    ids = data.val_ids(0, data.val_tokens)
    starts = np.flatnonzero(ids == 1)
    below = bytes.fromhex(manifest.val_below)
    val = [text for text in DOCUMENTS if document_hash(text.encode()) < below]
    assert published[starts].sum() == 0
    assert published.tolist() == [count for text in val for count in (0, *data.tokenizer.original_bytes(text))]
    assert published.sum() <= manifest.val.raw_bytes
    report = verify(data.path)
    assert report.val_bytes == manifest.val.decoded_bytes != report.published_bytes == published.sum()
    data = bare(data)
    for path in data.published_files:
        path.rename(path.with_name(path.name.replace("golf", "fineweb")))
    data = Dataset.open(data.path)
    assert len(data.val) == len(data.published) and data.prove_val_bytes() == manifest.val.decoded_bytes

    config = replace(
        tiny,
        model=replace(tiny.model, vocab_size=320),
        data=replace(tiny.data, path=str(data.path), batch_tokens=512),
        eval=replace(tiny.eval, max_tokens=None),
        schedule=replace(tiny.schedule, max_steps=1),
    )
    score = train(config, tmp_path / "run", quiet=True)["score"]
    assert score["published_bytes"] == published[1:].sum() and score["bytes"] == manifest.val.decoded_bytes
    assert score["published_bpb"] * score["published_bytes"] == pytest.approx(score["val_bpb"] * score["bytes"])
    assert f"\nval_bpb (published bytes) {score['published_bpb']:.4f}" in (tmp_path / "run/train.log").read_text()

    counts = open_shard(data.published_files[0]).copy()
    counts[at := int(np.flatnonzero(ids == 4)[0])] = 3
    write_shard(data.published_files[0], counts)
    with pytest.raises(VerificationError, match=f"count 3 bytes for val token {at}, which holds no text"):
        Dataset.open(data.path).published_bytes(0, data.val_tokens)
    write_shard(data.published_files[0], open_shard(data.published_files[0])[:-1].copy())
    with pytest.raises(InputError, match=r"\*_val_bytes_\*\.bin hold counts of \[899, .*expected \[900, "):
        Dataset.open(data.path)


def test_from_text_to_a_sample(tmp_path, tiny, monkeypatch, capsys):
    """The run folder knows CaseOps from its tokenizer alone."""
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "docs.jsonl")
    options = ["--vocab-size", "320", "--val-fraction", "0.3", "--workers", "1", "--case-ops"]
    assert main(["data", "prepare", str(source), "--out", "data", *options]) == 0
    assert main(["data", "verify", "data"]) == 0
    config = replace(
        tiny,
        model=replace(tiny.model, vocab_size=320),
        data=replace(tiny.data, path="data", batch_tokens=512),
        eval=replace(tiny.eval, max_tokens=None),
    )
    score = train(config, tmp_path / "run", quiet=True)["score"]
    assert score["bytes"] == Dataset.open("data").manifest.val.raw_bytes and score["label"] == "val_bpb"
    assert score["published_bpb"] is None and "published" not in (tmp_path / "run/train.log").read_text()
    loaded = golfgpt.load(tmp_path / "run")[1]
    assert loaded.case_ops and loaded.decode(loaded.encode("NASA McX")) == "NASA McX"
    capsys.readouterr()
    assert main(["sample", "run", "--prompt", "NASA", "--tokens", "60", "--temperature", "9"]) == 0
    assert capsys.readouterr().out.startswith("NASA")
    hello = loaded.encode("LLO")[1:]  # the letters without ALLCAPS
    monkeypatch.setattr("golfgpt.model.gpt.GPT.generate", lambda *args, **options: hello)
    assert main(["sample", "run", "--prompt", "HE"]) == 0
    assert capsys.readouterr().out == "HELLO\n"
