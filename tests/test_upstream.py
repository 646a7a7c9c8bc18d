"""Upstream's model files, written here as upstream's exporters write them, and the configuration read off tensors."""

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

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from golfgpt.config import ModelConfig
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.published import assumed_fields, from_published, infer_config, read_export, read_ptz, to_published

SMALL = ModelConfig(vocab_size=24, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, mlp_hidden=20)
XOR = {"bigram_hash": "xor", "bigram_vocab_size": 30, "bigram_dim": 6, "smear_gate": "after_norm"}
LINEAR = {"bigram_hash": "linear", "bigram_vocab_size": 30, "bigram_dim": 6, "smear_gate": "before_norm"}
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
COMPRESSORS = {
    None: bytes,
    "zlib": lambda content: zlib.compress(content, 9),
    "zstd": zstandard.ZstdCompressor(level=22).compress,
    "xz": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}


def trained(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state of the model in upstream's names and dtypes: embeddings are bfloat16."""
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
    """R4b, #70, #180, R5: `bits` gives those of the names with a part, fp16 elsewhere."""
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


# Files that upstream writes


@pytest.mark.parametrize("model", ["baseline", "untied", "xor", "one layer"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_exports_read_back(tmp_path, recipe, model):
    source = trained(MODELS[model])
    content = RECIPES[recipe](source)
    export = read_export(write(tmp_path, content))
    is_mixed = "m" in content
    assert export.format == ("mixed" if is_mixed else "int8_clean_per_row_v1")
    assert export.state.keys() == source.keys() == {*export.codes, *export.kept} == export.dtypes.keys()
    assert not export.codes.keys() & export.kept.keys()
    for name, original in source.items():
        weights = export.state[name]
        assert weights.dtype == torch.float32 and weights.shape == original.shape
        if name in export.codes:
            bits = int(content["m"][name]["type"][3]) if is_mixed else 6 if recipe in ("R3", "R4") else 8
            q, scale = rows(original, bits)
            assert torch.equal(export.codes[name][0], q) and torch.equal(export.codes[name][1], scale), name
            expected = (q.double() * scale.double()[:, None]).float()
        else:
            expected = original.half() if is_mixed or export.kept[name].dtype == torch.float16 else original
        assert torch.equal(weights, expected.to(original.dtype).float()), name
        recorded = name in export.codes or name in content.get("passthrough_orig_dtypes", {})
        if is_mixed or recorded:
            assert export.dtypes[name] == str(original.dtype).removeprefix("torch."), name
    assert infer_config(export.state) == MODELS[model]
    GPT(MODELS[model]).load_state_dict(from_published(export.state, MODELS[model]))


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize(
    "content", [per_row, lambda state: mixed(state, {".attn.": 6}), dict], ids=["R0", "mixed", "pt"]
)
def test_the_compressor_is_told_by_the_first_bytes(tmp_path, content, compressor):
    source = content(trained(SMALL))
    export = read_export(write(tmp_path, source, COMPRESSORS[compressor]))
    assert export.compressor == compressor
    assert export.state.keys() == trained(SMALL).keys()


@pytest.mark.parametrize("level", range(10))
def test_every_level_of_zlib_is_read(tmp_path, level):
    path = write(tmp_path, per_row(trained(SMALL)), lambda content: zlib.compress(content, level))
    assert read_export(path).compressor == "zlib"


@pytest.mark.parametrize("size_written", [True, False])
def test_zstd_frames_may_leave_their_size_out(tmp_path, size_written):
    compress = zstandard.ZstdCompressor(level=22, write_content_size=size_written).compress
    assert read_ptz(write(tmp_path, per_row(trained(SMALL)), compress)).keys() == trained(SMALL).keys()


def test_a_state_dict_is_read_in_its_own_dtypes(tmp_path):
    source = nn.Module().state_dict()  # an OrderedDict with an attribute, as a module's is
    source.update(trained(MODELS["xor"]))
    export = read_export(write(tmp_path, source, bytes))
    assert (export.format, export.compressor, export.codes) == ("state_dict", None, {})
    for name, tensor in source.items():
        assert torch.equal(export.state[name], tensor.float()) and export.state[name].dtype == torch.float32
        assert export.kept[name].dtype == tensor.dtype
    assert export.dtypes["tok_emb.weight"] == "bfloat16" and export.dtypes["smear.gate"] == "float32"


def test_tensors_saved_from_a_gpu_are_read(tmp_path):
    """final_model.pt is saved on the device that trained it."""
    source = trained(SMALL)
    with zipfile.ZipFile(io.BytesIO(saved(source))) as archive:
        program = archive.read("archive/data.pkl").replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    path = write(tmp_path, source, lambda content: repacked(content, {"archive/data.pkl": program}))
    assert b"cuda:0" in path.read_bytes() and b"cpu" not in path.read_bytes()
    state = read_ptz(path)
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in source.items())


def test_one_scale_for_a_whole_tensor(tmp_path):
    codes, scale = torch.arange(-8, 8, dtype=torch.int8), torch.tensor(0.3)
    content = per_row({})
    content["quantized"]["a"], content["scales"]["a"], content["dtypes"]["a"] = codes, scale, "float32"
    assert torch.equal(read_ptz(write(tmp_path, content))["a"], codes.float() * 0.3)
    content = {"w": {"a.q": codes, "a.scale": scale.half()}, "m": {"a": {"type": "int5"}}}
    assert torch.equal(read_ptz(write(tmp_path, content))["a"], codes.float() * scale.half().float())


# Files that nobody should have written


BLOCK = torch.zeros(100_000)
PER_ROW_FAULTS = [
    (lambda x: x.update(__quant_format__="other"), "its format is 'other'"),
    (lambda x: x.update(__quant_format__=BLOCK), "its format is tensor"),
    (lambda x: x.pop("__quant_format__"), "quantized is not a plain contiguous tensor"),
    (lambda x: x.pop("scales"), "missing keys: scales"),
    (lambda x: x.update(extra={}), "unexpected keys: extra"),
    (lambda x: x["scales"].pop("lm_head.weight"), "name different tensors"),
    (lambda x: x.update(passthrough=[1]), "passthrough is not a table"),
    (lambda x: x["passthrough"].update({7: torch.ones(1)}), "passthrough is not a table"),
    (lambda x: x["passthrough"].update({"\x1b[31m": torch.ones(1)}), "passthrough is not a table"),
    (lambda x: x["passthrough"].update({"lm_head.weight": torch.ones(1)}), "both quantized and passed.*lm_head.weight"),
    (lambda x: x["passthrough"].update(a="text"), "a is not a plain contiguous"),
    (lambda x: x["passthrough"].update(a=torch.tensor([math.nan])), "a is not finite"),
    (lambda x: x["passthrough"].update(a=torch.tensor([math.inf]).half()), "a is not finite"),
    (lambda x: x["passthrough"].update(a=torch.zeros(1, dtype=torch.int8)), "a is torch.int8"),
    (lambda x: x["passthrough"].update(a=torch.zeros(1).requires_grad_()), "a is not a plain contiguous"),
    (lambda x: x["passthrough"].update(a=torch.ones(4, 4).t()), "a is not a plain contiguous"),
    (lambda x: x["passthrough"].update(a=torch.ones(1).expand(2**40)), "a is not a plain contiguous"),
    (lambda x: x["passthrough"].update({str(i): BLOCK[i:] for i in range(2000)}), "more bytes than the file"),
    (lambda x: x["passthrough"].update(a=BLOCK, b=BLOCK), "more bytes than the file"),
    (
        lambda x: x["quantized"].update({"lm_head.weight": torch.ones(3, 4)}),
        "lm_head.weight has codes of torch.float32",
    ),
    (lambda x: x["scales"].update({"lm_head.weight": torch.ones(4)}), r"has codes .24, 16. with scales .4,."),
    (lambda x: x["scales"].update({"lm_head.weight": torch.ones(24, 1)}), r"with scales .24, 1."),
    (lambda x: x["scales"].update({"lm_head.weight": torch.ones(24, dtype=torch.int8)}), "scales of torch.int8"),
    (lambda x: x["scales"]["lm_head.weight"].fill_(math.nan), "lm_head.weight has scales that are not positive"),
    (lambda x: x["scales"]["lm_head.weight"].fill_(-1), "lm_head.weight has scales that are not positive"),
    (lambda x: x["scales"]["lm_head.weight"].zero_(), "lm_head.weight has scales that are not positive"),
    (lambda x: x["scales"]["lm_head.weight"].fill_(math.inf), "lm_head.weight is not finite"),
    (lambda x: x["scales"].update({"lm_head.weight": torch.full((24,), 3e38)}), "lm_head.weight is not finite"),
    (lambda x: x["dtypes"].update({"lm_head.weight": "float8"}), "lm_head.weight has the unknown dtype 'float8'"),
    (lambda x: x["dtypes"].update({"lm_head.weight": ["float32"]}), "lm_head.weight has the unknown dtype"),
    (lambda x: x.update(passthrough_orig_dtypes={"skip_weights": {}}), "skip_weights has the unknown dtype"),
    (lambda x: x.update(qmeta={"a": "x" * 10**6}), "its pickle of"),
]
MIXED_FAULTS = [
    (lambda x: x.pop("m"), "w is not a plain contiguous tensor"),
    (lambda x: x.update(m=[]), "m is not a table"),
    (lambda x: x["w"].pop("lm_head.weight.q"), "missing tensors: lm_head.weight.q"),
    (lambda x: x["w"].pop("skip_weights"), "missing tensors: skip_weights"),
    (lambda x: x["w"].update(more=torch.ones(1)), "unexpected tensors: more"),
    (lambda x: x["m"].pop("lm_head.weight"), "unexpected tensors: lm_head.weight.q, lm_head.weight.scale"),
    (lambda x: x["m"].update({"lm_head.weight": {"type": "int7"}}), "lm_head.weight is stored as {'type': 'int7'}"),
    (lambda x: x["m"].update({"lm_head.weight": {"type": "int6", "group": 64}}), "which is unknown"),
    (lambda x: x["m"].update({"lm_head.weight": {"type": ["int6"]}}), "which is unknown"),
    (lambda x: x["m"].update({"lm_head.weight": 6}), "lm_head.weight is stored as 6"),
    (lambda x: x["m"].update({"lm_head.weight.q": "passthrough"}), "two tensors are stored as: lm_head.weight.q"),
    (lambda x: x["w"]["lm_head.weight.q"].fill_(32), "lm_head.weight has codes outside int6"),
    (lambda x: x["w"]["lm_head.weight.q"].fill_(-33), "lm_head.weight has codes outside int6"),
    (lambda x: x["w"].update({"lm_head.weight.q": torch.ones(24, 16)}), "lm_head.weight has codes of torch.float32"),
    (lambda x: x["w"].update({"lm_head.weight.scale": torch.ones(16)}), r"has codes .24, 16. with scales .16,."),
    (lambda x: x["w"].update({"lm_head.weight.scale": 0.5}), "lm_head.weight is not a plain contiguous tensor"),
    (lambda x: x["w"]["skip_weights"].fill_(math.nan), "skip_weights is not finite"),
]


@pytest.mark.parametrize(("change", "message"), PER_ROW_FAULTS)
def test_malformed_exports_are_refused(tmp_path, change, message):
    source = per_row(trained(MODELS["untied"]))
    change(source)
    with pytest.raises(InputError, match=message):
        read_ptz(write(tmp_path, source))


@pytest.mark.parametrize(("change", "message"), MIXED_FAULTS)
def test_malformed_mixed_exports_are_refused(tmp_path, change, message):
    source = mixed(trained(MODELS["untied"]), {".attn.": 6, "lm_head": 6})
    change(source)
    with pytest.raises(InputError, match=message):
        read_ptz(write(tmp_path, source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "the file is not a table of names"),
        (torch.ones(1), "the file is not a table of names"),
        ({"step": 3, "model": {"a": torch.ones(1)}}, "step is not a plain contiguous tensor"),
        ({"a": torch.tensor([math.nan])}, "a is not finite"),
        ({"a": nn.Parameter(torch.ones(1))}, "_rebuild_parameter"),
        ({"a": torch.ones(1, dtype=torch.float64)}, "DoubleStorage"),
    ],
)
def test_other_things_that_torch_saves_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_ptz(write(tmp_path, content, bytes))


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [Payload(print, "executed"), Payload(bytearray, 2**40), {"passthrough": Payload(eval, "1/0")}],
    ids=["print", "allocation", "eval"],
)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_pickled_calls_are_neither_run_nor_allocated(tmp_path, capsys, content, compressor):
    with pytest.raises(InputError, match="which no tensor needs"):
        read_ptz(write(tmp_path, content, COMPRESSORS[compressor]))
    assert capsys.readouterr().out == ""


def test_deep_nesting_is_refused(tmp_path):
    """Printing what a file holds must not recurse as deeply as the file nests."""
    names = {name: b"X" + len(name).to_bytes(4, "little") + name.encode() for name in ("w", "m", "a")}
    deep = 10_000 * b"]" + 9_999 * b"a"
    program = b"\x80\x02}" + names["w"] + b"}s" + names["m"] + b"}" + names["a"] + deep + b"ss."
    path = write(tmp_path, {}, lambda content: repacked(content, {"archive/data.pkl": program}))
    with pytest.raises(InputError, match="a is stored as"):
        read_ptz(path)


def repacked(content: bytes, replace: dict[str, bytes], more: dict[str, bytes] | None = None) -> bytes:
    """A torch.save file with some entries replaced and others added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, replace.get(entry.filename, old.read(entry)))
        for name, data in (more or {}).items():
            new.writestr(name, data)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("archive/data.pkl", "two of its entries have one name"),
        ("archive/DATA.PKL", "two of its entries have one name"),
        ("archive/data/0", "two of its entries have one name"),
        ("other/data.pkl", "it has 2 pickles"),
    ],
)
def test_a_second_entry_cannot_stand_in_for_the_scanned_one(tmp_path, more, message):
    hidden = pickle.dumps(Payload(print, "executed"), protocol=2)
    with pytest.raises(InputError, match=message):
        read_ptz(write(tmp_path, trained(SMALL), lambda content: repacked(content, {}, {more: hidden})))


def test_a_storage_smaller_than_its_tensor_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a torch.save file"):
        read_ptz(write(tmp_path, trained(SMALL), lambda content: repacked(content, {"archive/data/0": b"12"})))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_damaged_files_are_refused(tmp_path, compressor):
    path = write(tmp_path, per_row(trained(SMALL)), COMPRESSORS[compressor])
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-30], whole[: len(whole) // 2], whole[:7], whole[:2], whole + b"x", 2 * whole):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a readable upstream model"):
            read_ptz(path)
    path.write_bytes(COMPRESSORS[compressor](saved(trained(SMALL)) + b"x"))
    with pytest.raises(InputError, match="bytes precede or follow the archive"):
        read_ptz(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_byte_is_read_or_refused(tmp_path_factory, data):
    content = bytearray(SAVED)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flip") / "final_model.pt"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert all(tensor.isfinite().all() for tensor in read_ptz(path).values())


SAVED = saved(mixed({"a": torch.ones(9, 9), "b": torch.ones(4)}, {"a": 6}))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "it is empty"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00", "starts with the bytes 1f 8b 08 00 00 00: neither a zlib, zstd or xz stream"),
        (pickle.dumps({"a": 1}), "starts with the bytes 80 04"),
        (zlib.compress(pickle.dumps({"a": 1})), "not a torch.save file"),
        (lzma.compress(b"text", format=lzma.FORMAT_ALONE), "starts with the bytes 5d 00 00"),
        (zlib.compress(bytes(99))[:-4] + b"abcd", "bad compressed stream"),
        (b"\xfd7zXZ\x00" + bytes(40), "bad compressed stream"),
        (b"\x28\xb5\x2f\xfd" + bytes(40), "bad compressed stream|not a torch.save file"),
        (b"\x28\xb5\x2f\xfd", "bad compressed stream"),
        (b"PK\x03\x04" + bytes(40), "not a torch.save file"),
    ],
)
def test_other_files_are_refused(tmp_path, blob, message):
    path = tmp_path / "final_model.zlib.ptz"
    path.write_bytes(blob)
    with pytest.raises(InputError, match=message):
        read_ptz(path)


def streamed_zstd(content: bytes) -> bytes:
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    return stream.compress(content) + stream.flush()


@pytest.mark.parametrize("compress", [*COMPRESSORS.values(), streamed_zstd])
def test_a_file_that_inflates_without_end_is_refused(tmp_path, monkeypatch, compress):
    monkeypatch.setattr("golfgpt.published.files.MAX_PTZ_BYTES", 10**6)
    path = tmp_path / "bomb.ptz"
    path.write_bytes(b"PK\x03\x04" + bytes(2 * 10**6) if compress is bytes else compress(bytes(2 * 10**6)))
    with pytest.raises(InputError, match=r"larger than 1000000|did not decompress full frame"):
        read_ptz(path)


@pytest.mark.parametrize("claimed", [2**40, 2**62])
def test_a_zstd_frame_that_claims_too_much_is_refused(tmp_path, claimed):
    path = tmp_path / "bomb.ptz"
    header = b"\x28\xb5\x2f\xfd" + bytes([0xC0, 0x58]) + claimed.to_bytes(8, "little")
    path.write_bytes(header + b"\x01\x00\x00")
    with pytest.raises(InputError, match="content is larger than"):
        read_ptz(path)


def test_a_decoder_that_asks_for_too_much_memory_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**29}]
    path = write(tmp_path, trained(SMALL), lambda content: lzma.compress(content, filters=filters))
    with pytest.raises(InputError, match=r"bad compressed stream \(Memory usage limit"):
        read_ptz(path)


def test_a_missing_decompressor_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, per_row(trained(SMALL)), COMPRESSORS["zstd"])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="zstd needs the package zstandard: install it"):
        read_ptz(path)
    assert read_ptz(write(tmp_path, per_row(trained(SMALL)))).keys() == trained(SMALL).keys()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.ptz"):
        read_ptz(tmp_path / "nothing.ptz")


# The configuration


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_is_read_off_the_tensors(name):
    state = trained(MODELS[name])
    assert infer_config(state) == MODELS[name]


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
    assert assumed_fields(trained(SMALL)).keys() == fields.keys()
    assert infer_config(trained(SMALL), **fields) == dataclasses.replace(SMALL, **fields)
    fields |= {"smear_gate": "before_norm", "document_start": 1}
    state = trained(MODELS["xor"])
    assert assumed_fields(state).keys() == fields.keys()
    assert infer_config(state, **fields) == dataclasses.replace(MODELS["xor"], **fields)
    assert infer_config(state, smear_gate="after_norm") == MODELS["xor"]
    assert assumed_fields(trained(MODELS["pairs only"])).keys() == fields.keys() - {"smear_gate"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.clear(), "missing tensors: tok_emb.weight"),
        (lambda state: state.pop("tok_emb.weight"), "missing tensors: tok_emb.weight"),
        (lambda state: state.pop("blocks.0.attn.q_gain"), "missing tensors: blocks.0.attn.q_gain"),
        (lambda state: state.pop("blocks.1.attn_scale"), "missing tensors: blocks.1.attn_scale"),
        (lambda state: state.pop("skip_weights"), "missing tensors: skip_weights"),
        (lambda state: state.pop("bigram.proj.weight"), "missing tensors: bigram.proj.weight"),
        (lambda state: state.pop("bigram.embed.weight"), "unexpected tensors: bigram.proj.weight, bigram.scale"),
        (lambda state: state.update({"ve.weight": torch.ones(1)}), "unexpected tensors: ve.weight"),
        (lambda state: state.update({"blocks.9.attn_scale": torch.ones(16)}), "missing tensors: blocks.3.attn.c_k"),
        (
            lambda state: state.update({"blocks.0.attn.q_gain": torch.ones(4, 1)}),
            "q_gain has shape .4, 1., expected 1 ",
        ),
        (lambda state: state.update({"blocks.0.attn.q_gain": torch.ones(3)}), r"not a multiple of model.num_heads 3"),
        (lambda state: state.update({"blocks.0.attn.q_gain": torch.ones(0)}), "num_heads is 0; expected >= 1"),
        (
            lambda state: state.update({"blocks.0.attn.c_k.weight": torch.ones(9, 16)}),
            r"has shape .9, 16., expected .8, 16.",
        ),
        (lambda state: state.update({"blocks.1.mlp.fc.weight": torch.ones(21, 16)}), r"fc.weight has shape .21, 16."),
        (lambda state: state.update({"tok_emb.weight": torch.ones(24, 0)}), "model_dim is 0; expected >= 1"),
        (lambda state: state.update({"bigram.scale": torch.ones(1)}), r"bigram.scale has shape .1,., expected"),
    ],
)
def test_states_of_no_model_are_refused_by_name(change, message):
    state = trained(MODELS["xor"])
    change(state)
    with pytest.raises(InputError, match=message):
        infer_config(state)


@pytest.mark.parametrize("levels", [2, 60])
def test_tuples_of_tuples_as_a_key_are_not_hashed(levels, tmp_path):
    """60 levels of (t, t) in 300 bytes would take 2^60 steps."""
    program = b"\x80\x02}K\x01\x85" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(1, levels)) + b"K\x01s."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    (tmp_path / "m.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="one tuple several times"):
        read_export(tmp_path / "m.pt")


def test_a_gate_that_is_not_there_cannot_be_given():
    with pytest.raises(
        InputError, match=r"smear_gate before_norm was asked for, and there is no tensor smear.gate: choose none"
    ):
        infer_config(trained(SMALL), smear_gate="before_norm")


def test_an_impossible_field_is_refused():
    with pytest.raises(InputError, match="document_start 1 changes nothing"):
        infer_config(trained(SMALL), document_start=1)
