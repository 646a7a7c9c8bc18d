"""`model.golf`: the container of a trained model, and the byte budget that it must fit.

    magic        8 bytes   b"golfgpt\\0"
    version      uint32    3                                     numbers are little-endian
    header       uint32    bytes of the header, at most 1 MB
    compressed   uint64    bytes of the compressed payload
    digest      32 bytes   SHA-256 of everything else, in file order
    header                 canonical JSON: sorted keys, no spaces
    compressed payload     nothing may follow

The header holds the model config, the training sequence length, the tokenizer's SHA-256, the shape and format of
each part (a bank, or some layers of one), the parts whose codes are stored by columns, the compressor with its level,
and the exact payload length: all that decoding needs, and nothing of how the weights were made. The payload holds the
codes of every quantized part, then the scales, then the kept parts, in the order of the parameter table. Numbers of
two and four bytes are stored as byte planes (all first bytes, all second bytes, ...): exponents compress and
mantissas do not, and keeping them apart saves 7 to 17 kB of the baseline's 15.8 MB.

The rows of each matrix of codes are stored in the order of their scales, ties as they come. Rows of like scale are
alike in their outliers, and compressors adapt to stretches of one distribution. The reader derives the order from the
scales, so it costs nothing. The codes then follow by rows or by columns, whichever is smaller for the part: inputs
differ in size too. Both together save 0.1 to 0.4 percent of the file for models trained here (LOG.md).

Reading trusts no length: each is checked before memory is allocated, and decompression stops at the stated
payload length, which must be what the shapes add up to. Every defect is an InputError that names it. The
digest finds damage; it does not authenticate. There is no pickle and no code in the file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from golfgpt.config import BudgetConfig, ModelConfig, QuantConfig, from_dict, to_dict
from golfgpt.errors import BudgetError, InputError
from golfgpt.files import write_bytes
from golfgpt.model.parameters import parameter_shapes
from golfgpt.quant.quantizer import (
    QuantizedTensor,
    Quantizer,
    TensorFormat,
    TensorReport,
    join,
    parse_part,
    payload_bytes,
    tensor_report,
)

MAGIC = b"golfgpt\0"
VERSION = 3
"""2 until layers of one bank could differ in format and codes had layouts."""
MAX_HEADER_BYTES = 10**6
MAX_PAYLOAD_BYTES = 256 * 2**20
"""Largest payload, compressed or not."""

MAX_SEQ_LEN = 2**31 - 1

SAMPLE_CODES = 2**18
"""A part's layout is chosen on its first layers up to this many codes, at least one layer."""

_PREFIX = struct.Struct("<8sIIQ32s")
_DIGEST_BYTES = hashlib.sha256().digest_size
_NUMPY = {"int8": "i1", "float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True)
class ArtifactInfo:
    """What the header of an artifact says, and the sizes of its parts in bytes."""

    model: ModelConfig
    formats: dict[str, TensorFormat]
    """Part name -> format, in payload order."""
    seq_len: int
    """Tokens per training sequence."""
    tokenizer_sha256: str
    compressor: str
    level: int
    columns: frozenset[str]
    """Parts whose codes are stored column after column; those of all others, row after row."""
    header_bytes: int
    compressed_bytes: int

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
        """One line per bank, without errors: those need the weights before quantization."""
        return [tensor_report(name, format) for name, format in self.formats.items()]


@dataclass(frozen=True)
class Artifact:
    info: ArtifactInfo
    state: dict[str, Tensor]
    """Bank name -> fp32 weights, decoded."""


def pack(
    state: Mapping[str, Tensor],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    tokenizer_sha256: str,
    seq_len: int,
) -> bytes:
    """Bytes of the artifact of `state` (banks of any float dtype); equal for equal state and libraries.

    Raises InputError for weights that cannot be stored, a payload above MAX_PAYLOAD_BYTES, a malformed
    digest, and a compressor that is not installed: another in its place would change the size unnoticed.
    """
    encoded = Quantizer(model, quant).encode(state)
    return seal(encoded, model=model, quant=quant, tokenizer_sha256=tokenizer_sha256, seq_len=seq_len)


def seal(
    encoded: Mapping[str, QuantizedTensor],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    tokenizer_sha256: str,
    seq_len: int,
) -> bytes:
    """`pack` of parts that are quantized already; of `quant` the compressor and its level count."""
    formats = {name: tensor.format for name, tensor in encoded.items()}
    check_payload_bytes(formats)
    for name, tensor in encoded.items():
        _check_values(name, tensor.format, tensor.values, tensor.scale)
    if not re.fullmatch("[0-9a-f]{64}", tokenizer_sha256) or not 1 <= seq_len <= MAX_SEQ_LEN:
        raise InputError(f"tokenizer_sha256 {tokenizer_sha256!r} or seq_len {seq_len} cannot be stored")
    columns = _columns(encoded, quant.compressor, quant.level)
    compressor, level, compressed = compress(_join(encoded, columns), quant.compressor, quant.level)
    return _assemble(_header(model, formats, seq_len, tokenizer_sha256, compressor, level, columns), compressed)


def write(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    tokenizer_sha256: str,
    seq_len: int,
) -> ArtifactInfo:
    """Write the artifact of `state` atomically: on any failure `path` keeps what it held.

    Raises as `pack`, and OSError as the file system reports it (a full disk).
    """
    blob = pack(state, model=model, quant=quant, tokenizer_sha256=tokenizer_sha256, seq_len=seq_len)
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
    payload = _decompress(info.compressor, compressed, info.payload_bytes)
    tensors = _split(payload, info.formats, info.columns)
    return Artifact(info, join({name: tensor.decode() for name, tensor in tensors.items()}))


def header_bytes(quantizer: Quantizer) -> int:
    """Bytes of an artifact beside its compressed payload."""
    columns = {name for name, format in quantizer.formats.items() if format.quantized}
    longest = _header(quantizer.model, quantizer.formats, 10**6, "0" * 64, "brotli", 11, columns)
    return _PREFIX.size + len(longest)


# Container


def _assemble(header: bytes, compressed: bytes) -> bytes:
    lengths = _PREFIX.pack(MAGIC, VERSION, len(header), len(compressed), b"")[:-_DIGEST_BYTES]
    return lengths + _digest(lengths, header, compressed) + header + compressed


def _digest(*parts: bytes | memoryview) -> bytes:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.digest()


def _check_prefix(prefix: bytes, file_bytes: int) -> tuple[int, int]:
    """Lengths of header and compressed payload, bounded and adding up to the size of the file."""
    if len(prefix) < _PREFIX.size:
        raise InputError(f"{file_bytes} bytes are too few for an artifact (empty or truncated)")
    magic, version, header_bytes, compressed_bytes, _ = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise InputError("it does not start with the magic of an artifact")
    if version != VERSION:
        raise InputError(f"version {version}, this program reads version {VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise InputError(f"it claims a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
    if compressed_bytes > MAX_PAYLOAD_BYTES:
        raise InputError(f"it claims a payload of {compressed_bytes} bytes, more than {MAX_PAYLOAD_BYTES}")
    excess = file_bytes - (_PREFIX.size + header_bytes + compressed_bytes)
    if excess:
        raise InputError(f"{excess} trailing bytes" if excess > 0 else f"truncated: {-excess} bytes are missing")
    return header_bytes, compressed_bytes


def _with_path(path: str | Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        if not Path(path).is_file():
            raise InputError("no such file")
        with open(path, "rb") as file:
            _check_prefix(file.read(_PREFIX.size), Path(path).stat().st_size)
            file.seek(0)
            return parse(file.read())
    except (InputError, OSError) as error:
        raise InputError(f"{path} is not a usable artifact: {error}") from None


def _open(blob: bytes) -> tuple[ArtifactInfo, memoryview]:
    """Checked header, and the compressed payload."""
    header_bytes, compressed_bytes = _check_prefix(blob[: _PREFIX.size], len(blob))
    lengths, body = blob[: _PREFIX.size - _DIGEST_BYTES], memoryview(blob)[_PREFIX.size :]
    if _digest(lengths, body) != blob[len(lengths) : _PREFIX.size]:
        raise InputError("the SHA-256 does not match: the content is damaged")
    return _parse_header(bytes(body[:header_bytes]), compressed_bytes), body[header_bytes:]


# Header


def _header(
    model: ModelConfig,
    formats: Mapping[str, TensorFormat],
    seq_len: int,
    tokenizer_sha256: str,
    compressor: str,
    level: int,
    columns: Set[str],
) -> bytes:
    fields = {
        "columns": [name for name in formats if name in columns],
        "compressor": [compressor, level],
        "model": to_dict(model),
        "payload_bytes": payload_bytes(formats),
        "seq_len": seq_len,
        "tensors": {
            name: [format.shape, format.format, *(item for item in (format.scale, format.group) if item is not None)]
            for name, format in formats.items()
        },
        "tokenizer_sha256": tokenizer_sha256,
    }
    return _canonical(fields)


def _canonical(fields: Any) -> bytes:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _parse_header(text: bytes, compressed_bytes: int) -> ArtifactInfo:
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
        if _canonical(fields) != text:
            raise InputError("it is not canonical JSON")
        expected = {"columns", "compressor", "model", "payload_bytes", "seq_len", "tensors", "tokenizer_sha256"}
        if not isinstance(fields, dict) or fields.keys() != expected:
            raise InputError(f"its fields are {sorted(fields)}, expected {sorted(expected)}")
        model = from_dict(ModelConfig, fields["model"], "model.")
        formats = _parse_formats(fields["tensors"], parameter_shapes(model))
        check_payload_bytes(formats)
        if fields["payload_bytes"] != payload_bytes(formats):
            raise InputError(
                f"payload_bytes {fields['payload_bytes']!r}, but its tensors take {payload_bytes(formats)}"
            )
        compressor, level = fields["compressor"]
        if compressor not in CODECS:
            raise InputError(f"unknown compressor {compressor!r}")
        columns = frozenset(fields["columns"])
        if unknown := columns - {name for name, format in formats.items() if format.quantized}:
            raise InputError(f"columns names {sorted(unknown)}, which are not quantized tensors")
        seq_len, digest = fields["seq_len"], fields["tokenizer_sha256"]
        for what, value, low, high in (
            ("level", level, 0, CODECS[compressor].level), ("seq_len", seq_len, 1, MAX_SEQ_LEN)
        ):  # fmt: skip
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{what} is not an integer in {low}..{high}")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise InputError(f"tokenizer_sha256 {digest!r} is not a SHA-256")
        info = ArtifactInfo(model, formats, seq_len, digest, compressor, level, columns, len(text), compressed_bytes)
        if _header(model, formats, seq_len, digest, compressor, level, columns) != text:
            raise InputError("a value is not written in canonical form")  # 9.0 for a shape's 9, 30 for 30.0
        return info
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"bad header: {str(error)[:1000]}") from None  # the header may be all one name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InputError(f"duplicate name {name!r}")
        fields[name] = value
    return fields


def _parse_formats(entries: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorFormat]:
    """Formats of the parts, in payload order; the parts of each bank hold all its layers, once."""
    if not isinstance(entries, dict):
        raise InputError(f"its tensors are {entries!r}")
    formats, found = {}, {}
    for part in sorted(entries, key=lambda part: (parse_part(part)[0], parse_part(part)[1].start or 0)):
        found.setdefault(parse_part(part)[0], []).append(part)
    if found.keys() != shapes.keys():
        raise InputError(f"its tensors are {sorted(found)}, the model config has {sorted(shapes)}")
    for bank, expected in shapes.items():
        end = 0
        for part in found[bank]:
            shape, *format = entries[part]
            layers = parse_part(part)[1]
            if layers != slice(None):
                if not expected or layers.start != end or not end < layers.stop <= expected[0]:
                    raise InputError(f"the parts of tensor {bank} are {found[bank]}, it has shape {list(expected)}")
                if len(found[bank]) == 1:
                    raise InputError(f"the part {part} is all there is of tensor {bank}")
                end = layers.stop
            elif len(found[bank]) > 1:
                raise InputError(f"the parts of tensor {bank} are {found[bank]}")
            wanted = expected if layers == slice(None) else (layers.stop - layers.start, *expected[1:])
            if shape != list(wanted):
                raise InputError(f"tensor {part} has shape {shape}, the model config implies {list(wanted)}")
            formats[part] = TensorFormat(wanted, *format)
        if end not in (0, expected[0] if expected else 0):
            raise InputError(f"the parts of tensor {bank} are {found[bank]}, it has shape {list(expected)}")
    return formats


def check_payload_bytes(formats: Mapping[str, TensorFormat]) -> None:
    """Raises InputError for tensors that no artifact holds because they are too large."""
    if payload_bytes(formats) > MAX_PAYLOAD_BYTES:
        raise InputError(f"its tensors take {payload_bytes(formats)} bytes, more than {MAX_PAYLOAD_BYTES}")


# Payload


def _arrays(formats: Mapping[str, TensorFormat]) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(bank, part, number format, shape) of each array, in payload order."""
    quantized = {name: format for name, format in formats.items() if format.quantized}
    kept = {name: format for name, format in formats.items() if not format.quantized}
    yield from ((name, "values", "int8", format.shape) for name, format in quantized.items())
    yield from ((name, "scale", format.scale, format.scale_shape) for name, format in quantized.items())
    yield from ((name, "values", format.format, format.shape) for name, format in kept.items())


def _row_order(format: TensorFormat, scale: Tensor) -> np.ndarray:
    """Indices of the rows (..., rows, 1) in stored order: by scale, or the largest of a row's, ties as they come."""
    key = scale.cpu().numpy().reshape(*format.shape[:-1], -1).max(-1)
    return np.argsort(key, axis=-1, kind="stable")[..., None]


def _join(tensors: Mapping[str, QuantizedTensor], columns: Set[str]) -> bytes:
    parts = []
    for name, part, number, _ in _arrays({name: tensor.format for name, tensor in tensors.items()}):
        tensor = tensors[name]
        array = getattr(tensor, part).cpu().contiguous().numpy().astype(_NUMPY[number])
        if tensor.format.quantized and part == "values":
            array = np.take_along_axis(array, _row_order(tensor.format, tensor.scale), axis=-2)
            array = array.swapaxes(-1, -2) if name in columns else array
        planes = array.reshape(-1, 1).view(np.uint8).T  # (bytes of a number, numbers)
        parts.append(planes.tobytes())
    return b"".join(parts)


def _split(payload: np.ndarray, formats: Mapping[str, TensorFormat], columns: Set[str]) -> dict[str, QuantizedTensor]:
    """Tensors of `payload` (uint8, exactly their length); InputError for a value that no encoder writes."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
    for name, part, number, shape in _arrays(formats):
        dtype = np.dtype(_NUMPY[number])
        if number == "int8" and name in columns:
            shape = (*shape[:-2], shape[-1], shape[-2])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        planes, payload = payload[:size].reshape(dtype.itemsize, -1), payload[size:]
        array = np.array(planes.T, order="C").view(dtype).reshape(shape)
        parts[name][part] = torch.from_numpy(array.astype(dtype.newbyteorder("=")))
    for name, tensors in parts.items():
        if formats[name].quantized:
            stored = tensors["values"].mT if name in columns else tensors["values"]
            order = torch.from_numpy(_row_order(formats[name], tensors["scale"])).expand(stored.shape)
            tensors["values"] = torch.empty(stored.shape, dtype=torch.int8).scatter_(-2, order, stored)
        _check_values(name, formats[name], **tensors)
    return {name: QuantizedTensor(formats[name], **tensors) for name, tensors in parts.items()}


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


# Compressors. Each decoder yields chunks, so that memory stays near the stated payload length whatever
# the stream decodes to; where a library has a limit of its own it is used per chunk.

_CHUNK = 2**20


class MissingPackageError(InputError):
    """A compressor's package is not installed."""


class Codec(NamedTuple):
    level: int
    """The highest."""
    compress: Callable[[bytes, int], bytes]
    """(payload, level) -> compressed."""
    chunks: Callable[[memoryview, int], Iterator[bytes]]
    """(compressed, payload length) -> decompressed chunks; raises for a stream that ends early or late."""


def _zlib_compress(payload: bytes, level: int) -> bytes:
    # Raw deflate; memLevel 9 doubles the symbols per block, 35 kB less than the default for the baseline. Matches in
    # noise cost more than they save: codes of 5 and 6 bits take 4 to 7 percent less with Huffman codes alone.
    streams = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        stream = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        streams.append(stream.compress(payload) + stream.flush())
    return min(streams, key=len)


def _zlib_chunks(compressed: memoryview, size: int) -> Iterator[bytes]:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    for piece in _pieces(compressed):
        _check_end(True, piece if stream.eof else b"")
        while piece and not stream.eof:  # past the end, unconsumed_tail never empties
            yield stream.decompress(piece, _CHUNK)
            piece = stream.unconsumed_tail
    yield stream.flush()
    _check_end(stream.eof, stream.unused_data)


def _zstd_compress(payload: bytes, level: int) -> bytes:
    zstandard = _optional("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(payload))
    return zstandard.ZstdCompressor(compression_params=parameters).compress(payload)


def _zstd_chunks(compressed: memoryview, size: int) -> Iterator[bytes]:
    # max_output_size is ignored for a frame that declares its size, so the declaration is what to check.
    zstandard = _optional("zstandard")
    declared = zstandard.frame_content_size(compressed)
    if declared != size:
        raise InputError(f"the zstd frame declares {declared} bytes, the header {size}")
    yield zstandard.ZstdDecompressor().decompress(compressed, allow_extra_data=False)


def _lzma_filters(size: int, level: int = 9) -> list[dict[str, int]]:
    # Raw LZMA1: 10 kB less than xz's blocks for the baseline. The window bounds the decoder's memory. Codes depend
    # neither on the byte before nor on their position: without these contexts 0.1 to 0.7 percent less.
    window = min(max(size, 4096), 32 * 2**20)
    return [{"id": lzma.FILTER_LZMA1, "preset": level | lzma.PRESET_EXTREME, "dict_size": window, "lc": 0, "pb": 0}]


def _lzma_compress(payload: bytes, level: int) -> bytes:
    return lzma.compress(payload, format=lzma.FORMAT_RAW, filters=_lzma_filters(len(payload), level))


def _lzma_chunks(compressed: memoryview, size: int) -> Iterator[bytes]:
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(size))
    for piece in _pieces(compressed):
        yield stream.decompress(piece, _CHUNK)  # EOFError past the end of the stream
        while not stream.eof and not stream.needs_input:
            yield stream.decompress(b"", _CHUNK)
    _check_end(stream.eof, stream.unused_data)


def _brotli_compress(payload: bytes, level: int) -> bytes:
    return _optional("brotli").compress(payload, quality=level, lgwin=24)


def _brotli_chunks(compressed: memoryview, size: int) -> Iterator[bytes]:
    stream = _optional("brotli").Decompressor()
    for piece in _pieces(compressed):
        yield stream.process(piece, output_buffer_limit=_CHUNK)  # brotli.error past the end of the stream
        # It can accept more data while it still holds output, so that is no sign that all of it was handed out.
        while not stream.is_finished() and (chunk := stream.process(b"", output_buffer_limit=_CHUNK)):
            yield chunk
    _check_end(stream.is_finished(), b"")


CODECS = {
    "zlib": Codec(9, _zlib_compress, _zlib_chunks),
    "zstd": Codec(22, _zstd_compress, _zstd_chunks),
    "lzma": Codec(9, _lzma_compress, _lzma_chunks),
    "brotli": Codec(11, _brotli_compress, _brotli_chunks),
}


def _pieces(compressed: memoryview) -> Iterator[memoryview]:
    return (compressed[start : start + _CHUNK] for start in range(0, len(compressed), _CHUNK))


def _check_end(ended: bool, unused: bytes) -> None:
    if not ended:
        raise InputError("the compressed stream is truncated")
    if unused:
        raise InputError("bytes follow the compressed stream")


def require_compressor(compressor: str) -> None:
    """Raises InputError now rather than after training when `compressor` needs a package that is missing."""
    for name in ("zstd", "brotli") if compressor == "smallest" else (compressor,):
        if name in ("zstd", "brotli"):
            try:
                _optional({"zstd": "zstandard"}.get(name, name))
            except MissingPackageError as error:
                raise InputError(f"quant.compressor {compressor}: {error}, or choose another") from None


def _optional(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingPackageError(f"the package {module} is missing: install it") from None


def compress(payload: bytes, compressor: str, level: int | None = None) -> tuple[str, int, bytes]:
    """(name, level, compressed payload); "smallest" tries all, in threads, and prefers the first of equals."""
    names = list(CODECS) if compressor == "smallest" else [compressor]
    levels = [CODECS[name].level if level is None else level for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda name, level: CODECS[name].compress(payload, level), names, levels))
    return min(zip(names, levels, results, strict=True), key=lambda result: len(result[2]))


def _columns(encoded: Mapping[str, QuantizedTensor], compressor: str, level: int | None) -> set[str]:
    """Parts whose codes compress to fewer bytes by columns, each tried alone on its sample: two runs of the compressor
    over max(SAMPLE_CODES, one layer) codes a part, whatever the number of layers."""
    samples = {name: _sample(tensor) for name, tensor in encoded.items() if tensor.format.quantized}
    payloads = [_join({name: sample}, columns) for name, sample in samples.items() for columns in (set(), {name})]
    with ThreadPoolExecutor(2) as pool:
        sizes = [len(found[2]) for found in pool.map(lambda payload: compress(payload, compressor, level), payloads)]
    return {name for name, rows, columns in zip(samples, sizes[::2], sizes[1::2], strict=True) if columns < rows}


def _sample(tensor: QuantizedTensor) -> QuantizedTensor:
    """The first layers of a bank, the first rows of an embedding."""
    first = slice(max(1, SAMPLE_CODES // tensor.values[0].numel()))
    values, scale = tensor.values[first], tensor.scale[first]
    return QuantizedTensor(replace(tensor.format, shape=tuple(values.shape)), values, scale)


def _decompress(compressor: str, compressed: memoryview, size: int) -> np.ndarray:
    """Payload as uint8 (size,); InputError if the stream is damaged or holds another number of bytes."""
    payload, filled = np.empty(size, np.uint8), 0
    try:
        for chunk in CODECS[compressor].chunks(compressed, size):
            if filled + len(chunk) > size:
                raise InputError(f"it holds more than the {size} bytes of its tensors")
            payload[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
    except MissingPackageError:
        raise
    except Exception as error:  # each library has its own type of exception
        raise InputError(f"bad {compressor} payload: {error}") from None
    if filled != size:
        raise InputError(f"bad {compressor} payload: it holds {filled} bytes, its tensors take {size}")
    return payload


# Budget


@dataclass(frozen=True)
class BudgetReport:
    """The artifact against its budget, in decimal bytes."""

    file_bytes: int
    code_bytes: int
    artifact_bytes: int
    """The limit."""

    @property
    def total_bytes(self) -> int:
        return self.file_bytes + self.code_bytes

    @property
    def margin_bytes(self) -> int:
        """Bytes left under the limit; negative when over it."""
        return self.artifact_bytes - self.total_bytes

    def __str__(self) -> str:
        return (
            f"{self.total_bytes:,} bytes = model {self.file_bytes:,} + code allowance {self.code_bytes:,}; "
            f"limit {self.artifact_bytes:,}, margin {self.margin_bytes:,}"
        )


def budget_report(file_bytes: int, budget: BudgetConfig) -> BudgetReport:
    return BudgetReport(file_bytes, budget.code_bytes, budget.artifact_bytes)


def check_budget(file_bytes: int, budget: BudgetConfig) -> BudgetReport:
    """The report of an artifact that fits. Raises BudgetError for one that is over by a byte or more."""
    report = budget_report(file_bytes, budget)
    if report.margin_bytes < 0:
        raise BudgetError(
            f"over budget by {-report.margin_bytes:,} bytes: {report}. Try fewer quant.bits, "
            "quant.compressor=smallest, or a smaller model (num_layers, model_dim, mlp_hidden, vocab_size)"
        )
    return report
