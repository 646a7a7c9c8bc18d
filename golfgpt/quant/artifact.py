"""`model.golf`: the container of a trained model.

    magic        8 bytes   b"golfgpt\\0"
    version      uint32    5                                     numbers are little-endian
    header       uint32    bytes of the header, at most 1 MB
    compressed   uint64    bytes of the compressed streams
    digest      32 bytes   SHA-256 of everything else, in file order
    header                 canonical JSON: sorted keys, no spaces
    streams                one after another; nothing may follow

The header holds the model config, the training sequence length, the tokenizer's SHA-256, the shape and format of each
layer group (a bank, or some layers of one), the groups whose codes are stored by columns, and the streams, each with
its compressor, level and lengths: all that decoding needs, and nothing of how the weights were made. The streams
decompress to the parts of one payload: the codes of every quantized group, then their scales and corrections, then the
passthrough groups, in the order of the parameter table. There is one stream for everything, or one for the codes of
each bank and one for the rest, whichever is smaller (LOG.md: a few bytes either way). Numbers of two and four bytes are
stored as byte planes (all first bytes, all second bytes, ...): exponents compress and mantissas do not, and keeping
them apart saves 7 to 17 kB of the baseline's 15.8 MB.

The rows of each matrix of codes are stored in the order of their scales, ties in the order of the matrix. Rows of like
scale are alike in their outliers, and compressors adapt to stretches of one distribution. The reader derives the order
from the scales, so it costs nothing. The codes then follow by rows or by columns, whichever is smaller for the group:
inputs differ in size too. Both together save 0.1 to 0.4 percent of the file for models trained here (LOG.md).

Version 4, which has one stream, is read too. Reading trusts no length: each is checked before memory is allocated, and
the streams must decompress to as many bytes as the shapes add up to. Every defect is an InputError that names it. The
digest finds damage; it does not authenticate. There is no pickle and no code in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from golfgpt.config import ModelConfig, QuantConfig, from_dict, to_dict
from golfgpt.errors import InputError
from golfgpt.files import parse_json, write_bytes
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant.codecs import CODECS, compress, decompress, most_bytes
from golfgpt.quant.formats import (
    QuantizedTensor,
    TensorFormat,
    TensorReport,
    decode,
    layer_group_name,
    parse_layer_group,
    payload_bytes,
    tensor_report,
)
from golfgpt.quant.quantizer import Quantizer

MAGIC = b"golfgpt\0"
VERSION, OLDEST = 5, 4
"""The version that is written, and the oldest that is read. A release with new fields of ModelConfig raises both."""
MAX_STREAMS = 64
MAX_HEADER_BYTES = 10**6
MAX_PAYLOAD_BYTES = 256 * 2**20
"""Largest payload, compressed or not."""
MAX_SEQ_LEN = 2**31 - 1

SAMPLE_CODES = 2**18
"""A group's layout is chosen on its first layers up to this many codes, at least one layer."""

_SPLIT_BYTES = 120
"""A further layer group in the header, at most: its name, twice, shape and format."""
_PREFIX = struct.Struct("<8sIIQ32s")
_DIGEST_BYTES = hashlib.sha256().digest_size
_NUMPY = {"int8": "i1", "float16": "<f2", "float32": "<f4"}


class Stream(NamedTuple):
    """A part of the payload, compressed."""

    compressor: str
    level: int
    payload_bytes: int
    compressed_bytes: int


@dataclass(frozen=True)
class ArtifactInfo:
    """What the header of an artifact says."""

    model: ModelConfig
    formats: dict[str, TensorFormat]
    """Layer group -> format, in payload order."""
    seq_len: int
    """Tokens per training sequence."""
    tokenizer_sha256: str
    streams: tuple[Stream, ...]
    columns: frozenset[str]
    """Groups whose codes are stored column after column; those of all others, row after row."""
    version: int = VERSION

    def __post_init__(self) -> None:
        """Raises InputError for what no header holds."""
        if not re.fullmatch("[0-9a-f]{64}", self.tokenizer_sha256):
            raise InputError(f"tokenizer_sha256 {self.tokenizer_sha256!r}, expected 64 hexadecimal digits")
        if not 1 <= len(self.streams) <= MAX_STREAMS:
            raise InputError(f"{len(self.streams)} streams, expected 1 to {MAX_STREAMS}")
        numbers = [("seq_len", self.seq_len, 1, MAX_SEQ_LEN)]
        for compressor, level, payload, compressed in self.streams:
            if compressor not in CODECS:
                raise InputError(f"compressor {compressor!r}, expected one of {', '.join(CODECS)}")
            numbers.append(("level", level, 0, CODECS[compressor].level))
            numbers.append(("payload_bytes", payload, 0, MAX_PAYLOAD_BYTES))
            numbers.append(("compressed_bytes", compressed, 0, 2 * MAX_PAYLOAD_BYTES))
        for name, value, low, high in numbers:
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} {value!r}, expected an integer in {low}..{high}")
        if (total := sum(stream.payload_bytes for stream in self.streams)) != self.payload_bytes:
            raise InputError(f"its streams hold {total} bytes, its tensors take {self.payload_bytes}")

    def header(self) -> bytes:
        """Canonical JSON."""
        packing = {"streams": self.streams}
        if self.version == 4:
            packing = {"compressor": self.streams[0][:2], "payload_bytes": self.payload_bytes}
        fields = {
            "columns": [name for name in self.formats if name in self.columns],
            "model": to_dict(self.model),
            "seq_len": self.seq_len,
            "tensors": {name: _entry(format) for name, format in self.formats.items()},
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        text = json.dumps(fields | packing, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @property
    def compressor(self) -> str:
        """Those of the streams, as brotli or brotli/lzma."""
        return "/".join(sorted({stream.compressor for stream in self.streams}))

    @property
    def packing(self) -> str:
        """Compressors with levels, and the number of streams."""
        kinds = sorted({f"{stream.compressor} level {stream.level}" for stream in self.streams})
        return ", ".join(kinds) + (f" ({len(self.streams)} streams)" if len(self.streams) > 1 else "")

    @property
    def compressed_bytes(self) -> int:
        return sum(stream.compressed_bytes for stream in self.streams)

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
    encoded: dict[str, QuantizedTensor]
    """Layer group -> codes with scales, or weights; in all as large as the payload."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Bank name -> fp32 weights, decoded now."""
        return decode(self.encoded)

    def load_into(self, model: nn.Module) -> None:
        """Decode the weights into the parameters of `model`, which has no other copy of them."""
        with torch.no_grad():
            decode(self.encoded, dict(model.named_parameters()))


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
        _check_values(tensor, name)
    columns = _smaller_by_columns(encoded, quant.compressor, quant.level)
    streams, compressed = _compress(_parts(encoded, columns), quant.compressor, quant.level)
    header = ArtifactInfo(model, formats, seq_len, tokenizer_sha256, streams, columns).header()
    return _prefix(header, compressed) + header + compressed


def _entry(format: TensorFormat) -> list:
    """A format in the header: its fields, without those at the end that are None."""
    fields = list(astuple(format))
    while fields[-1] is None:
        fields.pop()
    return fields


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
    encoded = split(payload(info.streams, compressed), info.formats, info.columns)
    for name, tensor in encoded.items():
        # what a correction adds
        if tensor.left is not None and not all(x.dequantize().isfinite().all() for _, x in tensor.pieces()):
            raise InputError(f"tensor {name} has weights that exceed float32")
    return Artifact(info, encoded)


def header_bytes(quantizer: Quantizer) -> int:
    """Bytes of an artifact beside its compressed payload, at most."""
    columns = frozenset(name for name, format in quantizer.formats.items() if format.quantized)
    streams = [Stream("brotli", 11, payload_bytes(quantizer.formats), 0)]
    streams += [Stream("brotli", 11, 0, 10**8)] * len({parse_layer_group(name)[0] for name in columns})
    # A matrix with wide columns or a correction splits its layer group in three.
    config = quantizer.config
    split = 2 * _SPLIT_BYTES * (bool(config.wide_columns) + bool(config.low_rank) * config.low_rank_tensors)
    info = ArtifactInfo(quantizer.model, quantizer.formats, 10**6, "0" * 64, tuple(streams), columns)
    return _PREFIX.size + info.header_bytes + split


# Container


def _prefix(header: bytes, compressed: bytes | memoryview, version: int = VERSION) -> bytes:
    lengths = _PREFIX.pack(MAGIC, version, len(header), len(compressed), b"")[:-_DIGEST_BYTES]
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
    header, compressed, version = sections(blob)
    return _parse_header(header, len(compressed), version), compressed


def sections(blob: bytes) -> tuple[bytes, memoryview, int]:
    """Header, compressed payload and version of an artifact whose lengths and digest are right. Raises InputError."""
    if len(blob) < _PREFIX.size:
        raise InputError(f"{len(blob)} bytes are too few for an artifact (empty or truncated)")
    magic, version, header_bytes, compressed_bytes, _ = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise InputError("it does not start with the magic of an artifact")
    if not OLDEST <= version <= VERSION:
        raise InputError(f"version {version}, this program reads versions {OLDEST} to {VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise InputError(f"it claims a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
    excess = len(blob) - (_PREFIX.size + header_bytes + compressed_bytes)
    if excess:
        raise InputError(f"{excess} trailing bytes" if excess > 0 else f"truncated: {-excess} bytes are missing")
    start = _PREFIX.size + header_bytes
    header, compressed = blob[_PREFIX.size : start], memoryview(blob)[start:]
    if _prefix(header, compressed, version) != blob[: _PREFIX.size]:
        raise InputError("the SHA-256 does not match: the content is damaged")
    return header, compressed, version


# Header


def _parse_header(text: bytes, compressed_bytes: int, version: int) -> ArtifactInfo:
    try:
        fields = parse_json(text, dict)
        packing = {"compressor", "payload_bytes"} if version == 4 else {"streams"}
        expected = {"columns", "model", "seq_len", "tensors", "tokenizer_sha256"} | packing
        if fields.keys() != expected:
            raise InputError(f"its fields are {sorted(fields)}, expected {sorted(expected)}")
        model = from_dict(ModelConfig, fields["model"], "model")
        formats = _parse_formats(fields["tensors"], parameter_shapes(model))
        check_payload_bytes(formats)
        seq_len, digest = fields["seq_len"], fields["tokenizer_sha256"]
        columns = frozenset(name for name, f in formats.items() if f.quantized and name in fields["columns"])
        if version == 4:
            fields["streams"] = [[*fields["compressor"], payload_bytes(formats), compressed_bytes]]
        streams = tuple(Stream(*stream) for stream in fields["streams"][: MAX_STREAMS + 1])
        info = ArtifactInfo(model, formats, seq_len, digest, streams, columns, version)
        if info.payload_bytes > (most := most_bytes(compressed_bytes)):
            raise InputError(f"its tensors take {info.payload_bytes} bytes, {compressed_bytes} hold at most {most}")
        if info.compressed_bytes != compressed_bytes:
            raise InputError(f"its streams have {info.compressed_bytes} bytes, the file {compressed_bytes}")
        if info.header() != text:
            raise InputError("it is not in canonical form, or a value contradicts its model config and formats")
        return info
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
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


def payload(streams: Sequence[Stream], compressed: memoryview, compressor: str | None = None) -> np.ndarray:
    """What the streams decompress to, uint8; `compressor`: that of all streams, where it is known."""
    parts = []
    for stream in streams:
        piece, compressed = compressed[: stream.compressed_bytes], compressed[stream.compressed_bytes :]
        parts.append(np.frombuffer(decompress(compressor or stream.compressor, piece, stream.payload_bytes), np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _arrays(formats: Mapping[str, TensorFormat]) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(layer group, field of QuantizedTensor, number format, shape) of each array, in payload order."""
    quantized = {name: format.arrays for name, format in formats.items() if format.quantized}
    yield from ((name, "values", *arrays["values"]) for name, arrays in quantized.items())
    for name, arrays in quantized.items():
        yield from ((name, field, *array) for field, array in arrays.items() if field != "values")
    yield from ((name, "values", f.format, f.shape) for name, f in formats.items() if not f.quantized)


def _row_order(format: TensorFormat, scale: Tensor) -> np.ndarray:
    """Indices of the rows (..., rows, 1) in stored order: by the largest scale of a row, ties in the matrix's order."""
    key = scale.cpu().numpy().reshape(*format.shape[:-1], -1).max(-1)
    return np.argsort(key, axis=-1, kind="stable")[..., None]


def _parts(tensors: Mapping[str, QuantizedTensor], columns: Set[str]) -> list[bytes]:
    """The payload in parts: the codes of each bank, and the rest."""
    parts: dict[str, list[bytes]] = {}
    for name, field, number, _ in _arrays({name: tensor.format for name, tensor in tensors.items()}):
        tensor = tensors[name]
        array = getattr(tensor, field).cpu().contiguous().numpy().astype(_NUMPY[number])
        is_codes = field == "values" and tensor.format.quantized
        if is_codes:
            array = np.take_along_axis(array, _row_order(tensor.format, tensor.scale), axis=-2)
            array = array.swapaxes(-1, -2) if name in columns else array
        planes = array.reshape(-1, 1).view(np.uint8).T  # (bytes of a number, numbers)
        parts.setdefault(parse_layer_group(name)[0] if is_codes else "", []).append(planes.tobytes())
    rest = parts.pop("", [])
    return [b"".join(arrays) for arrays in (*parts.values(), rest) if arrays]


def _compress(parts: Sequence[bytes], compressor: str, level: int | None) -> tuple[tuple[Stream, ...], bytes]:
    """The streams of one payload, all in one or part by part, whichever gives fewer bytes."""
    found = []
    for pieces in ([b"".join(parts)], parts) if len(parts) > 1 else (parts,):
        results = [compress(piece, compressor, level) for piece in pieces]
        streams = [Stream(name, used, len(p), len(c)) for p, (name, used, c) in zip(pieces, results, strict=True)]
        found.append((tuple(streams), b"".join(result[2] for result in results)))
    return min(found, key=lambda way: len(way[1]) + len(json.dumps(way[0])))


def split(payload: np.ndarray, formats: Mapping[str, TensorFormat], columns: Set[str]) -> dict[str, QuantizedTensor]:
    """Tensors of `payload` (uint8, exactly their length); InputError for a value that no encoder writes."""
    fields: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
    for name, field, number, shape in _arrays(formats):
        dtype = np.dtype(_NUMPY[number])
        if field == "values" and name in columns:
            shape = (*shape[:-2], shape[-1], shape[-2])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        planes, payload = payload[:size].reshape(dtype.itemsize, -1), payload[size:]
        array = planes if dtype.itemsize == 1 else np.array(planes.T, order="C")
        array = array.view(dtype).reshape(shape)
        fields[name][field] = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
    for name, tensors in fields.items():
        if formats[name].quantized:
            stored = tensors["values"].mT if name in columns else tensors["values"]
            order = torch.from_numpy(_row_order(formats[name], tensors["scale"])).expand(stored.shape)
            tensors["values"] = torch.empty(stored.shape, dtype=torch.int8).scatter_(-2, order, stored)
    found = {name: QuantizedTensor(formats[name], **tensors) for name, tensors in fields.items()}
    for name, tensor in found.items():
        _check_values(tensor, name)
    return found


def _check_values(tensor: QuantizedTensor, name: str) -> None:
    format = tensor.format
    shapes = {field: tuple(array.shape) for field, array in tensor.arrays.items()}
    if shapes != {field: shape for field, (_, shape) in format.arrays.items()}:
        raise InputError(f"tensor {name} has arrays of shapes {shapes}, its format is {format}")
    for field, array in tensor.arrays.items():
        if array.is_floating_point():
            low, high = map(float, array.aminmax()) if array.numel() else (1.0, 1.0)  # both NaN if any number is
            if not format.quantized:
                if not math.isfinite(high - low):
                    raise InputError(f"tensor {name} holds non-finite weights")
            elif not 0 < low <= high < math.inf:
                raise InputError(f"tensor {name} holds scales that are not positive finite numbers")
            elif high * 128 > torch.finfo(torch.float32).max:
                raise InputError(f"tensor {name} holds scales whose weights exceed float32")
            continue
        if field == "values" and format.wide is not None:
            narrow = torch.ones(array.size(-1), dtype=torch.bool)
            narrow[format.wide : format.wide + format.wide_columns] = False
            array = array[..., narrow]
        low, high = (int(bound) for bound in array.aminmax()) if array.numel() else (0, 0)
        most = format.max_code if field == "values" else 7
        if max(-low - 1, high) > most:
            raise InputError(f"tensor {name} holds codes {low} to {high}, outside {format.format} ({field})")


def _smaller_by_columns(encoded: Mapping[str, QuantizedTensor], compressor: str, level: int | None) -> frozenset[str]:
    """Groups whose codes compress to fewer bytes by columns, each tried alone on its sample: two runs of the compressor
    over max(SAMPLE_CODES, one layer) codes per group, whatever the number of layers."""
    samples = {name: _sample(tensor) for name, tensor in encoded.items() if tensor.format.quantized}
    payloads = [
        b"".join(_parts({name: sample}, columns)) for name, sample in samples.items() for columns in (set(), {name})
    ]
    with ThreadPoolExecutor(2) as pool:
        sizes = [len(found[2]) for found in pool.map(lambda payload: compress(payload, compressor, level), payloads)]
    by_rows, by_columns = sizes[::2], sizes[1::2]
    return frozenset(name for name, a, b in zip(samples, by_rows, by_columns, strict=True) if b < a)


def _sample(tensor: QuantizedTensor) -> QuantizedTensor:
    """The first layers of a bank, the first rows of an embedding."""
    first = slice(max(1, SAMPLE_CODES // tensor.values[0].numel()))
    values, scale = tensor.values[first], tensor.scale[first]
    format = replace(tensor.format, shape=tuple(values.shape), wide=None, wide_columns=None, rank=None, rank_group=None)
    return QuantizedTensor(format, values, scale)
