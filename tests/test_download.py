"""Published shards from a hub of our own: an HTTP server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")  # bare GPU machines lack it

from test_cli import TINY

from golfgpt.cli import main
from golfgpt.data import download as module
from golfgpt.data.download import RECORD, REPO, REVISION, download
from golfgpt.data.shards import Dataset, write_shard
from golfgpt.errors import BusyError, InputError

MOVED = "b" * 40
SHARDS, VAL = "datasets/datasets/fineweb10B_sp384", 2
TOKENIZER = "fineweb_384_bpe.model"
TRAIN_0, TRAIN_1, VAL_1 = "fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000001.bin"


class Hub(ThreadingHTTPServer):
    """The endpoints that huggingface_hub calls; `faults` of a file name are used up one request each."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.in_git = files, ()
        self.branches = {"main": REVISION}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.got: list[tuple[str, str | None]] = []
        """Name and Range of every file that was asked for."""
        self.tokens: set[str | None] = set()
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def names(self) -> list[str]:
        return sorted(name for name, _ in self.got)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(path)
        hub.tokens.add(self.headers.get("Authorization"))
        if found := re.fullmatch(rf"/api/datasets/{REPO}/revision/(.+)", path):
            commit = hub.branches.get(found[1], found[1])
            if commit not in hub.branches.values():
                return self.answer(404, X_Error_Code="RevisionNotFound")
            body = json.dumps({"id": REPO, "sha": commit, "siblings": [*map(self.sibling, hub.files)]})
            return self.answer(200, body.encode(), Content_Type="application/json")
        if found := re.fullmatch(rf"/datasets/{REPO}/resolve/(\w+)/(.+)", path):
            return self.answer(302, Location=f"/lfs/{found[2]}", X_Repo_Commit=found[1])
        return self.file(path.removeprefix("/lfs/"))

    def sibling(self, path: str) -> dict:
        body = self.server.files[path]
        lfs = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        kept_in = {} if path.endswith(self.server.in_git) else {"lfs": lfs}
        return {"rfilename": path, "size": len(body), "blobId": blob, **kept_in}

    def file(self, path: str) -> None:
        name, body = path.rsplit("/", 1)[-1], self.server.files[path]
        wanted = self.headers.get("Range")
        self.server.got.append((name, wanted))
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        if fault == "busy":
            return self.answer(503)
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "truncated":
            body = body[:-100]
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and fault != "ignore-range" else 0
        rest = body[start:]
        head = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.close_connection = fault in ("drop", "stall")
        sent = rest[: len(rest) // 2] if self.close_connection else rest
        self.answer(206 if start else 200, sent, len(rest), **head)
        if fault == "stall":
            self.wfile.flush()
            self.server.release.wait(30)


@pytest.fixture(scope="session")
def published(corpus, tmp_path_factory) -> dict[str, bytes]:
    """Five train and two val shards of real text, and their tokenizer."""
    data, folder = Dataset.open(corpus), tmp_path_factory.mktemp("shards")
    for split, tokens, count, size in (("train", data.train[0], 5, 6000), ("val", data.val[0], VAL, 2500)):
        for i in range(count):
            write_shard(folder / f"fineweb_{split}_{i:06d}.bin", np.array(tokens[i * size : (i + 1) * size]))
    files = {f"{SHARDS}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    files |= {f"datasets/tokenizers/{TOKENIZER}": data.need_tokenizer().model_bytes}
    files |= {"datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin": b"x"}
    files |= {"datasets/tokenizers/fineweb_1024_bpe.model": b"x", "datasets/manifest.json": b"{}"}
    return files | {"datasets/datasets/fineweb10B_byte260/fineweb_val_000000.bin": b"x"}


@pytest.fixture
def hub(published):
    hub = Hub(dict(published))
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.release.set()
    hub.shutdown()
    thread.join()
    hub.server_close()


def get(hub: Hub, out: Path, train_shards: int = 3, **options):
    return download(out, **{"variant": "sp384", "train_shards": train_shards, "endpoint": hub.url} | options)


def same(hub: Hub, out: Path, train_shards: int) -> bool:
    """Whether `out` holds exactly these shards, all of val and the tokenizer, byte for byte, and nothing half done."""
    names = [f"fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    names += [TOKENIZER, *(f"fineweb_val_{i:06d}.bin" for i in range(VAL))]
    held = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in (RECORD, ".download.lock")}
    there = {path.rsplit("/", 1)[-1]: body for path, body in hub.files.items() if SHARDS in path or TOKENIZER in path}
    return held == {name: there[name] for name in names}


def test_a_second_call_asks_for_nothing_and_more_shards_for_those(hub, tmp_path):
    seen = []
    first = get(hub, tmp_path, progress=lambda *now: seen.append(now))
    assert same(hub, tmp_path, 3) and seen[-1] == ("fetching and checking", first.bytes, first.bytes)
    assert (first.train_tokens, first.val_tokens, first.fetched_files, first.damaged) == (18_000, 5_000, 6, ())
    record = json.loads((tmp_path / RECORD).read_text())
    assert (record["revision"], record["repo"], record["variant"]) == (REVISION, REPO, "sp384")
    for file in record["files"]:
        assert file["sha256"] == hashlib.sha256(hub.files[file["path"]]).hexdigest()
    assert all(f"/resolve/{REVISION}/" in path for path in hub.asked if "resolve" in path)
    hub.got.clear(), hub.asked.clear()
    again = get(hub, tmp_path, revision=REVISION)
    assert (again.fetched_files, again.fetched_bytes, hub.asked) == (0, 0, [])
    assert get(hub, tmp_path, 5).fetched_files == 2
    assert hub.names() == ["fineweb_train_000003.bin", "fineweb_train_000004.bin"]
    assert same(hub, tmp_path, 5)
    assert get(hub, tmp_path, 1).train_shards == 5  # they stay, and are checked
    (tmp_path / "fineweb_train_000004.bin").unlink()
    assert get(hub, tmp_path, 1).train_shards == 4  # but are not brought back


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "from elsewhere"])
@pytest.mark.parametrize(
    ("cut", "message"), [((2000, 2001), "SHA-256 .*, expected"), ((5000, 9**9), r"5001 bytes, expected \d+")]
)
def test_a_file_damaged_on_disk_is_named_and_fetched_again(hub, tmp_path, cut, message, recorded):
    get(hub, tmp_path)
    body = (tmp_path / TRAIN_1).read_bytes()
    (tmp_path / TRAIN_1).write_bytes(body[: cut[0]] + b"x" + body[cut[1] :])
    hub.got.clear()
    if not recorded:
        (tmp_path / RECORD).unlink()
    (found,) = get(hub, tmp_path).damaged
    assert hub.names() == [TRAIN_1] and same(hub, tmp_path, 3) and re.match(f"{TRAIN_1}: {message}", found)


@pytest.mark.parametrize(("fault", "kind"), [("corrupt", "SHA-256"), ("corrupt", "git blob"), ("truncated", "")])
def test_a_file_that_comes_damaged_is_fetched_again_once(hub, tmp_path, fault, kind):
    hub.in_git = (VAL_1,) if kind == "git blob" else ()
    hub.faults[VAL_1] = [fault]
    (found,) = get(hub, tmp_path).damaged
    assert same(hub, tmp_path, 3) and hub.names().count(VAL_1) == 2 and found.startswith(f"{VAL_1}: {kind}")
    hub.faults[VAL_1] = [fault] * 9
    (tmp_path / VAL_1).unlink()
    with pytest.raises(InputError, match=rf"{VAL_1} came with .*, twice"):
        get(hub, tmp_path)
    assert not (tmp_path / VAL_1).exists()
    hub.faults.clear()
    get(hub, tmp_path)
    assert same(hub, tmp_path, 3)


@pytest.mark.parametrize("faults", [["drop", "drop"], ["busy", "busy"], ["drop", "busy", "drop"]], ids=" ".join)
def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path, monkeypatch, faults):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults[TRAIN_0] = list(faults)
    assert get(hub, tmp_path).damaged == () and same(hub, tmp_path, 3)
    ranges = [wanted for name, wanted in hub.got if name == TRAIN_0]
    assert len(ranges) == len(faults) + 1 and ranges[0] is None
    assert all((wanted is not None) == ("drop" in faults) for wanted in ranges[1:])


@pytest.mark.parametrize("ignored", [False, True])
def test_the_next_call_goes_on_inside_a_file(hub, tmp_path, monkeypatch, ignored):
    monkeypatch.setattr(module, "RETRIES", 0)
    hub.faults[TRAIN_0] = ["busy"]
    with pytest.raises(InputError, match=f"cannot fetch {SHARDS}/{TRAIN_0} at .*503"):
        get(hub, tmp_path)
    (tmp_path / f".{TRAIN_0}.part").write_bytes(hub.files[f"{SHARDS}/{TRAIN_0}"][:5000])
    (tmp_path / f".{TRAIN_1}.part").write_bytes(b"x" * 3000)
    (tmp_path / TRAIN_1).unlink(missing_ok=True)
    hub.got.clear()
    hub.faults[TRAIN_0] = ["ignore-range"] if ignored else []
    report = get(hub, tmp_path)
    assert (TRAIN_0, "bytes=5000-") in hub.got and same(hub, tmp_path, 3)
    assert report.fetched_bytes < report.bytes and TRAIN_1 in [text.split(":")[0] for text in report.damaged]


def test_a_revision_that_moved_is_refused(hub, tmp_path):
    get(hub, tmp_path, revision="main")
    hub.branches["main"] = MOVED
    with pytest.raises(InputError, match=f"holds revision {REVISION}, but main is {MOVED}.*--revision {REVISION}"):
        get(hub, tmp_path, revision="main")
    (tmp_path / TRAIN_0).unlink()
    get(hub, tmp_path)  # the folder's own commit
    assert same(hub, tmp_path, 3)
    assert get(hub, tmp_path / "new", revision="main").revision == MOVED
    with pytest.raises(InputError, match=r"no such revision \(look up v9\); name a commit"):
        get(hub, tmp_path / "other", revision="v9")


def record(**file: object) -> bytes:
    file = {"path": f"{SHARDS}/{TRAIN_0}", "bytes": 1, "sha256": "0" * 64, "blob_id": None} | file
    record = {"format": 1, "golfgpt": "1", "repo": REPO, "revision": "0" * 40, "variant": "sp384"}
    return json.dumps(record | {"files": [file]}).encode()


@pytest.mark.parametrize(
    ("held", "options", "message"),
    [
        ({}, {"variant": "sp385"}, r"no variant 'sp385' .*; it has sp384, sp1024"),
        ({}, {"variant": "../x"}, "expected sp1024, sp8192"),
        (
            {},
            {"train_shards": 6},
            r"lacks fineweb_train_000005\.bin of sp384; it has 5 train shards \(--train-shards\) and 2 for val",
        ),
        ({}, {"variant": "sp1024", "train_shards": 1}, "it has 0 train shards"),
        ({}, {"train_shards": 0}, "must be at least 1"),
        ({f"{SHARDS}/{TRAIN_1}": None}, {}, f"lacks {TRAIN_1} of sp384"),
        ({f"{SHARDS}/fineweb_val_000000.bin": None}, {}, r"lacks fineweb_val_000000\.bin of sp384"),
        *(
            ({name: b"mine"}, {}, f"also holds {name}, which is not of this download")
            for name in ("golf_train_000000.bin", "x_val_0.bin", "tokenizer.model", "manifest.json")
        ),
        ({RECORD: record()}, {"variant": "sp1024"}, r"holds sp384 of .* for sp1024"),
        *(
            ({RECORD: text}, {}, rf"{RECORD} is not a readable download record .*delete it")
            for text in (b"", b"[]", b"{}", record(bytes="x"), record(bytes=-1), record(path="../../x"))
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_file_is_fetched(hub, tmp_path, held, options, message):
    """`held`: what is in the folder before; None: what the hub has lost."""
    for name, body in held.items():
        if body is None:
            del hub.files[name]
        else:
            (tmp_path / name).write_bytes(body)
    with pytest.raises(InputError, match=message):
        get(hub, tmp_path, **options)
    assert all((tmp_path / name).read_bytes() == body for name, body in held.items() if body) and hub.got == []


def test_too_little_disk_and_another_process(hub, tmp_path, monkeypatch):
    lock = module.filelock.FileLock(tmp_path / ".download.lock", is_singleton=False)
    with lock, pytest.raises(BusyError, match="is being downloaded to"):
        get(hub, tmp_path)
    total = sum(len(body) for path, body in hub.files.items() if SHARDS in path or TOKENIZER in path)
    (tmp_path / f".{TRAIN_0}.part").write_bytes(hub.files[f"{SHARDS}/{TRAIN_0}"][:1000])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=total - 1001))
    with pytest.raises(InputError, match=rf"need {total - 1000:,} bytes more, {total - 1001:,} are free: 1 short"):
        get(hub, tmp_path, 5)
    assert hub.got == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=total - 1000))
    assert get(hub, tmp_path, 5).fetched_bytes == total - 1000


# The command


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "golfgpt", "data", "download", "--variant", "sp384", "--train-shards", "3", *argv]


def process(endpoint: str, **more: str) -> dict:
    """HF_ENDPOINT is read when huggingface_hub is imported, so these tests need processes of their own."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", **more}
    return {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.mark.slow
def test_download_then_train(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(command("--json"), **process(hub.url), timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["train_tokens"]) == ("data/fineweb10B_sp384", 18_000)
    assert hub.tokens == {"Bearer hf_secret"}
    done = subprocess.run(command(), **process(hub.url, HF_HUB_OFFLINE="1"), timeout=120)
    assert "golfgpt train --recipe baseline --data.path data/fineweb10B_sp384 --model.vocab-size 384" in done.stdout
    assert "Traceback" not in done.stderr
    flags = [*TINY, "--schedule.max-steps", "2", "--data.path", report["path"], "--name", "first"]
    assert main(["train", "--recipe", "demo", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize(
    ("more", "message"), [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({}, "cannot look up")]
)
def test_without_a_network_the_command_says_so(tmp_path, more, message):
    options = process("http://127.0.0.1:9", **more)
    done = subprocess.run(command("--out", str(tmp_path / "d")), **options, timeout=60)
    assert done.returncode == 3 and done.stderr.startswith(f"golfgpt: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_leaves_what_the_next_call_continues(hub, tmp_path):
    """A shard above 20 MB, as http_get writes pieces of 10, from a server that falls silent in the middle."""
    write_shard(tmp_path / "big.bin", np.arange(11_000_000) % 384)
    hub.files[f"{SHARDS}/{TRAIN_1}"] = (tmp_path / "big.bin").read_bytes()
    hub.faults[TRAIN_1] = ["stall"]
    out = tmp_path / "d"
    started = subprocess.Popen(command("--out", str(out)), **process(hub.url))
    part = out / f".{TRAIN_1}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=10)
    assert started.returncode == 130 and "stopped by SIGINT; the same command continues" in said
    assert "Traceback" not in said
    kept = part.stat().st_size
    assert kept >= 10_000_000
    report = get(hub, out)
    assert (TRAIN_1, f"bytes={kept}-") in hub.got and report.damaged == () and same(hub, out, 3)
