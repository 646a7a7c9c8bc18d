"""Token shards on disk, the published format, and what golfgpt keeps beside them so that a score can be proved.

    golf_train_000000.bin    256 little-endian int32 (20240520, 1, token count, 0 ...), then uint16 LE tokens
    golf_val_000000.bin      the same; a document is BOS + its tokens and may run across shard edges
    golf_val_000000.bytes    sidecar: uint16 LE per token, the UTF-8 bytes it adds to the decoded text
    tokenizer.model          the SentencePiece model
    manifest.json            `Manifest`: digests, totals, and how the splits were made
    *_val_bytes_000000.bin   published CaseOps sidecar: a shard of the original bytes of each val token

Any folder of `*_train_*.bin` and `*_val_*.bin` opens, so published exports load as they are; without a
sidecar the byte counts come from the tokenizer. Nothing here loads a shard as a whole. Text is CaseOps text if the
tokenizer has the pieces of its operators (`Tokenizer.case_ops`); for a prepared folder the manifest says it too.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from golfgpt.bpb import ByteCounts, decoded_bytes
from golfgpt.data.documents import SUFFIXES
from golfgpt.data.manifest import MANIFEST, Manifest
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import InputError, VerificationError
from golfgpt.files import atomic_file, sha256_file

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
TOKENIZER = "tokenizer.model"
CHUNK_TOKENS = 1 << 20
"""Tokens handled at a time when a split is streamed."""

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)"""


# 1 Shards


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write tokens (T,) of an integer dtype with values below 65,536 as one shard, atomically."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or len(tokens) >= 1 << 31:
        raise InputError(f"{path}: a shard is 1-d and below 2^31 tokens, got shape {tokens.shape}")
    if tokens.dtype != np.uint16 and len(tokens) and not 0 <= tokens.min() <= tokens.max() <= 0xFFFF:
        raise InputError(f"{path}: tokens {tokens.min()}..{tokens.max()} do not fit uint16")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


class Shard:
    """`count` uint16 tokens of a file, from byte `offset` on; a slice reads them with pread. They are not
    memory-mapped, because a truncated file or a disk error would end the process by SIGBUS, without a sentence. The
    file stays open, so it may be deleted or replaced."""

    def __init__(self, path: str | os.PathLike, offset: int, count: int):
        self.path, self._offset, self._count = path, offset, count
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._opened = _state(self._file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        """(n,) uint16, read-only. Raises OSError, and InputError for a file that is no longer what was opened."""
        start, stop, _ = part.indices(self._count)
        data, wanted = b"", 2 * max(stop - start, 0)
        try:
            while len(data) < wanted:
                at = self._offset + 2 * start + len(data)
                piece = os.pread(self._file.fileno(), wanted - len(data), at)
                data += piece
                self.check_unchanged()
                if not piece:
                    break
        except OSError as error:
            error.filename = os.fspath(self.path)
            raise
        return np.frombuffer(data, "<u2")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or "<u2")

    def check_unchanged(self) -> None:
        """Raises InputError if the file has another size or time of modification than when it was opened."""
        if _state(self._file) != self._opened:
            raise InputError(
                f"{self.path} was changed while it was read; restore it, check with `golfgpt data verify`, then resume"
            )


def _state(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def open_shard(path: str | os.PathLike) -> Shard:
    """A shard's tokens (T,) uint16. Raises InputError for a wrong magic, version or length."""
    repair = "download or prepare this shard again"
    try:
        size, header = os.stat(path).st_size, np.fromfile(path, "<i4", HEADER_INTS)
    except OSError as error:
        raise InputError(f"cannot read the shard {path}: {error.strerror}; {repair}") from error
    if len(header) < HEADER_INTS:
        raise InputError(f"{path}: {size} bytes are less than a shard's header of {HEADER_BYTES}; {repair}")
    magic, version, count = map(int, header[:3])
    if (magic, version) != (MAGIC, VERSION):
        raise InputError(f"{path}: magic {magic}, version {version}; expected a shard's {MAGIC}, {VERSION}; {repair}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise InputError(
            f"{path}: the header says {count} tokens, so {HEADER_BYTES + 2 * count} bytes, but the file has "
            f"{size}; {repair}"
        )
    return Shard(path, HEADER_BYTES, count)


def gather(shards: Sequence[Shard | np.ndarray], start: int, stop: int) -> np.ndarray:
    """Items [start, stop) of the concatenation of 1-d arrays, copied; stop at most the total length."""
    parts = [np.empty(0, dtype=np.uint16)]
    for shard in shards:
        if start < len(shard) and stop > 0:
            parts.append(shard[max(start, 0) : stop])
        start, stop = start - len(shard), stop - len(shard)
    return np.concatenate(parts)


# 2 Dataset


class Dataset:
    """A folder of shards, opened and checked as far as that is cheap: headers, lengths, tokenizer, manifest.

    `check_token_ids`, `check_val_files` and `prove_val_bytes` read the tokens; `verify` reads and hashes everything.
    """

    path: Path
    train: list[Shard]
    """Sorted by file name."""
    val: list[Shard]
    train_files: list[Path]
    val_files: list[Path]
    sidecars: list[Shard] | None
    """Beside the val shards: bytes per token."""
    published_files: list[Path]
    """Published CaseOps sidecars, `*_val_bytes_*.bin`."""
    published: list[Shard]
    """Byte counts from these files; they differ from the decoded bytes if the tokenizer is lossy."""
    tokenizer: Tokenizer | None
    manifest: Manifest | None
    _proved: int | None = None

    @classmethod
    def open(cls, path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> Dataset:
        """Open a prepared folder, or one of published shards; `tokenizer` overrides the one in the folder.

        Raises InputError for what is missing or malformed, VerificationError where the folder contradicts
        its manifest or its splits share a shard.
        """
        self = cls()
        self.path = Path(path)
        if not self.path.is_dir():
            old = self.path.with_name(f".{self.path.name}.golfgpt.old")
            if old.exists():
                raise InputError(f"{path} is now {old}, because prepare --overwrite was killed; rename it back")
            if not self.path.exists():
                raise InputError(
                    f"there is no folder {path}; if it was moved, give its new place (train and eval: --data.path DIR, "
                    f"export: --data DIR), or prepare it: golfgpt data prepare FILES --out {shlex.quote(str(path))}"
                )
            raise InputError(f"{path} is not a folder, expected a prepared one: {_preparation(self.path)}")
        manifest = self.path / MANIFEST
        self.manifest = Manifest.load(manifest) if manifest.exists() else None
        self.train_files = sorted(self.path.glob("*_train_*.bin"))
        self.published_files = sorted(self.path.glob("*_val_bytes_*.bin"))
        self.val_files = sorted({*self.path.glob("*_val_*.bin")} - {*self.published_files})
        for name, files in (("train", self.train_files), ("val", self.val_files)):
            if not files:
                raise InputError(
                    f"{path} holds no *_{name}_*.bin, expected a prepared folder: {_preparation(self.path)}"
                )
        self.train, self.val = [*map(open_shard, self.train_files)], [*map(open_shard, self.val_files)]
        self.published = [*map(open_shard, self.published_files)]
        lengths = [*map(len, self.val)], [*map(len, self.published)]
        if self.published and lengths[0] != lengths[1]:
            raise InputError(
                f"{path}: the *_val_bytes_*.bin hold counts of {lengths[1]} tokens, expected {lengths[0]} as the val "
                "shards; download or prepare the data again, or delete all *_val_bytes_*.bin"
            )
        self.sidecars = self._open_sidecars()
        self.tokenizer = tokenizer or self._find_tokenizer()
        self._check_manifest()
        self._check_copies()
        return self

    @classmethod
    def bare(cls, path: str | os.PathLike) -> Dataset:
        """The shards and the tokenizer of a folder alone; bytes are counted with the tokenizer."""
        self = cls()
        self.path, self.manifest, self.sidecars, self.published = Path(path), None, None, []
        self.train_files = sorted(self.path.glob("*_train_*.bin"))
        self.val_files = sorted({*self.path.glob("*_val_*.bin")} - {*self.path.glob("*_val_bytes_*.bin")})
        self.train, self.val = [*map(open_shard, self.train_files)], [*map(open_shard, self.val_files)]
        self.tokenizer = self._find_tokenizer()
        return self

    def _open_sidecars(self) -> list[Shard] | None:
        paths = [file.with_suffix(".bytes") for file in self.val_files]
        if not any(path.exists() for path in paths):
            return None
        for path, shard in zip(paths, self.val, strict=True):
            size = path.stat().st_size if path.exists() else None
            if size != 2 * len(shard):
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(
                    f"{path} {found}, expected {2 * len(shard)} for {len(shard)} tokens; prepare the data again, or "
                    "delete all *.bytes to count with the tokenizer"
                )
        return [Shard(path, 0, len(shard)) for path, shard in zip(paths, self.val, strict=True)]

    def _find_tokenizer(self) -> Tokenizer | None:
        named = self.path / TOKENIZER
        models = [named] if named.exists() else sorted(self.path.glob("*.model"))
        if len(models) > 1:
            raise InputError(f"{self.path} holds {len(models)} *.model files; keep one, or name it {TOKENIZER}")
        known = self.manifest and self.manifest.tokenizer_sha256
        return Tokenizer.from_file(models[0], known) if models else None

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        repair = f"prepare the data again, or delete {self.path / MANIFEST} to use the shards without proof"
        if self.tokenizer is None or self.tokenizer.digest != self.manifest.tokenizer_sha256:
            have = self.tokenizer.digest if self.tokenizer else "none"
            raise VerificationError(
                f"{self.path}: found tokenizer {have}, the manifest has {self.manifest.tokenizer_sha256}; {repair}"
            )
        splits = (self.manifest.train, self.manifest.val)
        files = [*(item for split in splits for item in split.shards), *self.manifest.published_bytes]
        expected = {(item.file, item.tokens) for item in files}
        found = {(file.name, len(shard)) for _, file, shard in self._shards()}
        found |= {(file.name, len(counts)) for file, counts in zip(self.published_files, self.published, strict=True)}
        if different := sorted(expected ^ found):
            name, tokens = different[0]
            origin = "the manifest" if different[0] in expected else "the folder"
            raise VerificationError(f"{self.path}: {name} ({tokens} tokens) is only in {origin}; {repair}")
        if self.sidecars is None:
            raise VerificationError(f"{self.path}: the manifest's *.bytes sidecars are missing; {repair}")

    def _shards(self) -> list[tuple[str, Path, Shard]]:
        """Split, file and tokens of every shard, train before val."""
        train = [("train", *pair) for pair in zip(self.train_files, self.train, strict=True)]
        return train + [("val", *pair) for pair in zip(self.val_files, self.val, strict=True)]

    def _check_copies(self) -> None:
        train = {_sample_digest(shard): file for split, file, shard in self._shards() if split == "train"}
        for split, file, shard in self._shards():
            if split == "val" and len(shard) and (copy := train.get(_sample_digest(shard))):
                raise VerificationError(
                    f"the splits overlap: {file} and {copy} begin and end with the same tokens; remove one of them"
                )

    @property
    def vocab_size(self) -> int | None:
        """Pieces of the tokenizer; None where there is none."""
        return self.tokenizer.vocab_size if self.tokenizer else None

    @property
    def lossless(self) -> bool:
        """Whether the manifest proves that the tokens hold the raw text; False for shards without one."""
        return self.manifest is not None and self.manifest.lossless

    @property
    def train_tokens(self) -> int:
        return sum(map(len, self.train))

    @property
    def val_tokens(self) -> int:
        return sum(map(len, self.val))

    @functools.cached_property
    def digest(self) -> str:
        """64 hex digits that tell data sets apart: the manifest's digest, or, for bare shards, one over lengths
        and the first and last 64 Ki tokens of each shard."""
        if self.manifest:
            return self.manifest.digest
        parts = [_sample_digest(shard) for shards in (self.train, [()], self.val) for shard in shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def val_ids(self, start: int, stop: int) -> np.ndarray:
        """Val tokens [start, stop), uint16, a copy."""
        return gather(self.val, start, min(stop, self.val_tokens))

    def byte_counts(self, start: int, stop: int) -> np.ndarray:
        """UTF-8 bytes (uint16) that each of the val tokens [start, stop) adds to the decoded text.

        From the sidecar; without one from the tokenizer, given the token before, across shard edges too.
        """
        stop = min(stop, self.val_tokens)
        if self.sidecars is not None:
            return gather(self.sidecars, start, stop)
        first = max(start - 1, 0)
        while first and self._table.needs_before(int(self.val_ids(first, first + 1)[0])):
            first -= 1
        return self._table.count_stream(self.val_ids(first, stop))[start - first :]

    def published_bytes(self, start: int, stop: int) -> int | None:
        """Original bytes of val tokens [start, stop) by the published sidecar; None where there is none.

        Raises VerificationError where it counts bytes for BOS or an operator, as those of some published scripts do.
        """
        if not self.published:
            return None
        tokenizer = self.need_tokenizer()
        silent = tokenizer.is_boundary.copy()
        if tokenizer.case_ops:
            silent[tokenizer.operator_ids] = True
        total = 0
        for at in range(start, stop, CHUNK_TOKENS):
            end = min(at + CHUNK_TOKENS, stop)
            counts = gather(self.published, at, end)
            wrong = np.flatnonzero(silent[self.val_ids(at, end)] & (self.byte_counts(at, end) == 0) & (counts > 0))
            if len(wrong):
                raise VerificationError(
                    f"{self.path}: the *_val_bytes_*.bin count {counts[wrong[0]]} bytes for val token {at + wrong[0]}, "
                    "which holds no text: made by a wrong script; replace them, or delete them to score without"
                )
            total += int(counts.sum(dtype=np.int64))
        return total

    def val_chunks(self, stop: int) -> Iterator[np.ndarray]:
        """Val tokens [0, stop) in chunks of CHUNK_TOKENS."""
        return (self.val_ids(at, min(at + CHUNK_TOKENS, stop)) for at in range(0, stop, CHUNK_TOKENS))

    @functools.cached_property
    def _table(self) -> ByteCounts:
        return ByteCounts(self.need_tokenizer())

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises InputError where there is none."""
        if self.tokenizer is None:
            raise InputError(f"{self.path} holds no tokenizer: bits per byte need it; copy its *.model there")
        return self.tokenizer

    def check_token_ids(
        self,
        vocab_size: int | None = None,
        split: Literal["train", "val"] | None = None,
        assigned: tuple[int, int] = (0, 1),
    ) -> None:
        """Raises InputError naming the first shard (of one split, or of both) with a token id that is not below
        `vocab_size` (None: the tokenizer's). `assigned` = (rank, world) reads only every world-th shard."""
        limit = vocab_size or self.need_tokenizer().vocab_size
        for name, file, shard in self._shards()[assigned[0] :: assigned[1]]:
            if split not in (None, name):
                continue
            for start in range(0, len(shard), CHUNK_TOKENS):
                chunk = shard[start : start + CHUNK_TOKENS]
                if (largest := int(chunk.max())) >= limit:
                    at = start + int(chunk.argmax())
                    raise InputError(
                        f"{file}: token {at} is {largest}, the vocabulary has {limit}: wrong tokenizer, or a damaged "
                        f"shard; check with `golfgpt data verify {self.path}`, then prepare or download it again"
                    )

    def check_val_files(self, assigned: tuple[int, int] = (0, 1)) -> None:
        """Raises VerificationError naming the first file of val whose SHA-256 is not that of the manifest, if there is
        one. `assigned` as for `check_token_ids`."""
        files = (*self.manifest.val.shards, *self.manifest.published_bytes) if self.manifest else ()
        for shard in files[assigned[0] :: assigned[1]]:
            sidecar = str(Path(shard.file).with_suffix(".bytes"))
            for name, known in ((shard.file, shard.sha256), (sidecar, shard.sidecar_sha256)):
                if known and (found := sha256_file(self.path / name)) != known:
                    raise VerificationError(
                        f"{self.path / name} has changed since it was prepared: its SHA-256 is {found[:16]}…, the "
                        f"manifest has {known[:16]}…; prepare it again (golfgpt data verify {self.path} checks all)"
                    )

    def prove_val_bytes(self, stop: int | None = None) -> int:
        """UTF-8 bytes of the text of val tokens [0, stop), counted by `byte_counts` and by decoding the ids.

        A `stop` inside a character is proved to the end of that character. The whole of val is proved once
        and remembered. Raises InputError for token ids outside the vocabulary; VerificationError if the two
        counts differ, if a lossless val does not give the raw bytes, or if spaces were lost to U+2581.
        """
        stop = self.val_tokens if stop is None else min(stop, self.val_tokens)
        if stop == self.val_tokens and self._proved is not None:
            return self._proved
        tokenizer = self.need_tokenizer()
        self.check_token_ids(tokenizer.vocab_size, "val")
        end = stop
        while end < self.val_tokens and b"\x80" <= tokenizer.pieces[self.val_ids(end, end + 1)[0]][:1] < b"\xc0":
            end += 1
        edges = [(start, min(start + CHUNK_TOKENS, end)) for start in range(0, end, CHUNK_TOKENS)]
        counted = sum(int(self.byte_counts(*edge).sum()) for edge in edges)
        decoded = decoded_bytes(tokenizer, self.val_chunks(end))
        source = "the tokenizer's byte table" if self.sidecars is None else "the sidecar"
        if counted != decoded:
            raise VerificationError(
                f"{self.path}: {source} counts {counted} bytes in {end} val tokens, but they decode to {decoded}; "
                "no score can be proved: prepare the data again"
            )
        if self.manifest is None and not tokenizer.has_space_piece:
            self._refuse_spaces_as_bytes(edges)
        if self.manifest and stop == self.val_tokens:
            split = self.manifest.val
            if decoded != split.decoded_bytes or (self.lossless and decoded != split.raw_bytes):
                raise VerificationError(
                    f"{self.path}: val decodes to {decoded} bytes, the manifest has {split.decoded_bytes} decoded and "
                    f"{split.raw_bytes} raw; prepare the data again"
                )
        if stop == self.val_tokens:
            self._proved = decoded
        return decoded - int(self.byte_counts(stop, end).sum())

    def _refuse_spaces_as_bytes(self, edges: Sequence[tuple[int, int]]) -> None:
        space_ids = self.need_tokenizer().space_ids
        for start, stop in edges if space_ids else ():
            ids = self.val_ids(start, stop)
            hits = [ids[i : len(ids) - 2 + i] == space_ids[i] for i in range(3)]
            if count := int(np.logical_and.reduce(hits).sum()):
                raise VerificationError(
                    f'{self.path}: the vocabulary has no bare "▁", and {count} spaces or more of val are the bytes '
                    "E2 96 81, which would count 3 bytes each; prepare the data again from the text"
                )


def _preparation(path: Path) -> str:
    """How to make prepared data of the text in `path`, a file or a folder, perhaps of something else."""
    files = [path] if path.is_file() else [*path.iterdir()]
    if not any(file.name.endswith(SUFFIXES) for file in files) or path / "metrics.jsonl" in files:  # of a run
        return "golfgpt data prepare FILES --out DIR (or data download), then use DIR"
    out = Path("data", path.resolve().name.split(".")[0])
    out = shlex.quote(str(out.with_name(f"{out.name}-tokens") if out.exists() else out))
    return f"golfgpt data prepare {shlex.quote(str(path))} --out {out}, then use {out}"


def _sample_digest(shard: Sequence[int]) -> str:
    ends = np.concatenate([shard[: 1 << 16], shard[-(1 << 16) :]]).astype("<u2")
    return f"{len(shard)} {hashlib.sha256(ends.tobytes()).hexdigest()}"


# 3 Verification


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found to be right."""

    manifest: bool
    """Digests were checked; bare shards have none to check."""
    lossless: bool
    train_documents: int
    train_tokens: int
    val_documents: int
    val_tokens: int
    val_bytes: int
    """UTF-8 bytes of the decoded val text, counted twice."""
    published_bytes: int | None
    """Bytes of the original val text by a published CaseOps sidecar."""
    digest: str


def verify(path: str | os.PathLike, progress: Progress | None = None, tokenizer: Tokenizer | None = None) -> Report:
    """Read everything in a data folder and check it: digests, token ids, split overlap, byte counts, totals.

    Overlap is judged document by document on the token ids, which needs no manifest, and takes about 120 bytes of
    memory for each val document. Raises InputError for malformed files and
    VerificationError for contradictions, listing all that differ.
    """
    progress = progress or (lambda stage, done, total: None)
    data = Dataset.open(path, tokenizer)
    if data.manifest:
        _check_digests(data, data.manifest, progress)
    data.check_token_ids()
    bos_id = data.need_tokenizer().bos_id
    val_digests = list(_document_digests(data.val, bos_id, "reading val", progress))
    in_val, val_documents = set(val_digests), len(val_digests)
    train_documents = shared = 0
    for digest in _document_digests(data.train, bos_id, "reading train", progress):
        train_documents += 1
        shared += digest in in_val
    if shared:
        raise VerificationError(
            f"{path}: the splits overlap: {shared} of {train_documents} train documents are also in val; "
            "a score on this val means nothing: prepare the data again from splits that share no document"
        )
    if data.manifest:
        train, val = data.manifest.train, data.manifest.val
        found = (train_documents, data.train_tokens, val_documents, data.val_tokens)
        expected = (train.documents, train.tokens, val.documents, val.tokens)
        if found != expected:
            raise VerificationError(
                f"{path}: train documents and tokens, val documents and tokens are {found}, the manifest has "
                f"{expected}; prepare the data again"
            )
    progress("decoding val", 0, data.val_tokens)
    val_bytes = data.prove_val_bytes()
    progress("decoding val", data.val_tokens, data.val_tokens)
    return Report(
        manifest=data.manifest is not None,
        lossless=data.lossless,
        train_documents=train_documents,
        train_tokens=data.train_tokens,
        val_documents=val_documents,
        val_tokens=data.val_tokens,
        val_bytes=val_bytes,
        published_bytes=data.published_bytes(0, data.val_tokens),
        digest=data.digest,
    )


def _check_digests(data: Dataset, manifest: Manifest, progress: Progress) -> None:
    expected = {}
    for shard in (*manifest.train.shards, *manifest.val.shards, *manifest.published_bytes):
        expected[shard.file] = shard.sha256
        if shard.sidecar_sha256:
            expected[str(Path(shard.file).with_suffix(".bytes"))] = shard.sidecar_sha256
    wrong = []
    for done, (name, sha256) in enumerate(expected.items()):
        progress("hashing files", done, len(expected))
        if (found := sha256_file(data.path / name)) != sha256:
            wrong.append(f"  {name}: SHA-256 {found}, the manifest has {sha256}")
    progress("hashing files", len(expected), len(expected))
    if wrong:
        raise VerificationError(
            f"{data.path}: {len(wrong)} of {len(expected)} files are not what was prepared; prepare or download them "
            "again:\n" + "\n".join(wrong)
        )


def _document_digests(shards: Sequence[Shard], bos_id: int, stage: str, progress: Progress) -> Iterator[bytes]:
    """One 16-byte digest per document (BOS to BOS) of a split, streamed."""
    total, done = sum(map(len, shards)), 0
    state = None
    for shard in shards:
        for start in range(0, len(shard), CHUNK_TOKENS):
            chunk = np.asarray(shard[start : start + CHUNK_TOKENS])
            for part in filter(len, np.split(chunk, np.flatnonzero(chunk == bos_id))):
                if state and part[0] == bos_id:
                    yield state.digest()
                    state = None
                state = state or hashlib.blake2b(digest_size=16)
                state.update(part.tobytes())
            done += len(chunk)
            progress(stage, done, total)
    if state:
        yield state.digest()
