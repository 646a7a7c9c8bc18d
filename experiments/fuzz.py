"""Damaged and hostile files against every reader of golfgpt.

    python -m experiments.fuzz --out experiments/results       # 10,000 inputs for each target; goes on where it ended
    python -m experiments.fuzz --out experiments/results --report
    python -m experiments.fuzz --target artifact --input 1234     # one input again, with its traceback

Each input is a valid file, changed at random by its number: bytes, or the values inside, with digests and lengths made
right again so that what comes after them is reached. A child process reads it as the program would. Four things are
counted: children that die, reads of more than HANG seconds of CPU, growth of more than GROWTH bytes, and exceptions
that are not golfgpt.errors. A child's address space is limited, so that a bomb is a MemoryError and not the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import mmap
import os
import resource
import shutil
import signal
import sysconfig
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from golfgpt import watch
from golfgpt.config import (
    BudgetConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from golfgpt.data.download import Record, _read_record
from golfgpt.data.manifest import Manifest
from golfgpt.data.prepare import prepare
from golfgpt.data.shards import Dataset
from golfgpt.data.tokenizer import Tokenizer
from golfgpt.errors import GolfError
from golfgpt.files import write_json
from golfgpt.model.gpt import GPT
from golfgpt.published.files import read_export
from golfgpt.published.names import from_published, infer_config, to_published
from golfgpt.quant import artifact
from golfgpt.quant.codecs import CODECS, zstd_frame
from golfgpt.quant.formats import payload_bytes
from golfgpt.quant.quantizer import Quantizer
from golfgpt.report import page
from golfgpt.runs import list_runs
from golfgpt.score.compressors import compressors_bpb
from golfgpt.score.sums import PartialSums, Sums
from golfgpt.sweep.attempt import Loop, read_loop
from golfgpt.train import checkpoint
from golfgpt.train.train import train

INPUTS, BLOCK = 10_000, 250
HANG, STUCK = 2.0, 20
"""Seconds of CPU: what counts, and when a child is killed."""
GROWTH = 300 * 10**6
ADDRESSES = 3 * 2**30
"""What a child may allocate beside what it begins with."""

# Valid files


def make_files(folder: Path, data: Path | None = None) -> None:
    """A prepared folder (or a copy of `data`), a finished run of a tiny model, its published forms, and small files."""
    if data:
        shutil.copytree(data, folder / "data")
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
        lines = [json.dumps({"text": file.read_text(encoding="utf-8")[:8000]}) + "\n" for file in files]
        (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
        prepare([folder / "text.jsonl"], folder / "data", vocab_size=384, val_fraction=0.2, workers=1)
    shutil.copytree(folder / "data", folder / "bare", ignore=shutil.ignore_patterns("manifest.json"))
    config = RunConfig(
        model=ModelConfig(vocab_size=384, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_hidden=32),
        schedule=ScheduleConfig(max_steps=2, max_seconds=None),
        data=DataConfig(path=str(folder / "data"), batch_tokens=512, seq_len=64),
        quant=QuantConfig(keep_numel=1000),
        eval=EvalConfig(window=64, max_tokens=1000),
        budget=BudgetConfig(code_bytes=60_000),
        runtime=RuntimeConfig(device="cpu", dtype="float32", checkpoint_seconds=0),
    )
    run = folder / "run"
    train(config, run, quiet=True)
    next((run / "checkpoints").glob("*.safetensors")).replace(run / "checkpoints" / "saved.safetensors")
    for name, blob in _published(artifact.read(run / "model.golf").state).items():
        (folder / name).write_bytes(blob)
    compressors_bpb(Dataset.open(folder / "data"))  # writes baselines.json
    sums = PartialSums(folder)
    sums.open({"stride": 16}, fresh := Sums.start(0, torch.device("cpu")))
    sums.save(fresh._replace(next=3, values=fresh.values + 7))
    Loop(recipe="baseline", config=config, looks=(3, 5)).save(folder)
    write_json(folder / "download.json", dataclasses.asdict(Record(revision="0" * 40, variant="sp1024", files=())))


def _published(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    state = {name: tensor.contiguous() for name, tensor in to_published(state).items()}
    matrices = {name: w for name, w in state.items() if w.ndim == 2}
    scales = {name: (w.abs().amax(1) / 127).clamp_min(1e-8) for name, w in matrices.items()}
    codes = {name: (w / scales[name][:, None]).round().to(torch.int8) for name, w in matrices.items()}
    rest = {name: w for name, w in state.items() if name not in matrices}
    dtypes = dict.fromkeys(codes, "float32")
    rows = {"quantized": codes, "scales": scales, "dtypes": dtypes, "passthrough": rest}
    tensors = rest | {f"{n}.q": q for n, q in codes.items()} | {f"{n}.scale": s for n, s in scales.items()}
    how = dict.fromkeys(rest, "passthrough") | {name: {"type": "int8"} for name in codes}
    return {
        "final_model.pt": _saved(state),
        "rows.ptz": zlib.compress(_saved({"__quant_format__": "int8_clean_per_row_v1", **rows}), 9),
        "mixed.ptz": CODECS["zstd"].compress(_saved({"w": tensors, "m": how}), 3),
    }


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# Changes


def change_bytes(rng: Random, data: bytes) -> bytes:
    """One to four changes of bytes; most near the start, where lengths are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else min(rng.randrange(256), len(out))
        size = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        match rng.randrange(6):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at : at + size] = rng.randbytes(size)
            case 2:
                out[at : at + size] = rng.choice((0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")[
                    :size
                ]
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[(start := rng.randrange(len(out) + 1)) : start + size]
            case 5:
                del out[at:]
    return bytes(out)


HOSTILE = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "\ud800", "\0", "x" * 5000, "../../etc/passwd", [], {}, [[]], {"": {}}, [None] * 1000, {"x": 1},
)  # fmt: skip


def change_value(rng: Random, value: Any) -> Any:
    """`value` of JSON with one node replaced, removed, renamed, doubled or wrapped."""
    if isinstance(value, dict | list) and value and rng.random() < 0.95:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        out = value.copy()
        match rng.randrange(16):
            case 0:
                del out[key]
            case 1 if isinstance(value, dict):
                out[str(rng.choice(("", "x", key + "s", "\ud800", "__class__", "x" * 300)))] = out.pop(key)
            case 2:
                out[key] = rng.choice(HOSTILE)
            case _:
                out[key] = change_value(rng, value[key])
        return out
    if rng.random() < 0.1:
        for _ in range(rng.choice((1, 30, 100))):
            value = [value]
        return value
    if type(value) in (int, float) and rng.random() < 0.7:
        return rng.choice((value - 1, value + 1, -value, 2 * value, 1000 * value, float(value), str(value)))
    if type(value) is bool and rng.random() < 0.7:
        return not value
    return rng.choice(HOSTILE)


def change_json(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return change_bytes(rng, data)
    text = json.dumps(change_value(rng, json.loads(data)))
    if rng.random() < 0.05:  # deeper than Python's own limit of recursion
        depth = rng.choice((50, 2000, 200_000))
        text = '{"a":' * depth + "1" + "}" * depth if rng.random() < 0.5 else "[" * depth
    return text.encode(errors="surrogatepass")


def change_lines(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")[:-1]
    at = rng.randrange(len(lines))
    lines[at] = change_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def change_artifact(rng: Random, data: bytes) -> bytes:
    """Also the header and the payload, with lengths and digest made right."""
    header, compressed, version = artifact.sections(data)
    compressed = bytes(compressed)
    way = rng.randrange(5)
    if way == 0:
        return change_bytes(rng, data)
    if way == 1:
        compressed = change_bytes(rng, compressed)
    fields = json.loads(header)
    if way == 2:
        streams = tuple(artifact.Stream(*stream) for stream in fields["streams"])
        content = change_bytes(rng, artifact.payload(streams, memoryview(compressed)).tobytes())
        name = rng.choice(list(CODECS))
        compressed = CODECS[name].compress(content, 1)
        fields["streams"] = [[name, 1, len(content), len(compressed)]]
    if way == 3:
        fields = change_value(rng, fields)
    if way == 4:
        sizes = (2, 384, 20_000, 65_536), (1, 2, 40, 2000), (4, 64, 512, 4096), (1, 32, 5000)
        names = "vocab_size", "num_layers", "model_dim", "mlp_hidden"
        shape = {name: rng.choice(of) for name, of in zip(names, sizes, strict=True)}
        with contextlib.suppress(GolfError):  # more than an artifact holds
            return zeros(ModelConfig(num_heads=2, num_kv_heads=1, **shape), rng.choice((0, 10**9)))
    header = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return artifact._prefix(header, compressed, version) + header + compressed


def zeros(model: ModelConfig, keep_numel: int) -> bytes:
    """An artifact of `model` whose payload is zeros: a small file that would take much memory. Of 64 MiB or more there
    is no stream."""
    formats = Quantizer(model, QuantConfig(keep_numel=keep_numel)).formats
    compressed = _zeros(payload_bytes(formats)) if payload_bytes(formats) < 2**26 else bytes(1000)
    stream = artifact.Stream("brotli", 1, payload_bytes(formats), len(compressed))
    header = artifact.ArtifactInfo(model, formats, 64, "0" * 64, (stream,), frozenset()).header()
    return artifact._prefix(header, compressed) + header + compressed


@functools.cache
def _zeros(size: int) -> bytes:
    return CODECS["brotli"].compress(bytes(size), 1)


def change_checkpoint(rng: Random, data: bytes) -> bytes:
    """Also what it says beside tensors, with the digest made right."""
    if rng.random() < 0.4:
        return change_bytes(rng, data)
    tensors, size = safetensors.torch.load(data), int.from_bytes(data[:8], "little")
    meta = change_value(rng, json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["golfgpt"]))
    if isinstance(meta, dict):
        meta.pop("sha256", None)
        meta["sha256"] = checkpoint._digest(tensors, meta)
    text = json.dumps(meta)
    if rng.random() < 0.05:
        text = text.replace("0", "[" * 100_000 + "]" * 100_000, 1)
    return safetensors.torch.save(tensors, {"golfgpt": text})


def change_published(rng: Random, data: bytes) -> bytes:
    """Also the archive in its stream, and the values in the archive."""
    content, pack = data, bytes
    if data[:1] == b"x":
        content, pack = zlib.decompress(data), zlib.compress
    elif data[:4] == b"\x28\xb5\x2f\xfd":
        content, pack = zstd_frame(data, 2**28), lambda raw: CODECS["zstd"].compress(raw, 1)
    match rng.randrange(4):
        case 0:
            return change_bytes(rng, data)
        case 1:
            return pack(change_bytes(rng, content))
        case 2:
            return rng.choice(_WRAPPERS)(content + bytes(rng.choice((0, 0, 0, 10**6, 2**26))))
        case _:
            return pack(_saved(change_value(rng, torch.load(io.BytesIO(content), weights_only=True))))


_WRAPPERS = (zlib.compress, *(lambda raw, name=name: CODECS[name].compress(raw, 1) for name in ("zstd", "brotli")))


def change_tokenizer(rng: Random, data: bytes) -> bytes:
    """Also the messages in the protobuf, of which the first level has its lengths made right."""
    if rng.random() < 0.2:
        return change_bytes(rng, data)
    messages, at = [], 0
    while at < len(data):  # a tag and a length of at most two bytes each
        start, size, at = at, data[at + 1], at + 2
        if size & 128:
            size, at = (size & 127) | data[at] << 7, at + 1
        messages.append((data[start], data[at : at + size]))
        at += size
    for _ in range(rng.randint(1, 4)):
        at = rng.choice((rng.randrange(len(messages)), rng.randrange(4), -1, -2))
        tag, body = messages[at]
        match rng.randrange(6):
            case 0:
                messages[at : at + 1] = []
            case 1:
                messages[at:at] = [messages[at]] * rng.choice((1, 1, 70_000))
            case 2:
                messages[at] = tag, messages[rng.randrange(len(messages))][1]
            case 3:
                messages[at] = tag, change_bytes(rng, body)
            case _:  # in place, so that the inner lengths mostly stay right
                byte = rng.randrange(len(body) + 1)
                messages[at] = tag, body[:byte] + rng.randbytes(1) + body[byte + 1 :]
    return b"".join(bytes((tag, len(b) & 127 | 128, len(b) >> 7 & 127)) + b for tag, b in messages)


# Readers


@functools.cache
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer(file.read_bytes())


def read_artifact(folder: Path, file: str) -> None:
    artifact.inspect(folder / file).table()
    found = artifact.read(folder / file)
    found.load_into(GPT(found.info.model))


def read_shards(folder: Path, file: str) -> None:
    data = Dataset.open((folder / file).parent, _tokenizer(folder / "run/tokenizer.model"))
    assert len(data.digest) == 64
    data.check_token_ids()
    data.prove_val_bytes(1000)


def read_checkpoint(folder: Path, file: str) -> None:
    checkpoint.load(folder / file)


def read_published(folder: Path, file: str) -> None:
    export = read_export(folder / file)
    from_published(export.state, infer_config(export.state))


def read_tokenizer(folder: Path, file: str) -> None:
    tokenizer = Tokenizer((folder / file).read_bytes())
    ids = tokenizer.encode("The 1st \u2581 na\u00efve text")
    tokenizer.decode_batch([ids, list(range(tokenizer.vocab_size))])
    assert len(tokenizer.pieces) == tokenizer.vocab_size and tokenizer.strips_leading_space in (False, True)


def read_folder(folder: Path, file: str) -> None:
    """As list, report and watch do."""
    view = page._view(folder / "run", "run", 0)
    page._ledger([view]), page._step_times([view]), page._changed([view])
    for run in list_runs(folder / "run"):
        str(run.get("val_bpb"))
    if file.endswith("metrics.jsonl"):
        watch.watch(folder / "run", once=True, out=io.StringIO())


def read_small(folder: Path, file: str) -> None:
    match file:
        case "eval_partial_0.json":  # if it is damaged, the evaluation starts over
            PartialSums(folder).open({"stride": 16}, Sums.start(0, torch.device("cpu")))
        case "data/baselines.json":
            compressors_bpb(_Data(folder / "data"))
        case "incumbent.json":
            read_loop(folder)
        case "download.json":
            _read_record(folder / file)


class _Data:
    """A data set whose values would have to be measured again if they cannot be read."""

    def __init__(self, path: Path):
        self.path, self.digest = path, Manifest.load(path / "manifest.json").digest

    def prove_val_bytes(self) -> int:
        raise GolfError("not kept")


@dataclass(frozen=True)
class Target:
    files: tuple[str, ...]
    """Of which one is changed at a time."""
    change: Callable[[Random, bytes], bytes]
    read: Callable[[Path, str], None]
    """read(folder, the changed file)."""


TARGETS = {
    "artifact": Target(("run/model.golf",), change_artifact, read_artifact),
    "shards": Target(
        ("bare/golf_train_000000.bin", "bare/golf_val_000000.bin", "bare/golf_val_000000.bytes"),
        change_bytes,
        read_shards,
    ),
    "manifest": Target(("data/manifest.json",), change_json, read_shards),
    "config": Target(("run/config.json",), change_json, read_folder),
    "checkpoint": Target(("run/checkpoints/saved.safetensors",), change_checkpoint, read_checkpoint),
    "published": Target(("final_model.pt", "rows.ptz", "mixed.ptz"), change_published, read_published),
    "tokenizer": Target(("run/tokenizer.model",), change_tokenizer, read_tokenizer),
    "result.json": Target(("run/result.json", "run/env.json"), change_json, read_folder),
    "metrics.jsonl": Target(("run/metrics.jsonl",), change_lines, read_folder),
    "small files": Target(
        ("eval_partial_0.json", "data/baselines.json", "incumbent.json", "download.json"), change_json, read_small
    ),
}


# Runs


@dataclass
class Found:
    """What the inputs [start, stop) of a target did."""

    target: str
    start: int
    stop: int
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    """Of CPU, the longest."""
    growth: int = 0
    """Bytes, the most."""
    problems: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """Number of the input, and "crash", "hang", "growth" or the exception."""


def make_input(name: str, number: int, originals: dict[str, bytes]) -> tuple[str, bytes]:
    """File and content of the input `number`."""
    rng = Random(f"{name} {number}")
    file = rng.choice(TARGETS[name].files)
    return file, TARGETS[name].change(rng, originals[file])


def read_input(name: str, number: int, folder: Path, originals: dict[str, bytes], found: Found) -> None:
    """Read one input in this process and add to `found`."""
    file, data = make_input(name, number, originals)
    (folder / file).write_bytes(data)
    began, before = time.process_time(), _resident()
    try:
        TARGETS[name].read(folder, file)
        found.read += 1
    except GolfError:
        found.refused += 1
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found.problems.append((number, f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"))
    finally:
        (folder / file).write_bytes(originals[file])
    seconds, growth = time.process_time() - began, _peak() - before
    if seconds > HANG:
        found.problems.append((number, "hang"))
    if growth > GROWTH:
        found.problems.append((number, "growth"))
    found.seconds, found.growth = max(found.seconds, seconds), max(found.growth, growth)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _resident() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def run(name: str, start: int, stop: int, folder: Path) -> Found:
    """Read the inputs [start, stop) in child processes: another one after each that dies."""
    originals = {file: (folder / file).read_bytes() for file in TARGETS[name].files}
    total, current, first = Found(name, start, stop), mmap.mmap(-1, 8), 0
    while start < stop:
        receive, send = os.pipe()
        if not (child := os.fork()):
            try:
                _child(name, start, stop, folder, originals, current, send)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        os.close(send)
        with open(receive, "rb") as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(child, 0)
        for file, content in originals.items():
            (folder / file).write_bytes(content)
        for line in lines[-1:]:
            part = Found(**json.loads(line))
            total.read, total.refused = total.read + part.read, total.refused + part.refused
            total.seconds, total.growth = max(total.seconds, part.seconds), max(total.growth, part.growth)
            total.problems += part.problems
        start = int.from_bytes(current[:8], "little") + 1
        if status and not lines and start == first:
            raise SystemExit(f"the valid files of {name} cannot be read")
        if status:
            kind = "hang" if status == signal.SIGPROF else f"crash by signal {status & 127}"
            total.problems.append((start - 1, kind))
    return total


def _child(
    name: str, start: int, stop: int, folder: Path, originals: dict[str, bytes], current: mmap.mmap, send: int
) -> None:
    """After each input, what the child found so far; it may be its last line."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for file in originals:
        TARGETS[name].read(folder, file)  # imports, caches
    found = Found(name, start, stop)
    for number in range(start, stop):
        current[:8] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, STUCK)
        read_input(name, number, folder, originals, found)
        os.write(send, json.dumps(dataclasses.asdict(found)).encode() + b"\n")


def report(rows: Sequence[Found]) -> str:
    lines = [
        "| target | inputs | read | refused | crashes | hangs | growth | untyped | longest, s | most growth, MB |",
        "| --- | " + "--- | " * 9,
    ]
    for name in TARGETS:
        own = [row for row in rows if row.target == name]
        kinds = [kind.split()[0] for row in own for _, kind in row.problems]
        counts = [kinds.count(kind) for kind in ("crash", "hang", "growth")]
        numbers = [sum(row.stop - row.start for row in own), sum(row.read for row in own), sum(r.refused for r in own)]
        cells = [*numbers, *counts, len(kinds) - sum(counts)]
        most = max((row.seconds for row in own), default=0), max((row.growth for row in own), default=0) / 1e6
        lines.append(f"| {name} | " + " | ".join(f"{n:,}" for n in cells) + f" | {most[0]:.2f} | {most[1]:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of fuzz.jsonl")
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--input", type=int, help="read this one in this process")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    file = args.out and args.out / "fuzz.jsonl"
    rows = [Found(**json.loads(line)) for line in file.read_text().splitlines()] if file and file.exists() else []
    if not args.report:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            make_files(folder)
            if args.input is not None:
                originals = {file: (folder / file).read_bytes() for file in TARGETS[names[0]].files}
                path, data = make_input(names[0], args.input, originals)
                (folder / path).write_bytes(data)
                print(path, len(data), data[:2000])
                TARGETS[names[0]].read(folder, path)
                return
            for name in names:
                done = max((row.stop for row in rows if row.target == name), default=0)
                for start in range(done, args.inputs, BLOCK):
                    rows.append(run(name, start, min(start + BLOCK, args.inputs), folder))
                    if file:
                        with open(file, "a") as out:
                            out.write(json.dumps(dataclasses.asdict(rows[-1])) + "\n")
                    for number, kind in rows[-1].problems:
                        print(f"{name} {number}: {kind}", flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
