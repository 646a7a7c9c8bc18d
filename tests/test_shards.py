"""Shards, manifest and data folders: what is right opens and verifies, what is wrong is named."""

import functools
import hashlib
import json
import lzma
import os
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
from golfgpt.score.compressors import Bigram, compressors_bpb

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


# Shards


def test_a_shard_that_changes_while_it_is_open(tmp_path):
    """Deleted or replaced, it is still what was opened; cut or overwritten, the next read says so."""
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, np.arange(50_000))
    shard = open_shard(path)
    write_shard(path, np.zeros(10, dtype=np.uint16))
    assert shard[49_990:60_000].tolist() == [*range(49_990, 50_000)] and shard[-2:].tolist() == [49_998, 49_999]
    shard = open_shard(path)
    os.truncate(path, 1030)
    for part in (slice(0, 2), slice(5, 9)):
        with pytest.raises(InputError, match=r"x_train_000000\.bin was changed while it was read"):
            shard[part]


def test_a_disk_that_fails_names_the_shard_and_short_reads_are_completed(tmp_path, monkeypatch):
    path, pread = tmp_path / "x_train_000000.bin", os.pread
    write_shard(path, np.arange(100))
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 7), at))
    assert open_shard(path)[3:].tolist() == [*range(3, 100)]
    monkeypatch.setattr(os, "pread", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match=r"Input/output error: '.*/x_train_000000\.bin'"):
        open_shard(path)[3:]


@given(st.lists(st.integers(0, 65_535), max_size=50))
def test_shard_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "x_train_000000.bin"
    write_shard(path, np.array(tokens, dtype=np.int64))
    back = open_shard(path)[:]
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


HEADER = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bytes(4) + HEADER[4:] + bytes(6), "magic 0, version 1; expected a shard's 20240520, 1"),
        (HEADER[:4] + b"\x02" + HEADER[5:] + bytes(6), "version 2; expected a shard's 20240520, 1"),
        (HEADER + bytes(4), r"says 3 tokens, so 1030 bytes, but the file has 1028; download or prepare"),
        (HEADER[:8] + b"\xff\xff\xff\xff" + HEADER[12:] + bytes(6), "says -1 tokens"),
        (HEADER[:8] + b"\xff\xff\xff\x7f" + HEADER[12:] + bytes(6), "says 2147483647 tokens"),
        (b"short", "5 bytes are less than a shard's header"),
        (None, r"cannot read the shard .*No such file"),
    ],
    ids=["magic", "version", "length", "negative", "huge", "short", "missing"],
)
def test_damaged_shard(tmp_path, body, message):
    path = tmp_path / "a.bin"
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(InputError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_gather_is_a_slice_of_the_concatenation(lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert gather(np.split(whole, np.cumsum(lengths)), start, stop).tolist() == list(range(start, stop))


# Folders


def test_dataset_contents(folder):
    manifest = Manifest.load(folder / "manifest.json")
    assert manifest.lossless and isinstance(manifest.train.shards[0], ShardFile)
    sha256 = hashlib.sha256((folder / "golf_train_000000.bin").read_bytes()).hexdigest()
    assert manifest.train.shards[0].sha256 == sha256
    data = Dataset.open(folder)
    assert len(data.train) > 1 and len(data.val) > 1
    assert data.vocab_size == 310 and data.lossless and data.digest == manifest.digest
    data.check_token_ids()
    text = data.tokenizer.decode(data.val_ids(0, data.val_tokens))
    assert data.prove_val_bytes() == len(text.encode()) == manifest.val.raw_bytes == manifest.val.decoded_bytes
    assert (data.train_tokens, data.val_tokens) == (manifest.train.tokens, manifest.val.tokens)
    assert set(text.splitlines()) <= set("".join(DOCUMENTS).splitlines())
    counts = data.byte_counts(0, data.val_tokens)
    for stop in range(1, 120):
        assert data.prove_val_bytes(stop) == counts[:stop].sum()


def test_verify_reports_totals(folder):
    stages = []
    report = verify(folder, progress=lambda stage, done, total: stages.append((stage, done <= total)))
    manifest = Manifest.load(folder / "manifest.json")
    assert report.train_documents + report.val_documents == len(DOCUMENTS)
    assert (report.val_documents, report.val_bytes) == (manifest.val.documents, manifest.val.raw_bytes)
    assert report.manifest and report.lossless and report.digest == manifest.digest
    assert {"hashing files", "reading train", "decoding val"} <= {stage for stage, _ in stages}
    assert all(ok for _, ok in stages)


def test_bare_shards_count_as_the_sidecar_does(folder):
    data = Dataset.open(folder)
    sidecar = data.byte_counts(0, data.val_tokens)
    digest = data.digest
    data = Dataset.open(bare(folder))
    assert data.manifest is None and not data.lossless and data.digest != digest
    assert (data.byte_counts(0, data.val_tokens) == sidecar).all()
    pieces = [data.byte_counts(start, start + 13) for start in range(0, data.val_tokens, 13)]
    assert (np.concatenate(pieces) == sidecar).all()
    report = verify(folder)
    assert not report.manifest and report.val_bytes == data.prove_val_bytes() == sidecar.sum()


def test_a_folder_without_a_tokenizer(folder):
    (bare(folder) / "tokenizer.model").unlink()
    data = Dataset.open(folder)
    assert data.tokenizer is None and data.vocab_size is None
    with pytest.raises(InputError, match="holds no tokenizer"):
        data.byte_counts(0, 5)
    data.check_token_ids(310)
    assert Dataset.open(folder, tokenizer()).vocab_size == 310


def edit_manifest(change):
    def edit(folder):
        values = json.loads((folder / "manifest.json").read_text())
        change(values)
        (folder / "manifest.json").write_text(json.dumps(values))

    return edit


def remove(*names):
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def other_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(train_tokenizer(DOCUMENTS, 305))


def val_is_a_train_shard(folder):
    shutil.copy(bare(folder) / "golf_train_000000.bin", folder / "golf_val_000000.bin")


def another_shard(folder):
    write_shard(folder / "golf_train_999999.bin", np.arange(3))


def a_run(folder):
    remove("*")(folder)
    (folder / "metrics.jsonl").touch()


def two_models(folder):
    (folder / "tokenizer.model").rename(folder / "a.model")
    (folder / "b.model").touch()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shutil.rmtree, InputError, r"there is no folder .*; if it was moved, give its new place"),
        (a_run, InputError, r"golfgpt data prepare FILES --out DIR"),
        (remove("*"), InputError, r"holds no \*_train_\*\.bin"),
        (edit_manifest(lambda m: m.update(extra=1)), InputError, "unknown key extra"),
        (edit_manifest(lambda m: m.pop("val_below")), InputError, "missing key val_below"),
        (edit_manifest(lambda m: m["train"].update(tokens="9")), InputError, "train.tokens = '9', expected a whole"),
        (edit_manifest(lambda m: m["val"]["shards"][0].pop("sha256")), InputError, "missing key val.shards.sha256"),
        (edit_manifest(lambda m: m.update(format=2)), InputError, "manifest format 2 is not 1"),
        (edit_manifest(lambda m: m.update(val=[])), InputError, r"val: expected an object, got \[\]"),
        (lambda f: (f / "manifest.json").write_text("{"), InputError, "not a readable manifest"),
        (
            lambda f: os.truncate(f / "golf_val_000000.bytes", 1398),
            InputError,
            r"golf_val_000000\.bytes has 1398 bytes, expected 1400 for 700 tokens",
        ),
        (remove("golf_val_000000.bytes"), InputError, r"golf_val_000000\.bytes is missing"),
        (remove("*.bytes"), VerificationError, r"the manifest's \*\.bytes sidecars are missing"),
        (two_models, InputError, r"2 \*\.model files"),
        (remove("tokenizer.model"), VerificationError, "found tokenizer none, the manifest has"),
        (other_tokenizer, VerificationError, r"found tokenizer \w+, the manifest has"),
        (remove("golf_train_000001.bin"), VerificationError, r"golf_train_000001\.bin .* only in the manifest"),
        (another_shard, VerificationError, r"golf_train_999999\.bin \(3 tokens\) is only in the folder"),
        (val_is_a_train_shard, VerificationError, "the splits overlap: .* begin and end with the same tokens"),
    ],
)
def test_a_folder_that_does_not_open(folder, change, error, message):
    change(folder)
    with pytest.raises(error, match=message):
        Dataset.open(folder)


def flip_last_bit(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def spaces_counted_twice(folder):
    """A sidecar that counts every leading space twice contradicts the decoder, digests or not."""
    data = Dataset.open(folder)
    pieces = tokenizer().pieces
    for path, shard in zip(data.val_files, data.val, strict=True):
        counts = np.array([len(pieces[i]) + pieces[i].startswith(b" ") for i in shard[:]], dtype="<u2")
        path.with_suffix(".bytes").write_bytes(counts.tobytes())
    (folder / "manifest.json").unlink()


def val_document_inside_train(folder):
    """One val document, copied into the middle of train, at another place in another shard."""
    data = Dataset.open(bare(folder))
    starts = np.flatnonzero(data.val_ids(0, data.val_tokens) == 1)
    document = data.val_ids(starts[2], starts[3])
    train = np.concatenate(data.train)
    cut = np.flatnonzero(train == 1)[5]
    for file in data.train_files:
        file.unlink()
    write_shard(folder / "golf_train_000000.bin", np.concatenate([train[:cut], document, train[cut:]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: flip_last_bit(f / "golf_train_000000.bin"), r"1 of \d+ files(.|\n)*golf_train_000000.bin: SHA-256"),
        (lambda f: flip_last_bit(f / "golf_val_000001.bin"), r"1 of \d+ files(.|\n)*golf_val_000001.bin: SHA-256"),
        (lambda f: flip_last_bit(f / "golf_val_000000.bytes"), r"1 of \d+ files(.|\n)*golf_val_000000.bytes: SHA-256"),
        (edit_manifest(lambda m: m["val"].update(raw_bytes=1)), r"the manifest has \d+ decoded and 1 raw"),
        (
            edit_manifest(lambda m: m["train"].update(documents=1)),
            r"documents and tokens are .*, the manifest has \(1,",
        ),
        (spaces_counted_twice, r"the sidecar counts \d+ bytes in \d+ val tokens, but they decode to"),
        (val_document_inside_train, r"the splits overlap: 1 of \d+ train documents are also in val"),
    ],
)
def test_a_folder_that_does_not_verify(folder, change, message):
    change(folder)
    with pytest.raises(VerificationError, match=message):
        verify(folder)


def test_token_outside_the_vocabulary(folder):
    with open(folder / "golf_val_000000.bin", "r+b") as file:
        file.seek(1024 + 2 * 7)
        file.write((310).to_bytes(2, "little"))
    data = Dataset.open(folder)
    data.check_token_ids(split="train")
    for check in (data.check_token_ids, data.prove_val_bytes, lambda: verify(bare(folder))):
        with pytest.raises(InputError, match=r"golf_val_000000\.bin: token 7 is 310, the vocabulary has 310"):
            check()


def test_spaces_lost_to_bytes_are_refused(folder, monkeypatch):
    """Shards of a vocabulary without a bare "▁", encoded by plain SentencePiece: a space counts three bytes."""
    data = Dataset.open(bare(folder))
    monkeypatch.setattr(data.tokenizer, "has_space_piece", False)
    with pytest.raises(VerificationError, match="are the bytes E2 96 81, which would count 3 bytes each"):
        data.prove_val_bytes()


# Reference compressors


def test_bigram_sums_to_one(folder):
    bigram = Bigram(Dataset.open(folder))
    for context in (1, Dataset.open(folder).train[0][:].tolist()[5], 309):
        pairs = np.stack([np.full(310, context), np.arange(310)], axis=1).ravel().astype(np.uint16)
        assert bigram.probabilities(pairs)[::2].sum() == pytest.approx(1)


def test_scores_of_compressors_are_kept_and_use_the_divisor(folder):
    data = Dataset.open(folder)
    values = compressors_bpb(data)
    assert set(values) == {"gzip", "xz", "zstd", "bigram"} and all(0 < value < 8 for value in values.values())
    ids = data.val_ids(0, data.val_tokens)
    text = data.tokenizer.decode(ids).encode()
    assert values["xz"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
    assert values["gzip"] == pytest.approx(8 * (len(zlib.compress(text, 9)) + 12) / len(text))
    cache = json.loads((folder / "baselines.json").read_text())
    assert cache["bits_per_byte"] == values
    cache["bits_per_byte"]["gzip"] = 7.5
    (folder / "baselines.json").write_text(json.dumps(cache))
    assert compressors_bpb(data)["gzip"] == 7.5
    (folder / "baselines.json").write_text("{}")
    assert compressors_bpb(data) == values
