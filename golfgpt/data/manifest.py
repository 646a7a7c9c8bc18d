"""manifest.json of a prepared folder: digests, totals, and how the splits were made."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from typing import Any, Literal

from golfgpt.errors import InputError
from golfgpt.files import from_json, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard and, for val, its sidecar."""

    file: str
    tokens: int
    sha256: str
    sidecar_sha256: str | None = None
    """Of the file of the same name that ends in .bytes."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Totals of one split."""

    inputs: tuple[str, ...]
    """File names that the documents were read from."""
    documents: int
    tokens: int
    raw_bytes: int
    """UTF-8 bytes of the documents as they were read."""
    decoded_bytes: int
    """UTF-8 bytes of the text that the tokens decode to: the divisor of bits per byte."""
    changed_documents: int
    """Documents that do not decode to what was read; 0 for a lossless tokenizer."""
    shards: tuple[ShardFile, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds; its JSON is read back strictly."""

    format: int = 1
    golfgpt: str
    """Version of the program that prepared the folder."""
    tokenizer_sha256: str
    vocab_size: int
    lossless: bool
    """Every document of both splits decodes to exactly what was read."""
    val_below: str | None
    """A document went to val if its hash (`prepare.document_hash`, 16 hex digits) is below this one, to train
    otherwise. None: val came from inputs of its own, and no document is in both."""
    separator: str | None
    """Separator of .txt inputs; None: blank lines."""
    train: Split
    val: Split
    text_codec: Literal["caseops"] | None = None
    """What turns text into that which SentencePiece encodes (`golfgpt.data.caseops`); None: nothing does."""
    published_bytes: tuple[ShardFile, ...] = ()
    """Counts of val as published CaseOps sidecars have them, where a given CaseOps tokenizer loses text."""

    @classmethod
    def load(cls, path: str | os.PathLike) -> Manifest:
        """Raises InputError naming an unknown or missing key, a wrong type or an unknown format."""
        try:
            values = {"text_codec": None, "published_bytes": []} | read_json(path, dict)  # older ones lack these keys
            manifest = from_json(cls, values)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable manifest: {error}; prepare the data again") from error
        if manifest.format != 1:
            raise InputError(f"{path}: manifest format {manifest.format} is not 1; use the version that wrote it")
        return manifest

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of tokenizer, shards and sidecars: the content, not the names."""
        train, val = (
            [f"{shard.sha256} {shard.sidecar_sha256}" for shard in split.shards] for split in (self.train, self.val)
        )
        parts = [self.tokenizer_sha256, *train, "None None", *val]  # the border between the splits
        parts += [file.sha256 for file in self.published_bytes]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
