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
from urllib.parse import parse_qs, unquote, urlsplit

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

    def __init__(self, files: dict[str, bytes], in_git: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.in_git = files, in_git
        self.branches = {"main": REVISION}
        self.faults: dict[str, list[str]] = {}
        self.got: list[tuple[str, str | None]] = []
        """Name and Range of every file that was asked for."""
        self.asked: list[str] = []
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

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        hub.asked.append(path)
        hub.tokens.add(self.headers.get("Authorization"))
        if found := re.fullmatch(rf"/api/datasets/{REPO}/revision/(.+)", path):
            commit = hub.branches.get(found[1], found[1])
            if commit not in hub.branches.values():
                return self.answer(404, X_Error_Code="RevisionNotFound")
            return self.json({"id": REPO, "sha": commit})
        if found := re.fullmatch(rf"/api/datasets/{REPO}/tree/(\w+)/(.+)", path):
            return self.tree(found[2] + "/", int(parse_qs(url.query).get("cursor", ["0"])[0]))
        if found := re.fullmatch(rf"/datasets/{REPO}/resolve/(\w+)/(.+)", path):
            body = hub.files.get(found[2])
            if body is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(
                302,
                Location=f"/lfs/{found[2]}",
                X_Repo_Commit=found[1],
                X_Linked_Etag=f'"{hashlib.sha256(body).hexdigest()}"',
                X_Linked_Size=str(len(body)),
            )
        if path.startswith("/lfs/"):
            return self.file(path.removeprefix("/lfs/"))
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def json(self, value, **headers: str) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def tree(self, folder: str, start: int) -> None:
        """Four entries a page, as the hub gives a thousand."""
        entries = [{"type": "directory", "path": SHARDS, "oid": "0" * 40, "size": 0}]
        for path, body in sorted(self.server.files.items()):
            if path.startswith(folder):
                blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
                lfs = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
                entry = {"type": "file", "path": path, "size": len(body), "oid": blob, "lfs": lfs}
                if path.rsplit("/", 1)[-1] in self.server.in_git:
                    del entry["lfs"]
                entries.append(entry)
        page, more = entries[start : start + 4], start + 4 < len(entries)
        link = {"Link": f'<{self.server.url}{self.path.split("?")[0]}?cursor={start + 4}>; rel="next"'} if more else {}
        self.json(page, **link)

    def file(self, path: str) -> None:
        name, body = path.rsplit("/", 1)[-1], self.server.files[path]
        wanted = self.headers.get("Range")
        self.server.got.append((name, wanted))
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if fault == "busy":
            return self.answer(503)
        if fault == "corrupt":
            body = body[:1500] + bytes([body[1500] ^ 1]) + body[1501:]
        if fault == "truncated":
            body = body[:-100]
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and fault != "ignore-range" else 0
        rest = body[start:]
        head = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        if fault in ("drop", "stall"):
            self.send_response(206 if start else 200)
            for key, value in {"Content-Length": str(len(rest)), **head}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.release.wait(30)
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, rest, **head)


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


@pytest.fixture
def small_pieces(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def get(hub: Hub, out: Path, train_shards: int = 3, **options):
    return download(out, variant="sp384", train_shards=train_shards, endpoint=hub.url, **options)


def same(hub: Hub, out: Path, train_shards: int) -> bool:
    """Whether `out` holds exactly these shards, all of val and the tokenizer, byte for byte, and nothing half done."""
    names = [f"fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    names += [TOKENIZER, *(f"fineweb_val_{i:06d}.bin" for i in range(VAL))]
    held = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in (RECORD, ".download.lock")}
    there = {path.rsplit("/", 1)[-1]: body for path, body in hub.files.items() if SHARDS in path or TOKENIZER in path}
    return held == {name: there[name] for name in names}


def test_a_folder_that_trains(hub, tmp_path):
    seen = []
    report = get(hub, tmp_path / "a", progress=lambda *now: seen.append(now))
    assert same(hub, tmp_path / "a", 3)
    data = Dataset.open(tmp_path / "a")
    assert (data.train_tokens, data.val_tokens, data.vocab_size) == (18_000, 5_000, 384)
    assert (report.train_shards, report.val_shards, report.fetched_files, report.damaged) == (3, 2, 6, ())
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert (record["revision"], record["repo"], record["variant"]) == (REVISION, REPO, "sp384")
    for file in record["files"]:
        assert file["sha256"] == hashlib.sha256(hub.files[file["path"]]).hexdigest()
    assert seen[-1] == ("downloading", report.bytes, report.bytes)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert all(path.startswith(f"/datasets/{REPO}/resolve/{REVISION}/") for path in hub.asked if "resolve" in path)


def test_a_second_call_asks_for_nothing_and_more_shards_for_those(hub, tmp_path):
    get(hub, tmp_path)
    hub.got.clear(), hub.asked.clear()
    again = get(hub, tmp_path)
    assert (again.fetched_files, again.fetched_bytes, hub.asked) == (0, 0, [])
    assert get(hub, tmp_path, 5).fetched_files == 2
    assert hub.names() == ["fineweb_train_000003.bin", "fineweb_train_000004.bin"]
    assert same(hub, tmp_path, 5)
    assert get(hub, tmp_path, 1).train_shards == 5  # they stay, and are checked
    (tmp_path / "fineweb_train_000004.bin").unlink()
    assert get(hub, tmp_path, 1).train_shards == 4  # but are not brought back
    assert same(hub, tmp_path, 4)


def test_shards_from_elsewhere_are_adopted_when_they_are_right(hub, tmp_path):
    for name, body in ((TRAIN_0, hub.files[f"{SHARDS}/{TRAIN_0}"]), (TRAIN_1, b"something else")):
        (tmp_path / name).write_bytes(body)
    report = get(hub, tmp_path)
    assert TRAIN_0 not in hub.names() and same(hub, tmp_path, 3)
    assert [text.split(":")[0] for text in report.damaged] == [TRAIN_1]


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
def test_a_file_damaged_on_disk_is_named_and_fetched_again(hub, tmp_path, damage):
    get(hub, tmp_path)
    body = bytearray((tmp_path / TRAIN_1).read_bytes())
    body[2000] ^= 4
    damaged = {"flip": bytes(body), "cut": bytes(body[:-1]), "grow": bytes(body) + b"x", "empty": b""}[damage]
    (tmp_path / TRAIN_1).write_bytes(damaged)
    hub.got.clear()
    report = get(hub, tmp_path)
    assert hub.names() == [TRAIN_1] and same(hub, tmp_path, 3)
    assert len(report.damaged) == 1 and report.damaged[0].startswith(f"{TRAIN_1}: ")
    assert ("SHA-256" if damage == "flip" else f"bytes instead of {len(body)}") in report.damaged[0]


@pytest.mark.parametrize("fault", ["corrupt", "truncated"])
def test_a_file_that_comes_damaged_is_fetched_again_once(hub, tmp_path, fault):
    hub.faults[VAL_1] = [fault]
    report = get(hub, tmp_path)
    assert same(hub, tmp_path, 3) and hub.names().count(VAL_1) == 2
    assert len(report.damaged) == 1 and report.damaged[0].startswith(f"{VAL_1}: ")
    hub.faults[VAL_1] = [fault] * 9
    (tmp_path / VAL_1).unlink()
    with pytest.raises(InputError, match=rf"{VAL_1} came with .*, twice"):
        get(hub, tmp_path)
    assert not (tmp_path / VAL_1).exists()
    hub.faults.clear()
    get(hub, tmp_path)
    assert same(hub, tmp_path, 3)


def test_a_file_outside_lfs_is_checked_by_its_git_blob(hub, tmp_path):
    hub.in_git = (TOKENIZER,)
    hub.faults[TOKENIZER] = ["corrupt"]
    assert get(hub, tmp_path).damaged[0].startswith(f"{TOKENIZER}: git blob")
    record = json.loads((tmp_path / RECORD).read_text())
    assert hashlib.sha256((tmp_path / TOKENIZER).read_bytes()).hexdigest() in [f["sha256"] for f in record["files"]]


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path, small_pieces):
    hub.faults[TRAIN_0] = ["drop", "drop"]
    report = get(hub, tmp_path)
    ranges = [wanted for name, wanted in hub.got if name == TRAIN_0]
    assert ranges[0] is None and re.fullmatch(r"bytes=[1-9]\d*-", ranges[1]) and len(ranges) == 3
    assert same(hub, tmp_path, 3) and report.damaged == ()


def test_a_hub_that_fails_is_asked_again(hub, tmp_path):
    hub.faults[TRAIN_0] = ["busy"]
    assert get(hub, tmp_path).damaged == () and same(hub, tmp_path, 3)
    assert hub.names().count(TRAIN_0) == 2


@pytest.mark.parametrize("ignored", [False, True])
def test_the_next_call_goes_on_inside_a_file(hub, tmp_path, monkeypatch, ignored):
    monkeypatch.setattr(module, "RETRIES", 0)
    hub.faults[TRAIN_0] = ["busy"]
    with pytest.raises(InputError, match="answered 503 when asked to fetch"):
        get(hub, tmp_path)
    part, body = tmp_path / f".{TRAIN_0}.part", hub.files[f"{SHARDS}/{TRAIN_0}"]
    assert part.read_bytes() == b""
    part.write_bytes(body[:5000])  # as much as an earlier call got
    hub.got.clear()
    hub.faults[TRAIN_0] = ["ignore-range"] if ignored else []
    report = get(hub, tmp_path)
    assert (TRAIN_0, "bytes=5000-") in hub.got and same(hub, tmp_path, 3)
    assert report.fetched_bytes < report.bytes


def test_a_wrong_start_of_a_file_costs_one_more_try(hub, tmp_path):
    (tmp_path / f".{TRAIN_0}.part").write_bytes(b"x" * 3000)
    (tmp_path / f".{TRAIN_1}.part").write_bytes(b"x" * 30_000)
    assert [text.split(":")[0] for text in get(hub, tmp_path).damaged] == [TRAIN_0]
    assert same(hub, tmp_path, 3)


def test_a_revision_that_moved_is_refused(hub, tmp_path):
    get(hub, tmp_path, revision="main")
    hub.branches["main"] = MOVED
    with pytest.raises(InputError, match=f"holds revision {REVISION}, but main is {MOVED}") as refused:
        get(hub, tmp_path, revision="main")
    assert f"--revision {REVISION}" in str(refused.value)
    (tmp_path / TRAIN_0).unlink()
    get(hub, tmp_path)  # the folder's own commit
    assert same(hub, tmp_path, 3)
    assert get(hub, tmp_path / "new", revision="main").revision == MOVED
    with pytest.raises(InputError, match="no revision v9; name a commit"):
        get(hub, tmp_path / "other", revision="v9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sp385"}, r"no variant 'sp385' .*; it has sp384, sp1024"),
        ({"variant": "../x"}, "variants are named sp1024"),
        ({"variant": "byte260"}, "no variant 'byte260' .*; it has sp384, sp1024"),
        ({"variant": "sp384", "train_shards": 6}, "has 5 train shards of sp384"),
        ({"train_shards": 1}, "has 0 train shards of sp1024"),
        ({"train_shards": 0}, "must be at least 1"),
    ],
)
def test_what_does_not_exist(hub, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        download(tmp_path, endpoint=hub.url, **options)
    assert hub.got == []


@pytest.mark.parametrize("name", [TRAIN_1, "fineweb_val_000000.bin"])
def test_a_shard_that_the_hub_lacks(hub, tmp_path, name):
    del hub.files[f"{SHARDS}/{name}"]
    with pytest.raises(InputError, match=f"lacks the shard {name}"):
        get(hub, tmp_path)


def test_a_shard_with_a_wrong_header_is_refused(hub, tmp_path):
    hub.files[f"{SHARDS}/{TRAIN_1}"] += b"xx"
    with pytest.raises(InputError, match=rf"{TRAIN_1}.part: the header says 6000 tokens"):
        get(hub, tmp_path)
    assert not (tmp_path / TRAIN_1).exists()


def test_too_little_disk_is_said_to_the_byte_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    total = sum(len(body) for path, body in hub.files.items() if SHARDS in path or TOKENIZER in path)
    (tmp_path / f".{TRAIN_0}.part").write_bytes(hub.files[f"{SHARDS}/{TRAIN_0}"][:1000])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=total - 1001))
    with pytest.raises(InputError, match=rf"need {total - 1000:,} bytes more, {total - 1001:,} are free: 1 short"):
        get(hub, tmp_path, 5)
    assert hub.got == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=total - 1000))
    assert get(hub, tmp_path, 5).fetched_bytes == total - 1000


@pytest.mark.parametrize("name", ["golf_train_000000.bin", "x_val_0.bin", "tokenizer.model", "manifest.json"])
def test_a_folder_with_other_data_is_refused(hub, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=f"also holds {name}, which is not of this download"):
        get(hub, tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine" and hub.got == []


def test_another_variant_in_the_same_folder_is_refused(hub, tmp_path):
    get(hub, tmp_path)
    with pytest.raises(InputError, match=r"holds sp384 of .* for sp1024"):
        download(tmp_path, train_shards=1, endpoint=hub.url)


def record(bytes: object = 1, sha256: object = "0" * 64, revision: object = "0" * 40) -> str:
    file = {"path": f"{SHARDS}/{TRAIN_0}", "bytes": bytes, "sha256": sha256}
    return json.dumps({"files": [file], "revision": revision, "variant": "sp384"})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"files": []}', '{"files": 3, "revision": "x", "variant": "sp384"}'),
        *(record(bytes="x"), record(bytes=-1), record(sha256=7), record(sha256=None), record(revision=None)),
    ],
)
def test_an_unreadable_record_is_named_and_can_be_deleted(hub, tmp_path, text):
    get(hub, tmp_path)
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match=rf"{RECORD} is not a readable download record .*delete it"):
        get(hub, tmp_path)
    (tmp_path / RECORD).unlink()
    assert get(hub, tmp_path).fetched_files == 0


def test_a_folder_is_for_one_process_at_a_time(hub, tmp_path):
    lock = module.filelock.FileLock(tmp_path / ".download.lock", is_singleton=False)
    with lock, pytest.raises(BusyError, match="is being downloaded to"):
        get(hub, tmp_path)


def test_an_endpoint_that_is_not_there(tmp_path):
    with pytest.raises(
        InputError, match=r"^cannot look up \w+ at http://127.0.0.1:9: .*; check the connection"
    ) as said:
        download(tmp_path, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(said.value)


# The command


def command(hub: Hub | str, *argv: str) -> list[str]:
    return [sys.executable, "-m", "golfgpt", "data", "download", "--variant", "sp384", "--train-shards", "3", *argv]


def environment(endpoint: str, **more: str) -> dict[str, str]:
    """HF_ENDPOINT is read when huggingface_hub is imported, so these tests need processes of their own."""
    return os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", **more}


@pytest.mark.slow
def test_download_then_train(hub, tmp_path, monkeypatch, capsys):
    run = {"cwd": tmp_path, "env": environment(hub.url), "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command(hub, "--json"), **run)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["train_tokens"]) == ("data/fineweb10B_sp384", 18_000)
    assert hub.tokens == {"Bearer hf_secret"}
    done = subprocess.run(command(hub), **run)
    assert "golfgpt train --recipe baseline --data.path data/fineweb10B_sp384 --model.vocab-size 384" in done.stdout
    assert "Traceback" not in done.stderr

    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--schedule.max-steps", "2", "--data.path", report["path"], "--name", "first"]
    assert main(["train", "--recipe", "demo", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize(
    ("more", "message"), [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({}, "cannot look up")]
)
def test_without_a_network_the_command_says_so(tmp_path, more, message):
    done = subprocess.run(
        command("", "--out", str(tmp_path / "d")),
        env=environment("http://127.0.0.1:9", **more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3 and done.stderr.startswith(f"golfgpt: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_leaves_what_the_next_call_continues(hub, tmp_path):
    """A shard above 20 MB, as http_get writes pieces of 10, from a server that falls silent in the middle."""
    write_shard(tmp_path / "big.bin", np.arange(11_000_000) % 384)
    hub.files[f"{SHARDS}/{TRAIN_1}"] = (tmp_path / "big.bin").read_bytes()
    hub.faults[TRAIN_1] = ["stall"]
    out = tmp_path / "d"
    options = {"env": environment(hub.url), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(hub, "--out", str(out)), **options)
    part = out / f".{TRAIN_1}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped by SIGINT; the same command continues" in said
    assert "Traceback" not in said
    kept = part.stat().st_size
    assert kept >= 10_000_000
    report = get(hub, out)
    assert (TRAIN_1, f"bytes={kept}-") in hub.got and report.damaged == () and same(hub, out, 3)
