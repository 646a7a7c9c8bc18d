"""Shards, manifest and data folders: what is right opens and verifies, what is wrong is named."""

import dataclasses
import functools
import hashlib
import json
import lzma
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golfgpt.data.manifest import Manifest, ShardFile
from golfgpt.data.prepare import prepare
from golfgpt.data.shards import Dataset, gather, open_shard, verify, write_shard
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer
from golfgpt.errors import InputError, VerificationError
from golfgpt.score.baselines import Bigram, yardsticks

DOCUMENTS = [f"Document {i}: the value of {i * i} is é▁🙂\n\n  and {'more ' * (i % 7)}\n" for i in range(120)]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(train_tokenizer(DOCUMENTS, 310))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = folder / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    prepare([source], folder / "out", tokenizer=tokenizer(), val_fraction=0.3, shard_tokens=700, workers=1)
    return folder / "out"


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def bare(folder):
    """The same shards as they come from elsewhere: no manifest, no sidecars."""
    for path in [folder / "manifest.json", *folder.glob("*.bytes")]:
        path.unlink()
    return folder


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


# Shards


@given(st.lists(st.integers(0, 65_535), max_size=50))
def test_shard_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "x_train_000000.bin"
    write_shard(path, np.array(tokens, dtype=np.int64))
    back = open_shard(path)
    assert back.dtype == np.uint16 and back.tolist() == tokens


def test_shard_bytes_are_upstreams(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 2, 65_535]))
    data = (tmp_path / "a.bin").read_bytes()
    assert np.frombuffer(data[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert data[1024:] == b"\x01\x00\x02\x00\xff\xff"


@pytest.mark.parametrize("tokens", [[70_000], [-1]])
def test_tokens_that_do_not_fit(tmp_path, tokens):
    with pytest.raises(InputError, match="do not fit uint16"):
        write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"\x00\x00\x00\x00", "magic 0, version 1; expected a shard's 20240520, 1"),
        (4, b"\x02", "version 2; expected a shard's 20240520, 1"),
        (8, b"\x04", r"says 4 tokens, so 1032 bytes, but the file has 1030; download or prepare"),
        (8, b"\xff\xff\xff\xff", "says -1 tokens"),
        (8, b"\xff\xff\xff\x7f", "says 2147483647 tokens"),
    ],
    ids=["magic", "version", "length", "negative", "huge"],
)
def test_damaged_shard(tmp_path, offset, data, message):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(3))
    patch(path, offset, data)
    with pytest.raises(InputError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)


def test_truncated_and_missing_shards(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="5 bytes are less than a shard's header"):
        open_shard(tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"cannot read the shard .*No such file"):
        open_shard(tmp_path / "b.bin")


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_gather_is_a_slice_of_the_concatenation(lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert gather(np.split(whole, np.cumsum(lengths)), start, stop).tolist() == list(range(start, stop))


# Manifest


def test_manifest_round_trip(folder):
    manifest = Manifest.load(folder / "manifest.json")
    assert manifest.to_json() == Manifest.load(folder / "manifest.json").to_json()
    assert manifest.lossless and manifest.val.raw_bytes == manifest.val.decoded_bytes
    assert isinstance(manifest.train.shards[0], ShardFile)
    assert (
        manifest.train.shards[0].sha256 == hashlib.sha256((folder / "golf_train_000000.bin").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=1), "unknown key extra"),
        (lambda m: m.pop("val_below"), "missing key val_below"),
        (lambda m: m["train"].update(tokens="9"), "train.tokens = '9', expected int"),
        (lambda m: m["val"]["shards"][0].pop("sha256"), "missing key val.shards.sha256"),
        (lambda m: m.update(format=2), "manifest format 2 is not 1"),
        (lambda m: m.update(val=[]), r"val: expected an object, got \[\]"),
    ],
)
def test_manifest_is_strict(folder, change, message):
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        Dataset.open(folder)


def test_manifest_that_is_no_json(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a readable manifest"):
        Dataset.open(folder)


# Dataset


def test_dataset_contents(folder):
    data = Dataset.open(folder)
    assert len(data.train) > 1 and len(data.val) > 1
    assert data.vocab_size == 310 and data.lossless and len(data.digest) == 64
    data.check_token_ids()
    text = data.tokenizer.decode(data.val_ids(0, data.val_tokens))
    assert data.prove_val_bytes() == len(text.encode()) == data.manifest.val.raw_bytes
    assert data.val_tokens == data.manifest.val.tokens and data.train_tokens == data.manifest.train.tokens
    assert set(text.splitlines()) <= set("".join(DOCUMENTS).splitlines())


def test_bare_shards_count_as_the_sidecar_does(folder):
    data = Dataset.open(folder)
    sidecar = data.byte_counts(0, data.val_tokens)
    digest = data.digest
    data = Dataset.open(bare(folder))
    assert data.manifest is None and not data.lossless and data.digest != digest
    assert (data.byte_counts(0, data.val_tokens) == sidecar).all()
    pieces = [data.byte_counts(start, start + 13) for start in range(0, data.val_tokens, 13)]
    assert (np.concatenate(pieces) == sidecar).all()
    assert data.prove_val_bytes() == sidecar.sum()
    report = verify(folder)
    assert not report.manifest and report.val_bytes == sidecar.sum()


def test_every_prefix_can_be_proved(folder):
    data = Dataset.open(folder)
    counts = data.byte_counts(0, data.val_tokens)
    for stop in range(1, 120):
        assert data.prove_val_bytes(stop) == counts[:stop].sum()


def test_what_a_folder_lacks(folder, tmp_path):
    with pytest.raises(InputError, match="is not a folder; make one with `golfgpt data prepare"):
        Dataset.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \*_train_\*\.bin"):
        Dataset.open(tmp_path / "empty")
    (bare(folder) / "tokenizer.model").unlink()
    data = Dataset.open(folder)
    assert data.tokenizer is None and data.vocab_size is None
    with pytest.raises(InputError, match="holds no tokenizer"):
        data.byte_counts(0, 5)
    data.check_token_ids(310)
    assert Dataset.open(folder, tokenizer()).vocab_size == 310
    for name in ("a.model", "b.model"):
        (folder / name).write_bytes(tokenizer().model_bytes)
    with pytest.raises(InputError, match=r"2 \*\.model files"):
        Dataset.open(folder)


def test_token_outside_the_vocabulary(folder):
    patch(folder / "golf_val_000000.bin", 1024 + 2 * 7, (310).to_bytes(2, "little"))
    data = Dataset.open(folder)
    with pytest.raises(InputError, match=r"golf_val_000000\.bin: token 7 is 310, the vocabulary has 310"):
        data.check_token_ids()
    data.check_token_ids(split="train")
    with pytest.raises(InputError, match="token 7 is 310"):
        data.prove_val_bytes()
    with pytest.raises(InputError, match="token 7 is 310"):
        verify(bare(folder))


def test_sidecar_of_the_wrong_length(folder):
    path = folder / "golf_val_000000.bytes"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"golf_val_000000\.bytes has 1398 bytes, expected 1400 for 700 tokens"):
        Dataset.open(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"golf_val_000000\.bytes is missing"):
        Dataset.open(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "golf_train_000001.bin"])
def test_folder_that_contradicts_its_manifest(folder, name):
    (folder / name).unlink()
    with pytest.raises(VerificationError, match=r"found tokenizer none|golf_train_000001\.bin .* only in the manifest"):
        Dataset.open(folder)


def test_foreign_shard_beside_a_manifest(folder):
    write_shard(folder / "golf_train_999999.bin", np.arange(3))
    with pytest.raises(VerificationError, match=r"golf_train_999999\.bin \(3 tokens\) is only in the folder"):
        Dataset.open(folder)


def test_other_tokenizer_beside_a_manifest(folder):
    (folder / "tokenizer.model").write_bytes(train_tokenizer(DOCUMENTS, 305))
    with pytest.raises(VerificationError, match=r"found tokenizer \w+, the manifest has"):
        Dataset.open(folder)


# Verification


def test_verify_reports_totals(folder):
    stages = []
    report = verify(folder, progress=lambda stage, done, total: stages.append((stage, done <= total)))
    manifest = Manifest.load(folder / "manifest.json")
    assert report.train_documents + report.val_documents == len(DOCUMENTS)
    assert (report.val_documents, report.val_bytes) == (manifest.val.documents, manifest.val.raw_bytes)
    assert report.manifest and report.lossless and report.digest == manifest.digest
    assert {"hashing files", "reading train", "decoding val"} <= {stage for stage, _ in stages}
    assert all(ok for _, ok in stages)


@pytest.mark.parametrize("name", ["golf_train_000000.bin", "golf_val_000001.bin", "golf_val_000000.bytes"])
def test_flipped_bit_is_named(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=rf"1 of \d+ files are not what was prepared(.|\n)*{name}: SHA-256"):
        verify(folder)


def test_wrong_sidecar_is_caught_by_decoding(folder):
    """Teeth: a sidecar that counts every leading space twice contradicts the decoder, digests or not."""
    data = Dataset.open(folder)
    pieces = tokenizer().pieces
    for path, shard in zip(data.val_files, data.val, strict=True):
        counts = np.array([len(pieces[i]) + pieces[i].startswith(b" ") for i in shard], dtype="<u2")
        path.with_suffix(".bytes").write_bytes(counts.tobytes())
    (folder / "manifest.json").unlink()
    with pytest.raises(VerificationError, match=r"the sidecar counts \d+ bytes in \d+ val tokens, but they decode to"):
        verify(folder)


def test_manifest_with_other_byte_totals(folder):
    manifest = Manifest.load(folder / "manifest.json")
    val = dataclasses.replace(manifest.val, raw_bytes=manifest.val.raw_bytes + 1)
    (folder / "manifest.json").write_text(json.dumps(dataclasses.replace(manifest, val=val).to_json()))
    with pytest.raises(VerificationError, match=r"the manifest has \d+ decoded and \d+ raw"):
        verify(folder)


def test_split_overlap_is_found_document_by_document(folder):
    """One val document, copied into the middle of train, at another place in another shard."""
    data = Dataset.open(bare(folder))
    starts = np.flatnonzero(data.val_ids(0, data.val_tokens) == 1)
    document = data.val_ids(starts[2], starts[3])
    train = np.concatenate(data.train)
    cut = np.flatnonzero(train == 1)[5]
    for file in data.train_files:
        file.unlink()
    write_shard(folder / "golf_train_000000.bin", np.concatenate([train[:cut], document, train[cut:]]))
    with pytest.raises(VerificationError, match=r"the splits overlap: 1 of \d+ train documents are also in val"):
        verify(folder)


def test_shard_that_is_in_both_splits(folder):
    shutil.copy(folder / "golf_train_000000.bin", folder / "golf_val_000000.bin")
    with pytest.raises(VerificationError, match=r"the splits overlap: .* begin and end with the same tokens"):
        Dataset.open(bare(folder))


def test_spaces_lost_to_bytes_are_refused(folder, monkeypatch):
    """Shards of a vocabulary without a bare "▁", encoded by plain SentencePiece: a space counts three bytes."""
    data = Dataset.open(bare(folder))
    monkeypatch.setattr(data.tokenizer, "has_space_piece", False)
    with pytest.raises(VerificationError, match="are the bytes E2 96 81, which would count 3 bytes each"):
        data.prove_val_bytes()


# Yardsticks


def test_bigram_sums_to_one(folder):
    bigram = Bigram(Dataset.open(folder))
    for context in (1, int(Dataset.open(folder).train[0][5]), 309):
        pairs = np.stack([np.full(310, context), np.arange(310)], axis=1).ravel().astype(np.uint16)
        assert bigram.probabilities(pairs)[::2].sum() == pytest.approx(1)


def test_yardsticks_are_kept_and_use_the_divisor(folder):
    data = Dataset.open(folder)
    values = yardsticks(data)
    assert set(values) == {"gzip", "xz", "zstd", "bigram"} and all(0 < value < 8 for value in values.values())
    ids = data.val_ids(0, data.val_tokens)
    text = data.tokenizer.decode(ids).encode()
    assert values["xz"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
    assert values["gzip"] == pytest.approx(8 * (len(zlib.compress(text, 9)) + 12) / len(text))
    cache = json.loads((folder / "yardsticks.json").read_text())
    assert cache["bits_per_byte"] == values
    cache["bits_per_byte"]["gzip"] = 7.5
    (folder / "yardsticks.json").write_text(json.dumps(cache))
    assert yardsticks(data)["gzip"] == 7.5
    (folder / "yardsticks.json").write_text("{}")
    assert yardsticks(data) == values
