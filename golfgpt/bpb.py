"""Bits per byte: how many UTF-8 bytes of text each token stands for, counted twice.

    bpb = sum of nats over the scored tokens / ln 2 / bytes of their decoded text

`ByteCounts` counts per token from the vocabulary, vectorized. `decoded_bytes` decodes whole documents with
SentencePiece's own decoder and measures the text. The two share nothing but the ids; a score is printed
only when they agree. Both read a stream of ids as documents that a boundary piece (control or unknown)
starts: such a piece holds no text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from golfgpt.data import caseops
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import InputError


class ByteCounts:
    """UTF-8 bytes that a token adds to the decoded text, given the token before it.

    Byte pieces add 1, control and unknown pieces 0, others the length of their text. A leading space counts
    once, in the piece that carries it, except right after a boundary piece if the decoder drops it there. Operators of
    CaseOps add 0, or their 3 bytes after an ESC that is none itself, which only `count_stream` sees.
    """

    def __init__(self, tokenizer: Tokenizer):
        lengths = [len(piece) for piece in tokenizer.pieces]
        if max(lengths) > 0xFFFF:
            raise InputError(f"the tokenizer has a piece of {max(lengths)} bytes; sidecars count to 65535")
        self._bytes = np.array(lengths, dtype=np.uint16)
        self._boundary = tokenizer.is_boundary
        spaced = [piece.startswith(b" ") and not tokenizer.is_byte(i) for i, piece in enumerate(tokenizer.pieces)]
        self._dropped = np.array(spaced) if tokenizer.strips_leading_space else np.zeros(len(lengths), dtype=bool)
        self.bos_id = tokenizer.bos_id
        self._operators = tokenizer.operator_ids if tokenizer.case_ops else None
        if self._operators:
            self._bytes[self._operators] = 0

    def count(self, prev_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Bytes (uint16, shape of `ids`) of tokens `ids` that follow `prev_ids`; ids below the vocabulary size."""
        return self._bytes[ids] - (self._dropped[ids] & self._boundary[prev_ids])

    def count_stream(self, ids: np.ndarray, before: int | None = None) -> np.ndarray:
        """`count` of consecutive tokens (T,); `before` precedes the first, None: the stream starts here. CaseOps
        text must not be cut after an ESC (`needs_before`)."""
        prev_ids = np.empty_like(ids)
        prev_ids[:1] = self.bos_id if before is None else before
        prev_ids[1:] = ids[:-1]
        counts = self.count(prev_ids, ids)
        if self._operators:
            counts[caseops.escaped(ids, self._operators)] = caseops.OPERATOR_BYTES
        return counts

    def needs_before(self, token: int) -> bool:
        """Whether the count after `token` depends on what precedes it: an ESC may itself be escaped."""
        return self._operators is not None and token == self._operators[-1]


def decoded_bytes(tokenizer: Tokenizer, stream: Iterable[np.ndarray]) -> int:
    """UTF-8 bytes of the text that a stream of ids (chunks of any length) decodes to, by SentencePiece.

    A stream that ends inside a multi-byte character decodes to U+FFFD there, as the decoder has it. Byte pieces that
    spell a CaseOps operator, which no encoder writes, decode as one: `ByteCounts` then differs, and no score is proved.
    """
    return sum(len(text.encode()) for text in decoded_texts(tokenizer, stream))


def decoded_texts(tokenizer: Tokenizer, stream: Iterable[np.ndarray]) -> Iterator[str]:
    """The text of each document of a stream of ids (chunks of any length), by SentencePiece."""
    rest = np.empty(0, dtype=np.uint16)
    for chunk in itertools.chain(stream, [None]):
        ids = rest if chunk is None else np.concatenate([rest, chunk])
        *documents, rest = np.split(ids, np.flatnonzero(tokenizer.is_boundary[ids]))
        documents += [rest] if chunk is None else []
        runs = [ids[int(tokenizer.is_boundary[ids[0]]) :].tolist() for ids in documents if len(ids)]
        yield from tokenizer.decode_batch(runs)


def bits_per_byte(nats: float, nbytes: int) -> float:
    """`nats` (summed over tokens, natural logarithm) as bits per byte of text; raises InputError for no bytes."""
    if nbytes <= 0:
        raise InputError(f"bits per byte need text: the scored tokens decode to {nbytes} bytes")
    return nats / math.log(2) / nbytes
