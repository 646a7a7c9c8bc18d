"""The records' quantized files, written here as their exporters write them: streams per group, factors, columns.

Vectors of the published scripts are read from every folder that GOLFGPT_CONFORMANCE names.
"""

from __future__ import annotations

import json
import lzma
import struct
import sys
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import zstandard
from models import latest_record, lively, tiny_config
from test_conformance import FOLDERS, Vectors
from test_importer import RECORD_OPTIONS
from test_published import saved, shuffled

from golfgpt.cli import main
from golfgpt.data.orders import boundaries
from golfgpt.errors import InputError
from golfgpt.importer import layer_groups_of
from golfgpt.published.containers import unpack, unshuffled
from golfgpt.published.files import read_export
from golfgpt.published.names import from_published, to_published
from golfgpt.quant import artifact
from golfgpt.quant.formats import decode

GROUPS = ["_tok_emb.weight.q"]
GROUPS += [f"{kind}.weight.q" for kind in ("attn.c_k", "attn.c_q", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")]
SORTED = {"_tok_emb.weight.q", "attn.c_q.weight.q", "mlp.fc.weight.q"}
CODERS = {
    "bare": bytes,
    "brotli": lambda stream: brotli.compress(stream, quality=5),
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "zlib": zlib.compress,
}


def vectors(pattern: str) -> list:
    return [pytest.param(path, id=path.name) for folder in FOLDERS for path in sorted(folder.glob(pattern))]


# Writers


def chain(matrix: np.ndarray) -> np.ndarray:
    """Row 0, and then always the nearest row of those left."""
    order, left = [0], list(range(1, len(matrix)))
    while left:
        distances = np.abs(matrix[left].astype(np.float32) - matrix[order[-1]]).sum(1)
        order.append(left.pop(int(distances.argmin())))
    return np.array(order, dtype="<u2")


def streams_per_group(w: dict[str, torch.Tensor]) -> tuple[dict[str, bytes], dict, dict]:
    """Streams before their coders, "perms" among them; shapes of the groups; tensors of the remainder."""
    rest, shapes, streams, orders = dict(w), {}, {}, b""
    for group in GROUPS:
        names = [group[1:]] if group.startswith("_") else [f"blocks.{i}.{group}" for i in range(len(w))]
        matrices = [rest.pop(name).numpy() for name in names if name in rest]
        streams[group] = b""
        for matrix in matrices:
            shapes.setdefault(group, []).append(matrix.shape)
            if group in SORTED:
                order = chain(matrix)
                matrix, orders = matrix[order], orders + order.tobytes()
            streams[group] += matrix.T.tobytes()
    return streams | {"perms": orders}, shapes, rest


def pack(streams: list[bytes]) -> bytes:
    return b"PGRP" + struct.pack(f"<{len(streams) + 1}I", len(streams), *map(len, streams)) + b"".join(streams)


def per_group(content: dict, coder=CODERS["bare"], change=lambda parts: None) -> bytes:
    streams, shapes, rest = streams_per_group(content["w"])
    parts = {"streams": streams, "r": rest, "m": content["m"], "s": shapes}
    change(parts)
    remainder = CODERS["brotli"](saved({key: parts[key] for key in parts if key != "streams"}))
    coded = [coder(streams[group]) if streams[group] else b"" for group in GROUPS]
    return pack([*coded, remainder, CODERS["brotli"](streams["perms"])])


def codes(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1) / most).clamp_min(1e-4).half()
    return (weight / scale.float()[:, None]).round().clamp(-most, most).to(torch.int8), scale


RECORD = latest_record(tiny_config(Path()).model)
FC, WIDE = "blocks.1.mlp.fc.weight", "tok_emb.weight"
FACTORED = {FC: "+lqer_asym", "blocks.0.attn.proj.weight": "+lqer", WIDE: "+awqgrpint8+lqer_asym"}


def record(starts=(24, 8)) -> tuple[dict, dict[str, torch.Tensor]]:
    """A mixed file of the latest record, and the weights that its model has, before the rounding of the embedding."""
    w, m, weights = {}, {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, value in to_published({k: p.detach() for k, p in lively(RECORD).named_parameters()}).items():
        if name.endswith("attn_gate_w"):
            (w[f"{name}.gq"], w[f"{name}.gs"]), m[name] = codes(value, 8), "gate_int8_row"
            weights[name] = w[f"{name}.gq"].float() * w[f"{name}.gs"].float()[:, None]
        elif value.numel() <= 1000:
            w[name], m[name] = value.half(), "passthrough (float16)"
            weights[name] = w[name].float()
        else:
            bits = 7 if name == WIDE else 6
            w[f"{name}.q"], w[f"{name}.scale"] = codes(value, bits)
            m[name] = f"gptq (int{bits})" + FACTORED.get(name, "")
            weights[name] = w[f"{name}.q"].float() * w[f"{name}.scale"].float()[:, None]
            if "awq" in m[name]:
                q, w[f"{name}.awqg_s_hi"] = codes(value, 8)
                w[f"{name}.awqg_start"], w[f"{name}.awqg_size"] = torch.tensor(starts).short(), torch.tensor(4).short()
                wide = torch.tensor([column for start in starts for column in range(start, start + 4)])
                w[f"{name}.q"][:, wide] = q[:, wide]
                weights[name][:, wide] = (q.float() * w[f"{name}.awqg_s_hi"].float()[:, None])[:, wide]
            if "lqer" in m[name]:
                rows, columns = value.shape
                a = torch.randint(-2, 2, (rows, 4), generator=generator, dtype=torch.int8)
                b = torch.randint(-8, 8, (4, columns), generator=generator, dtype=torch.int8)
                end, counts = ("_a", ((), (4 * columns // 8,))) if "asym" in m[name] else ("", ((rows,), (4,)))
                sa, sb = (torch.rand(count, generator=generator).half() / 16 + 0.01 for count in counts)
                w |= {f"{name}.lqA{end}": a, f"{name}.lqAs{end}": sa, f"{name}.lqB{end}": b, f"{name}.lqBs{end}": sb}
                right = b.float() * sb.float().repeat_interleave(b.numel() // sb.numel()).view_as(b)
                weights[name] = weights[name] + (a.float() * sa.float().reshape(-1, 1)) @ right
    return {"w": w, "m": m}, weights


def write(tmp_path, blob: bytes) -> Path:
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(blob)
    return path


# Files that the records write


@pytest.mark.parametrize("coder", CODERS)
def test_streams_per_group_hold_what_one_stream_holds(tmp_path, coder):
    content, weights = record((24,))
    found = read_export(write(tmp_path, per_group(content, CODERS[coder])))
    one = read_export(write(tmp_path, brotli.compress(shuffled(saved(content)), quality=5)))
    assert (found.format, found.compressor, one.compressor) == ("mixed", "pergroup", "brotli")
    assert found.beside.keys() == FACTORED.keys() and found.codes.keys() == one.codes.keys() and not found.decoded
    for name, weight in weights.items():
        assert torch.equal(found.state[name], one.state[name]), name
        rounding = 2**-8 if name == WIDE else 1e-6  # bfloat16
        torch.testing.assert_close(found.state[name], weight, rtol=rounding, atol=1e-6)
        assert found.dtypes[name] == ("bfloat16" if name == WIDE else "float32")
    for name, pair in found.codes.items():
        ends = ("gq", "gs") if name.endswith("attn_gate_w") else ("q", "scale")
        assert all(torch.equal(part, content["w"][f"{name}.{end}"]) for part, end in zip(pair, ends, strict=True))


def test_codes_stay_with_what_they_have_beside_them(tmp_path):
    content, _ = record((24,))
    export = read_export(write(tmp_path, per_group(content)))
    groups = layer_groups_of(export, RECORD)
    formats = {name: group.format.format for name, group in groups.items()}
    assert {formats["mlp_fc[0:1]"], formats["mlp_fc[2:3]"], formats["c_q"], formats["mlp_proj"]} == {"int6"}
    assert all(groups[name].format.rank for name in ("mlp_fc[1:2]", "attn_proj[0:1]"))
    assert groups["tok_emb"].format.wide is not None
    for bank, weight in from_published(export.state, RECORD).items():
        rounding = 2**-8 if bank == "tok_emb" else 0  # bfloat16
        torch.testing.assert_close(decode(groups)[bank], weight, rtol=rounding, atol=0)


def test_what_the_artifact_has_no_place_for_becomes_float32(tmp_path):
    content, _ = record()
    export = read_export(write(tmp_path, saved(content)))
    assert export.decoded == (WIDE,) and WIDE not in export.codes and WIDE not in export.beside
    assert layer_groups_of(export, RECORD)["tok_emb"].format.format == "float32"


def test_the_command_imports_and_says_what_became_float32(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, _ = record((24,))
    path = write(tmp_path, per_group(content, CODERS["brotli"]))
    argv = ["import", str(path), "--tokenizer", str(corpus / "tokenizer.model"), "--name", "a", *RECORD_OPTIONS]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "mixed, pergroup" in out and "rounded here" not in out and "stored as float32" not in out
    decoded, weights = artifact.read("runs/a/model.golf").state, from_published(read_export(path).state, RECORD)
    for name, tensor in decoded.items():
        torch.testing.assert_close(tensor, weights[name], rtol=2**-8 if name == "tok_emb" else 1e-6, atol=1e-7)
    w, name = content["w"], next(name for name in FACTORED if name != WIDE)
    (key,) = (key for key in w if key.startswith(f"{name}.lqBs"))
    w[key] = torch.zeros_like(w[key])
    argv[1], argv[5] = str(write(tmp_path, saved(content))), "b"
    assert main(argv) == 0
    assert f"stored as float32, because model.golf has no place for their factors: {name}" in capsys.readouterr().out


def test_value_embeddings_are_bfloat16_and_methods_are_ignored(tmp_path):
    q, scale = codes(torch.randn(5, 8), 6)
    kind = {"type": "int6", "method": "gptq"}
    name = "ve_shared.embed.weight"
    content = {"w": {f"{name}.q": q, f"{name}.scale": scale}, "m": {name: kind}}
    state = read_export(write(tmp_path, saved(content))).state[name]
    assert torch.equal(state, (q.float() * scale.float()[:, None]).bfloat16().float())


# Files that nobody should have written

Q = "attn.c_q.weight.q"


def swap(table: str, key: str, value: object):
    return lambda parts: parts[table].update({key: value(parts[table][key]) if callable(value) else value})


GROUP_FAULTS = [
    (lambda parts: parts.update(more={}), "the remainder's tables are m, more, r, s, expected m, r, s"),
    (lambda parts: parts.update(s=[]), "s is not a table"),
    (swap("s", "mlp.up", []), "unexpected groups: mlp.up"),
    (swap("s", Q, 3), f"shapes of {Q} are no list of at most 1000"),
    (swap("s", Q, [(1, 1)] * 1001), f"shapes of {Q} are no list of at most 1000"),
    (swap("s", "_tok_emb.weight.q", lambda of: of * 2), "no list of at most 1"),
    (swap("s", Q, [(-1, 2)]), "not of positive sizes"),
    (swap("s", Q, [(2**70, 2)]), "not of positive sizes"),
    (swap("s", Q, [(True, 2)]), "not of positive sizes"),
    (swap("s", Q, [(2, 2, 2)]), "expected two sizes"),
    (swap("s", Q, [(2**16 + 1, 1)]), "at most 65536 rows"),
    (swap("s", "attn.proj.weight.q", [(2**31, 2**31)]), "holds more than .* its shapes claim 46116860184"),
    (swap("s", "attn.proj.weight.q", lambda of: of[:-1]), "attn.proj.weight.q: it holds more than"),
    (swap("streams", "attn.proj.weight.q", lambda stream: stream[:-1]), "has .* bytes, its shapes take"),
    (swap("streams", "attn.proj.weight.q", bytes(10**7)), "attn.proj.weight.q: it holds more than"),
    (swap("streams", "perms", lambda stream: stream[:-2]), "the stream of permutations has .* bytes, its shapes take"),
    (swap("streams", "perms", lambda stream: stream[:2] + stream[:-2]), "is not a permutation"),
    (swap("streams", "perms", lambda stream: b"\xff\xff" + stream[2:]), "is not a permutation"),
    (lambda parts: parts["r"].update({f"blocks.0.{Q}": torch.ones(2)}), f"blocks.0.{Q} is stored twice"),
    (lambda parts: parts["m"].pop("blocks.0.attn.c_q.weight"), "unexpected tensors: blocks.0.attn.c_q.weight.q"),
]


@pytest.mark.parametrize(("change", "message"), GROUP_FAULTS)
def test_malformed_groups_are_refused(tmp_path, change, message):
    path = write(tmp_path, per_group(record()[0], CODERS["zlib"], change))
    with pytest.raises(InputError, match=message):
        read_export(path)


def test_damaged_groups_and_groups_of_lrzip_are_refused(tmp_path):
    blob = per_group(record()[0], CODERS["brotli"])
    for damaged in (blob[:4], blob[:43], blob[:-1], blob + b"x", b"PGRP" + b"\xff" * 40, blob[:4] + b"\x08" + blob[5:]):
        with pytest.raises(InputError, match=r"it ends within the lengths|it claims \d+ streams of \d+ bytes"):
            read_export(write(tmp_path, damaged))
    lrzip = write(tmp_path, per_group(record()[0], lambda stream: b"LRZI" + stream[:40]))
    with pytest.raises(InputError, match=r"_tok_emb.weight.q is an lrzip stream, which golfgpt does not.*lrzip -d"):
        read_export(lrzip)


@pytest.mark.parametrize("content", [b"BSHF", b"BSHF\0abc"])
def test_a_shuffle_without_stride_is_refused(tmp_path, content):
    with pytest.raises(InputError, match="shuffled by a stride of 0"):
        read_export(write(tmp_path, brotli.compress(content)))


def test_a_missing_brotli_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, brotli.compress(saved(record()[0]), quality=5))
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(InputError, match="the package brotli is missing: install it"):
        read_export(path)


MIXED_FAULTS = [
    (f"{FC}.lqA_a", lambda t: None, "fc.weight is missing or not a plain"),
    (f"{FC}.lqA_a", lambda t: t.float(), "factors of torch.float32"),
    (f"{FC}.lqA_a", lambda t: t[:-1].clone(), "has factors"),
    (f"{FC}.lqB_a", lambda t: t[0].clone(), "has factors"),
    (f"{FC}.lqB_a", lambda t: t.t().contiguous(), "has factors"),
    (f"{FC}.lqBs_a", lambda t: t[:5].clone(), "scales are not of equally many codes"),
    (f"{FC}.lqBs_a", lambda t: t[:0].clone(), "with 0 scales"),
    (f"{FC}.lqAs_a", lambda t: t * torch.nan, "is not finite"),
    (f"{WIDE}.awqg_start", lambda t: t.long(), "groups of columns of torch.int64"),
    (f"{WIDE}.awqg_start", lambda t: t[None].clone(), "groups of columns of shapes"),
    (f"{WIDE}.awqg_start", lambda t: t - 9, "2 groups of 4 columns, which do not fit"),
    (f"{WIDE}.awqg_start", lambda t: t.repeat(99), "198 groups of 4 columns, which do not fit"),
    (f"{WIDE}.awqg_size", lambda t: t * 8, "which do not fit"),
    (f"{WIDE}.awqg_size", lambda t: t * 0, "2 groups of 0 columns"),
    (f"{WIDE}.awqg_s_hi", lambda t: t[1:].clone(), "groups of columns of shapes"),
    (f"{WIDE}.awqg_s_hi", lambda t: t * 0, "scales of columns that are not positive"),
    (f"{WIDE}.q", lambda t: t.clone().index_fill_(1, torch.tensor([0]), 64), "codes outside int7"),
    ("m", "gptq (int9)", "stored as 'gptq .int9.', expected"),
    ("m", "gptq (int6)+hadamard", "stored as .*expected passthrough, int5, int6"),
    ("m", "gptq (int6)", "unexpected tensors: .*lqA_a"),
]


@pytest.mark.parametrize(("key", "change", "message"), MIXED_FAULTS)
def test_malformed_factors_and_columns_are_refused(tmp_path, key, change, message):
    content, _ = record()
    if key == "m":
        content["m"][FC] = change
    else:
        content["w"][key] = change(content["w"][key])
    with pytest.raises(InputError, match=message):
        read_export(write(tmp_path, saved({name: dict(table) for name, table in content.items()})))


# Vectors


@pytest.mark.parametrize("path", vectors("q_pergroup*.safetensors"))
def test_vectors_of_streams_per_group(path):
    v = Vectors(path)
    given, streams = v.part("in."), v.part("stream.")
    assert v.meta["group_order"] == GROUPS and v.meta["stream_order"] == [*GROUPS, "remainder", "perms"]
    written, shapes, rest = streams_per_group(given)
    assert rest.keys() == {*v.meta["remainder_keys"]} and {*v.meta["simsort"]} == SORTED
    assert {name: bytes(stream.tolist()) for name, stream in streams.items()} == {k: x for k, x in written.items() if x}
    content = saved({"r": rest, "m": {}, "s": shapes})
    blob = pack([written.get(name, content) for name in v.meta["stream_order"]])
    head = bytes(v["container_head"].tolist())
    remainder = slice(8 + 4 * len(GROUPS), 12 + 4 * len(GROUPS))
    assert blob[: remainder.start] == head[: remainder.start] and blob[remainder.stop : 44] == head[remainder.stop :]
    found = unpack(blob, 10**8).content["w"]
    assert found.keys() == given.keys() and all(torch.equal(tensor, found[name]) for name, tensor in given.items())


@pytest.mark.parametrize("path", vectors("q_mixed*.safetensors"))
def test_vectors_of_factors(tmp_path, path):
    v = Vectors(path)
    for config in v.meta["configs"]:
        tag, dropped = config["tag"], [name for name, t in v.part("state.").items() if not t.is_floating_point()]
        w = {name: t for name, t in v.part(f"{tag}.result.").items() if name not in dropped}  # no model has integers
        m = {name: kind for name, kind in config["meta"].items() if name not in dropped}
        export = read_export(write(tmp_path, brotli.compress(shuffled(saved({"w": w, "m": m})), quality=5)))
        assert {*export.beside} == {*config["lqer_residual_norm"]} and not export.decoded
        for name, weight in v.part(f"{tag}.dequant.").items():
            dtype = getattr(torch, export.dtypes[name])
            torch.testing.assert_close(export.state[name], weight.to(dtype).float(), rtol=1e-6, atol=1e-6)
        for name, norm in (config["residual_norm"] | config["lqer_residual_norm"]).items():
            found = (v[f"state.{name}"].float() - export.state[name]).norm().item()
            rounding = export.state[name].norm().item() * 2**-8 if export.dtypes[name] == "bfloat16" else 0
            assert found == pytest.approx(norm, rel=1e-4, abs=rounding), name


@pytest.mark.parametrize("path", vectors("q_misc*.json"))
def test_vectors_of_the_byte_shuffle(path):
    for case in json.loads(path.read_text())["byte_shuffle"]:
        given, output = bytes.fromhex(case["input"]), bytes.fromhex(case["output"])
        assert shuffled(given, case["stride"]) == output
        assert unshuffled(output) == bytes.fromhex(case["unshuffled"]) == given


@pytest.mark.parametrize("path", vectors("q_misc*.json"))
def test_vectors_of_segments(path):
    for case in json.loads(path.read_text())["cu_seqlens"]:
        row = np.zeros(case["total_len"], dtype=np.uint16)
        row[case["bos_positions"]] = 1
        found = boundaries(row, 1, case["max_doc_len"] or case["total_len"], case["bucket_size"])
        assert found.tolist() == case["cu_seqlens"] and np.diff(found).max() == case["max_seqlen"]
