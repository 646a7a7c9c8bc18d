"""The published model files, written here as their exporters write them, and the configuration read off tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import lzma
import math
import pickle
import sys
import zipfile
import zlib

import brotli
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from models import in_banks, unseen
from test_model import RECORDS
from torch import nn

from golfgpt.config import BigramConfig, LoopConfig, ModelConfig, ParallelConfig, ValueEmbeddingConfig
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.published.files import read_export
from golfgpt.published.names import assumed_fields, from_published, infer_config, to_published

SMALL = ModelConfig(vocab_size=24, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, mlp_hidden=20)
XOR = {"bigram": BigramConfig(rows=30, dim=6), "smear_gate": "after_norm"}
LINEAR = {"bigram": BigramConfig(rows=30, dim=6, hash="linear"), "smear_gate": "before_norm"}
MODELS = {
    "baseline": SMALL,
    "untied": dataclasses.replace(SMALL, tie_embeddings=False),
    "one layer": dataclasses.replace(SMALL, num_layers=1),
    "one head": dataclasses.replace(SMALL, num_heads=1, num_kv_heads=1),
    "xor": dataclasses.replace(SMALL, **XOR),
    "linear": dataclasses.replace(SMALL, **LINEAR),
    "gate only": dataclasses.replace(SMALL, smear_gate="after_norm"),
    "pairs only": dataclasses.replace(SMALL, **XOR | {"smear_gate": "none"}),
    "full size": ModelConfig(),
}
PR65_NAMES = {"smear.gate": "smeargate.gate", "bigram.embed": "bigram_hash.table", "bigram.proj": "bigram_hash.proj"}


def streamed_zstd(content: bytes) -> bytes:
    """A frame that does not state its length."""
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    return stream.compress(content) + stream.flush()


def shuffled(content: bytes, stride: int = 2) -> bytes:
    """The byte shuffle of the records: bytes 0, s, 2 s, ..., then those from 1 on and so forth."""
    if stride <= 1 or len(content) < stride:
        return content
    return b"BSHF" + bytes([stride]) + b"".join(content[first::stride] for first in range(stride))


COMPRESSORS = {
    "bare": (None, bytes),
    "zlib 1": ("zlib", lambda content: zlib.compress(content, 1)),
    "zlib 5": ("zlib", lambda content: zlib.compress(content, 5)),
    "zlib 6": ("zlib", lambda content: zlib.compress(content, 6)),
    "zlib 9": ("zlib", lambda content: zlib.compress(content, 9)),
    "zstd": ("zstd", zstandard.ZstdCompressor(level=22).compress),
    "streamed zstd": ("zstd", streamed_zstd),
    "xz": ("xz", lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
    "brotli": ("brotli", lambda content: brotli.compress(content, quality=5)),
    "shuffled brotli": ("brotli", lambda content: brotli.compress(shuffled(content), quality=5)),
}


def trained(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state of the model in the published names and dtypes: embeddings are bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    banks = {
        name: torch.empty_like(p).normal_(0, 0.5, generator=generator) for name, p in GPT(config).named_parameters()
    }
    state = {name: tensor.clone() for name, tensor in to_published(banks).items()}
    if config.num_layers == 1:
        state["skip_weights"] = torch.ones(0, config.model_dim)
    for name in ("tok_emb.weight", "bigram.embed.weight"):
        if name in state:
            state[name] = state[name].bfloat16()
    return state


def rows(tensor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    limit = 2 ** (bits - 1) - 1
    scale = (tensor.float().abs().amax(1) / limit).clamp_min(1e-4).half()
    return (tensor.float() / scale.float()[:, None]).round().clamp(-limit - 1, limit).to(torch.int8), scale


def per_row(state: dict[str, torch.Tensor], bits: int = 8, fp16: tuple[str, ...] = (), keep: int = 64) -> dict:
    """R0 to R4: `fp16` names tensors kept in fp16, "keep" is the size up to which all are."""
    content = {"__quant_format__": "int8_clean_per_row_v1"}
    content |= {key: {} for key in ("quantized", "scales", "dtypes", "passthrough", "passthrough_orig_dtypes", "qmeta")}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name in fp16:
            content["passthrough"][name], content["passthrough_orig_dtypes"][name] = tensor.half(), dtype
        elif tensor.numel() <= keep:
            content["passthrough"][name] = tensor.float()
        else:
            content["quantized"][name], content["scales"][name] = rows(tensor, bits)
            content["dtypes"][name], content["qmeta"][name] = dtype, {"scheme": "per_row", "axis": 0}
    return content


def mixed(state: dict[str, torch.Tensor], bits: dict[str, int], keep: int = 64) -> dict:
    """R4b, #70, #180, R5: `bits` gives those of the names that contain a key, fp16 elsewhere."""
    content = {"w": {}, "m": {}}
    for name, tensor in state.items():
        width = next((width for part, width in bits.items() if part in name), None)
        if tensor.numel() <= keep or width is None:
            content["w"][name] = tensor.half()
            content["m"][name] = "passthrough" if tensor.numel() <= keep else "passthrough_fp16"
        else:
            content["w"][f"{name}.q"], content["w"][f"{name}.scale"] = rows(tensor, width)
            content["m"][name] = {"type": f"int{width}"}
    return content


LATE_K = tuple(f"blocks.{i}.attn.c_k.weight" for i in (1, 2))
RECIPES = {
    "R0": lambda state: per_row(state),
    "R1": lambda state: per_row(state, fp16=("tok_emb.weight",)),
    "R3": lambda state: per_row(state, 6, fp16=("tok_emb.weight", *LATE_K)),
    "R4": lambda state: per_row(state, 6),
    "R4b": lambda state: mixed(state, {".attn.": 6, ".mlp.": 6}),
    "#70": lambda state: mixed(state, {".attn.": 6, ".mlp.": 6, "tok_emb": 8}),
    "#180": lambda state: mixed(state, {"blocks.1.attn.c_k": None, ".attn.": 6, ".mlp.": 5, "bigram": 6}),
    "R5": lambda state: mixed(state, {".attn.": 6, ".mlp.": 5, "bigram": 6}, keep=16),
}


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write(tmp_path, content: object, compress=zlib.compress):
    path = tmp_path / "final_model.int8.ptz"
    path.write_bytes(compress(saved(content)))
    return path


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **replace: bytes) -> bytes:
    """A torch.save file with some of its entries replaced, by the last part of their names."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, replace.get(entry.filename.rpartition("/")[2], old.read(entry)))
    return out.getvalue()


# Files that the published scripts write


@pytest.mark.parametrize("model", ["baseline", "untied", "xor", "one layer"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_exports_read_back(tmp_path, recipe, model):
    source = trained(MODELS[model])
    content = RECIPES[recipe](source)
    export = read_export(write(tmp_path, content))
    is_mixed = "m" in content
    assert export.format == ("mixed" if is_mixed else "int8_clean_per_row_v1")
    assert export.state.keys() == source.keys() == {*export.codes, *export.passthrough} == export.dtypes.keys()
    assert not export.codes.keys() & export.passthrough.keys()
    for name, original in source.items():
        weights = export.state[name]
        assert weights.dtype == torch.float32 and weights.shape == original.shape
        if name in export.codes:
            bits = int(content["m"][name]["type"][3]) if is_mixed else 6 if recipe in ("R3", "R4") else 8
            q, scale = rows(original, bits)
            assert torch.equal(export.codes[name][0], q) and torch.equal(export.codes[name][1], scale), name
            expected = (q.double() * scale.double()[:, None]).float()
        else:
            half = is_mixed or export.passthrough[name].dtype == torch.float16
            expected = original.half() if half else original
        assert torch.equal(weights, expected.to(original.dtype).float()), name
        recorded = name in export.codes or name in content.get("passthrough_orig_dtypes", {})
        if is_mixed or recorded:
            assert export.dtypes[name] == str(original.dtype).removeprefix("torch."), name
    assert infer_config(export.state) == MODELS[model]
    GPT(MODELS[model]).load_state_dict(from_published(export.state, MODELS[model]))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_compressor_is_told_by_the_first_bytes(tmp_path, name):
    compressor, compress = COMPRESSORS[name]
    export = read_export(write(tmp_path, per_row(trained(SMALL)), compress))
    assert export.compressor == compressor and export.state.keys() == trained(SMALL).keys()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_state_dict_is_read_in_its_own_dtypes(tmp_path, device):
    """final_model.pt is saved on the device that trained it."""
    source = nn.Module().state_dict()  # an OrderedDict with an attribute, as a module's is
    source.update(trained(MODELS["xor"]))
    content = saved(source)
    if device != "cpu":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            program = archive.read("archive/data.pkl").replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
        content = repacked(content, **{"data.pkl": program})
        assert b"cuda:0" in content and b"cpu" not in content
    (tmp_path / "final_model.pt").write_bytes(content)
    export = read_export(tmp_path / "final_model.pt")
    assert (export.format, export.compressor, export.codes) == ("state_dict", None, {})
    for name, tensor in source.items():
        assert torch.equal(export.state[name], tensor.float()) and export.state[name].dtype == torch.float32
        assert export.passthrough[name].dtype == tensor.dtype
    assert export.dtypes["tok_emb.weight"] == "bfloat16" and export.dtypes["smear.gate"] == "float32"


def test_one_scale_for_a_whole_tensor(tmp_path):
    codes, scale = torch.arange(-8, 8, dtype=torch.int8), torch.tensor(0.3)
    content = per_row({})
    content["quantized"]["a"], content["scales"]["a"], content["dtypes"]["a"] = codes, scale, "float32"
    assert torch.equal(read_export(write(tmp_path, content)).state["a"], codes.float() * 0.3)
    content = {"w": {"a.q": codes, "a.scale": scale.half()}, "m": {"a": {"type": "int5"}}}
    assert torch.equal(read_export(write(tmp_path, content)).state["a"], codes.float() * scale.half().float())


# Files that nobody should have written

HEAD = "lm_head.weight"
BLOCK = torch.zeros(100_000)
NOT_PLAIN = {
    "text": "text",
    "parameter": nn.Parameter(torch.ones(1)),
    "transposed": torch.ones(4, 4).t(),
    "expanded": torch.ones(1).expand(2**40),
    "negative": torch._neg_view(torch.ones(1)),
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.ones(2, device="meta"),
}


def in_table(table: str, name: str, value: object):
    return lambda content: content[table].update({name: value})


PER_ROW_FAULTS = [
    (lambda x: x.update(__quant_format__="other"), "its format is 'other'"),
    (lambda x: x.update(__quant_format__=BLOCK), "its format is tensor"),
    (lambda x: x.pop("__quant_format__"), "quantized is missing or not a plain contiguous tensor"),
    (lambda x: x.pop("scales"), "its tables are dtypes, .*, expected dtypes, passthrough, quantized, scales"),
    (lambda x: x.update(extra={}), "its tables are .*extra"),
    (lambda x: x["scales"].pop(HEAD), "name different tensors"),
    (lambda x: x.update(passthrough=[1]), "passthrough is not a table"),
    (in_table("passthrough", 7, torch.ones(1)), "passthrough is not a table"),
    (in_table("passthrough", "\x1b[31m", torch.ones(1)), "passthrough is not a table"),
    (in_table("passthrough", HEAD, torch.ones(1)), "both quantized and passed.*lm_head.weight"),
    *((in_table("passthrough", "a", value), "a is missing or not a plain") for value in NOT_PLAIN.values()),
    (in_table("passthrough", "a", torch.tensor([math.nan])), "a is not finite"),
    (in_table("passthrough", "a", torch.tensor([math.inf]).half()), "a is not finite"),
    (in_table("passthrough", "a", torch.zeros(1, dtype=torch.int8)), "a is torch.int8 .* expected one of float32"),
    (lambda x: x["passthrough"].update({str(i): BLOCK[i:] for i in range(2000)}), "more bytes than the file"),
    (in_table("quantized", HEAD, torch.ones(3, 4)), "lm_head.weight has codes of torch.float32"),
    (in_table("scales", HEAD, torch.ones(4)), r"has codes .24, 16. with scales .4,."),
    (in_table("scales", HEAD, torch.ones(24, dtype=torch.int8)), "scales of torch.int8"),
    *((lambda x, v=v: x["scales"][HEAD].fill_(v), "scales that are not positive") for v in (math.nan, -1, 0)),
    (in_table("scales", HEAD, torch.full((24,), 3e38)), "lm_head.weight is not finite"),
    (in_table("dtypes", HEAD, "float8"), "lm_head.weight is torch.float32 for 'float8', expected"),
    (in_table("dtypes", HEAD, ["float32"]), "lm_head.weight is torch.float32 for .'float32'., expected"),
    (lambda x: x.update(passthrough_orig_dtypes={"skip_weights": {}}), "skip_weights is torch.float32 for {}"),
]
MIXED_FAULTS = [
    (lambda x: x.pop("m"), "w is missing or not a plain contiguous tensor"),
    (lambda x: x.update(m=[]), "m is not a table"),
    (lambda x: x["w"].pop(f"{HEAD}.q"), "lm_head.weight is missing or"),
    (lambda x: x["w"].pop("skip_weights"), "skip_weights is missing or"),
    (in_table("w", "more", torch.ones(1)), "unexpected tensors: more"),
    (lambda x: x["m"].pop(HEAD), "unexpected tensors: lm_head.weight.q, lm_head.weight.scale"),
    (in_table("m", HEAD, {"type": "int7"}), "lm_head.weight is stored as {'type': 'int7'}"),
    (in_table("m", HEAD, {"type": "int6", "group": 64}), "expected passthrough, int5"),
    (in_table("m", HEAD, {"type": ["int6"]}), "expected passthrough, int5"),
    (in_table("m", f"{HEAD}.q", "passthrough"), "lm_head.weight.q is missing or"),
    (lambda x: x["w"][f"{HEAD}.q"].fill_(32), "lm_head.weight has codes outside int6"),
    (lambda x: x["w"][f"{HEAD}.q"].fill_(-33), "lm_head.weight has codes outside int6"),
    (in_table("w", f"{HEAD}.scale", 0.5), "lm_head.weight is missing or not a plain contiguous tensor"),
    (lambda x: x["w"]["skip_weights"].fill_(math.nan), "skip_weights is not finite"),
]


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [(per_row, *fault) for fault in PER_ROW_FAULTS]
    + [(lambda state: mixed(state, {".attn.": 6, "lm_head": 6}), *fault) for fault in MIXED_FAULTS],
)
def test_malformed_exports_are_refused(tmp_path, make, change, message):
    content = make(trained(MODELS["untied"]))
    change(content)
    with pytest.raises(InputError, match=message):
        read_export(write(tmp_path, content))


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["bare", "xz"])
@pytest.mark.parametrize("content", [Payload(print, "executed"), {"passthrough": Payload(eval, "1/0")}])
def test_pickled_calls_are_not_run(tmp_path, capsys, content, name):
    with pytest.raises(InputError, match=r"of plain tensors \(Unsupported global: GLOBAL \w+ was not an allowed"):
        read_export(write(tmp_path, content, COMPRESSORS[name][1]))
    assert capsys.readouterr().out == ""


def test_deep_nesting_is_refused(tmp_path):
    """Printing what a file holds must not recurse as deeply as the file nests."""
    names = {name: b"X" + len(name).to_bytes(4, "little") + name.encode() for name in ("w", "m", "a")}
    deep = 10_000 * b"]" + 9_999 * b"a"
    program = b"\x80\x02}" + names["w"] + b"}s" + names["m"] + b"}" + names["a"] + deep + b"ss."
    path = write(tmp_path, {}, lambda content: repacked(content, **{"data.pkl": program}))
    with pytest.raises(InputError, match="a is stored as"):
        read_export(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content + b"x", "bytes precede or follow the archive"),
        (lambda content: repacked(content, zipfile.ZIP_DEFLATED), "its entries are compressed, or claim more bytes"),
        (lambda content: repacked(content, **{"0": b"12"}), "not a torch.save file of plain tensors"),
        (lambda content: content[: len(content) // 2], "not a torch.save file of plain tensors"),
        (lambda content: pickle.dumps({"a": 1}), "not a torch.save file of plain tensors"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, change, message):
    (tmp_path / "m.ptz").write_bytes(zlib.compress(change(saved(trained(SMALL)))))
    with pytest.raises(InputError, match=message):
        read_export(tmp_path / "m.ptz")


@pytest.mark.parametrize("name", sorted(COMPRESSORS.keys() - {"streamed zstd"}))  # whose last block is empty
def test_damaged_streams_are_refused(tmp_path, name):
    path = write(tmp_path, per_row(trained(SMALL)), COMPRESSORS[name][1])
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-30], whole[: len(whole) // 2], whole[:7], whole[:2], whole + b"x", 2 * whole):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a readable published model"):
            read_export(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_byte_is_read_or_refused(tmp_path_factory, data):
    content = bytearray(SAVED)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flip") / "final_model.pt"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert all(tensor.isfinite().all() for tensor in read_export(path).state.values())


SAVED = saved(mixed({"a": torch.ones(9, 9), "b": torch.ones(4)}, {"a": 6}))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "starts with the bytes '', expected a zlib, zstd or xz stream"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00", "starts with the bytes '1f 8b 08 00 00 00', expected"),
        (lzma.compress(b"text", format=lzma.FORMAT_ALONE), "starts with the bytes '5d 00 00"),
        (zlib.compress(bytes(99))[:-4] + b"abcd", "bad zlib stream"),
        (b"\xfd7zXZ\x00" + bytes(40), "bad xz stream"),
        (b"\x28\xb5\x2f\xfd", "bad zstd stream"),
        (b"\x28\xb5\x2f\xfd\xc0\x58" + (2**40).to_bytes(8, "little") + b"\1\0\0", "holds more than .* declares"),
        (b"PK\x03\x04" + bytes(40), "not a torch.save file of plain tensors"),
        (saved([torch.ones(1)]), "the file is not a table of names"),
        (saved({"step": 3, "model": {"a": torch.ones(1)}}), "step is missing or not a plain contiguous tensor"),
        (saved({"a": torch.ones(1, dtype=torch.float64)}), "a is torch.float64 .* expected one of float32"),
        (
            lzma.compress(bytes(9), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**29}]),
            "bad xz stream: Memory usage limit",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, blob, message):
    path = tmp_path / "final_model.zlib.ptz"
    path.write_bytes(blob)
    with pytest.raises(InputError, match=message):
        read_export(path)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_file_that_inflates_without_end_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("golfgpt.published.files.MAX_BYTES", 10**6)
    path = tmp_path / "bomb.ptz"
    path.write_bytes(b"PK\x03\x04" + bytes(2 * 10**6) if name == "bare" else COMPRESSORS[name][1](bytes(2 * 10**6)))
    with pytest.raises(InputError, match=r"holds more than 1000000|did not decompress full frame"):
        read_export(path)


def test_a_missing_decompressor_and_a_missing_file_are_named(tmp_path, monkeypatch):
    path = write(tmp_path, per_row(trained(SMALL)), COMPRESSORS["zstd"][1])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="the package zstandard is missing: install it"):
        read_export(path)
    assert read_export(write(tmp_path, per_row(trained(SMALL)))).state.keys() == trained(SMALL).keys()
    with pytest.raises(InputError, match=r"nothing\.ptz"):
        read_export(tmp_path / "nothing.ptz")


# Names


@pytest.mark.parametrize("name", MODELS)
def test_names_and_configuration_are_read_off_the_tensors(name):
    state, config = trained(MODELS[name]), MODELS[name]
    assert infer_config(state) == config
    banks = from_published(state, config)
    assert list(banks) == [bank for bank, _ in GPT(config).named_parameters()]
    back = to_published(banks)
    assert {*back, "skip_weights"} == {*state, "skip_weights"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.items())
    assert ("skip_weights" in banks) == (config.num_layers > 1), "published models of one layer hold it, empty"


def test_the_names_are_the_published_ones():
    matrices = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"]
    layers = [f"{name}.weight" for name in matrices] + ["attn_scale", "mlp_scale", "resid_mix", "attn.q_gain"]
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in layers}
    assert trained(SMALL).keys() == expected | {"tok_emb.weight", "skip_weights"}
    with pytest.raises(InputError, match="unexpected tensors: bonus"):
        to_published({"bonus": torch.ones(1)})


@pytest.mark.parametrize("name", ["linear", "xor", "gate only"])
def test_names_of_pr65_are_read(name):
    state = trained(MODELS[name])
    renamed = {}
    for key, tensor in state.items():
        for ours, theirs in PR65_NAMES.items():
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    assert renamed.keys() != state.keys()
    config = infer_config(renamed)
    assert config == dataclasses.replace(MODELS[name], smear_gate="before_norm")
    banks = from_published(renamed, config)
    assert all(torch.equal(bank, banks[key]) for key, bank in from_published(state, config).items())
    with pytest.raises(InputError, match=r"tensors under two names: .*smeargate\.gate"):
        infer_config(state | renamed)


def test_what_the_tensors_do_not_show_is_given_or_assumed():
    fields = {"logit_softcap": 15.0, "rope_base": 5e3, "rope_reference_len": 1024}
    assert assumed_fields(SMALL).keys() == fields.keys()
    assert infer_config(trained(SMALL), ModelConfig(**fields)) == dataclasses.replace(SMALL, **fields)
    fields |= {"smear_gate": "before_norm", "document_start": 1}
    state = trained(MODELS["xor"])
    assert assumed_fields(MODELS["xor"]).keys() == fields.keys()
    assert infer_config(state, ModelConfig(**fields)) == dataclasses.replace(MODELS["xor"], **fields)
    assert infer_config(state, ModelConfig(smear_gate="after_norm")) == MODELS["xor"]
    assert assumed_fields(MODELS["pairs only"]).keys() == fields.keys() - {"smear_gate"}
    pairs = dataclasses.replace(MODELS["pairs only"], document_start=1)
    assert (
        infer_config(
            trained(pairs), ModelConfig(**fields | {"smear_gate": "none"}, bigram=BigramConfig(rows=9, dim=9))
        ).document_start
        == 1
    )
    with pytest.raises(InputError, match=r"missing tensors: smear.gate, which the recipe or the options ask for"):
        infer_config(trained(SMALL), ModelConfig(smear_gate="before_norm"))


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("spelling", [dict, in_banks])
def test_models_of_later_records_are_read_off_the_tensors(name, spelling):
    single, config = trained(RECORDS[name]), RECORDS[name]
    state = spelling(single)
    assert infer_config(state, unseen(config)) == infer_config(state, config) == config
    back = to_published(from_published(state, config))
    assert back.keys() == single.keys() and all(torch.equal(tensor, single[key]) for key, tensor in back.items())


def test_every_record_lists_what_was_assumed_for_it():
    always = {"logit_softcap", "rope_base", "rope_reference_len", "mlp_slope", "xsa_layers", "rope_dims", "ln_scale"}
    loops = {"loop.first", "loop.last", "loop.passes"}
    more = {
        "2026-03-22": {"smear_gate", "document_start", "value_embedding.layers"},
        "2026-03-25": {"smear_gate", "document_start", "value_embedding.layers"},
        "golf2": loops | {"document_start", "attn_gate_scale"},
        "2026-04-05": loops | {"parallel.kind"},
        "pr1477": loops | {"parallel.first"},
        "2026-04-09": loops | {"parallel.kind", "parallel.first"},
        "2026-04-16": loops | {"parallel.first", "parallel.final"},
        "2026-04-19": loops | {"parallel.first", "parallel.final"},
        "2026-04-27": loops | {"parallel.first", "parallel.final", "document_start", "attn_gate_scale"},
    }
    assert {name: assumed_fields(config).keys() - always for name, config in RECORDS.items()} == more
    assert all(always < assumed_fields(config).keys() for config in RECORDS.values())


def test_a_gate_of_all_channels_is_dense_unless_its_window_is_as_wide():
    dense = RECORDS["2026-04-19"]
    sparse = dataclasses.replace(dense, attn_gate="sparse", gate_window=dense.model_dim)
    state = trained(dense)
    assert infer_config(state, dataclasses.replace(sparse, gate_window=12)).attn_gate == "dense"
    assert infer_config(state, sparse) == sparse and trained(sparse).keys() == state.keys()


def test_value_embeddings_are_those_of_the_last_layers_if_nothing_else_is_said():
    config = RECORDS["2026-03-22"]
    like = dataclasses.replace(config, value_embedding=ValueEmbeddingConfig())
    assert infer_config(trained(config), like).value_embedding == ValueEmbeddingConfig(dim=10, layers=(3, 4))
    more = dataclasses.replace(like, value_embedding=ValueEmbeddingConfig(dim=3, layers=(1, 2, 4)))
    with pytest.raises(InputError, match=r"missing tensors: ve_layer_scales\.2$"):
        infer_config(trained(config), more)
    without = {name: tensor for name, tensor in trained(config).items() if not name.startswith("ve_layer_scales")}
    with pytest.raises(InputError, match=r"missing tensors: ve_layer_scales\.0$"):
        infer_config(without, like)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("2026-04-05", {"loop": LoopConfig()}, "4 rows, expected 2, half of the 5 layers .* passes 1;"),
        ("2026-04-05", {"loop": LoopConfig(first=1, last=3, passes=3)}, "expected 5, .*last 3 and passes 3; set"),
        ("2026-03-22", {"loop": LoopConfig(first=1, last=2, passes=2)}, "skip_weights has 2 rows, expected 3"),
        ("2026-03-22", {"skip_gates": True}, "missing tensors: skip_gates, which the recipe or the options ask for"),
        ("2026-03-22", {"attn_gate": "dense"}, r"missing tensors: blocks\.0\.attn\.attn_gate_w, which the recipe"),
        ("2026-04-05", {"parallel": ParallelConfig(kind="routed", first=3)}, "tensors: parallel_post_.* the recipe"),
        ("pr1477", {"parallel": ParallelConfig()}, "parallel.first is 0; expected a layer after model.loop.last"),
        ("pr1477", {"parallel": ParallelConfig(kind="routed", first=3)}, "tensors: parallel_post_lambdas, .* recipe"),
        ("2026-04-05", {"num_layers": 9, "xsa_layers": (3, 5)}, "xsa_layers is .3, 5.; expected .* from 0 to 4"),
        ("2026-04-05", {"model_dim": 480, "rope_dims": 16}, "rope_dims is 16; expected .* up to head_dim, 12"),
    ],
)  # fmt: skip
def test_options_that_the_tensors_contradict_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        infer_config(trained(RECORDS[name]), dataclasses.replace(RECORDS[name], **options))


LARGE = [
    ("qo_bank", (9, 48, 48), "qo_bank has shape .9, 48, 48., expected .10, 48, 48."),
    ("qo_bank", (10, 48, 47), "qo_bank has shape .10, 48, 47., expected .10, 48, 48."),
    ("qo_bank", (), "qo_bank has shape .., expected .10, 48, 48."),
    ("qo_bank", None, "missing tensors: blocks.0.attn.c_q.weight, .* and 2 more"),
    ("kv_bank", (1, 24, 48), "kv_bank has shape .1, 24, 48., expected .10, 24, 48."),
    ("kv_bank", (10, 25, 48), "kv_bank has shape .10, 25, 48., expected .10, 24, 48."),
    ("kv_bank", (10, 24), "kv_bank has shape .10, 24., expected 3 dimensions"),
    ("kv_bank", None, "missing tensors: blocks.0.attn.c_k.weight"),
    ("mlp_up_bank", (6, 80, 48), "mlp_up_bank has shape .6, 80, 48., expected .5, 80, 48."),
    ("mlp_up_bank", (5, 80, 48, 1), "mlp_up_bank has shape .5, 80, 48, 1., expected 3 dimensions"),
    ("mlp_down_bank", (5, 80, 48), "mlp_down_bank has shape .5, 80, 48., expected .5, 48, 80."),
    ("mlp_down_bank", (0, 48, 80), "mlp_down_bank has shape .0, 48, 80., expected .5, 48, 80."),
    ("blocks.2.mlp.fc.weight", (80, 48), "unexpected tensors: blocks.2.mlp.fc.weight"),
    ("smear_gate.weight", (12,), "smear_gate.weight has shape .12,., expected 2 dimensions"),
    ("smear_gate.weight", (1, 13), "smear_gate.weight has shape .1, 13., expected .1, 12."),
    ("blocks.3.attn.attn_gate_w", (4, 11), "blocks.3.attn.attn_gate_w has shape .4, 11., expected .4, 12."),
    ("skip_gates", (5, 48), "skip_gates has shape .5, 48., expected .4, 48."),
    ("parallel_post_lambdas", (5, 2), "parallel_post_lambdas has shape .5, 2., expected .5, 2, 2."),
    ("lane_merge", (), "unexpected tensors: lane_merge"),
    ("ve_layer_scales.0", (1,), "unexpected tensors: ve_layer_scales.0"),
]


@pytest.mark.parametrize(("name", "shape", "message"), LARGE)
def test_malformed_states_with_banks_are_refused_by_name(name, shape, message):
    state, config = in_banks(trained(RECORDS["2026-04-27"])), RECORDS["2026-04-27"]
    if shape is None:
        del state[name]
    else:
        state[name] = torch.ones(shape)
    with pytest.raises(InputError, match=message):
        infer_config(state, config)
    with pytest.raises(InputError, match=r"missing|unexpected|has shape"):
        from_published(state, config)


Q_GAIN = "blocks.0.attn.q_gain"
FOREIGN = [
    ("tok_emb.weight", None, "missing tensors: tok_emb.weight"),
    (Q_GAIN, None, "missing tensors: blocks.0.attn.q_gain"),
    ("blocks.1.attn_scale", None, "missing tensors: blocks.1.attn_scale"),
    ("skip_weights", None, "missing tensors: skip_weights"),
    ("bigram.proj.weight", None, "missing tensors: bigram.proj.weight"),
    ("bigram.embed.weight", None, "unexpected tensors: bigram.proj.weight, bigram.scale"),
    ("ve.weight", (1,), "unexpected tensors: ve.weight"),
    ("blocks.9.attn_scale", (16,), "missing tensors: blocks.3.attn.c_k"),
    (Q_GAIN, (4, 1), "q_gain has shape .4, 1., expected 1 "),
    (Q_GAIN, (3,), "not a multiple of model.num_heads 3"),
    (Q_GAIN, (0,), "num_heads is 0; expected >= 1"),
    ("blocks.0.attn.c_k.weight", (9, 16), "has shape .9, 16., expected .8, 16."),
    ("blocks.1.mlp.fc.weight", (21, 16), "fc.weight has shape .21, 16."),
    ("tok_emb.weight", (24, 0), "model_dim is 0; expected >= 1"),
    ("bigram.scale", (1,), "bigram.scale has shape .1,., expected"),
]


@pytest.mark.parametrize(("name", "shape", "message"), FOREIGN)
def test_states_of_no_model_are_refused_by_name(name, shape, message):
    state = trained(MODELS["xor"])
    if shape is None:
        del state[name]
    else:
        state[name] = torch.ones(shape)
    with pytest.raises(InputError, match=message):
        infer_config(state)
    with pytest.raises(InputError, match=r"missing|unexpected|has shape"):
        from_published(state, MODELS["xor"])
