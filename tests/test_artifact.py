"""The container: exact round trips, and a typed error in bounded memory for anything that is not whole."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import sys
import tracemalloc
import zlib
from functools import partial

import brotli
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from golfgpt.config import BudgetConfig, ModelConfig, QuantConfig, to_dict
from golfgpt.errors import BudgetError, InputError
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant import artifact
from golfgpt.quant.artifact import (
    CODECS,
    budget_report,
    check_budget,
    inspect,
    pack,
    read,
    require_compressor,
    unpack,
    write,
)
from golfgpt.quant.quantizer import Quantizer

MODEL = ModelConfig(vocab_size=16, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, mlp_hidden=8)
QUANT = QuantConfig(bits=6, keep_numel=63, compressor="zlib")  # keeps c_k and c_v in float16
TOKENIZER = hashlib.sha256(b"tokenizer").hexdigest()
PREFIX_BYTES = 56


def random_state(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}


def packed(model: ModelConfig = MODEL, quant: QuantConfig = QUANT, seed: int = 0) -> bytes:
    return pack(random_state(model, seed), model=model, quant=quant, tokenizer_sha256=TOKENIZER, seq_len=64)


def parts(blob: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(blob[12:16], "little")
    return json.loads(blob[PREFIX_BYTES : PREFIX_BYTES + size]), blob[PREFIX_BYTES + size :]


def sealed(header: dict | bytes, compressed: bytes) -> bytes:
    """A file whose lengths and digest are right, so that the checks behind them are reached."""
    if isinstance(header, dict):
        header = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return artifact._assemble(header, compressed)


BLOB = packed()
HEADER, COMPRESSED = parts(BLOB)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.booleans(),
    st.sampled_from(["none", "xor", "linear"]),
    st.integers(2, 8),
    st.sampled_from([0, 40, 10**9]),
    st.sampled_from(["float16", "float32"]),
    st.sampled_from(list(CODECS)),
    st.integers(0, 1000),
)
def test_round_trip(vocab, layers, head_dim, tied, pairs, bits, keep_numel, scale_dtype, compressor, seed):
    model = ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=2 * head_dim,
        num_heads=2,
        num_kv_heads=1,
        mlp_hidden=5,
        tie_embeddings=tied,
        smear_gate="none" if pairs == "none" else "after_norm",
        bigram_hash=pairs,
        bigram_vocab_size=0 if pairs == "none" else 11,
        bigram_dim=0 if pairs == "none" else 3,
    )
    quant = QuantConfig(bits=bits, keep_numel=keep_numel, scale_dtype=scale_dtype, compressor=compressor)
    blob, quantizer = packed(model, quant, seed), Quantizer(model, quant)
    assert blob == packed(model, quant, seed)
    got = unpack(blob)
    expected = quantizer.decode(quantizer.encode(random_state(model, seed)))
    assert list(got.state) == list(expected)
    for name, weights in expected.items():
        assert got.state[name].dtype == torch.float32
        assert torch.equal(got.state[name], weights), name
    assert got.info.model == model
    assert got.info.formats == quantizer.formats
    assert got.info.payload_bytes == quantizer.payload_bytes
    assert got.info.file_bytes == len(blob)
    assert (got.info.compressor, got.info.seq_len, got.info.tokenizer_sha256) == (compressor, 64, TOKENIZER)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_layout_round_trips(data):
    """Codes of any values, scales that tie, layers in several parts, groups, any set of parts by columns."""
    quant = QuantConfig(bits=6, keep_numel=0, rules=("blocks.1.*=int5/2", "tok_emb.weight=int8/4"), compressor="zlib")
    formats = Quantizer(MODEL, quant).formats
    columns = data.draw(st.sets(st.sampled_from([name for name, format in formats.items() if format.quantized])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    encoded = Quantizer(MODEL, quant).encode(random_state())
    for tensor in encoded.values():
        if tensor.scale is not None:
            bound = tensor.format.max_code
            tensor.values.random_(-bound - 1, bound + 1, generator=generator)
            tensor.scale.copy_(torch.randint(1, 3, tensor.scale.shape, generator=generator))
    payload = artifact._join(encoded, columns)
    assert len(payload) == Quantizer(MODEL, quant).payload_bytes
    header = artifact._header(MODEL, formats, 64, TOKENIZER, "zlib", 9, columns)
    got = unpack(sealed(header, CODECS["zlib"].compress(payload, 9)))
    assert got.info.columns == columns
    for name, weights in Quantizer(MODEL, quant).decode(encoded).items():
        assert torch.equal(got.state[name], weights), name


def test_rows_are_stored_by_their_scale_and_ties_in_order():
    encoded = Quantizer(MODEL, QUANT).encode(random_state())
    c_q = encoded["c_q"]
    c_q.scale[:] = torch.tensor([3.0, 1.0, 2.0, 1.0, 4.0, 2.0, 1.0, 5.0])
    c_q.values[:] = torch.arange(8)[:, None]
    rows = bytes((1, 3, 6, 2, 5, 0, 4, 7))
    assert artifact._join({"c_q": c_q}, {"c_q"})[:64] == rows * 8
    assert artifact._join({"c_q": c_q}, set())[:64] == b"".join(bytes([row]) * 8 for row in rows)


@pytest.mark.parametrize("compressor", CODECS)
def test_codes_whose_columns_differ_are_stored_by_columns(compressor):
    generator = torch.Generator().manual_seed(0)
    model = dataclasses.replace(MODEL, model_dim=64, mlp_hidden=64)
    state = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}
    state["mlp_fc"][:, :, :32] *= 0.01
    state["mlp_proj"][:, :32] *= 0.01
    quant = QuantConfig(clip_floor=1.0, keep_numel=63, compressor=compressor)  # the floor leaves small rows small
    keywords = {"model": model, "quant": quant, "tokenizer_sha256": TOKENIZER, "seq_len": 64}
    blob = pack(state, **keywords)
    assert blob == pack(state, **keywords)
    columns = unpack(blob).info.columns
    assert "mlp_fc" in columns
    assert "mlp_proj" not in columns


def test_the_layout_is_chosen_on_whole_leading_layers(monkeypatch):
    encoded = Quantizer(MODEL, QUANT).encode(random_state())
    monkeypatch.setattr(artifact, "SAMPLE_CODES", 63)
    assert artifact._sample(encoded["c_q"]).values.shape == (1, 8, 8)  # never less than a layer
    assert artifact._sample(encoded["tok_emb"]).scale.shape == (7,)
    monkeypatch.setattr(artifact, "SAMPLE_CODES", 2**18)
    assert artifact._sample(encoded["c_q"]).format == encoded["c_q"].format


def test_write_read_inspect_agree(tmp_path):
    path = tmp_path / "model.golf"
    info = write(path, random_state(), model=MODEL, quant=QUANT, tokenizer_sha256=TOKENIZER, seq_len=64)
    assert path.read_bytes() == BLOB
    assert info == inspect(path) == read(path).info
    assert info.file_bytes == path.stat().st_size
    assert info.parameters == sum(math.prod(shape) for shape in parameter_shapes(MODEL).values())
    assert sum(line.value_bytes + line.scale_bytes for line in info.table()) == info.payload_bytes


def test_inspect_decompresses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.golf"
    path.write_bytes(BLOB)
    monkeypatch.setattr(artifact, "_decompress", None)
    assert inspect(path).model == MODEL


def test_smallest_tries_all_and_prefers_the_first_of_equals(monkeypatch):
    sizes = {name: len(packed(quant=QuantConfig(compressor=name))) for name in CODECS}
    blob = packed(quant=QuantConfig(compressor="smallest"))
    assert len(blob) == min(sizes.values())
    noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).mul(4).to(torch.int8).numpy().tobytes()
    assert len(CODECS["zlib"].compress(noise, 9)) < 0.99 * len(zlib.compress(noise, 9))  # Huffman codes alone
    for name, codec in CODECS.items():
        monkeypatch.setitem(CODECS, name, codec._replace(compress=lambda payload, level: bytes(7)))
    assert artifact.compress(b"payload", "smallest") == ("zlib", 9, bytes(7))


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
    ("digest", "seq_len"), [("abc", 64), (TOKENIZER.upper(), 64), (TOKENIZER, 0), (TOKENIZER, 2**31)]
)
def test_pack_refuses_what_read_would(digest, seq_len):
    with pytest.raises(InputError, match="cannot be stored"):
        pack(random_state(), model=MODEL, quant=QUANT, tokenizer_sha256=digest, seq_len=seq_len)


def test_pack_refuses_a_payload_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(artifact, "MAX_PAYLOAD_BYTES", Quantizer(MODEL, QUANT).payload_bytes - 1)
    with pytest.raises(InputError, match="more than"):
        packed()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch, call):
    path = tmp_path / "model.golf"
    path.write_bytes(BLOB)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write(path, random_state(seed=1), model=MODEL, quant=QUANT, tokenizer_sha256=TOKENIZER, seq_len=64)
    assert path.read_bytes() == BLOB
    assert os.listdir(tmp_path) == ["model.golf"]


# Damage


def test_truncation_at_every_length():
    for size in range(len(BLOB)):
        with pytest.raises(InputError, match=r"truncated|trailing"):
            unpack(BLOB[:size])


def test_a_flipped_bit_in_every_byte():
    for position in range(len(BLOB)):
        blob = bytearray(BLOB)
        blob[position] ^= 1 << position % 8
        with pytest.raises(InputError):
            unpack(bytes(blob))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_forged_damage_is_refused_or_decodes_to_finite_weights(data):
    """With a digest made right again, a change may be legitimate (another seq_len, another code)."""
    compressor = data.draw(st.sampled_from(list(FORGED)))
    header, compressed = FORGED[compressor]
    body = bytearray(header + compressed)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        state = unpack(sealed(bytes(body[: len(header)]), bytes(body[len(header) :]))).state
    except InputError:
        return
    assert all(tensor.isfinite().all() for tensor in state.values())


def _forged(compressor: str) -> tuple[bytes, bytes]:
    header, compressed = parts(packed(quant=QuantConfig(keep_numel=63, compressor=compressor)))
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), compressed


FORGED = {name: _forged(name) for name in CODECS}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(blob):
    for candidate in (blob, BLOB[:24] + blob, sealed(blob, COMPRESSED), sealed(HEADER, blob)):
        with pytest.raises(InputError):
            unpack(candidate)


@pytest.mark.parametrize(
    ("offset", "size", "value", "message"),
    [
        (0, 8, b"PK\3\4\0\0\0\0", "magic"),
        (8, 4, 1, "version 1, this program reads version 3"),
        (12, 4, 10**6 + 1, "header of 1000001 bytes"),
        (12, 4, 2**32 - 1, "header of 4294967295 bytes"),
        (16, 8, 2**28 + 1, "payload of 268435457 bytes"),
        (16, 8, 2**64 - 1, "payload of 18446744073709551615 bytes"),
        (16, 8, 2**28, "truncated: .* bytes are missing"),
        (24, 32, bytes(32), "SHA-256 does not match"),
    ],
)
def test_each_field_of_the_prefix_is_checked(offset, size, value, message):
    value = value if isinstance(value, bytes) else value.to_bytes(size, "little")
    with pytest.raises(InputError, match=message):
        unpack(BLOB[:offset] + value + BLOB[offset + size :])


@pytest.mark.parametrize("extra", [b"\0", b"x" * 1000])
def test_trailing_bytes_are_refused(extra):
    with pytest.raises(InputError, match=f"{len(extra)} trailing bytes"):
        unpack(BLOB + extra)


def edited(**changes) -> bytes:
    return sealed(HEADER | changes, COMPRESSED)


def tensors(**changes) -> dict:
    entries = HEADER["tensors"] | changes
    return {name: entry for name, entry in entries.items() if entry is not None}


def model(**changes) -> dict:
    return to_dict(MODEL) | changes


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (edited(extra=1), "fields are .*extra"),
        (sealed({k: v for k, v in HEADER.items() if k != "seq_len"}, COMPRESSED), "fields are"),
        (edited(model=model(hidden=1)), "unknown key model.hidden"),
        (edited(model=model(num_heads=3)), "not a multiple of model.num_heads"),
        (edited(model=model(num_layers=3)), "tensor .* the model config implies"),
        (edited(model=model(num_layers=2**62, vocab_size=2**16)), "the model config implies"),
        (edited(model=model(logit_softcap=10**400)), "bad header"),
        (edited(model=[]), "bad header"),
        (edited(tensors=tensors(c_q=None)), "the model config has"),
        (edited(tensors=tensors(bonus=[[1], "float32"])), "the model config has"),
        (edited(tensors=tensors(c_q=[[2, 8, 9], "int6", "float16"])), "tensor c_q has shape"),
        (edited(tensors=tensors(c_q=[[2.0, 8, 8], "int6", "float16"])), "canonical form"),
        (edited(tensors=tensors(c_q=[[2, 8, 8], "int9", "float16"])), "unknown tensor format 'int9'"),
        (edited(tensors=tensors(c_q=[[2, 8, 8], "int6"])), "unknown scale dtype None"),
        (edited(tensors=tensors(c_q=[[2, 8, 8], "int6", ["float16"]])), "bad header"),
        (edited(tensors=tensors(c_q=[[2, 8, 8], "float32"])), "its tensors take"),
        (edited(tensors=7), "bad header"),
        (edited(payload_bytes=HEADER["payload_bytes"] + 1), "its tensors take"),
        (edited(payload_bytes=float(HEADER["payload_bytes"])), "canonical form"),
        (edited(compressor=["gzip", 9]), "unknown compressor 'gzip'"),
        (edited(compressor=[["zlib"], 9]), "bad header"),
        (edited(compressor="zlib"), "bad header"),
        (edited(columns=["c_x"]), "columns names ..c_x.., which are not quantized"),
        (edited(columns=["c_k"]), "columns names ..c_k.., which are not quantized"),
        (edited(columns=["c_q", "c_q"]), "canonical form"),
        (edited(columns=["c_q", "tok_emb"]), "canonical form"),
        (edited(columns={"c_q": 1}), "canonical form"),
        (edited(columns="c_q"), "columns names"),
        (edited(columns=""), "canonical form"),
        (edited(columns=[["c_q"]]), "bad header"),
        (edited(columns=7), "bad header"),
        (edited(columns=None), "bad header"),
        (edited(seq_len=0), "seq_len is not an integer in 1.."),
        (edited(seq_len=True), "seq_len is not an integer in 1.."),
        (edited(tokenizer_sha256="Z" * 64), "not a SHA-256"),
        (edited(tokenizer_sha256=None), "bad header"),
        (sealed(json.dumps(HEADER, sort_keys=True).encode(), COMPRESSED), "not canonical JSON"),
        (sealed(b'{"a":1,"a":1}', COMPRESSED), "duplicate name 'a'"),
        (sealed(b'{"a":NaN}', COMPRESSED), "bad header"),
        (sealed(b'{"a":"\\ud800"}', COMPRESSED), "bad header"),
        (sealed(b"[" * 10**6, COMPRESSED), "bad header"),
        (sealed(b"\xff", COMPRESSED), "bad header"),
        (sealed(b"", COMPRESSED), "bad header"),
    ],
)
def test_each_field_of_the_header_is_checked(blob, message):
    with pytest.raises(InputError, match=message):
        unpack(blob)


def test_a_model_beyond_the_payload_limit_is_refused_before_allocation():
    huge = ModelConfig(vocab_size=65_536, num_layers=1000, model_dim=2**20, mlp_hidden=2**30)
    formats = Quantizer(huge, QUANT).formats
    header = json.loads(artifact._header(huge, formats, 64, TOKENIZER, "zlib", 9, set()))
    with pytest.raises(InputError, match=r"its tensors take \d+ bytes, more than"):
        unpack(sealed(header, COMPRESSED))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("c_q", lambda tensor: tensor.values.view(-1).__setitem__(3, -33), "tensor c_q holds codes -33 to"),
        ("c_q", lambda tensor: tensor.scale.view(-1).__setitem__(0, math.nan), "tensor c_q holds scales"),
        ("mlp_fc", lambda tensor: tensor.scale.view(-1).__setitem__(0, math.inf), "tensor mlp_fc holds scales"),
        ("mlp_fc", lambda tensor: tensor.scale.view(-1).__setitem__(0, -1.0), "tensor mlp_fc holds scales"),
        ("c_k", lambda tensor: tensor.values.view(-1).__setitem__(0, math.inf), "tensor c_k holds non-finite"),
        ("q_gain", lambda tensor: tensor.values.view(-1).__setitem__(0, math.nan), "tensor q_gain holds non-finite"),
    ],
)
def test_values_that_no_encoder_writes_are_refused(name, edit, message):
    encoded = Quantizer(MODEL, QUANT).encode(random_state())
    edit(encoded[name])
    with pytest.raises(InputError, match=message):
        unpack(sealed(HEADER, CODECS["zlib"].compress(artifact._join(encoded, set(HEADER["columns"])), 9)))


def test_scales_that_overflow_float32_are_refused():
    quant = QuantConfig(keep_numel=63, scale_dtype="float32", compressor="zlib")
    encoded = Quantizer(MODEL, quant).encode(random_state())
    encoded["c_q"].scale[0, 0] = 3e38
    header, _ = parts(packed(quant=quant))
    with pytest.raises(InputError, match="tensor c_q holds scales whose weights exceed"):
        unpack(sealed(header, CODECS["zlib"].compress(artifact._join(encoded, set(HEADER["columns"])), 9)))


# Compressed streams

PAYLOAD = artifact._join(Quantizer(MODEL, QUANT).encode(random_state()), set(HEADER["columns"]))


@pytest.mark.parametrize("compressor", CODECS)
def test_damaged_streams_are_refused(compressor):
    stream = CODECS[compressor].compress(PAYLOAD, CODECS[compressor].level)
    header = HEADER | {"compressor": [compressor, CODECS[compressor].level]}
    assert unpack(sealed(header, stream)).info.compressor == compressor
    for damaged in (b"", stream[:-1], stream[: len(stream) // 2], stream + b"\0", stream + stream):
        with pytest.raises(InputError, match=f"bad {compressor} payload"):
            unpack(sealed(header, damaged))
    for payload in (PAYLOAD[:-1], PAYLOAD + b"\0"):
        with pytest.raises(InputError, match=f"bad {compressor} payload"):
            unpack(sealed(header, CODECS[compressor].compress(payload, CODECS[compressor].level)))


@pytest.mark.parametrize("compressor", CODECS)
def test_streams_longer_than_a_chunk_round_trip(compressor):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3 * 2**19,), dtype=torch.uint8, generator=generator).numpy().tobytes()
    payload = noise + bytes(3 * 2**20) + noise[:1000]
    compress = partial(CODECS[compressor].compress, level=CODECS[compressor].level)
    if compressor == "brotli":  # quality 11 takes seconds on this much noise

        def compress(payload):
            return brotli.compress(payload, quality=2)

    stream = compress(payload)
    assert len(stream) > 2**20
    assert artifact._decompress(compressor, memoryview(stream), len(payload)).tobytes() == payload
    for damaged in (stream[: 2**20], stream + b"\0", stream + bytes(2**20)):
        with pytest.raises(InputError, match=f"bad {compressor} payload"):
            artifact._decompress(compressor, memoryview(damaged), len(payload))


@pytest.mark.parametrize("compressor", CODECS)
def test_bombs_are_refused_in_little_memory(compressor):
    stream = CODECS[compressor].compress(bytes(32 * 2**20), CODECS[compressor].level)
    assert len(stream) < 2**17
    blob = sealed(HEADER | {"compressor": [compressor, 9]}, stream)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"more than the \d+ bytes of|declares 33554432 bytes"):
        unpack(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_zstd_frames_that_hide_or_falsify_their_size_are_refused():
    size = len(PAYLOAD)
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**26))
    honest = zstandard.ZstdCompressor().compress(bytes(2**26))
    declared = (2**26).to_bytes(4, "little")
    assert honest.count(declared) == 1
    for stream in (hidden, honest.replace(declared, size.to_bytes(4, "little"))):
        with pytest.raises(InputError, match="bad zstd payload"):
            unpack(sealed(HEADER | {"compressor": ["zstd", 22]}, stream))


# Files


def test_unreadable_files_are_named(tmp_path):
    empty = tmp_path / "empty.golf"
    empty.touch()
    for path, message in ((empty, "too few"), (tmp_path, "no such file"), (tmp_path / "none", "no such file")):
        for function in (read, inspect):
            with pytest.raises(InputError, match=f"{path.name} is not a usable artifact: .*{message}"):
                function(path)


def test_a_huge_sparse_file_is_refused_unread(tmp_path):
    path = tmp_path / "model.golf"
    path.write_bytes(BLOB)
    os.truncate(path, 2**40)
    with pytest.raises(InputError, match="trailing bytes"):
        read(path)


# Budget


def test_the_budget_is_exact_to_the_byte():
    budget = BudgetConfig(artifact_bytes=16_000_000, code_bytes=60_000)
    report = check_budget(15_940_000, budget)
    assert (report.total_bytes, report.margin_bytes) == (16_000_000, 0)
    assert check_budget(15_939_999, budget).margin_bytes == 1
    with pytest.raises(BudgetError, match=r"over budget by 1 bytes.*16,000,001.*quant\.bits") as caught:
        check_budget(15_940_001, budget)
    assert caught.value.exit_code == 4
    assert budget_report(15_940_001, budget).margin_bytes == -1


@pytest.mark.parametrize("compressor", CODECS)
@pytest.mark.parametrize("extra", [-1, 0, 1, 4096])
def test_codes_that_decode_to_several_chunks_are_read_to_the_end(compressor, extra):
    """Nearly random codes, as trained weights have: decoders hold output back when the input has ended."""
    codes = np.random.default_rng(0).standard_normal(3 * 2**20 + extra) * 8
    payload = np.clip(np.round(codes), -31, 31).astype(np.int8).tobytes()
    level = {"brotli": 1, "zstd": 1, "zlib": 1, "lzma": 0}[compressor]
    stream = CODECS[compressor].compress(payload, level)
    assert artifact._decompress(compressor, memoryview(stream), len(payload)).tobytes() == payload
    with pytest.raises(InputError, match=f"bad {compressor} payload"):
        artifact._decompress(compressor, memoryview(stream[:-9]), len(payload))
