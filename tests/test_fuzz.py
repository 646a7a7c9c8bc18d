"""Files from strangers: a sample of experiments/fuzz.py, what it found, and the claims of SECURITY.md."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golfgpt
from experiments import fuzz
from golfgpt.config import ModelConfig, QuantConfig, RunConfig
from golfgpt.data import tokenizer as tokenizers
from golfgpt.data.manifest import Manifest
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import GolfError, InputError
from golfgpt.files import MAX_JSON_BYTES, parse_json, read_json
from golfgpt.published.files import read_export
from golfgpt.quant import artifact
from golfgpt.quant.formats import DTYPES, QuantizedTensor
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import Result
from golfgpt.sweep.attempt import Loop
from golfgpt.train import checkpoint


@pytest.fixture(scope="module")
def files(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    fuzz.make_files(folder, corpus)
    return folder


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_sample_of_changed_files_is_read_or_refused(files, name):
    """Without a death, a hang, growth or an error of another type."""
    found = fuzz.run(name, 0, 100, files)
    assert not found.problems and found.read + found.refused == 100
    assert found.read and found.refused  # changes are neither without effect nor all caught by the first check


# JSON


HOSTILE = {
    "nested": ("[" * 100_000, "nested deeper than 32 levels"),
    "nested a little": ("[" * 33 + "]" * 33, "nested deeper than 32 levels"),
    "a huge integer": ('{"digits": 1' + "0" * 400 + "}", "holds the integer 1000"),
    "a large integer": ('{"step": 9223372036854775808}', "holds the integer 9223372036854775808"),
    "NaN": ('{"score": NaN}', "holds NaN, expected finite"),
    "an infinite number": ('{"score": 1e999}', "holds 1e999, expected finite"),
    "half a character": (r'{"dataset": "\ud800"}', "surrogates not allowed"),
    "not text": (b"\xff\xfe\xff", "can't decode"),
    "text": ('"digest"', "root: expected an object, got 'digest'"),
    "too long": ("[" + " " * MAX_JSON_BYTES + "]", f"more than {MAX_JSON_BYTES} bytes"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_json_is_a_value_error(tmp_path, text, message):
    (tmp_path / "file").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "file", dict)


@pytest.mark.parametrize("text", [text for text, _ in HOSTILE.values()], ids=list(HOSTILE))
@pytest.mark.parametrize("name", ["manifest", "config", "result.json", "small files"])
def test_every_json_file_is_read_by_it(files, name, text):
    for file in fuzz.TARGETS[name].files:
        original = (files / file).read_bytes()
        (files / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            starts_over = file == "eval_partial_0.json"
            with contextlib.nullcontext() if starts_over else pytest.raises(GolfError):
                fuzz.TARGETS[name].read(files, file)
        finally:
            (files / file).write_bytes(original)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "step", "key", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    VALUES, st.sampled_from([Manifest, Result, RunConfig, Loop, checkpoint._Meta, dict[str, int], tuple[float, ...]])
)
def test_any_value_fits_a_shape_or_is_a_value_error(value, shape):
    try:
        parse_json(json.dumps(value), shape)
    except ValueError as error:
        assert len(str(error)) < 1000


def test_a_type_is_named_with_its_path():
    with pytest.raises(ValueError, match=r"^score.val_bpb = 'low', expected a number$"):
        parse_json('{"score": {"val_bpb": "low"}, "later": 1}', Result)


# Memory


LARGE = ModelConfig(vocab_size=65_536, num_layers=1, model_dim=640, num_heads=2, num_kv_heads=1, mlp_hidden=64)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's count of peak memory")
def test_reading_takes_at_most_twice_the_payload(tmp_path, monkeypatch):
    """And 16 MB for the decoder. 44 MB in one tensor: above 32 MiB, malloc gives all memory back."""
    quant, encoded = QuantConfig(compressor="zlib", level=1), {}
    for name, format in Quantizer(LARGE, quant).formats.items():
        arrays = {field: torch.ones(shape, dtype=DTYPES[number]) for field, (number, shape) in format.arrays.items()}
        encoded[name] = QuantizedTensor(format, **arrays)
    monkeypatch.setattr(artifact, "_smaller_by_columns", lambda *_: frozenset())
    monkeypatch.setattr(artifact, "most_bytes", lambda compressed: 2**28)
    blob = artifact.seal(encoded, model=LARGE, quant=quant, tokenizer_sha256="0" * 64, seq_len=64)
    size = artifact._open(blob)[0].payload_bytes
    before = fuzz._resident()
    read = artifact.unpack(blob)
    assert size > 40e6 and fuzz._peak() - before < 2 * size + 16e6
    before = fuzz._resident()
    weights = read.state  # 4 bytes for each code, and little beside them
    assert fuzz._peak() - before < 4 * size + 16e6 and all(w.eq(1).all() for w in weights.values())


def test_a_small_file_that_holds_much_is_refused_before_it_is_decompressed(tmp_path, monkeypatch):
    (tmp_path / "m.golf").write_bytes(fuzz.zeros(LARGE, 0))
    monkeypatch.setattr(artifact, "decompress", None)
    for look in (artifact.inspect, artifact.read):
        with pytest.raises(InputError, match=r"its tensors take 43\d{6} bytes, \d+ hold at most 33554432"):
            look(tmp_path / "m.golf")
    (tmp_path / "m.ptz").write_bytes(zlib.compress(bytes(2**26)))
    with pytest.raises(InputError, match="it holds more than 33554432 bytes"):
        read_export(tmp_path / "m.ptz")


def test_a_checkpoint_with_a_large_header_is_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes((2**23).to_bytes(8, "little") + b" " * 2**23)
    with pytest.raises(InputError, match="claims a header of 8388608 bytes"):
        checkpoint.load(tmp_path / "m.safetensors")


# Tokenizers


def test_an_unknown_tokenizer_is_tried_in_another_process_once(corpus, tmp_path, monkeypatch):
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('of the working directory')")
    monkeypatch.chdir(tmp_path)
    file = corpus / "tokenizer.model"
    digest = Tokenizer(file.read_bytes()).digest
    tried, run = [], subprocess.run
    monkeypatch.setattr(tokenizers, "_tried", set())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: tried.append(run(*a, **k)) or tried[-1])
    assert Tokenizer.from_file(file, digest).digest == digest and not tried
    assert Tokenizer.from_file(file).digest == Tokenizer.from_file(file, "0" * 64).digest == digest
    assert [done.returncode for done in tried] == [0]


@pytest.mark.parametrize(
    ("trial", "seconds", "message"),
    [
        ("import os; os.abort()", 600, "ends a process by SIGABRT"),
        ("while True: pass", 0.5, "takes more than 0.5 s to load"),
    ],
)
def test_a_tokenizer_that_would_end_the_process_is_refused(corpus, monkeypatch, trial, seconds, message):
    monkeypatch.setattr(tokenizers, "_tried", set())
    monkeypatch.setattr(tokenizers, "_TRIAL", trial)
    monkeypatch.setattr(tokenizers, "TRIAL_SECONDS", seconds)
    with pytest.raises(InputError, match=message):
        Tokenizer.from_file(corpus / "tokenizer.model")


def test_a_tokenizer_that_would_fail_later_is_refused(corpus):
    model_bytes = (corpus / "tokenizer.model").read_bytes()
    unknown, space = model_bytes.index(b"<unk>") + 11, model_bytes.index(b"\xe2\x96\x81")
    for at, byte, message in ((unknown, b"\1", "no piece for unknown text"), (space, b"\xff", "not UTF-8")):
        with pytest.raises(InputError, match=message):
            Tokenizer(model_bytes[:at] + byte + model_bytes[at + 1 :])


def test_a_large_tokenizer_is_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "t.model").write_bytes(bytes(tokenizers.MAX_BYTES + 1))
    monkeypatch.setattr(tokenizers, "check_apart", None)
    with pytest.raises(InputError, match="more than 16777216 bytes"):
        Tokenizer.from_file(tmp_path / "t.model")


# Code


def test_no_reader_runs_code_of_a_file():
    """torch.load only with weights_only=True, in one place; no other reader of pickles."""
    loads = []
    for file in Path(golfgpt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve", "dill", "joblib", "yaml"} & set(names), file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                loads.append((file.name, {word.arg: ast.unparse(word.value) for word in node.keywords}))
    assert [(name, words["weights_only"]) for name, words in loads] == [("containers.py", "True")]


def test_security_md_names_tests_that_exist():
    root = Path(golfgpt.__file__).parents[1]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (root / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    assert not [name for file, name in named if f"\ndef {name}(" not in (root / file).read_text(encoding="utf-8")]
