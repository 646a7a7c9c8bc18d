"""SentencePiece tokenizers: one that round-trips every document, and any that is given.

What SentencePiece 0.2.3 does to text, found by experiment, and what is done about it here:

    U+2581 "▁" in the text  encodes like a space; here it becomes its three byte pieces E2 96 81
    no bare "▁" piece       a space that joins no piece becomes E2 96 81 too and decodes to U+2581, three bytes
                            for one (~20 % too many); here it becomes the byte piece 20
    U+2585 "▅" in training  the whole sentence is skipped; here it only separates sentences
    lone surrogates         not text: InputError
    decoding                a tokenizer with a dummy prefix or whitespace removal drops one leading space
                            of the text; one trained here drops nothing

Tabs, newlines, CR, NUL, runs of spaces, U+FEFF, U+FFFD, private use and literal "<s>" or "<0x41>" survive.

A tokenizer whose pieces hold the operators of CaseOps encodes and decodes through `golfgpt.data.caseops`. The pieces
alone decide it, so it is known wherever the model file is: in a run, an export, or a folder of published shards.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from golfgpt.data import caseops
from golfgpt.errors import InputError

SPACE = "\u2581"
TRAINING_CHARS = 24_000_000
"""Characters that a tokenizer is trained on at most: 4 s for 1,024 pieces on 2 cores, 0.35 GB."""
MAX_BYTES = 2**24
"""Largest model file: 65,536 pieces take 1.2 MB."""
TRIAL_SECONDS = 60
_TRIAL = r"""
import sys
sys.path = [path for path in sys.path if path]  # '' is the working directory
import sentencepiece
model = sentencepiece.SentencePieceProcessor(model_proto=sys.stdin.buffer.read())
pieces = range(model.get_piece_size())
ids = model.encode("The 1st \u2581 na\u00efve \U0001f600 text", out_type="offset_mapping")["ids"]
model.decode([ids, *([i] for i in pieces)])
[model.id_to_piece(i) for i in pieces]
"""
"""What fails in Python in the trial fails here as well, with its own error."""
_tried: set[str] = set()
_SENTENCE_CHARS = 8192
_MAX_VOCAB = 65_536


class Tokenizer:
    """A SentencePiece model, its text behaviour pinned down to bytes per piece."""

    def __init__(self, model_bytes: bytes, name: str = "the tokenizer"):
        """Raises InputError if `model_bytes` is no SentencePiece model that shards can be made with."""
        self.model_bytes, self.name = bytes(model_bytes), name
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocab_size: int = self._model.get_piece_size()
        except Exception as error:
            raise InputError(f"{name} is not a SentencePiece model: {error}") from error
        self.bos_id: int = self._model.bos_id()
        self.pad_id: int = self._model.pad_id()  # -1: there is none
        if not 0 < self.vocab_size <= _MAX_VOCAB:
            raise InputError(f"{name} has {self.vocab_size} pieces; shards hold uint16 tokens: 1 to {_MAX_VOCAB}")
        if self.bos_id < 0:
            raise InputError(f"{name} has no BOS piece; every document of a shard starts with one")
        check_pieces(self._model, name)

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> Tokenizer:
        return cls(model_bytes)

    @classmethod
    def from_file(cls, path: str | os.PathLike, sha256: str | None = None) -> Tokenizer:
        """The tokenizer in a file. SentencePiece parses in C++, so a file without the known digest `sha256` is tried in
        another process first. Raises InputError as the constructor, and for a file that is missing or too large."""
        try:
            with open(path, "rb") as file:
                model_bytes = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        if len(model_bytes) > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES} bytes; expected a SentencePiece model")
        check_apart(model_bytes, str(path), sha256)
        return cls(model_bytes, str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS. Raises InputError for lone surrogates, which no UTF-8 text holds."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text holds a lone surrogate at character {error.start}; remove or replace it") from None
        if self.case_ops:
            text = caseops.encode(text)
        if SPACE not in text or not self.space_ids:
            return self._encode_part(text)
        head, *tail = text.split(SPACE)
        ids = self._encode_part(head)
        for part in tail:
            ids += self.space_ids + self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        if self.has_space_piece or not self.space_ids:
            return ids
        out: list[int] = []
        for i in ids:
            out.append(i)
            if out[-3:] == self.space_ids:
                out[-3:] = [self._model.piece_to_id("<0x20>")]
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` by SentencePiece's own decoder; control pieces are invisible. CaseOps operators that cannot
        apply, as in sampled ids, are dropped."""
        return self.decode_batch([[int(i) for i in ids]])[0]

    def decode_batch(self, batch: Sequence[list[int]]) -> list[str]:
        """`decode` of several lists of ids."""
        texts = self._model.decode(batch) if batch else []
        return [caseops.decode(text, strict=False) for text in texts] if self.case_ops else texts

    def original_bytes(self, text: str) -> list[int]:
        """Bytes of `text` that each of `encode(text)` stands for, as published CaseOps sidecars count them: of the text
        that a piece was made from, before normalization. What the normalizer drops at the ends is in no piece.

        Of the byte pieces of a character only the last has any, operators have none. For a lossless tokenizer they add
        up to the size of `text`. Raises InputError unless `counts_original_bytes`.
        """
        if not self.counts_original_bytes:
            raise InputError('original bytes are counted for CaseOps tokenizers with a piece "▁"; this is another one')
        text = caseops.encode(text)
        counts: list[int] = []
        for number, part in enumerate(text.split(SPACE) if self.space_ids else [text]):
            if number:
                counts += [0, 0, len(SPACE.encode())]
            before = np.concatenate([[0], np.cumsum(caseops.original_bytes(part))])
            start, stop = np.array(self._model.encode(part, out_type="offset_mapping")["offsets"], int).reshape(-1, 2).T
            counts += (before[stop] - before[start]).tolist()
        return counts

    @functools.cached_property
    def case_ops(self) -> bool:
        """Whether the four operators of CaseOps are user-defined pieces. These score 0, and of the learned pieces only
        the first does, so four learned characters are no operators."""
        model, ids = self._model, self.operator_ids
        return not any(model.is_byte(i) or self.is_boundary[i] or model.get_score(i) for i in ids)

    @property
    def counts_original_bytes(self) -> bool:
        """Whether `original_bytes` can count: where "▁" is no piece, `encode` replaces ids."""
        return self.case_ops and self.has_space_piece

    @functools.cached_property
    def operator_ids(self) -> list[int]:
        """Ids of the pieces TITLE, ALLCAPS, CAPNEXT, ESC of CaseOps; the unknown piece's where there is none."""
        return [self._model.piece_to_id(operator) for operator in caseops.OPERATORS]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the model file in hexadecimal."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """UTF-8 bytes of each piece, a leading space included; empty for control and unknown pieces."""
        out = []
        for i, silent in enumerate(self.is_boundary):
            if silent:
                out.append(b"")
            elif self._model.is_byte(i):
                out.append(bytes([int(self._model.id_to_piece(i)[3:5], 16)]))
            else:
                out.append(self._model.id_to_piece(i).replace(SPACE, " ").encode())
        return out

    @functools.cached_property
    def is_boundary(self) -> np.ndarray:
        """bool (vocab_size,): control and unknown pieces, which hold no text and end a run of it."""
        model = self._model
        return np.array([model.is_control(i) or model.is_unknown(i) for i in range(self.vocab_size)])

    @functools.cached_property
    def strips_leading_space(self) -> bool:
        """Whether the decoder drops a space that starts the text; asked of the decoder itself."""
        spaced = next(
            (i for i, piece in enumerate(self.pieces) if piece.startswith(b" ") and not self.is_byte(i)), None
        )
        return spaced is not None and len(self._model.decode([spaced]).encode()) < len(self.pieces[spaced])

    def is_byte(self, i: int) -> bool:
        """Whether piece `i` is one byte of the byte fallback."""
        return self._model.is_byte(i)

    @functools.cached_property
    def has_space_piece(self) -> bool:
        """Whether the vocabulary holds a bare "▁", without which a lone space falls to bytes."""
        return not self._model.is_unknown(self._model.piece_to_id(SPACE))

    @functools.cached_property
    def space_ids(self) -> list[int]:
        """The byte pieces E2 96 81 of U+2581; empty where the vocabulary lacks them."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return ids if all(map(self.is_byte, ids)) else []


def check_pieces(model: sentencepiece.SentencePieceProcessor, name: str) -> None:
    """Raises InputError for pieces with which SentencePiece loads, and fails when it encodes or decodes."""
    if not 0 <= model.unk_id() < model.get_piece_size():
        raise InputError(f"{name} has no piece for unknown text, which SentencePiece needs; train another")
    try:
        model.decode([[i] for i in range(model.get_piece_size())])
    except UnicodeDecodeError as error:
        raise InputError(f"{name} has a piece that is not UTF-8 ({error}); train another") from error


def check_apart(model_bytes: bytes, name: str, sha256: str | None = None) -> None:
    """Load, encode and decode in another process, once for each content; nothing if the digest is `sha256`. Raises
    InputError for bytes that end it, or take it more than TRIAL_SECONDS."""
    digest = hashlib.sha256(model_bytes).hexdigest()
    if digest in (sha256, *_tried):
        return
    try:
        command = [sys.executable, "-c", _TRIAL]
        done = subprocess.run(command, input=model_bytes, capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(f"{name}: SentencePiece takes more than {TRIAL_SECONDS} s to load it; use another") from None
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
        raise InputError(f"{name} is not a SentencePiece model: loading it ends a process by {ended}; use another")
    _tried.add(digest)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, max_chars: int = TRAINING_CHARS, case_ops: bool = False
) -> bytes:
    """Train a byte-pair SentencePiece model that round-trips any text; returns the model file.

    With `case_ops` it is trained on CaseOps text and has the operators as pieces 4 to 7, as the published ones have.
    `texts` is read once, in bounded memory: when it exceeds `max_chars` an even sample of it is used. The
    result depends on the texts and sizes alone. Raises InputError when `vocab_size` is too small or too
    large for the text, naming the bound.
    """
    if not 0 < vocab_size <= _MAX_VOCAB:
        raise InputError(f"vocabulary size {vocab_size} is not in 1..{_MAX_VOCAB}")
    model = io.BytesIO()
    texts = map(caseops.encode, texts) if case_ops else texts
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_even_sample(_sentences(texts), max_chars)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _SENTENCE_CHARS,  # bytes; longer sentences would be dropped silently
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=8,  # it is stored in the model, so the machine's own number would change the digest
            minloglevel=3,
            **({"user_defined_symbols": list(caseops.OPERATORS)} if case_ops else {}),
        )
    except RuntimeError as error:
        raise InputError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in re.split("[\u2581\u2585]", text):
            for start in range(0, len(part), _SENTENCE_CHARS):
                yield part[start : start + _SENTENCE_CHARS]


def _even_sample(items: Iterable[str], max_chars: int) -> list[str]:
    """Every 2^k-th item, with the smallest k that keeps the sample within `max_chars`."""
    kept: list[str] = []
    stride, chars = 1, 0
    for index, item in enumerate(items):
        if index % stride:
            continue
        kept.append(item)
        chars += len(item)
        while chars > max_chars and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            chars = sum(map(len, kept))
    return kept


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        least = int(found[1])
        ample = 2 ** math.ceil(math.log2(1.25 * least))
        return (
            f"vocabulary size {vocab_size} is too small for this text: with {least:,} each piece would be a character "
            f"or a byte, so choose more, such as {ample} (--vocab-size), or leave out files with rare characters"
        )
    if found := re.search(r"set it to a value <= (\d+)", message):
        most = f"at most {found[1]} (--vocab-size)"
        return f"vocabulary size {vocab_size} is too large for this text: choose {most}, or give more text"
    if "sentences_.empty()" in message:
        return "no text to train a tokenizer on: the train split is empty"
    return f"SentencePiece could not train {vocab_size} pieces: {message}"
