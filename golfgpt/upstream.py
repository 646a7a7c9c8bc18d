"""Names and files of the published models (openai/parameter-golf).

A golfgpt model keeps the same-shaped matrices of all L layers in one bank of shape (L, out, in); upstream
names one tensor per layer. `parameter_shapes` is the one statement of what a model holds.

    bank           shape                     upstream name
    tok_emb        (vocab, dim)              tok_emb.weight
    lm_head        (vocab, dim), untied      lm_head.weight
    c_q            (L, dim, dim)             blocks.{i}.attn.c_q.weight
    c_k, c_v       (L, kv_dim, dim)          blocks.{i}.attn.c_k.weight, blocks.{i}.attn.c_v.weight
    attn_proj      (L, dim, dim)             blocks.{i}.attn.proj.weight
    mlp_fc         (L, hidden, dim)          blocks.{i}.mlp.fc.weight
    mlp_proj       (L, dim, hidden)          blocks.{i}.mlp.proj.weight
    attn_scale     (L, dim)                  blocks.{i}.attn_scale
    mlp_scale      (L, dim)                  blocks.{i}.mlp_scale
    resid_mix      (L, 2, dim)               blocks.{i}.resid_mix
    q_gain         (L, heads)                blocks.{i}.attn.q_gain
    skip_weights   (skips, dim), skips > 0   skip_weights
    smear_gate     (dim,), smear_gate        smear.gate
    bigram_table   (rows, pair dim)          bigram.embed.weight         these with bigram_hash,
    bigram_proj    (dim, pair dim)           bigram.proj.weight
    bigram_scale   ()                        bigram.scale                this with "xor" only

The banks of SmearGate and BigramHash come last, so that models of one seed agree in the others. The upstream
names are those of PRs #162, #180 and R5; files of PR #65, whose "linear" variant this is, were not seen.

`read_ptz` reads upstream's exported file (zlib of a torch.save dict, "int8_clean_per_row_v1"). It is the
only place where golfgpt meets a pickle. The pickle is scanned before it is loaded: it may only rebuild
plain tensors from stored bytes, so neither code nor an allocation can hide in it.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golfgpt.config import ModelConfig
from golfgpt.errors import InputError

MAX_PTZ_BYTES = 256 * 2**20
"""Largest file and largest decompressed content that `read_ptz` accepts."""

_MAX_PICKLE_BYTES = 10**6  # scanning a megabyte takes 0.4 s; a three-layer export has 5 kB
_PTZ_FORMAT = "int8_clean_per_row_v1"
_PTZ_KEYS = {"__quant_format__", "quantized", "scales", "dtypes", "passthrough"}
_PTZ_OPTIONAL_KEYS = {"qmeta", "passthrough_orig_dtypes"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLE_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch CharStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch FloatStorage",
}

_LAYER_NAMES = {
    "c_q": "attn.c_q.weight",
    "c_k": "attn.c_k.weight",
    "c_v": "attn.c_v.weight",
    "attn_proj": "attn.proj.weight",
    "mlp_fc": "mlp.fc.weight",
    "mlp_proj": "mlp.proj.weight",
    "attn_scale": "attn_scale",
    "mlp_scale": "mlp_scale",
    "resid_mix": "resid_mix",
    "q_gain": "attn.q_gain",
}
_MODEL_NAMES = {
    "tok_emb": "tok_emb.weight",
    "lm_head": "lm_head.weight",
    "skip_weights": "skip_weights",
    "smear_gate": "smear.gate",
    "bigram_table": "bigram.embed.weight",
    "bigram_proj": "bigram.proj.weight",
    "bigram_scale": "bigram.scale",
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Bank name -> shape of every parameter of the model, in the order in which artifacts store them."""
    layers, dim, hidden = config.num_layers, config.model_dim, config.mlp_hidden
    shapes = {
        "tok_emb": (config.vocab_size, dim),
        "lm_head": (config.vocab_size, dim),
        "c_q": (layers, dim, dim),
        "c_k": (layers, config.kv_dim, dim),
        "c_v": (layers, config.kv_dim, dim),
        "attn_proj": (layers, dim, dim),
        "mlp_fc": (layers, hidden, dim),
        "mlp_proj": (layers, dim, hidden),
        "attn_scale": (layers, dim),
        "mlp_scale": (layers, dim),
        "resid_mix": (layers, 2, dim),
        "q_gain": (layers, config.num_heads),
        "skip_weights": (config.num_skips, dim),
        "smear_gate": (dim,),
        "bigram_table": (config.bigram_vocab_size, config.bigram_dim),
        "bigram_proj": (dim, config.bigram_dim),
        "bigram_scale": (),
    }
    absent = {
        "lm_head": config.tie_embeddings,
        "skip_weights": config.num_skips == 0,
        "smear_gate": config.smear_gate == "none",
        "bigram_table": config.bigram_hash == "none",
        "bigram_proj": config.bigram_hash == "none",
        "bigram_scale": config.bigram_hash != "xor",
    }
    return {name: shape for name, shape in shapes.items() if not absent.get(name)}


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError naming missing, unexpected or mis-shaped tensors of `state`."""
    if missing := shapes.keys() - state.keys():
        raise InputError(f"missing tensors: {_listed(missing)}")
    if unexpected := state.keys() - shapes.keys():
        raise InputError(f"unexpected tensors: {_listed(unexpected)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise InputError(f"tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}")


def _listed(names: Iterable[str]) -> str:
    names = sorted(ascii(name)[1:-1] for name in names)  # names from files may hold control characters
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's per-layer tensors, as views of the banks in `state`; InputError for an unknown bank."""
    out = {}
    for name, tensor in state.items():
        if name in _MODEL_NAMES:
            out[_MODEL_NAMES[name]] = tensor
        elif name in _LAYER_NAMES:
            out |= {f"blocks.{i}.{_LAYER_NAMES[name]}": layer for i, layer in enumerate(tensor)}
        else:
            raise InputError(f"unexpected tensors: {name}")
    return out


def from_upstream(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Banks stacked from upstream's per-layer tensors, dtypes kept.

    Strict: raises InputError naming missing, unexpected or mis-shaped tensors. A one-layer upstream model
    holds skip_weights of zero rows, which is dropped.
    """
    if config.num_skips == 0 and "skip_weights" in state and state["skip_weights"].numel() == 0:
        state = {name: tensor for name, tensor in state.items() if name != "skip_weights"}
    shapes = parameter_shapes(config)
    expected = {}
    for name, shape in shapes.items():
        if name in _MODEL_NAMES:
            expected[_MODEL_NAMES[name]] = shape
        else:
            expected |= {f"blocks.{i}.{_LAYER_NAMES[name]}": shape[1:] for i in range(shape[0])}
    check_state(state, expected)
    return {
        name: state[_MODEL_NAMES[name]]
        if name in _MODEL_NAMES
        else torch.stack([state[f"blocks.{i}.{_LAYER_NAMES[name]}"] for i in range(shape[0])])
        for name, shape in shapes.items()
    }


def read_ptz(path: str | Path) -> dict[str, Tensor]:
    """Per-layer fp32 tensors of upstream's `final_model.int8.ptz`, under upstream's names.

    codes (rows, columns) int8 times their row's scale, rounded to the dtype that the tensor had in
    upstream's model (the embedding was bfloat16), then widened to fp32. Raises InputError for anything
    malformed, after reading at most MAX_PTZ_BYTES however much the file claims to hold.
    """
    try:
        with open(path, "rb") as file:
            blob = file.read(MAX_PTZ_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    try:
        if len(blob) > MAX_PTZ_BYTES:
            raise InputError(f"the file is larger than {MAX_PTZ_BYTES} bytes")
        content = _inflate(blob)
        return _dequantize(_load_plain_tensors(content), max_elements=len(content))
    except InputError as error:
        raise InputError(f"{path} is not a readable {_PTZ_FORMAT} export: {error}") from None


def _inflate(blob: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(blob, MAX_PTZ_BYTES + 1)
    except zlib.error as error:
        raise InputError(f"bad zlib stream ({error})") from None
    if len(content) > MAX_PTZ_BYTES:
        raise InputError(f"the content is larger than {MAX_PTZ_BYTES} bytes")
    if not stream.eof:
        raise InputError("the zlib stream is truncated")
    if stream.unused_data:
        raise InputError(f"{len(stream.unused_data)} bytes follow the zlib stream")
    return content


def _load_plain_tensors(content: bytes) -> Any:
    """torch.load of a torch.save file that holds nothing but containers and stored tensors."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > len(content):
                raise InputError("its entries claim more bytes than the file holds")
            (program,) = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if program.file_size > _MAX_PICKLE_BYTES:
                raise InputError(f"its pickle of {program.file_size} bytes holds more than tensors")
            for opcode, argument, _ in pickletools.genops(archive.read(program)):
                if opcode.name == "STACK_GLOBAL" or (
                    opcode.name in ("GLOBAL", "INST") and argument not in _PICKLE_GLOBALS
                ):
                    raise InputError(f"it refers to {argument}, which no tensor needs")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign parsers meet hostile bytes with any type of exception
        raise InputError(f"not a torch.save file of plain tensors ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _dequantize(export: Any, max_elements: int) -> dict[str, Tensor]:
    if not isinstance(export, dict) or export.get("__quant_format__") != _PTZ_FORMAT:
        raise InputError("it does not name that format")
    if missing := _PTZ_KEYS - export.keys():
        raise InputError(f"missing keys: {_listed(missing)}")
    if unexpected := export.keys() - _PTZ_KEYS - _PTZ_OPTIONAL_KEYS:
        raise InputError(f"unexpected keys: {_listed(unexpected)}")
    sections = {key: value for key, value in export.items() if key != "__quant_format__"}
    for key, value in sections.items():
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise InputError(f"{key} is not a table of names")
    codes, scales, dtypes, kept = (sections[key] for key in ("quantized", "scales", "dtypes", "passthrough"))
    if not codes.keys() == scales.keys() == dtypes.keys():
        raise InputError("quantized, scales and dtypes name different tensors")
    if both := codes.keys() & kept.keys():
        raise InputError(f"both quantized and passed through: {_listed(both)}")
    tensors = [*codes.items(), *scales.items(), *kept.items()]
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_contiguous():
            raise InputError(f"{name} is not a contiguous tensor")
    # Views can show one stored byte many times; real exports hold at least a byte for each element.
    if sum(tensor.numel() for _, tensor in tensors) > max_elements:
        raise InputError("its tensors have more elements than the file has bytes")
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise InputError(f"{name} is not finite")

    out = {}
    for name, q in codes.items():
        scale = scales[name]
        if q.dtype != torch.int8 or q.ndim == 0 or not scale.is_floating_point():
            raise InputError(f"{name} has codes of {q.dtype} with scales of {scale.dtype}")
        if scale.shape not in (q.shape[:1], torch.Size([])):  # upstream's per-tensor form has one scale
            raise InputError(f"{name} has codes {tuple(q.shape)} with scales {tuple(scale.shape)}")
        if not isinstance(dtypes[name], str) or dtypes[name] not in _DTYPES:
            raise InputError(f"{name} has the unknown dtype {dtypes[name]!r}")
        scale = scale.float().reshape(-1, *[1] * (q.ndim - 1))
        out[name] = (q.float() * scale).to(_DTYPES[dtypes[name]]).float()
    for name, tensor in kept.items():
        original = sections.get("passthrough_orig_dtypes", {}).get(name, "float32")
        if not isinstance(original, str) or original not in _DTYPES or not tensor.is_floating_point():
            raise InputError(f"{name} is {tensor.dtype}, recorded as {original!r}")
        out[name] = tensor.to(_DTYPES[original]).float()
    return out
