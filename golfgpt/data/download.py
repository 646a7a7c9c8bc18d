"""Published token shards: fetched from the Hugging Face hub, checked against it, recorded.

    fineweb_train_000000.bin ...    shards, and fineweb_1024_bpe.model: under these names only when they are right
    .fineweb_train_000000.bin.part  what came of one so far, in pieces of 10 MB; the next call goes on from there
    download.json                   `Record`: dataset, commit, and path, size and SHA-256 of every file

The layout at the hub is upstream's (`data/cached_challenge_fineweb.py`, its default `datasets/` prefix):

    datasets/datasets/fineweb10B_sp1024/fineweb_{train,val}_%06d.bin
    datasets/tokenizers/fineweb_1024_bpe.model

The hub's tree listing gives size and SHA-256 of every file, so upstream's manifest is not needed. Files come over
plain HTTP with ranges (`huggingface_hub.file_download.http_get`) and not through `hf_hub_download`, which in 2.4
drops what an interrupted call has fetched, nor through hf_xet, for the same reason. The hub's environment variables
hold: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT. huggingface_hub is imported when it is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from golfgpt import __version__
from golfgpt.data.shards import MANIFEST, Dataset, Progress, open_shard
from golfgpt.errors import BusyError, InputError, Interrupted
from golfgpt.files import sha256_file, write_json

REPO = "willdepueoai/parameter-golf"
REVISION = "a85b0e6035c3c94bc23685a07c81a8f3bf89db80"
"""The only commit that the hub's cache paths in public run scripts name; never checked against the hub from here."""
RECORD = "download.json"
RETRIES = 2
GRACE = 3.0
"""Seconds that threads get to stop after ctrl-C."""

_SHARD = re.compile(
    r"datasets/datasets/fineweb10B_(?P<variant>sp\d+)/fineweb_(?P<split>train|val)_(?P<index>\d{6})\.bin"
)
_TOKENIZER = re.compile(r"datasets/tokenizers/fineweb_(?P<pieces>\d+)_bpe\.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """What a file of the dataset must be."""

    path: str
    """In the dataset repository; its last part is the name here."""
    bytes: int
    sha256: str | None
    """None until it is here, for the rare file that the hub keeps in git and not in LFS."""
    blob_id: str | None = None
    """SHA-1 of git, which checks such a file."""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def problem(self, path: Path) -> str | None:
        """How the file at `path` differs from what it must be; None if it does not."""
        if (size := path.stat().st_size) != self.bytes:
            return f"{size} bytes instead of {self.bytes}"
        if self.sha256:
            kind, want, have = "SHA-256", self.sha256, sha256_file(path)
        else:
            blob = b"blob %d\0" % size + path.read_bytes()
            kind, want, have = "git blob", self.blob_id, hashlib.sha1(blob).hexdigest()
        return None if have == want else f"{kind} {have} instead of {want}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a folder of published shards holds, or will once its download is through."""

    format: int = 1
    golfgpt: str = __version__
    """Version of the program that wrote it."""
    repo: str = REPO
    revision: str
    """Commit of the dataset."""
    variant: str
    files: tuple[RemoteFile, ...]

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record at `path`, None where there is none. Raises InputError for one that cannot be read."""
        try:
            values = json.loads(path.read_bytes())
            self = cls(**values | {"files": tuple(RemoteFile(**file) for file in values["files"])})
            if self.format != 1 or not all(
                _SHARD.fullmatch(f.path) or _TOKENIZER.fullmatch(f.path) for f in self.files
            ):
                raise ValueError("another format, or files of another dataset")
            sizes = all(type(f.bytes) is int and f.bytes >= 0 for f in self.files)
            digests = [(f.sha256, 64) for f in self.files if f.sha256 is not None or f.blob_id is None]
            digests += [(f.blob_id, 40) for f in self.files if f.blob_id is not None] + [(self.revision, 40)]
            if not sizes or not all(re.fullmatch(f"[0-9a-f]{{{digits}}}", digest) for digest, digits in digests):
                raise ValueError("a size, digest or revision is none")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is not a readable download record ({error}); delete it, and the files beside it are checked "
                "against the hub instead"
            ) from error
        return self


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
    """All that is in the folder now, each file checked by its SHA-256."""
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
    a file that is wrong when fetched twice; BusyError; Interrupted after ctrl-C.
    """
    if train_shards < 1 or workers < 1:
        raise InputError(f"--train-shards {train_shards} and --workers {workers} must be at least 1")
    if not re.fullmatch("[A-Za-z0-9_]{1,32}", variant):
        raise InputError(f"--variant {variant!r}: variants are named sp1024, sp8192 and the like")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BusyError(f"{out} is being downloaded to by another process; wait for it") from None
    try:
        return _download(out, variant, train_shards, revision, workers, endpoint, progress or (lambda *_: None))
    except KeyboardInterrupt:
        raise Interrupted("stopped by SIGINT; the same command continues", signal.SIGINT) from None
    finally:
        lock.release()


def _download(
    out: Path,
    variant: str,
    train_shards: int,
    revision: str | None,
    workers: int,
    endpoint: str | None,
    progress: Progress,
) -> Report:
    hub = _Hub(endpoint)
    commit, files = _plan(out, hub, variant, train_shards, revision)
    record = Record(revision=commit, variant=variant, files=tuple(files))
    write_json(out / RECORD, dataclasses.asdict(record))

    stop = threading.Event()
    present = [file for file in files if (out / file.name).exists()]
    meter = _Meter("checking files", present, progress)

    def check(file: RemoteFile) -> str | None:
        found = file.problem(out / file.name)
        meter.set(file, file.bytes)
        return found

    problems = dict(zip(present, _each(check, present, workers, stop), strict=True))
    damaged = [f"{file.name}: {found}" for file, found in problems.items() if found]
    missing = [file for file in files if file not in problems or problems[file]]
    parts = {file: out / f".{file.name}.part" for file in missing}
    need = sum(file.bytes - (min(p.stat().st_size, file.bytes) if p.exists() else 0) for file, p in parts.items())
    if need > (free := shutil.disk_usage(out).free):
        raise InputError(
            f"{out}: {len(missing)} files need {need:,} bytes more, {free:,} are free: {need - free:,} short; free "
            "some, choose another --out, or fewer --train-shards"
        )
    meter = _Meter("downloading", missing, progress)

    def fetch(file: RemoteFile) -> None:
        def wrong(found: str) -> None:
            damaged.append(f"{file.name}: {found}")

        hub.fetch(file, commit, parts[file], lambda done: meter.set(file, done), stop, wrong)
        if file.name.endswith(".bin"):
            open_shard(parts[file])
        os.replace(parts[file], out / file.name)

    _each(fetch, missing, workers, stop)
    whole = tuple(replace(file, sha256=file.sha256 or sha256_file(out / file.name)) for file in files)
    write_json(out / RECORD, dataclasses.asdict(replace(record, files=whole)))
    data = Dataset.open(out)
    return Report(
        path=str(out),
        repo=REPO,
        revision=commit,
        variant=variant,
        train_shards=len(data.train),
        val_shards=len(data.val),
        train_tokens=data.train_tokens,
        val_tokens=data.val_tokens,
        files=len(files),
        bytes=sum(file.bytes for file in files),
        fetched_files=len(missing),
        fetched_bytes=need,
        damaged=tuple(damaged),
    )


def _plan(out: Path, hub: _Hub, variant: str, train_shards: int, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit, and the files that the folder will hold; the hub is asked only for what the record does not say."""
    record = Record.load(out / RECORD)
    if record and (record.repo, record.variant) != (REPO, variant):
        raise InputError(f"{out} holds {record.variant} of {record.repo}; choose another --out for {variant}")
    commit = record.revision if record else REVISION
    if revision is not None:
        commit = revision if _COMMIT.fullmatch(revision) else hub.resolve(revision)
    if record and record.revision != commit:
        raise InputError(
            f"{out} holds revision {record.revision}, but {revision} is {commit}; choose another --out for that, or "
            f"continue with --revision {record.revision}"
        )
    known = record.files if record else ()
    try:
        wanted = _select(known, variant, train_shards)
    except InputError:  # a new folder, or more shards than before
        known = hub.list_files(commit)
        wanted = _select(known, variant, train_shards)
    here = {path.name for pattern in ("*_train_*.bin", "*_val_*.bin", "*.model") for path in out.glob(pattern)}
    more = [f for f in known if f not in wanted and f.name in here and _shard_of(f, variant, "train")]
    files = sorted([*wanted, *more], key=lambda file: file.path)
    strange = here - {file.name for file in files}
    if (out / MANIFEST).exists():
        strange.add(MANIFEST)
    if strange:
        raise InputError(f"{out} also holds {min(strange)}, which is not of this download; choose another --out")
    return commit, files


def _shard_of(file: RemoteFile, variant: str, split: str) -> bool:
    found = _SHARD.fullmatch(file.path)
    return found is not None and (found["variant"], found["split"]) == (variant, split)


def _select(files: Sequence[RemoteFile], variant: str, train_shards: int) -> list[RemoteFile]:
    """The first `train_shards` train shards, all of val and the tokenizer. Raises InputError for what is missing."""
    pieces = {found["pieces"]: f for f in files if (found := _TOKENIZER.fullmatch(f.path))}
    variants = {found["variant"] for f in files if (found := _SHARD.fullmatch(f.path))}
    offered = sorted((v for v in variants if v[2:] in pieces), key=lambda v: int(v[2:]))
    if variant not in offered:
        raise InputError(
            f"{REPO} has no variant {variant!r} with a SentencePiece tokenizer; it has {', '.join(offered) or 'none'}"
        )
    chosen = [pieces[variant[2:]]]
    for split, count in (("train", train_shards), ("val", None)):
        shards = {int(_SHARD.fullmatch(f.path)["index"]): f for f in files if _shard_of(f, variant, split)}
        if count and count > len(shards):
            raise InputError(f"--train-shards {count}: {REPO} has {len(shards)} train shards of {variant}")
        for index in range(count or max(shards, default=0) + 1):
            if index not in shards:
                raise InputError(f"{REPO} lacks the shard fineweb_{split}_{index:06d}.bin of {variant}")
            chosen.append(shards[index])
    return chosen


class _Stopped(Exception):
    """Another thread failed, or the user stopped the command."""


def _each(work: Callable[[Any], Any], items: Iterable[Any], workers: int, stop: threading.Event) -> list[Any]:
    """`work` of each item on some threads, results in order; the first error, or ctrl-C, stops the others.

    The threads are daemons and get `GRACE` seconds to stop: one that waits for a silent server would otherwise hold
    the command for a minute, and no file is harmed when it ends in the middle.
    """
    futures = [(Future(), item) for item in items]
    todo = deque(futures)

    def run() -> None:
        with contextlib.suppress(IndexError):  # all taken
            while not stop.is_set():
                future, item = todo.popleft()
                try:
                    future.set_result(work(item))
                except BaseException as error:
                    future.set_exception(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(todo)))]
    try:
        for thread in threads:
            thread.start()
        for future in as_completed(future for future, _ in futures):
            future.result()
    except BaseException:
        stop.set()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            if thread.ident:
                thread.join(max(0.0, deadline - time.monotonic()))
        raise
    return [future.result() for future, _ in futures]


class _Meter:
    """Bytes done of several files at once, reported as one number by one thread at a time."""

    def __init__(self, stage: str, files: list[RemoteFile], progress: Progress):
        self._stage, self._progress, self._lock = stage, progress, threading.Lock()
        self._done, self._total = dict.fromkeys(files, 0), sum(file.bytes for file in files)

    def set(self, file: RemoteFile, done: int) -> None:
        with self._lock:
            self._done[file] = done
            self._progress(self._stage, sum(self._done.values()), self._total)


class _Part(io.FileIO):
    """A file to append to, unbuffered so that a kill loses nothing, that tells its length and can be stopped."""

    def __init__(self, path: Path, grown: Callable[[int], None], stop: threading.Event):
        super().__init__(path, "ab")
        self._grown, self._stop = grown, stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise _Stopped
        rest = memoryview(data)
        while rest:
            with self.explained():
                rest = rest[super().write(rest) :]
        self._grown(self.tell())
        return len(data)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.name}: {error.strerror}; the same command continues") from error


class _Unavailable(InputError):
    """The hub cannot be reached, or fails itself: worth another try."""


class _Hub:
    """The calls to the hub; every failure of them is an InputError in one sentence."""

    def __init__(self, endpoint: str | None):
        self._endpoint = endpoint

    def resolve(self, revision: str) -> str:
        """The commit that a branch or tag is now."""
        return self._call(
            "resolve", revision, lambda api: api.dataset_info(REPO, revision=revision, expand=["sha"]).sha
        )

    def list_files(self, commit: str) -> list[RemoteFile]:
        """Shards and tokenizers of all variants."""
        # asked first because it fails at once where the listing below tries an absent hub for half a minute
        self._call("look up", commit, lambda api: api.dataset_info(REPO, revision=commit, expand=["sha"]))
        tree = self._call(
            "list",
            commit,
            lambda api: list(
                api.list_repo_tree(REPO, "datasets", recursive=True, revision=commit, repo_type="dataset")
            ),
        )
        return [
            RemoteFile(path=e.path, bytes=e.size, sha256=e.lfs.sha256 if e.lfs else None, blob_id=e.blob_id)
            for e in tree
            if _SHARD.fullmatch(e.path) or _TOKENIZER.fullmatch(e.path)
        ]

    def fetch(
        self,
        file: RemoteFile,
        commit: str,
        part: Path,
        grown: Callable[[int], None],
        stop: threading.Event,
        wrong: Callable[[str], None],
    ) -> None:
        """Bring `file` to `part`, on disk and checked; what is in `part` already is not fetched again.

        A connection that breaks is taken up again as long as bytes come and `RETRIES` times when none do; a file
        that is wrong (`wrong` is told how) is fetched again once.
        """
        idle, again = 0, False
        while True:
            if part.exists() and part.stat().st_size > file.bytes:
                part.unlink()
            with _Part(part, grown, stop) as target:
                before = target.tell()
                grown(before)
                try:
                    if before < file.bytes:
                        self._call("fetch", file.path, lambda api, t=target, b=before: self._get(file, commit, t, b))
                except _Unavailable:
                    idle = 0 if target.tell() > before else idle + 1
                    if idle > RETRIES or stop.wait(idle):
                        raise
                    continue
                with target.explained():
                    os.fsync(target.fileno())
            if not (found := file.problem(part)):
                return
            part.unlink()
            if again:
                raise InputError(
                    f"{file.path} came with {found}, twice; the hub or a proxy serves it damaged: try again later, or "
                    "another HF_ENDPOINT"
                )
            again = True
            wrong(found)

    def _get(self, file: RemoteFile, commit: str, target: _Part, start: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(library_name="golfgpt", library_version=__version__)
        headers["Accept-Encoding"] = "identity"  # ranges and lengths are those of the file
        url = hf_hub_url(REPO, file.path, repo_type="dataset", revision=commit, endpoint=self._endpoint)
        http_get(url, target, resume_size=start, headers=headers)

    def _call(self, verb: str, what: str, work: Callable[[Any], Any]) -> Any:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        try:
            from huggingface_hub import HfApi, errors
            from huggingface_hub.utils import disable_progress_bars, logging
        except ImportError as error:
            raise InputError(f"the download needs huggingface_hub ({error}): pip install huggingface_hub") from error
        disable_progress_bars()
        logging.set_verbosity_error()  # its retries would be printed through the progress bar
        api = HfApi(endpoint=self._endpoint, library_name="golfgpt", library_version=__version__)
        try:
            return work(api)
        except (InputError, _Stopped):
            raise
        except errors.OfflineModeIsEnabled as error:
            raise InputError(f"HF_HUB_OFFLINE is set, so nothing can be fetched ({verb} {what})") from error
        except errors.RevisionNotFoundError as error:
            raise InputError(
                f"{REPO} at {api.endpoint} has no revision {what}; name a commit, branch or tag: --revision main"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise InputError(
                f"{api.endpoint} has no dataset {REPO}, or does not show it to this HF_TOKEN; check HF_ENDPOINT and "
                "HF_TOKEN"
            ) from error
        except errors.HfHubHTTPError as error:
            kind = _Unavailable if error.response.status_code >= 500 else InputError
            raise kind(
                f"{api.endpoint} answered {error.response.status_code} when asked to {verb} {what}; the same command "
                "continues later"
            ) from error
        except Exception as error:  # httpx, httpx2 or requests, by the version of huggingface_hub
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise _Unavailable(
                f"cannot {verb} {what} at {api.endpoint}: {text}; check the connection and HF_ENDPOINT, then the same "
                "command continues"
            ) from error
