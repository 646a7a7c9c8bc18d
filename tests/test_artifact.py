"""The container: exact round trips, and a typed error in bounded memory for anything that is not whole."""

import dataclasses
import hashlib
import json
import math
import os
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from golfgpt.config import BigramConfig, BudgetConfig, ModelConfig, QuantConfig, to_dict
from golfgpt.errors import BudgetError, InputError
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant import artifact
from golfgpt.quant.artifact import ArtifactInfo, Stream, inspect, pack, read, seal, unpack, write
from golfgpt.quant.budget import budget_report, check_budget
from golfgpt.quant.codecs import CODECS, compress, decompress, require_compressor
from golfgpt.quant.formats import decode
from golfgpt.quant.quantizer import Quantizer

MODEL = ModelConfig(vocab_size=16, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, mlp_hidden=8)
QUANT = QuantConfig(bits=6, keep_numel=63, compressor="zlib")  # c_k and c_v in float16
DIGEST = hashlib.sha256(b"tokenizer").hexdigest()
SOURCE = {"tokenizer_sha256": DIGEST, "seq_len": 64}
PREFIX_BYTES = 56


def random_state(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}


def packed(model: ModelConfig = MODEL, quant: QuantConfig = QUANT, seed: int = 0) -> bytes:
    return pack(random_state(model, seed), model=model, quant=quant, **SOURCE)


def parts(blob: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(blob[12:16], "little")
    return json.loads(blob[PREFIX_BYTES : PREFIX_BYTES + size]), blob[PREFIX_BYTES + size :]


def sealed(header: dict | bytes, compressed: bytes) -> bytes:
    """A file whose lengths and digest are right, so that the checks after them are reached."""
    if isinstance(header, dict):
        header = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return artifact._prefix(header, compressed) + header + compressed


def payload_of(encoded, columns) -> bytes:
    return b"".join(artifact._parts(encoded, set(columns)))


def one_stream(compressor: str, level: int, compressed: bytes, payload_bytes: int | None = None) -> dict:
    return {"streams": [[compressor, level, payload_bytes or len(PAYLOAD), len(compressed)]]}


ENCODED = Quantizer(MODEL, QUANT).encode(random_state())
BLOB = packed()
HEADER, COMPRESSED = parts(BLOB)
PAYLOAD = payload_of(ENCODED, HEADER["columns"])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.booleans(),
    st.sampled_from(["none", "xor", "linear"]),
    st.builds(
        QuantConfig,
        bits=st.integers(2, 8),
        keep_numel=st.sampled_from([0, 40, 10**9]),
        scale_dtype=st.sampled_from(["float16", "float32"]),
        compressor=st.sampled_from(list(CODECS)),
    ),
    st.integers(0, 1000),
)
def test_round_trip(vocab, layers, head_dim, tied, pairs, quant, seed):
    model = ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=2 * head_dim,
        num_heads=2,
        num_kv_heads=1,
        mlp_hidden=5,
        tie_embeddings=tied,
        smear_gate="none" if pairs == "none" else "after_norm",
        bigram=BigramConfig() if pairs == "none" else BigramConfig(rows=11, dim=3, hash=pairs),
    )
    blob, quantizer = packed(model, quant, seed), Quantizer(model, quant)
    assert blob == packed(model, quant, seed)
    got = unpack(blob)
    expected = decode(quantizer.encode(random_state(model, seed)))
    assert list(got.state) == list(expected)
    for name, weights in expected.items():
        assert got.state[name].dtype == torch.float32 and torch.equal(got.state[name], weights), name
    info = got.info
    assert (info.model, info.formats, info.compressor) == (model, quantizer.formats, quant.compressor)
    assert (info.payload_bytes, info.file_bytes) == (quantizer.payload_bytes, len(blob))
    assert (info.seq_len, info.tokenizer_sha256) == (64, DIGEST)


# Layouts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_layout_round_trips(data):
    """Codes of any values, scales that tie, banks in several layer groups, shared scales, any set of groups by
    columns."""
    quant = QuantConfig(bits=6, keep_numel=0, rules=("blocks.1.*=int5/2", "tok_emb.weight=int8/4"), compressor="zlib")
    quantizer = Quantizer(MODEL, quant)
    quantized = [name for name, format in quantizer.formats.items() if format.quantized]
    columns = frozenset(data.draw(st.sets(st.sampled_from(quantized))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    encoded = quantizer.encode(random_state())
    for name in quantized:
        bound = encoded[name].format.max_code
        encoded[name].values.random_(-bound - 1, bound + 1, generator=generator)
        encoded[name].scale.copy_(torch.randint(1, 3, encoded[name].scale.shape, generator=generator))
    parts = artifact._parts(encoded, columns)
    if data.draw(st.booleans()):
        parts = [b"".join(parts)]
    pieces = [CODECS["zlib"].compress(part, 9) for part in parts]
    streams = tuple(Stream("zlib", 9, len(part), len(piece)) for part, piece in zip(parts, pieces, strict=True))
    assert sum(map(len, parts)) == quantizer.payload_bytes
    info = ArtifactInfo(MODEL, quantizer.formats, 64, DIGEST, streams, columns)
    got = unpack(sealed(info.header(), b"".join(pieces)))
    assert got.info.columns == columns
    for name, weights in decode(encoded).items():
        assert torch.equal(got.state[name], weights), name


def test_rows_are_stored_by_their_scale_and_ties_in_order():
    c_q = Quantizer(MODEL, QUANT).encode(random_state())["c_q"]
    c_q.scale[:] = torch.tensor([3.0, 1.0, 2.0, 1.0, 4.0, 2.0, 1.0, 5.0])
    c_q.values[:] = torch.arange(8)[:, None]
    rows = bytes((1, 3, 6, 2, 5, 0, 4, 7))
    assert payload_of({"c_q": c_q}, {"c_q"})[:64] == rows * 8
    assert payload_of({"c_q": c_q}, ())[:64] == b"".join(bytes([row]) * 8 for row in rows)


@pytest.mark.parametrize("compressor", CODECS)
def test_codes_whose_columns_differ_are_stored_by_columns(compressor):
    model = dataclasses.replace(MODEL, model_dim=64, mlp_hidden=64)
    state = random_state(model)
    state["mlp_fc"][:, :, :32] *= 0.01
    state["mlp_proj"][:, :32] *= 0.01
    quant = QuantConfig(clip_floor=1.0, keep_numel=63, compressor=compressor)  # the floor leaves small rows small
    columns = unpack(pack(state, model=model, quant=quant, **SOURCE)).info.columns
    assert "mlp_fc" in columns and "mlp_proj" not in columns


def test_streams_are_split_where_that_is_smaller():
    """Codes of two kinds: incompressible ones, which a coder adapted to the others takes longer for, and constants."""
    model = dataclasses.replace(MODEL, model_dim=64, mlp_hidden=512, num_heads=8, num_kv_heads=8)
    encoded = Quantizer(model, dataclasses.replace(QUANT, bits=8, keep_numel=0)).encode(random_state(model))
    for number, name in enumerate(("c_q", "c_k", "c_v", "attn_proj", "mlp_fc", "mlp_proj")):
        values = encoded[name].values
        values.copy_(torch.randint(2, values.shape, generator=torch.Generator().manual_seed(number)) * 20 * number - 50)
    for compressor, count in (("zlib", 8), ("smallest", 8)):
        quant = dataclasses.replace(QUANT, compressor=compressor)
        got = unpack(seal(encoded, model=model, quant=quant, **SOURCE))
        assert len(got.info.streams) == count and f"({count} streams)" in got.info.packing
        assert all(torch.equal(got.state[name], w) for name, w in decode(encoded).items())
    assert unpack(BLOB).info.packing == "zlib level 9"


def test_version_4_is_read():
    header = {name: value for name, value in HEADER.items() if name != "streams"}
    header |= {"compressor": ["zlib", 9], "payload_bytes": len(PAYLOAD)}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    got = unpack(artifact._prefix(text, COMPRESSED, 4) + text + COMPRESSED)
    assert all(torch.equal(got.state[name], w) for name, w in unpack(BLOB).state.items())
    with pytest.raises(InputError, match="canonical form"):
        bad = text.replace(f'"payload_bytes":{len(PAYLOAD)}'.encode(), b'"payload_bytes":1')
        unpack(artifact._prefix(bad, COMPRESSED, 4) + bad + COMPRESSED)


def test_the_layout_is_chosen_on_whole_leading_layers(monkeypatch):
    assert artifact._sample(ENCODED["c_q"]).format == ENCODED["c_q"].format
    monkeypatch.setattr(artifact, "SAMPLE_CODES", 63)
    assert artifact._sample(ENCODED["c_q"]).values.shape == (1, 8, 8)  # never less than a layer
    assert artifact._sample(ENCODED["tok_emb"]).scale.shape == (7,)


# Writing


def test_write_read_inspect_agree(tmp_path, monkeypatch):
    path = tmp_path / "model.golf"
    info = write(path, Quantizer(MODEL, QUANT).encode(random_state()), model=MODEL, quant=QUANT, **SOURCE)
    assert path.read_bytes() == BLOB and info == read(path).info
    monkeypatch.setattr(artifact, "decompress", None)
    assert info == inspect(path), "which decompresses nothing"
    assert info.file_bytes == path.stat().st_size
    assert info.parameters == sum(math.prod(shape) for shape in parameter_shapes(MODEL).values())
    assert sum(line.value_bytes + line.scale_bytes for line in info.table()) == info.payload_bytes


def test_smallest_tries_all_and_prefers_the_first_of_equals(monkeypatch):
    sizes = {name: len(packed(quant=QuantConfig(compressor=name))) for name in CODECS}
    assert len(packed(quant=QuantConfig(compressor="smallest"))) == min(sizes.values())
    noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).mul(4).to(torch.int8).numpy().tobytes()
    assert len(CODECS["zlib"].compress(noise, 9)) < 0.99 * len(zlib.compress(noise, 9))  # Huffman codes alone
    for name, codec in CODECS.items():
        monkeypatch.setitem(CODECS, name, codec._replace(compress=lambda payload, level: bytes(7)))
    assert compress(b"payload", "smallest") == ("zlib", 9, bytes(7))


@pytest.mark.parametrize(("compressor", "module"), [("zstd", "zstandard"), ("brotli", "brotli")])
def test_a_missing_compressor_is_an_error_never_another_one(monkeypatch, compressor, module):
    blob = packed(quant=QuantConfig(compressor=compressor))
    monkeypatch.setitem(sys.modules, module, None)
    for wanted in (compressor, "smallest"):
        with pytest.raises(InputError, match=f"the package {module} is missing: install it"):
            packed(quant=QuantConfig(compressor=wanted))
        with pytest.raises(InputError, match=f"quant.compressor {wanted}: the package {module} .*, or choose another"):
            require_compressor(wanted)
    with pytest.raises(InputError, match=f"^the package {module} is missing: install it$"):
        unpack(blob)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("c_q", lambda tensor: tensor.values.view(-1).__setitem__(3, -33), "tensor c_q holds codes -33 to"),
        ("c_q", lambda tensor: tensor.scale.view(-1).__setitem__(0, math.nan), "tensor c_q holds scales that are not"),
        ("mlp_fc", lambda tensor: tensor.scale.view(-1).__setitem__(0, -1.0), "tensor mlp_fc holds scales that are"),
        ("mlp_fc", lambda tensor: tensor.scale.view(-1).__setitem__(0, 3e38), "mlp_fc holds scales whose weights exc"),
        ("c_k", lambda tensor: tensor.values.view(-1).__setitem__(0, math.inf), "tensor c_k holds non-finite"),
        ("q_gain", lambda tensor: tensor.values.view(-1).__setitem__(0, math.nan), "tensor q_gain holds non-finite"),
    ],
)
def test_values_that_no_encoder_makes_are_neither_written_nor_read(name, edit, message):
    quant = dataclasses.replace(QUANT, scale_dtype="float32")
    header, _ = parts(packed(quant=quant))
    encoded = Quantizer(MODEL, quant).encode(random_state())
    edit(encoded[name])
    with pytest.raises(InputError, match=message):
        seal(encoded, model=MODEL, quant=quant, **SOURCE)
    payload = payload_of(encoded, header["columns"])
    stream = CODECS["zlib"].compress(payload, 9)
    with pytest.raises(InputError, match=message):
        unpack(sealed(header | one_stream("zlib", 9, stream, len(payload)), stream))


def test_a_model_beyond_the_payload_limit_is_refused_before_allocation(monkeypatch):
    huge = ModelConfig(vocab_size=65_536, num_layers=1000, model_dim=2**20, mlp_hidden=2**30)
    quantizer = Quantizer(huge, QUANT)
    fields = {"model": to_dict(huge), "tensors": {name: artifact._entry(f) for name, f in quantizer.formats.items()}}
    with pytest.raises(InputError, match=r"its tensors take \d+ bytes, more than"):
        unpack(sealed(HEADER | fields, COMPRESSED))
    monkeypatch.setattr(artifact, "MAX_PAYLOAD_BYTES", Quantizer(MODEL, QUANT).payload_bytes - 1)
    with pytest.raises(InputError, match="more than"):
        packed()


@pytest.mark.parametrize(("wrong", "message"), [({"seq_len": 0}, "seq_len 0"), ({"tokenizer_sha256": "a"}, "'a'")])
def test_what_no_header_holds_is_not_written(wrong, message):
    with pytest.raises(InputError, match=f"{message}, expected"):
        pack(random_state(), model=MODEL, quant=QUANT, **(SOURCE | wrong))


# Damage


def test_every_truncation_and_every_flipped_byte_is_refused():
    for position in range(len(BLOB)):
        with pytest.raises(InputError, match=r"truncated|trailing"):
            unpack(BLOB[:position])
        flipped = BLOB[position] ^ 1 << position % 8
        with pytest.raises(InputError):
            unpack(BLOB[:position] + bytes([flipped]) + BLOB[position + 1 :])


FORGED = {name: parts(packed(quant=QuantConfig(keep_numel=63, compressor=name))) for name in CODECS}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_forged_damage_is_refused_or_decodes_to_finite_weights(data):
    """With a digest made right again, a change may be legitimate (another seq_len, another code)."""
    header, compressed = FORGED[data.draw(st.sampled_from(list(FORGED)))]
    header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    body = bytearray(header + compressed)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        state = unpack(sealed(bytes(body[: len(header)]), bytes(body[len(header) :]))).state
    except InputError:
        return
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"PK\3\4\0\0\0\0", "magic"),
        (8, b"\1\0\0\0", "version 1, this program reads versions 4 to 5"),
        (12, (10**6 + 1).to_bytes(4, "little"), "header of 1000001 bytes"),
        (16, b"\xff" * 8, "truncated: .* bytes are missing"),
        (24, bytes(32), "SHA-256 does not match"),
        (len(BLOB), b"x" * 1000, "1000 trailing bytes"),
    ],
)
def test_each_field_of_the_prefix_is_checked(offset, value, message):
    with pytest.raises(InputError, match=message):
        unpack(BLOB[:offset] + value + BLOB[offset + len(value) :])


def tensors(**changes) -> dict:
    entries = HEADER["tensors"] | changes
    return {"tensors": {name: entry for name, entry in entries.items() if entry is not None}}


def model(**changes) -> dict:
    return {"model": to_dict(MODEL) | changes}


C_Q = [[2, 8, 8], "int6", "float16"]
LAYER = [[1, 8, 8], "int6", "float16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "fields are .*extra"),
        (model(hidden=1), "unknown key model.hidden"),
        (model(num_layers=3), r"its streams hold \d+ bytes, its tensors take"),
        (model(num_layers=2**62, vocab_size=2**16), "do not hold its|more than"),
        (model(logit_softcap=10**400), "bad header"),
        (tensors(c_q=None), "groups of tensor c_q do not hold its 2 layers once each"),
        (tensors(**{"c_q[1:2]": LAYER}), "groups of tensor c_q do not hold its 2 layers"),
        (tensors(**{"c_q": None, "c_q[0:1]": LAYER, "c_q[1:3]": C_Q}), "canonical form"),
        (tensors(**{"c_q[0:0]": [[0, 8, 8], "int6", "float16"]}), "expected a bank or some of its layers"),
        (tensors(bonus=[[1], "float32"]), "its tensors have bonus"),
        (tensors(c_q=[[2, 8, 9], "int6", "float16"]), "canonical form"),
        (tensors(c_q=[[2.0, 8, 8], "int6", "float16"]), "canonical form"),
        (tensors(c_q=[[2, 8, 8], "int9", "float16"]), "tensor format 'int9', expected one of float32"),
        (tensors(c_q=[[2, 8, 8], "int6", ["float16"]]), "bad header"),
        (tensors(c_q=[[2, 8, 8], "float32"]), r"its streams hold \d+ bytes, its tensors take"),
        (one_stream("zlib", 9, COMPRESSED, len(PAYLOAD) + 1), r"its streams hold \d+ bytes, its tensors take"),
        (one_stream("gzip", 9, COMPRESSED), "compressor 'gzip', expected one of zlib, "),
        (one_stream("zlib", 10, COMPRESSED), r"level 10, expected an integer in 0\.\.9"),
        (one_stream("zlib", 9, COMPRESSED + b"x"), r"its streams have \d+ bytes, the file"),
        (one_stream("zlib", 9, COMPRESSED, -1), r"payload_bytes -1, expected an integer in 0\.\."),
        ({"streams": []}, "0 streams, expected 1 to 64"),
        ({"streams": [["zlib", 9, 0, 0]] * 100}, "65 streams, expected 1 to 64"),
        ({"streams": [["zlib", 9, 0]]}, "bad header"),
        ({"streams": "zlib"}, "bad header"),
        ({"compressor": ["zlib", 9]}, "fields are .*compressor"),
        ({"columns": ["c_k"]}, "canonical form"),
        ({"columns": ["c_q", "c_q"]}, "canonical form"),
        ({"columns": 7}, "bad header"),
        ({"seq_len": 0}, r"seq_len 0, expected an integer in 1\.\."),
        ({"seq_len": True}, r"seq_len True, expected an integer in 1\.\."),
        ({"tokenizer_sha256": "Z" * 64}, "expected 64 hexadecimal digits"),
        ({"tokenizer_sha256": None}, "bad header"),
    ],
)
def test_each_field_of_the_header_is_checked(changes, message):
    with pytest.raises(InputError, match=message):
        unpack(sealed(HEADER | changes, COMPRESSED))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(HEADER, sort_keys=True).encode(), "canonical form"),
        (json.dumps(HEADER, separators=(",", ":")).encode().replace(b"{", b'{"seq_len":64,', 1), "canonical form"),
        (b'{"a":1}', "bad header: its fields are"),
        (b'{"a":NaN}', "bad header: it holds NaN"),
        (b"[" * 10**6, "bad header"),
        (b"\xff", "bad header"),
        (b"", "bad header"),
    ],
)
def test_other_texts_are_no_header(text, message):
    with pytest.raises(InputError, match=message):
        unpack(sealed(text, COMPRESSED))


# Compressed streams


@pytest.mark.parametrize("compressor", CODECS)
def test_damaged_streams_are_refused(compressor):
    level = CODECS[compressor].level
    stream = CODECS[compressor].compress(PAYLOAD, level)
    assert unpack(sealed(HEADER | one_stream(compressor, level, stream), stream)).info.compressor == compressor
    lengths = [CODECS[compressor].compress(payload, level) for payload in (PAYLOAD[:-1], PAYLOAD + b"\0")]
    for damaged in (b"", stream[:-1], stream[: len(stream) // 2], stream + b"\0", stream + stream, *lengths):
        with pytest.raises(InputError, match=f"bad {compressor} payload|truncated|follow the|more than|its tensors"):
            unpack(sealed(HEADER | one_stream(compressor, level, damaged), damaged))


@pytest.mark.parametrize("compressor", CODECS)
@pytest.mark.parametrize("extra", [-1, 0, 1, 4096])
def test_long_streams_are_read_to_the_end(compressor, extra):
    """Nearly random codes, as trained weights have: decoders hold output back when the input has ended."""
    codes = np.random.default_rng(0).standard_normal(3 * 2**20 + extra) * 8
    payload = np.clip(np.round(codes), -31, 31).astype(np.int8).tobytes()
    stream = CODECS[compressor].compress(payload, {"brotli": 1, "zstd": 1, "zlib": 1, "lzma": 0}[compressor])
    assert decompress(compressor, memoryview(stream), len(payload)) == payload
    for damaged in (stream[:-9], stream[: 2**20], stream + bytes(2**20)):
        with pytest.raises(InputError):
            decompress(compressor, memoryview(damaged), len(payload))


@pytest.mark.parametrize("compressor", CODECS)
def test_bombs_are_refused_in_little_memory(compressor):
    stream = CODECS[compressor].compress(bytes(32 * 2**20), CODECS[compressor].level)
    assert len(stream) < 2**17
    blob = sealed(HEADER | one_stream(compressor, 9, stream), stream)
    tracemalloc.start()
    with pytest.raises(InputError, match=f"it holds more than {len(PAYLOAD)} bytes"):
        unpack(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_zstd_frames_that_hide_or_falsify_their_size_are_refused():
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**26))
    honest = zstandard.ZstdCompressor().compress(bytes(2**26))
    declared = (2**26).to_bytes(4, "little")
    assert honest.count(declared) == 1
    for stream in (hidden, honest.replace(declared, len(PAYLOAD).to_bytes(4, "little"))):
        with pytest.raises(InputError, match="bad zstd payload"):
            unpack(sealed(HEADER | one_stream("zstd", 22, stream), stream))
    with pytest.raises(InputError, match="declares 0 bytes"):
        decompress("zstd", memoryview(honest.replace(declared, bytes(4))), 0)


@pytest.mark.parametrize("compressor", CODECS)
def test_a_stream_of_nothing_is_read_to_its_end(compressor):
    stream = CODECS[compressor].compress(b"", CODECS[compressor].level)
    assert decompress(compressor, memoryview(stream), 0) == b""
    for damaged in (stream[:-1], stream + b"\0", CODECS[compressor].compress(b"\0", CODECS[compressor].level)):
        with pytest.raises(InputError):
            decompress(compressor, memoryview(damaged), 0)


# Files


def test_unreadable_files_are_named(tmp_path):
    empty, sparse = tmp_path / "empty.golf", tmp_path / "sparse.golf"
    empty.touch()
    sparse.write_bytes(BLOB)
    os.truncate(sparse, 2**40)
    cases = {empty: "too few", sparse: "more than an artifact has", tmp_path: "no such file"}
    for path, message in cases.items():
        for function in (read, inspect):
            with pytest.raises(InputError, match=f"{path.name} is not a usable artifact: .*{message}"):
                function(path)


# Budget


def test_the_budget_is_exact_to_the_byte():
    budget = BudgetConfig(artifact_bytes=16_000_000, code_bytes=60_000)
    report = check_budget(15_940_000, budget)
    assert (report.total_bytes, report.margin_bytes) == (16_000_000, 0)
    with pytest.raises(BudgetError, match=r"over budget: 16,000,001.*quant\.bits") as caught:
        check_budget(15_940_001, budget)
    assert caught.value.exit_code == 4
    assert budget_report(15_940_001, budget).margin_bytes == -1


def test_code_that_nobody_counted_is_said():
    report = budget_report(1_000, BudgetConfig(artifact_bytes=1_500))
    assert (report.total_bytes, report.margin_bytes) == (1_000, 500) and "code not counted" in str(report)
