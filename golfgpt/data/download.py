"""Published token shards: fetched from the Hugging Face hub, checked against the digests it lists, recorded.

    fineweb_train_000000.bin ...    shards, and fineweb_1024_bpe.model: under these names only when they are right
    .fineweb_train_000000.bin.part  what has arrived of one; the next call continues it
    download.json                   `Record`: dataset, commit, and path, size and digest of every file

The layout at the hub is the publishers' (`data/cached_challenge_fineweb.py`, its default `datasets/` prefix):

    datasets/datasets/fineweb10B_sp1024/fineweb_{train,val}_%06d.bin
    datasets/tokenizers/fineweb_1024_bpe.model

Files come over plain HTTP with ranges (`huggingface_hub.file_download.http_get`), not through `hf_hub_download` or
hf_xet: those drop the part of a file that an interrupted call has fetched, and check its size but no digest.
huggingface_hub is imported when the hub is asked, and reads HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its timeouts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import filelock

from golfgpt import __version__
from golfgpt.data.manifest import MANIFEST
from golfgpt.data.shards import Dataset, Progress
from golfgpt.errors import BusyError, InputError, Interrupted, Terminated
from golfgpt.files import read_json, sha256_file, write_json

REPO = "willdepueoai/parameter-golf"
REVISION = "a85b0e6035c3c94bc23685a07c81a8f3bf89db80"
"""The only commit that the hub's cache paths in public run scripts name; never checked against the hub from here."""
RECORD = "download.json"
RETRIES = 2
"""Attempts to continue a file after one that brought no byte."""
GRACE = 3.0
"""Seconds that the threads have to stop."""

_FILE = re.compile(
    r"datasets/datasets/fineweb10B_(?P<variant>sp\d+)/fineweb_(train|val)_\d{6}\.bin"
    r"|datasets/tokenizers/fineweb_(?P<pieces>\d+)_bpe\.model"
)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """What a file of the dataset must be."""

    path: str
    """In the dataset repository; its last part is the name here."""
    bytes: int
    sha256: str | None
    """None for the rare file that the hub keeps in git and not in LFS."""
    blob_id: str | None
    """SHA-1 of git, which checks such a file."""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def variant(self) -> str | None:
        """Which variant's shard or tokenizer it is; None for any other file."""
        found = _FILE.fullmatch(self.path)
        return found and (found["variant"] or f"sp{found['pieces']}")

    def problem(self, path: Path) -> str | None:
        """How the file at `path` differs from what it must be; None if it does not."""
        if (size := path.stat().st_size) != self.bytes:
            return f"{size} bytes, expected {self.bytes}"
        if self.sha256:
            kind, expected, found = "SHA-256", self.sha256, sha256_file(path)
        else:
            blob = b"blob %d\0" % size + path.read_bytes()
            kind, expected, found = "git blob", self.blob_id, hashlib.sha1(blob).hexdigest()
        return None if found == expected else f"{kind} {found}, expected {expected}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a folder of published shards holds, or will hold when its download is complete."""

    format: int = 1
    golfgpt: str = __version__
    """Version of the program that wrote it."""
    repo: str = REPO
    revision: str
    """Commit of the dataset."""
    variant: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `download` found and did."""

    path: str
    repo: str
    revision: str
    variant: str
    train_shards: int
    val_shards: int
    train_tokens: int
    val_tokens: int
    files: int
    bytes: int
    """All that is in the folder now, each file checked by its digest."""
    fetched_files: int
    fetched_bytes: int
    damaged: tuple[str, ...]
    """Files that were not what they must be, and how; each was fetched again."""


def download(
    out: str | os.PathLike,
    *,
    variant: str = "sp1024",
    train_shards: int = 80,
    revision: str | None = None,
    workers: int = 4,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Bring the first `train_shards` shards, all of validation and the tokenizer into `out`, flat, and check them.

    Files that are right stay, so the same call continues an interrupted one, and verifies a finished one without
    the network. `revision` None: the folder's own commit, else `REVISION`; a branch or tag is resolved to a commit.
    A folder keeps to one commit and one variant. More train shards than asked for stay if they are of this download.

    Raises InputError for a wrong variant, count, folder or record, too little disk, a hub that cannot be reached, and
    a file that is wrong when fetched twice; BusyError; Interrupted after ctrl-C, and after Terminated.
    """
    if train_shards < 1 or workers < 1:
        raise InputError(f"--train-shards {train_shards} and --workers {workers} must be at least 1")
    if not re.fullmatch(r"sp\d{1,9}", variant):
        raise InputError(f"--variant {variant!r}: expected sp1024, sp8192 or the like")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".download.lock", timeout=0):
            record = _plan(out, variant, train_shards, revision, endpoint)
            write_json(out / RECORD, dataclasses.asdict(record))
            files = _Download(out, record, endpoint)
            files.check_disk()
            files.run(workers, progress or (lambda *_: None))
            data = Dataset.open(out)
    except filelock.Timeout:
        raise BusyError(f"{out} is being downloaded to by another process; wait for it") from None
    except (KeyboardInterrupt, Terminated) as error:
        came = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        raise Interrupted(f"stopped by {came.name}; the same command continues", came) from None
    return Report(
        path=str(out),
        repo=REPO,
        revision=record.revision,
        variant=variant,
        train_shards=len(data.train),
        val_shards=len(data.val),
        train_tokens=data.train_tokens,
        val_tokens=data.val_tokens,
        files=len(record.files),
        bytes=sum(file.bytes for file in record.files),
        fetched_files=len(files.fetched),
        fetched_bytes=sum(files.fetched),
        damaged=tuple(files.damaged),
    )


def _plan(out: Path, variant: str, train_shards: int, revision: str | None, endpoint: str | None) -> Record:
    """What the folder will hold; the hub is asked only for what the folder's record does not say."""
    old = _read_record(out / RECORD)
    if old and (old.repo, old.variant) != (REPO, variant):
        raise InputError(f"{out} holds {old.variant} of {old.repo}; choose another --out for {variant}")
    commit, known = (old.revision, old.files) if old else (None, ())
    if revision not in (None, commit) or sum("_train_" in file.name for file in known) < train_shards:
        found, known = _look_up(revision or commit or REVISION, endpoint)
        if commit not in (None, found):
            raise InputError(
                f"{out} holds revision {commit}, but {revision} is {found}; choose another --out for that, or continue "
                f"with --revision {commit}"
            )
        commit = found
    wanted = _select(known, variant, train_shards)
    here = {
        path.name for pattern in ("*_train_*.bin", "*_val_*.bin", "*.model", MANIFEST) for path in out.glob(pattern)
    }
    files = {file.name: file for file in known if file.variant == variant and file.name in wanted | here}
    if strange := here - files.keys():
        raise InputError(f"{out} also holds {min(strange)}, which is not of this download; choose another --out")
    return Record(revision=commit, variant=variant, files=tuple(files[name] for name in sorted(files)))


def _read_record(path: Path) -> Record | None:
    try:
        record = read_json(path, Record)
        if record.format != 1 or any(file.variant != record.variant or file.bytes < 1 for file in record.files):
            raise ValueError("another format, or files of another dataset")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable download record ({error}); delete it, and the files beside it are checked "
            "against the hub instead"
        ) from error
    return record


def _select(files: Sequence[RemoteFile], variant: str, train_shards: int) -> set[str]:
    """Names of the first `train_shards` train shards, all of val and the tokenizer. InputError for a missing one."""
    shards, tokenizers = ({f.variant for f in files if f.name.endswith(end)} for end in (".bin", ".model"))
    if variant not in shards & tokenizers:
        offered = sorted(shards & tokenizers, key=lambda name: int(name[2:]))
        raise InputError(
            f"{REPO} has no variant {variant!r} with a SentencePiece tokenizer; it has {', '.join(offered) or 'none'}"
        )
    names = {file.name for file in files if file.variant == variant}
    train, val = (sum(f"_{split}_" in name for name in names) for split in ("train", "val"))
    wanted = {f"fineweb_{variant[2:]}_bpe.model"}
    wanted |= {f"fineweb_train_{i:06d}.bin" for i in range(train_shards)}
    wanted |= {f"fineweb_val_{i:06d}.bin" for i in range(max(val, 1))}
    if lacking := wanted - names:
        raise InputError(
            f"{REPO} lacks {min(lacking)} of {variant}; it has {train} train shards (--train-shards) and {val} for val"
        )
    return wanted


class _Download:
    """The files of a record on their way into a folder."""

    def __init__(self, out: Path, record: Record, endpoint: str | None):
        self._out, self._commit, self._files, self._endpoint = out, record.revision, record.files, endpoint
        self._stop = threading.Event()
        self.fetched: list[int] = []
        """Bytes of each file that was fetched."""
        self.damaged: list[str] = []

    def check_disk(self) -> None:
        """Raises InputError if the files do not fit."""
        sizes = {file: _size(self._out / file.name) + _size(self._part(file)) for file in self._files}
        need = sum(max(0, file.bytes - size) for file, size in sizes.items())
        if need > (free := shutil.disk_usage(self._out).free):
            raise InputError(
                f"{self._out}: the files need {need:,} bytes more, {free:,} are free: {need - free:,} short; choose "
                "another --out, or fewer --train-shards"
            )

    def run(self, workers: int, progress: Progress) -> None:
        """Bring all files, `workers` at a time; the first error, or ctrl-C, stops the others at their next piece."""
        slots = threading.Semaphore(workers)

        def work(file: RemoteFile) -> RemoteFile:
            with slots:
                self._bring(file)
            return file

        pool = ThreadPool(workers)  # of daemons: one that waits for a silent server does not hold the command
        outcomes = pool.imap_unordered(work, self._files)
        finished: set[RemoteFile] = set()
        try:
            while len(finished) < len(self._files):
                with contextlib.suppress(multiprocessing.TimeoutError):
                    finished.add(outcomes.next(timeout=0.2))
                done = sum(file.bytes if file in finished else _size(self._part(file)) for file in self._files)
                progress("fetching and checking", done, sum(file.bytes for file in self._files))
        finally:
            self._stop.set()
            pool.terminate()
            for _ in range(workers):
                slots.acquire(timeout=GRACE / workers)

    def _part(self, file: RemoteFile) -> Path:
        return self._out / f".{file.name}.part"

    def _bring(self, file: RemoteFile) -> None:
        """Check `file`; if it is missing or wrong, fetch it beside its place, check that and rename it."""
        path, part = self._out / file.name, self._part(file)
        if path.exists():
            if not (found := file.problem(path)):
                return
            self.damaged.append(f"{file.name}: {found}")
            path.unlink()
        self.fetched.append(max(0, file.bytes - _size(part)))
        for _ in range(2):
            self._fetch(file, part)
            if not (found := file.problem(part)):
                os.replace(part, path)
                return
            self.damaged.append(f"{file.name}: {found}")
            part.unlink()
        raise InputError(
            f"{file.path} came with {found}, twice; the hub or a proxy serves it damaged: try again later, or another "
            "HF_ENDPOINT"
        )

    def _fetch(self, file: RemoteFile, part: Path) -> None:
        """Append to `part` what it lacks. A connection that breaks is taken up again as long as bytes arrive, and
        `RETRIES` times when none do."""
        idle = 0
        while (before := _size(part)) < file.bytes:
            try:
                return self._get(file, part)
            except _Unavailable:
                idle = 0 if _size(part) > before else idle + 1
                if idle > RETRIES or self._stop.wait(idle):
                    raise

    def _get(self, file: RemoteFile, part: Path) -> None:
        with _hub(f"fetch {file.path}", self._endpoint), _Part(part, self._stop) as target:
            from huggingface_hub import hf_hub_url
            from huggingface_hub.file_download import http_get
            from huggingface_hub.utils import build_hf_headers

            headers = build_hf_headers(library_name="golfgpt", library_version=__version__)
            headers["Accept-Encoding"] = "identity"  # ranges and lengths are those of the file
            url = hf_hub_url(REPO, file.path, repo_type="dataset", revision=self._commit, endpoint=self._endpoint)
            http_get(url, target, resume_size=target.tell(), headers=headers)
            target.flush()
            os.fsync(target.fileno())


class _Part(io.BufferedWriter):
    """A file to append to, which refuses to grow once `stop` is set."""

    def __init__(self, path: Path, stop: threading.Event):
        super().__init__(io.FileIO(path, "ab"))
        self._stop = stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise InputError("stopped")
        try:
            return super().write(data)
        except OSError as error:
            raise InputError(f"cannot write {self.name}: {error.strerror}; the same command continues") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # also a part that another thread has just renamed
        return 0


def _look_up(revision: str, endpoint: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit that `revision` is now, and its shards and tokenizers of all variants."""
    with _hub(f"look up {revision}", endpoint) as api:
        info = api.dataset_info(REPO, revision=revision, files_metadata=True)
    files = [
        RemoteFile(path=f.rfilename, bytes=f.size, sha256=f.lfs.sha256 if f.lfs else None, blob_id=f.blob_id)
        for f in info.siblings
    ]
    return info.sha, [file for file in files if file.variant]


class _Unavailable(InputError):
    """The hub cannot be reached, or fails itself: worth another try."""


@contextlib.contextmanager
def _hub(action: str, endpoint: str | None) -> Iterator[Any]:
    """The hub's client (`HfApi`); every failure inside becomes an InputError in one sentence."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # its retries would be printed through our progress bar
    api = HfApi(endpoint=endpoint, library_name="golfgpt", library_version=__version__)
    try:
        yield api
    except InputError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise InputError(f"HF_HUB_OFFLINE is set, so nothing can be fetched ({action})") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{REPO} at {api.endpoint} has no such revision ({action}); name a commit, branch or tag: --revision main"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{api.endpoint} has no dataset {REPO}, or hides it from this HF_TOKEN; check HF_ENDPOINT and HF_TOKEN"
        ) from error
    except Exception as error:  # httpx, httpx2 or requests, by the version of huggingface_hub
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise _Unavailable(
            f"cannot {action} at {api.endpoint}: {text}; check the connection and HF_ENDPOINT, then the same command "
            "continues"
        ) from error
