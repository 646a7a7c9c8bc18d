"""From text files to a folder: nothing lost, nothing half-written, every bad input named."""

import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from golfgpt.data.demo_text import demo_text
from golfgpt.data.documents import LEAST_DOCUMENT_BYTES, document_hash, find_inputs, read_documents, split_text
from golfgpt.data.manifest import Manifest
from golfgpt.data.prepare import mix, prepare, val_limit
from golfgpt.data.shards import Dataset, verify
from golfgpt.data.tokenizer import train_tokenizer
from golfgpt.errors import InputError, VerificationError

DOCUMENTS = [f"Document {i}: the value of {i * i} is é▁🙂\r\n\n\n  and\t{'more ' * (i % 7)}\n" for i in range(100)]


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.fixture
def source(tmp_path):
    return jsonl(tmp_path / "docs.jsonl", DOCUMENTS)


def documents_of(data: Dataset, split: str) -> list[str]:
    ids = np.concatenate(getattr(data, split))
    return [data.tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]


# Reading


pieces = st.lists(st.sampled_from([b"\n", b"\n\n", b"x" * 700, b" \t", b"\r\n\r\n", "é".encode() * 900, b"--"]))


@given(pieces.map(b"".join), st.sampled_from([None, b"--", b"\n"]))
def test_split_covers_the_text(data, separator):
    spans = list(split_text(data, separator))
    assert b"".join(data[start:end] for start, end in spans) == data
    sizes = [end - start for start, end in spans]
    assert all(size >= LEAST_DOCUMENT_BYTES for size in sizes) or len(sizes) == 1
    for _, end in spans[:-1]:
        assert data[:end].endswith(separator or b"\n")


@pytest.mark.parametrize(
    ("text", "separator", "starts"),
    [
        ("".join(f"P{i} " + "word " * 400 + "\n \t\n\n" for i in range(40)) + "\ufeff end\r\n", None, ["P"] * 40),
        ("<|end|>".join(letter * 3000 + "\n\n" + letter for letter in "abc"), "<|end|>", ["a", "b", "c"]),
    ],
    ids=["blank lines", "separator"],
)
def test_txt_documents_join_to_the_file(tmp_path, text, separator, starts):
    (tmp_path / "a.txt").write_bytes(text.encode())
    seen = []
    documents = list(read_documents([tmp_path / "a.txt"], separator, seen.append))
    assert "".join(documents) == text and sum(seen) == len(text.encode())
    assert [document[0] for document in documents] == starts
    assert all(len(document.encode()) >= LEAST_DOCUMENT_BYTES for document in documents)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jsonl_and_zst_hold_the_same(tmp_path, end):
    """Lines shorter and longer than the pieces in which files are read."""
    documents = [f"{i} {DOCUMENTS[i % 100]}" for i in range(2000)] + ["🙂" * 100_000, "end"]
    data = end.join(json.dumps({"text": text}) for text in documents).encode()
    half = len(data) // 2  # frames may end inside a line
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.zst").write_bytes(zst(data[:half]) + zst(b"") + zst(data[half:]))
    for path in tmp_path.iterdir():
        seen = []
        assert list(read_documents([path], advance=seen.append)) == documents
        assert sum(seen) == path.stat().st_size


def test_inputs_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.jsonl", "sub/c.txt", "readme.md"):
        (tmp_path / name).write_text('{"text": "x"}')
    names = lambda inputs: [path.name for path in find_inputs(inputs)]  # noqa: E731
    assert names([tmp_path]) == ["a.jsonl", "b.txt", "c.txt"]
    assert names([f"{tmp_path}/*.txt", tmp_path / "b.txt", tmp_path / "a.jsonl"]) == ["b.txt", "a.jsonl"]
    assert names([f"{tmp_path}/**/*.txt"]) == ["b.txt", "c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no text"),
        ("a.txt", b"abc\xffd", r"a\.txt: byte 3 \(0xff\) is not UTF-8"),
        ("a.txt", b"x\n\n" * 2000 + b"\xc3", r"a\.txt: byte 6000 \(0xc3\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl, line 2: byte 10 of the line \(0xff\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"content": "a"}', r'a\.jsonl, line 1: expected an object with a string "text"'),
        ("a.jsonl", b'["text"]', 'line 1: expected an object with a string "text"'),
        ("a.jsonl", b'{"text": 5}', 'line 1: expected an object with a string "text"'),
        ("a.jsonl", b'{"text": "ok\\n\\ud800"}', r"line 1: a lone surrogate \\ud800 is at character 3"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.zst", b"nonsense", r"a\.jsonl\.zst: damaged zstd data"),
        ("a.jsonl.zst", zst(b'{"text": "a"}\n') + zst(b'{"text": "\xff"}'), r"line 2: byte 10 of the line \(0xff\)"),
        ("a.jsonl.zst", zst(b'{"text": "a"}\n') + zst(b"\n" * 9999)[:-3], r"a\.jsonl\.zst: the zstd data are cut off"),
        ("a.csv", b"x", r"a\.csv: cannot read this kind of file; expected \.txt, \.jsonl, \.jsonl\.zst"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents([tmp_path / name]))


@pytest.mark.parametrize(
    ("inputs", "separator", "message"),
    [
        (["none.txt"], None, r"input .*none\.txt is no file and no folder, and as a pattern matches no"),
        ([""], None, r"holds no \.txt, \.jsonl, \.jsonl\.zst"),
        ([], None, "no input is named"),
        ([""], "", "separator is empty"),
    ],
)
def test_bad_inputs_are_named(tmp_path, inputs, separator, message):
    with pytest.raises(InputError, match=message):
        list(read_documents([tmp_path / name for name in inputs], separator))


def test_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude42"}')
    assert list(read_documents([tmp_path / "a.jsonl"])) == ["🙂"]


# Preparing


def test_every_document_is_there_once(tmp_path, source):
    seen = {}
    manifest = prepare(
        [source], tmp_path / "out", vocab_size=320, val_fraction=0.3, shard_tokens=500, workers=1,
        progress=lambda stage, done, total: seen.__setitem__(stage, (done, total)),
    )  # fmt: skip
    assert seen == dict.fromkeys(("training the tokenizer", "encoding"), (source.stat().st_size,) * 2)
    data = Dataset.open(tmp_path / "out")
    train, val = documents_of(data, "train"), documents_of(data, "val")
    below = bytes.fromhex(manifest.val_below)
    mixed = sorted(DOCUMENTS, key=lambda d: document_hash(d.encode()))
    assert train == [d for d in mixed if document_hash(d.encode()) >= below]
    assert val == [d for d in DOCUMENTS if document_hash(d.encode()) < below]
    assert [len(shard) for shard in data.train[:-1]] == [500] * (len(data.train) - 1)
    assert (manifest.train.documents, manifest.val.documents) == (len(train), len(val))
    assert manifest.val.raw_bytes == len("".join(val).encode()) and manifest.lossless
    assert manifest.train.inputs == ("docs.jsonl",) and manifest == data.manifest
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert verify(tmp_path / "out").val_documents == len(val)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_mixing_is_by_stretches():
    texts = [f"{i:04d}" for i in range(100)]
    out = list(mix(texts, None, chars=40))
    assert out != texts
    for start in range(0, 100, 10):
        assert sorted(out[start : start + 10]) == texts[start : start + 10]


def test_given_tokenizer_and_any_number_of_workers(tmp_path, source, monkeypatch):
    monkeypatch.setattr("golfgpt.data.prepare._BATCH_BYTES", 300)  # several batches for each worker
    (tmp_path / "t.model").write_bytes(train_tokenizer(DOCUMENTS, 330))
    one, three = (
        prepare([source], tmp_path / str(workers), tokenizer=tmp_path / "t.model", val_fraction=0.3, workers=workers)
        for workers in (1, 3)
    )
    assert one == three and one.lossless and one.vocab_size == 330
    assert (tmp_path / "1/tokenizer.model").read_bytes() == (tmp_path / "t.model").read_bytes()


def test_val_inputs_of_their_own(tmp_path, source):
    val = jsonl(tmp_path / "val.jsonl", ["Another text.", "And one more."])
    manifest = prepare([source], tmp_path / "out", vocab_size=320, val=[val], workers=1)
    assert manifest.val_below is None and manifest.val.inputs == ("val.jsonl",)
    assert documents_of(Dataset.open(tmp_path / "out"), "val") == ["Another text.", "And one more."]
    jsonl(val, ["Another text.", DOCUMENTS[7]])
    with pytest.raises(InputError, match="1 of 100 train documents are also among the 2 val documents"):
        prepare([source], tmp_path / "both", vocab_size=320, val=[val], workers=1)
    assert not (tmp_path / "both").exists()


def test_given_lossy_tokenizer_is_measured(tmp_path, source):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=model, model_type="bpe", vocab_size=310, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    manifest = prepare([source], tmp_path / "out", tokenizer=tmp_path / "lossy.model", val_fraction=0.3, workers=1)
    data = Dataset.open(tmp_path / "out")
    val = documents_of(data, "val")
    assert not manifest.lossless and not data.lossless
    assert manifest.val.changed_documents == manifest.val.documents == len(val)
    assert manifest.val.decoded_bytes == len("".join(val).encode()) < manifest.val.raw_bytes
    assert verify(tmp_path / "out").val_bytes == manifest.val.decoded_bytes


def test_round_trip_check_has_teeth(tmp_path, source, monkeypatch):
    """A tokenizer that forgets U+2581, as plain SentencePiece does, is stopped at the first document."""
    monkeypatch.setattr("golfgpt.data.tokenizer.Tokenizer.encode", lambda self, text: self._model.encode(text))
    with pytest.raises(VerificationError, match="the trained tokenizer changes a document at byte"):
        prepare([source], tmp_path / "out", vocab_size=320, val_fraction=0.3, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction is 0.0; expected a number between 0 and 1"),
        ({"val": ["x"], "val_fraction": 0.1}, "exclude each other"),
        ({"vocab_size": 100}, "100 is too small for this text: with"),
        ({"vocab_size": 60_000}, "60000 is too large for this text: choose at most"),
        ({"tokenizer": "none.model"}, "cannot read the tokenizer none.model"),
        ({"shard_tokens": 0}, "shard_tokens 0"),
        ({"workers": 0}, "workers 0, expected at least 1"),
    ],
)
def test_refusals_leave_nothing(tmp_path, source, options, message):
    with pytest.raises(InputError, match=message):
        prepare([source], tmp_path / "out", **({"vocab_size": 320, "workers": 1} | options))
    assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl"}


@pytest.mark.parametrize(("fraction", "documents"), [(1e-9, (99, 1)), (1 - 1e-9, (1, 99)), (0.3, None)])
def test_each_split_has_a_document(source, fraction, documents):
    texts = list(read_documents([source]))
    limit = val_limit(texts, fraction)
    in_val = sum(document_hash(text.encode()) < limit for text in texts)
    assert (len(texts) - in_val, in_val) == (documents or (len(texts) - in_val, in_val))
    assert documents or limit == round(0.3 * 2**64).to_bytes(8, "big")


def test_what_cannot_work_is_refused_before_a_tokenizer_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("golfgpt.data.prepare.train_tokenizer", None)
    (tmp_path / "a.txt").write_text("A line.\n\n" * 300)
    with pytest.raises(InputError, match="all of the text is one document"):
        prepare([tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(InputError, match=r"a\.txt is an input of both train and val"):
        prepare([tmp_path], tmp_path / "out", val=[tmp_path / "a.txt"])


def test_a_file_that_is_named_again_is_said(tmp_path):
    file, said = tmp_path / "a.txt", []
    file.write_text("a")
    assert find_inputs([file, tmp_path, str(tmp_path / "*")], said.append) == [file]
    assert said == [f"each file is read once; named again by 2 of 3 inputs: {file}, {file}"]


def test_files_with_the_same_text_are_said(tmp_path, source):
    copy, said = tmp_path / "copy.jsonl", []
    copy.write_bytes(source.read_bytes())
    (tmp_path / "other.txt").write_text("other")
    prepare([tmp_path], tmp_path / "out", vocab_size=320, workers=1, say=said.append)
    assert said == [f"1 of 3 files repeat another one, whose text counts again: {source} is {copy}"]


def test_every_faulty_file_is_named_at_once(tmp_path):
    for number in range(13):
        (tmp_path / f"{number:02}.txt").write_bytes(b"" if number % 2 else b"a\xff" if number else b"good")
    with pytest.raises(InputError) as caught:
        prepare([tmp_path], tmp_path / "out")
    first, second, *_, last = str(caught.value).splitlines()
    assert first == f"{tmp_path / '01.txt'} holds no text; remove it from the inputs"
    assert second.startswith(f"  {tmp_path / '02.txt'}: byte 1 (0xff) is not UTF-8")
    assert last == "  … and more files"


def test_more_shards_than_a_folder_should_hold(tmp_path, source, monkeypatch):
    monkeypatch.setattr("golfgpt.data.prepare.MAX_SHARDS", 100)
    with pytest.raises(InputError, match="shards of 10 tokens would be more than 100 files of train"):
        prepare([source], tmp_path / "out", vocab_size=320, shard_tokens=10, workers=1)


def test_files_of_other_kinds_in_a_folder_are_named(tmp_path):
    for name in ("a.txt", "b.md", "c/d.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    said: list[str] = []
    assert find_inputs([tmp_path], said.append) == [tmp_path / "a.txt"]
    left_out = f"2 of 3 files in {tmp_path} are left out, of other kinds: "
    assert said == [f"{left_out}{tmp_path / 'b.md'}, {tmp_path / 'c/d.pdf'}"]


def test_full_disk_leaves_the_old_folder(tmp_path, source, monkeypatch):
    old = prepare([source], tmp_path / "out", vocab_size=320, val_fraction=0.3, workers=1)

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("golfgpt.data.prepare.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        prepare([source], tmp_path / "out", vocab_size=330, val_fraction=0.3, workers=1, overwrite=True)
    assert Manifest.load(tmp_path / "out/manifest.json") == old
    assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl", "out"}


@pytest.mark.parametrize("killed", [False, True])
def test_old_data_come_back_where_the_new_could_not_take_their_place(tmp_path, source, monkeypatch, killed):
    """The second of two renames fails, or a kill comes before it, which cleans nothing up."""
    options = {"vocab_size": 320, "val_fraction": 0.3, "workers": 1}
    old, rename = prepare([source], tmp_path / "out", **options), Path.rename

    def fails(self, target):
        if self.suffix == f".{os.getpid()}" or (killed and self.suffix == ".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr("golfgpt.data.prepare.shutil.rmtree", lambda *a, **k: None)
    with pytest.raises(OSError, match="Input/output error"):
        prepare([source], tmp_path / "out", **options, overwrite=True)
    monkeypatch.undo()
    if killed:
        with pytest.raises(InputError, match=r"out is now .*/\.out\.golfgpt\.old, because prepare --overwrite was"):
            Dataset.open(tmp_path / "out")
        mine = tmp_path / f".out.golfgpt.{socket.gethostname()}"
        rename(Path(f"{mine}.{os.getpid()}"), Path(f"{mine}.4194305"))  # above Linux's largest process id
        others = {".out.2024", ".out.old", ".out.golfgpt.another-machine.4194305"}
        for name in others:
            (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="is not empty"):
            prepare([source], tmp_path / "out", **options)
        assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl", "out", *others}
    assert Dataset.open(tmp_path / "out").manifest == old


def test_existing_folders(tmp_path, source):
    options = {"vocab_size": 320, "val_fraction": 0.3, "workers": 1}
    (tmp_path / "out").mkdir()
    prepare([source], tmp_path / "out", **options)
    with pytest.raises(InputError, match=r"is not empty: .*; name another folder"):
        prepare([source], tmp_path / "out", **options)
    manifest = prepare([source], tmp_path / "out", **options | {"vocab_size": 310}, overwrite=True)
    assert Dataset.open(tmp_path / "out").manifest == manifest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"no manifest\.json, so it is not replaced"):
        prepare([source], tmp_path / "mine", **options, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        prepare([source], source, **options)


# The embedded corpus


def test_demo_counts_what_it_leaves_out(tmp_path):
    files = {
        "b.py": "b", "a/c.py": "c", "a/test/d.py": "d", "tests/e.py": "e", "idlelib/idle_test/f.py": "f",
        "site-packages/g.py": "g", "empty.py": "", "note.txt": "h", "_sysconfigdata_x.py": "i",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    demo = demo_text(tmp_path)
    assert demo.documents == ("c", "b") and "2 files" in demo.name
    assert demo.skipped == {"tests": 3, "empty": 1, "not UTF-8": 1, "generated by the build": 1}
    with pytest.raises(InputError, match="holds no Python source"):
        demo_text(tmp_path / "a/test/none")
    assert any("def dataclass" in text for text in demo_text().documents)
