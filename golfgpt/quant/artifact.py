"""`model.golf`: the container of a trained model.

    magic        8 bytes   b"golfgpt\\0"
    version      uint32    4                                     numbers are little-endian
    header       uint32    bytes of the header, at most 1 MB
    compressed   uint64    bytes of the compressed payload
    digest      32 bytes   SHA-256 of everything else, in file order
    header                 canonical JSON: sorted keys, no spaces
    compressed payload     nothing may follow

The header holds the model config, the training sequence length, the tokenizer's SHA-256, the shape and format of each
layer group (a bank, or some layers of one), the groups whose codes are stored by columns, the compressor with its
level, and the exact payload length: all that decoding needs, and nothing of how the weights were made. The payload
holds the codes of every quantized group, then the scales, then the passthrough groups, in the order of the parameter
table. Numbers of two and four bytes are stored as byte planes (all first bytes, all second bytes, ...): exponents
compress and mantissas do not, and keeping them apart saves 7 to 17 kB of the baseline's 15.8 MB.

The rows of each matrix of codes are stored in the order of their scales, ties in the order of the matrix. Rows of like
scale are alike in their outliers, and compressors adapt to stretches of one distribution. The reader derives the order
from the scales, so it costs nothing. The codes then follow by rows or by columns, whichever is smaller for the group:
inputs differ in size too. Both together save 0.1 to 0.4 percent of the file for models trained here (LOG.md).

Reading trusts no length: each is checked before memory is allocated, and the payload must be as long as the shapes add
up to. Every defect is an InputError that names it. The digest finds damage; it does not authenticate. There is no
pickle and no code in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golfgpt.config import ModelConfig, QuantConfig, from_dict, to_dict
from golfgpt.errors import InputError
from golfgpt.files import write_bytes
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant.codecs import CODECS, compress, decompress
from golfgpt.quant.quantizer import (
    QuantizedTensor,
    Quantizer,
    TensorFormat,
    TensorReport,
    decode,
    layer_group_name,
    parse_layer_group,
    payload_bytes,
    tensor_report,
)

MAGIC = b"golfgpt\0"
VERSION = 4
"""3 until model.bigram became a config of its own. A release with new fields of ModelConfig raises it."""
MAX_HEADER_BYTES = 10**6
MAX_PAYLOAD_BYTES = 256 * 2**20
"""Largest payload, compressed or not."""
MAX_SEQ_LEN = 2**31 - 1

SAMPLE_CODES = 2**18
"""A group's layout is chosen on its first layers up to this many codes, at least one layer."""

_PREFIX = struct.Struct("<8sIIQ32s")
_DIGEST_BYTES = hashlib.sha256().digest_size
_NUMPY = {"int8": "i1", "float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True)
class ArtifactInfo:
    """What the header of an artifact says, and the size of its payload."""

    model: ModelConfig
    formats: dict[str, TensorFormat]
    """Layer group -> format, in payload order."""
    seq_len: int
    """Tokens per training sequence."""
    tokenizer_sha256: str
    compressor: str
    level: int
    columns: frozenset[str]
    """Groups whose codes are stored column after column; those of all others, row after row."""
    compressed_bytes: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for what no header holds."""
        if self.compressor not in CODECS:
            raise InputError(f"compressor {self.compressor!r}, expected one of {', '.join(CODECS)}")
        if not re.fullmatch("[0-9a-f]{64}", self.tokenizer_sha256):
            raise InputError(f"tokenizer_sha256 {self.tokenizer_sha256!r}, expected 64 hexadecimal digits")
        for name, low, high in ("level", 0, CODECS[self.compressor].level), ("seq_len", 1, MAX_SEQ_LEN):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} {value!r}, expected an integer in {low}..{high}")

    def header(self) -> bytes:
        """Canonical JSON of all but compressed_bytes."""
        fields = {
            "columns": [name for name in self.formats if name in self.columns],
            "compressor": [self.compressor, self.level],
            "model": to_dict(self.model),
            "payload_bytes": self.payload_bytes,
            "seq_len": self.seq_len,
            "tensors": {
                name: [f.shape, f.format, *(item for item in (f.scale, f.group) if item is not None)]
                for name, f in self.formats.items()
            },
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @property
    def header_bytes(self) -> int:
        return len(self.header())

    @property
    def payload_bytes(self) -> int:
        return payload_bytes(self.formats)

    @property
    def file_bytes(self) -> int:
        return _PREFIX.size + self.header_bytes + self.compressed_bytes

    @property
    def parameters(self) -> int:
        return sum(format.elements for format in self.formats.values())

    def table(self) -> list[TensorReport]:
        """One line per group, without errors: those need the weights before quantization."""
        return [tensor_report(name, format) for name, format in self.formats.items()]


@dataclass(frozen=True)
class Artifact:
    info: ArtifactInfo
    state: dict[str, Tensor]
    """Bank name -> fp32 weights, decoded."""


def seal(
    encoded: Mapping[str, QuantizedTensor],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    tokenizer_sha256: str,
    seq_len: int,
) -> bytes:
    """Bytes of the artifact of quantized layer groups; `quant` gives the compressor and its level.

    Raises InputError for values that no reader takes, a payload above MAX_PAYLOAD_BYTES, a malformed digest, and a
    compressor that is not installed: another in its place would change the size unnoticed.
    """
    formats = {name: tensor.format for name, tensor in encoded.items()}
    check_payload_bytes(formats)
    for name, tensor in encoded.items():
        _check_values(name, tensor.format, tensor.values, tensor.scale)
    columns = _smaller_by_columns(encoded, quant.compressor, quant.level)
    compressor, level, compressed = compress(_join(encoded, columns), quant.compressor, quant.level)
    header = ArtifactInfo(model, formats, seq_len, tokenizer_sha256, compressor, level, columns).header()
    return _prefix(header, compressed) + header + compressed


def pack(state: Mapping[str, Tensor], *, model: ModelConfig, quant: QuantConfig, **options: Any) -> bytes:
    """`seal` of `state` (banks of any float dtype) as `quant` stores it; equal for equal state and libraries.

    Raises as `seal`, and InputError for weights that cannot be stored.
    """
    return seal(Quantizer(model, quant).encode(state), model=model, quant=quant, **options)


def write(path: str | Path, encoded: Mapping[str, QuantizedTensor], **options: Any) -> ArtifactInfo:
    """Write the `seal` of quantized layer groups atomically: on any failure `path` keeps what it held.

    Raises as `seal`, and OSError as the file system reports it (a full disk).
    """
    blob = seal(encoded, **options)
    info, _ = _open(blob)
    write_bytes(path, blob)
    return info


def read(path: str | Path) -> Artifact:
    """Decode the artifact at `path`. Raises InputError naming the file and what is wrong with it."""
    return _with_path(path, unpack)


def inspect(path: str | Path) -> ArtifactInfo:
    """Header and sizes of the artifact at `path`, digest checked, nothing decompressed. Raises as `read`."""
    return _with_path(path, lambda blob: _open(blob)[0])


def unpack(blob: bytes) -> Artifact:
    """`read` of an artifact in memory."""
    info, compressed = _open(blob)
    payload = np.frombuffer(decompress(info.compressor, compressed, info.payload_bytes), np.uint8)
    tensors = _split(payload, info.formats, info.columns)
    return Artifact(info, decode(tensors))


def header_bytes(quantizer: Quantizer) -> int:
    """Bytes of an artifact beside its compressed payload, at most."""
    columns = frozenset(name for name, format in quantizer.formats.items() if format.quantized)
    return ArtifactInfo(quantizer.model, quantizer.formats, 10**6, "0" * 64, "brotli", 11, columns).file_bytes


# Container


def _prefix(header: bytes, compressed: bytes | memoryview) -> bytes:
    lengths = _PREFIX.pack(MAGIC, VERSION, len(header), len(compressed), b"")[:-_DIGEST_BYTES]
    digest = hashlib.sha256(lengths + header)
    digest.update(compressed)
    return lengths + digest.digest()


def _with_path(path: str | Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        if not Path(path).is_file():
            raise InputError("no such file")
        if (size := Path(path).stat().st_size) > _PREFIX.size + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES:
            raise InputError(f"{size} bytes are more than an artifact has")
        return parse(Path(path).read_bytes())
    except (InputError, OSError) as error:
        raise InputError(f"{path} is not a usable artifact: {error}") from None


def _open(blob: bytes) -> tuple[ArtifactInfo, memoryview]:
    """Checked header, and the compressed payload."""
    if len(blob) < _PREFIX.size:
        raise InputError(f"{len(blob)} bytes are too few for an artifact (empty or truncated)")
    magic, version, header_bytes, compressed_bytes, _ = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise InputError("it does not start with the magic of an artifact")
    if version != VERSION:
        raise InputError(f"version {version}, this program reads version {VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise InputError(f"it claims a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
    excess = len(blob) - (_PREFIX.size + header_bytes + compressed_bytes)
    if excess:
        raise InputError(f"{excess} trailing bytes" if excess > 0 else f"truncated: {-excess} bytes are missing")
    start = _PREFIX.size + header_bytes
    header, compressed = blob[_PREFIX.size : start], memoryview(blob)[start:]
    if _prefix(header, compressed) != blob[: _PREFIX.size]:
        raise InputError("the SHA-256 does not match: the content is damaged")
    return _parse_header(header, compressed_bytes), compressed


# Header


def _parse_header(text: bytes, compressed_bytes: int) -> ArtifactInfo:
    try:
        fields = json.loads(text)
        expected = {"columns", "compressor", "model", "payload_bytes", "seq_len", "tensors", "tokenizer_sha256"}
        if fields.keys() != expected:
            raise InputError(f"its fields are {sorted(fields)}, expected {sorted(expected)}")
        model = from_dict(ModelConfig, fields["model"], "model")
        formats = _parse_formats(fields["tensors"], parameter_shapes(model))
        check_payload_bytes(formats)
        seq_len, digest, (compressor, level) = (fields[key] for key in ("seq_len", "tokenizer_sha256", "compressor"))
        columns = frozenset(name for name, f in formats.items() if f.quantized and name in fields["columns"])
        info = ArtifactInfo(model, formats, seq_len, digest, compressor, level, columns, compressed_bytes)
        if info.header() != text:
            raise InputError(
                f"it is not in canonical form, or a value contradicts its model config and formats (payload_bytes is "
                f"{fields['payload_bytes']!r}, expected {info.payload_bytes})"
            )
        return info
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"bad header: {str(error)[:1000]}") from None  # the header may be all one name


def _parse_formats(entries: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorFormat]:
    """Formats of the layer groups, in payload order; the groups of each bank hold all its layers, once."""
    banks: dict[str, list[tuple[slice, list]]] = {bank: [] for bank in shapes}
    for name, (_, *format) in entries.items():
        bank, layers = parse_layer_group(name)
        if bank not in banks:
            raise InputError(f"its tensors have {bank}, the model config has {sorted(shapes)}")
        banks[bank].append((layers, format))
    formats = {}
    for bank, shape in shapes.items():
        num_layers = shape[0] if shape else 1
        groups = sorted(banks[bank], key=lambda group: group[0].start or 0)
        spans = [layers.indices(num_layers)[:2] for layers, _ in groups]
        if [start for start, _ in spans] + [num_layers] != [0] + [stop for _, stop in spans]:
            raise InputError(f"the layer groups of tensor {bank} do not hold its {num_layers} layers once each")
        for (start, stop), (_, format) in zip(spans, groups, strict=True):
            group_shape = (stop - start, *shape[1:]) if shape else ()
            formats[layer_group_name(bank, start, stop, num_layers)] = TensorFormat(group_shape, *format)
    return formats


def check_payload_bytes(formats: Mapping[str, TensorFormat]) -> None:
    """Raises InputError for tensors that no artifact holds because they are too large."""
    if payload_bytes(formats) > MAX_PAYLOAD_BYTES:
        raise InputError(f"its tensors take {payload_bytes(formats)} bytes, more than {MAX_PAYLOAD_BYTES}")


# Payload


def _arrays(formats: Mapping[str, TensorFormat]) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(layer group, field of QuantizedTensor, number format, shape) of each array, in payload order."""
    quantized = [(name, format) for name, format in formats.items() if format.quantized]
    yield from ((name, "values", "int8", format.shape) for name, format in quantized)
    yield from ((name, "scale", format.scale, format.scale_shape) for name, format in quantized)
    yield from ((name, "values", f.format, f.shape) for name, f in formats.items() if not f.quantized)


def _row_order(format: TensorFormat, scale: Tensor) -> np.ndarray:
    """Indices of the rows (..., rows, 1) in stored order: by the largest scale of a row, ties in the matrix's order."""
    key = scale.cpu().numpy().reshape(*format.shape[:-1], -1).max(-1)
    return np.argsort(key, axis=-1, kind="stable")[..., None]


def _join(tensors: Mapping[str, QuantizedTensor], columns: Set[str]) -> bytes:
    arrays = []
    for name, field, number, _ in _arrays({name: tensor.format for name, tensor in tensors.items()}):
        tensor = tensors[name]
        array = getattr(tensor, field).cpu().contiguous().numpy().astype(_NUMPY[number])
        if number == "int8":
            array = np.take_along_axis(array, _row_order(tensor.format, tensor.scale), axis=-2)
            array = array.swapaxes(-1, -2) if name in columns else array
        planes = array.reshape(-1, 1).view(np.uint8).T  # (bytes of a number, numbers)
        arrays.append(planes.tobytes())
    return b"".join(arrays)


def _split(payload: np.ndarray, formats: Mapping[str, TensorFormat], columns: Set[str]) -> dict[str, QuantizedTensor]:
    """Tensors of `payload` (uint8, exactly their length); InputError for a value that no encoder writes."""
    fields: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
    for name, field, number, shape in _arrays(formats):
        dtype = np.dtype(_NUMPY[number])
        if number == "int8" and name in columns:
            shape = (*shape[:-2], shape[-1], shape[-2])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        planes, payload = payload[:size].reshape(dtype.itemsize, -1), payload[size:]
        array = np.array(planes.T, order="C").view(dtype).reshape(shape)
        fields[name][field] = torch.from_numpy(array.astype(dtype.newbyteorder("=")))
    for name, tensors in fields.items():
        if formats[name].quantized:
            stored = tensors["values"].mT if name in columns else tensors["values"]
            order = torch.from_numpy(_row_order(formats[name], tensors["scale"])).expand(stored.shape)
            tensors["values"] = torch.empty(stored.shape, dtype=torch.int8).scatter_(-2, order, stored)
        _check_values(name, formats[name], **tensors)
    return {name: QuantizedTensor(formats[name], **tensors) for name, tensors in fields.items()}


def _check_values(name: str, format: TensorFormat, values: Tensor, scale: Tensor | None = None) -> None:
    shapes = tuple(values.shape), None if scale is None else tuple(scale.shape)
    if shapes != (format.shape, format.scale_shape if format.quantized else None):
        raise InputError(f"tensor {name} has values and scales of shapes {shapes}, its format is {format}")
    if not format.quantized:
        if not values.isfinite().all():
            raise InputError(f"tensor {name} holds non-finite weights")
        return
    low, high = (int(bound) for bound in values.aminmax())
    if max(-low - 1, high) > format.max_code:
        raise InputError(f"tensor {name} holds codes {low} to {high}, outside {format.format}")
    if not (scale.isfinite() & (scale > 0)).all():
        raise InputError(f"tensor {name} holds scales that are not positive finite numbers")
    if not (scale.float() * max(-low, high, format.max_code)).isfinite().all():
        raise InputError(f"tensor {name} holds scales whose weights exceed float32")


def _smaller_by_columns(encoded: Mapping[str, QuantizedTensor], compressor: str, level: int | None) -> frozenset[str]:
    """Groups whose codes compress to fewer bytes by columns, each tried alone on its sample: two runs of the compressor
    over max(SAMPLE_CODES, one layer) codes per group, whatever the number of layers."""
    samples = {name: _sample(tensor) for name, tensor in encoded.items() if tensor.format.quantized}
    payloads = [_join({name: sample}, columns) for name, sample in samples.items() for columns in (set(), {name})]
    with ThreadPoolExecutor(2) as pool:
        sizes = [len(found[2]) for found in pool.map(lambda payload: compress(payload, compressor, level), payloads)]
    by_rows, by_columns = sizes[::2], sizes[1::2]
    return frozenset(name for name, a, b in zip(samples, by_rows, by_columns, strict=True) if b < a)


def _sample(tensor: QuantizedTensor) -> QuantizedTensor:
    """The first layers of a bank, the first rows of an embedding."""
    first = slice(max(1, SAMPLE_CODES // tensor.values[0].numel()))
    values, scale = tensor.values[first], tensor.scale[first]
    return QuantizedTensor(replace(tensor.format, shape=tuple(values.shape)), values, scale)
