"""Compressors of an artifact's payload. A decoder makes no more than the limit that it is given, whatever the stream
claims to hold: no length is trusted before memory is allocated for it.

zlib    raw deflate. memLevel 9 doubles the symbols per block: 35 kB less than the default for the baseline. Matches in
        noise cost more than they save, so Huffman codes alone are tried too: 4 to 7 percent less for 5 and 6 bits.
zstd    one frame that states its length
lzma    raw LZMA1: 10 kB less than xz's blocks for the baseline. Codes depend neither on the byte before nor on their
        position: 0.1 to 0.7 percent less without these contexts (lc, pb).
brotli  the largest window
"""

from __future__ import annotations

import importlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

from golfgpt.errors import InputError

MAX_WINDOW_BYTES = 2**28
"""Memory of a decoder beside its output: xz -9 asks for 2^26, zstd -22 for at most 2^27."""

MAX_RATIO, FREE_BYTES = 64, 32 * 2**20
"""A trained weight takes more than an eighth of a bit. So no file of weights holds more than 64 times its own bytes,
above a size that does no harm."""

PIECE_BYTES = 2**20

PACKAGES = {"zstd": "zstandard", "brotli": "brotli"}
"""Compressor -> the package that it needs."""


class Codec(NamedTuple):
    level: int
    """The highest."""
    compress: Callable[[bytes, int], bytes]
    """(payload, level) -> compressed."""
    decompress: Callable[[memoryview, int], Iterable[bytes]]
    """(compressed, limit) -> pieces of at most `limit` bytes in all; raises for a stream that holds more, or ends early
    or late."""


def whole_stream(stream: Any, compressed: bytes | memoryview, limit: int) -> bytes:
    """What `stream`, a decompressor of zlib or lzma, makes of `compressed`. Raises InputError above `limit` bytes, and
    unless the stream and `compressed` end together."""
    return b"".join(_pieces_of(stream, compressed, limit))


def _pieces_of(stream: Any, compressed: bytes | memoryview, limit: int) -> Iterator[bytes]:
    def read(data: bytes | memoryview, most: int) -> bytes:
        return stream.decompress(data or getattr(stream, "unconsumed_tail", b""), most)  # lzma keeps its input itself

    yield from _pieces(read, lambda: stream.eof, compressed, limit)
    if stream.unused_data:
        raise InputError(f"{len(stream.unused_data)} bytes follow the compressed stream")


def _pieces(
    read: Callable[[bytes | memoryview, int], bytes], ended: Callable[[], bool], data: bytes | memoryview, limit: int
) -> Iterator[bytes]:
    """What read(data, most bytes) makes of `data`, at most PIECE_BYTES at a time."""
    total = 0
    while True:
        piece = read(data, min(PIECE_BYTES, limit + 1 - total))
        data, total = b"", total + len(piece)
        if total > limit:
            raise InputError(f"it holds more than {limit} bytes")
        yield piece
        if ended():
            return
        if not piece:
            raise InputError("the compressed stream is truncated")


def zstd_frame(compressed: bytes | memoryview, limit: int) -> bytes:
    """What the frame `compressed` holds. Raises InputError above `limit` bytes, and ZstdError for damage."""
    zstandard = _package("zstd")
    declared = zstandard.frame_content_size(compressed)  # -1: not at all
    if declared > limit:  # max_output_size is ignored for a frame that declares its size
        raise InputError(f"it holds more than {limit} bytes: its zstd frame declares {declared}")
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    if not declared:  # `decompress` then reads the header alone; with a block and a checksum it has at most 25 bytes
        stream = decompressor.decompressobj()
        if len(compressed) > 25 or stream.decompress(compressed) or not stream.eof or stream.unused_data:
            raise InputError("its zstd frame declares 0 bytes, and is truncated or holds more")
        return b""
    return decompressor.decompress(compressed, max_output_size=limit, allow_extra_data=False)


def _zlib_compress(payload: bytes, level: int) -> bytes:
    streams = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        stream = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        streams.append(stream.compress(payload) + stream.flush())
    return min(streams, key=len)


def _zlib_decompress(compressed: memoryview, limit: int) -> Iterator[bytes]:
    return _pieces_of(zlib.decompressobj(-zlib.MAX_WBITS), compressed, limit)


def _zstd_compress(payload: bytes, level: int) -> bytes:
    zstandard = _package("zstd")
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(payload))
    return zstandard.ZstdCompressor(compression_params=parameters).compress(payload)


def _lzma_filters(size: int, level: int = 9) -> list[dict[str, int]]:
    window = min(max(size, 4096), 32 * 2**20)  # bounds the decoder's memory
    return [{"id": lzma.FILTER_LZMA1, "preset": level | lzma.PRESET_EXTREME, "dict_size": window, "lc": 0, "pb": 0}]


def _lzma_compress(payload: bytes, level: int) -> bytes:
    return lzma.compress(payload, format=lzma.FORMAT_RAW, filters=_lzma_filters(len(payload), level))


def _lzma_decompress(compressed: memoryview, limit: int) -> Iterator[bytes]:
    return _pieces_of(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(limit)), compressed, limit)


def _brotli_compress(payload: bytes, level: int) -> bytes:
    return _package("brotli").compress(payload, quality=level, lgwin=24)


def _brotli_decompress(compressed: memoryview, limit: int) -> Iterator[bytes]:
    stream = _package("brotli").Decompressor()

    def read(data: bytes | memoryview, most: int) -> bytes:
        return stream.process(data, output_buffer_limit=most)  # raises for bytes past the end of the stream

    return _pieces(read, stream.is_finished, compressed, limit)


CODECS = {
    "zlib": Codec(9, _zlib_compress, _zlib_decompress),
    "zstd": Codec(22, _zstd_compress, lambda compressed, limit: [zstd_frame(compressed, limit)]),
    "lzma": Codec(9, _lzma_compress, _lzma_decompress),
    "brotli": Codec(11, _brotli_compress, _brotli_decompress),
}


def compress(payload: bytes, compressor: str, level: int | None = None) -> tuple[str, int, bytes]:
    """(name, level, compressed payload); "smallest" tries all, in threads, and prefers the first of equals."""
    if compressor != "smallest":
        codec = CODECS[compressor]
        used = codec.level if level is None else level
        return compressor, used, codec.compress(payload, used)
    names = list(CODECS)
    levels = [CODECS[name].level if level is None else level for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda name, level: CODECS[name].compress(payload, level), names, levels))
    return min(zip(names, levels, results, strict=True), key=lambda result: len(result[2]))


def decompress(compressor: str, compressed: memoryview, size: int) -> bytearray:
    """The payload of `size` bytes; InputError for a damaged stream and for one of another length."""
    payload, end = bytearray(size), 0
    try:
        for piece in CODECS[compressor].decompress(compressed, size):
            payload[end : end + len(piece)] = piece
            end += len(piece)
    except InputError:
        raise
    except Exception as error:  # each library has its own type of exception
        raise InputError(f"bad {compressor} payload: {error}") from None
    if end != size:
        raise InputError(f"it holds {end} bytes, its tensors take {size}")
    return payload


def most_bytes(compressed: int) -> int:
    """Bytes that a file of `compressed` bytes may hold; above them it only takes memory."""
    return max(FREE_BYTES, MAX_RATIO * compressed)


def require_compressor(compressor: str) -> None:
    """Raises InputError now rather than after training when `compressor` needs a package that is missing."""
    for name in PACKAGES if compressor == "smallest" else PACKAGES.keys() & {compressor}:
        try:
            _package(name)
        except InputError as error:
            raise InputError(f"quant.compressor {compressor}: {error}, or choose another") from None


def _package(compressor: str) -> ModuleType:
    try:
        return importlib.import_module(PACKAGES[compressor])
    except ImportError:
        raise InputError(f"the package {PACKAGES[compressor]} is missing: install it") from None
