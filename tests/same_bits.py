"""What twenty steps of every recipe and mechanism compute, to the bit: proof that a change of the code changes nothing.

    export PYTHONPATH=$PWD:$PWD/kernels                    in each checkout
    python tests/same_bits.py record /elsewhere/before.json     in the old one, with a copy of this file
    python tests/same_bits.py record /elsewhere/after.json      in the new one, same machine, same versions
    python tests/same_bits.py compare before.json after.json
    python tests/same_bits.py kill                         ten SIGKILLs at random moments resume to the same bits

Everything goes through the command line and the files of a run, so both checkouts run the same script. Recorded are
the losses, gradient norms and rates of all steps, the SHA-256 of every parameter and optimizer state of the last
checkpoint, of the artifact's payload before compression (codes, scales, kept tensors) and of every decoded tensor, and
the score. Eager cases must be equal; compiled ones in their losses, within 1e-5 relative, because Inductor may reorder
sums. `record` continues a file that a stopped call left; --only NAME records the cases whose name contains it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from pathlib import Path

SIZES = (
    "--model.vocab-size 384 --model.num-layers 4 --model.model-dim 64 --model.num-heads 4 --model.num-kv-heads 2 "
    "--model.mlp-hidden 96 --data.batch-tokens 512 --data.seq-len 64 --data.spans 4 --schedule.max-steps 20 "
    "--schedule.max-seconds None --optim.muon-momentum-warmup-steps 8 --quant.keep-numel 1000 "
    "--quant.compressor zlib --eval.window 64 --eval.stride 32 --eval.max-tokens 3000 --runtime.device cpu "
    "--runtime.dtype float32 --runtime.checkpoint-seconds 0 --runtime.threads 1 --runtime.log-every 1"
)
PAIRS = "--model.bigram.rows 1100 --model.bigram.dim 64"
R5 = f"{PAIRS} --model.num-layers 10 --average.swa-every 4 --schedule.warmdown-max-frac None"
NTK = "--model.rope-reference-len 48"
RECIPES = {
    "baseline": "",
    "warmdown-int8": f"{NTK} --eval.window 88 --eval.stride 88",
    "long-context": NTK,
    "int6-mlp3x": NTK,
    "mixed-qat": "",
    "int6-qat-4096": "",
    "int6-ptq-4096": "",
    "int5-int6-swa": f"{R5} {NTK}",
    "int5-int6-swa-base": R5,
    "golf": f"{PAIRS} --budget.artifact-bytes 190000 --budget.code-bytes 1000 --budget.reserve-bytes 2000",
    "small": "",
    "demo": "",
}
MECHANISMS = {
    "untied": "--model.no-tie-embeddings",
    "one layer": "--model.num-layers 1",
    "five layers": "--model.num-layers 5",
    "before_norm and linear": f"--model.smear-gate before_norm --model.bigram.hash linear {PAIRS}",
    "documents": f"--model.smear-gate after_norm {PAIRS} --model.document-start 1 --eval.document-aware",
    "phase and orthogonal": "--model.resid-mix-init phase --model.matrix-init orthogonal",
    "muon options": "--optim.muon-row-norm --optim.muon-variance-beta 0.9 --optim.weight-decay 0.02",
    "clip and microbatches": "--optim.grad-clip-norm 0.1 --data.microbatch-tokens 64",
    "sharded": "--runtime.optimizer sharded --optim.muon-variance-beta 0.9 --quant.qat export",
    "ema": "--average.kind ema --average.ema-decay 0.8",
    "swa in float32": "--average.kind swa --average.swa-every 3 --average.swa-start-lr 1.0",
    "qat of parts": "--quant.qat export --quant.rules blocks.-1.*=float16 *.mlp.*=int5/16 tok_emb.weight=int8 "
    "blocks.0.attn.c_q.weight=int4",
    "qat of all": "--quant.qat export --quant.bits 6 --quant.clip quantile --quant.code-range full "
    "--quant.scale-dtype float32 --quant.codes-from float32_scale --quant.control-dtype float16",
    "qat late": "--quant.qat export --quant.qat-start 0.4",
    "qat below a rate": "--quant.qat r5 --quant.qat-below-lr 0.7 --quant.bits 5 --quant.scale-floor 0.00006",
    "pruned": "--quant.prune 0.1 --model.vocab-size 384 --model.mlp-hidden 1100",
    "probe": "--runtime.val-every 7 --runtime.probe --quant.bits 4",
    "bfloat16": "--runtime.dtype bfloat16 --quant.qat export",
    "rule r4b": "--eval.rule r4b",
}
CASES = {name: (name, extra) for name, extra in RECIPES.items()}
CASES |= {f"small + {name}": ("small", extra) for name, extra in MECHANISMS.items()}
COMPILED = ("baseline", "int5-int6-swa", "small + qat of parts")
"""With two layers: Inductor takes a minute or more for each."""


def arguments(case: str, data: Path, compiled: bool = False) -> list[str]:
    """Command line of a case; later overrides win; merged here because tyro accepts each flag once."""
    recipe, extra = CASES[case]
    flags: dict[str, list[str]] = {}
    form = "--runtime.compile on --model.num-layers 2" if compiled else "--runtime.compile off"
    words = f"{SIZES} {extra} --runtime.warmup-steps 2 {form}".split()
    for word in words:
        if word.startswith("--"):
            flags[word] = (name := [])
        else:
            name.append(word)
    return ["train", "--recipe", recipe, "--data.path", str(data), *(w for f in flags for w in (f, *flags[f]))]


# ---- recording


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(tensors) -> dict[str, str]:
    import torch

    return {
        name: sha256(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in sorted(tensors.items())
    }


def payload(artifact: bytes) -> bytes:
    """Codes, scales and kept tensors of a model.golf that was compressed by raw deflate."""
    *_, header, compressed = struct.unpack_from("<8sIIQ", artifact)
    return zlib.decompress(artifact[-compressed:], -zlib.MAX_WBITS) if compressed and header else b""


def record_of(run: Path) -> dict:
    """What a finished run left."""
    from safetensors.torch import load_file

    import golfgpt

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [[m["loss"], m["grad_norm"], m["lr_multiplier"]] for m in lines if m["kind"] == "train"]
    probes = [[m[k] for k in ("val_loss", "val_bpb", "probe_bpb", "probe_bytes")] for m in lines if m["kind"] == "val"]
    score = json.loads((run / "result.json").read_text())["score"]
    model, _ = golfgpt.load(run)
    return {
        "steps": steps,
        "probes": probes,
        "state": digests(load_file(max((run / "checkpoints").glob("step_*.safetensors")))),
        "payload": sha256(payload((run / "model.golf").read_bytes())),
        "decoded": digests(model.state_dict()),
        "score": {key: score[key] for key in ("val_loss", "val_bpb", "nats", "tokens", "bytes", "label")},
    }


def corpus(folder: Path) -> Path:
    """Some of the standard library's source, 384 tokens."""
    data = folder / "data"
    if not data.exists():
        from golfgpt.data.prepare import prepare

        files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
        with open(folder / "text.jsonl", "w", encoding="utf-8") as out:
            for file in files:
                out.write(json.dumps({"text": file.read_text(encoding="utf-8")[:8000]}) + "\n")
        prepare([folder / "text.jsonl"], data, vocab_size=384, val_fraction=0.2, workers=1)
    return data


def run_cases(out: Path, only: str) -> None:
    """All cases that `out` lacks, in this process, alone or as one of torchrun's ranks; rank 0 writes."""
    from golfgpt.cli import main

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(os.environ["SAME_BITS_FOLDER"])
    known = json.loads(out.read_text()) if out.exists() else {}
    todo = [(case, False) for case in CASES] + ([(case, True) for case in COMPILED] if world == 1 else [])
    os.chdir(folder)
    if world > 1:  # torchrun's store serves one process group: all cases share it
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.destroy_process_group, destroy = lambda: None, dist.destroy_process_group
        atexit.register(destroy)
    for case, compiled in todo:
        key = f"{case} @ {world}{' compiled' if compiled else ''}"
        if key in known or only not in key:
            continue
        begun, said = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([*arguments(case, folder / "data", compiled), "--name", key.replace(" ", "_")])
        if code:
            raise SystemExit(f"{key}: exit code {code}\n{said.getvalue()[-2000:]}")
        if rank == 0:
            known[key] = record_of(folder / "runs" / key.replace(" ", "_"))
            out.write_text(json.dumps(known, indent=0))
            print(f"{key}: {time.perf_counter() - begun:.1f} s", flush=True)


def record(out: Path, only: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        corpus(Path(name))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SAME_BITS_FOLDER": name, "XDG_CACHE_HOME": f"{name}/cache"}
        for world in (1, 3):
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command = [sys.executable, *(torchrun if world > 1 else []), __file__, "_run", str(out.resolve())]
            subprocess.run([*command, "--only", only], env=env, check=True)


# ---- comparing


def compare(before: dict, after: dict) -> list[str]:
    """Where two records differ, a line each."""
    found = [f"{key}: only in {'the first' if key in before else 'the second'}" for key in before.keys() ^ after.keys()]
    for key in sorted(before.keys() & after.keys()):
        a, b = before[key], after[key]
        if key.endswith("compiled"):
            for i, (x, y) in enumerate(zip(a["steps"], b["steps"], strict=True)):
                if abs(x[0] - y[0]) > 1e-5 * abs(x[0]):
                    found.append(f"{key}: loss of step {i + 1} is {x[0]!r} and {y[0]!r}")
            continue
        for part in a:
            if a[part] != b[part]:
                x, y = a[part], b[part]
                names = [n for n in {*x, *y} if x.get(n) != y.get(n)] if isinstance(x, dict) else []
                first = next((i + 1 for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), "")
                found.append(f"{key}: {part} differ{'s' if isinstance(x, str) else ''} {sorted(names) or first}")
    return found


# ---- killing


def kill(count: int, seed: int) -> None:
    """A run killed `count` times at random moments ends with the bits of one that was left alone."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(seed)
        data, env = corpus(folder), {**os.environ, "OMP_NUM_THREADS": "1"}
        options = arguments("small + qat late", data)
        options[options.index("--schedule.max-steps") + 1] = "400"
        options[options.index("--runtime.checkpoint-seconds") + 1] = "0.2"
        golfgpt = [sys.executable, "-m", "golfgpt"]
        begun = time.perf_counter()
        run = {"cwd": folder, "env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*golfgpt, *options, "--name", "whole"], check=True, **run)
        seconds = time.perf_counter() - begun
        command, kills = [*options, "--name", "killed"], 0
        while kills < count:
            process = subprocess.Popen([*golfgpt, *command], **run)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.2, 0.55) * seconds)  # before the first step, or some way on
            if process.poll() is None:
                process.kill()
                process.wait()
                kills += 1
            elif (folder / "runs/killed/result.json").exists():  # over before it was killed: begin anew
                shutil.rmtree(folder / "runs/killed")
            started = (folder / "runs/killed/config.json").exists()
            command = ["train", "--resume", "runs/killed"] if started else [*options, "--name", "killed"]
        subprocess.run([*golfgpt, *command], check=True, **run)
        whole, killed = record_of(folder / "runs/whole"), record_of(folder / "runs/killed")
        # Steps that were taken twice are logged twice.
        whole["steps"], killed["steps"] = whole["steps"][-1:], killed["steps"][-1:]
        found = compare({"run": whole}, {"run": killed})
        print("\n".join(found) or f"{kills} kills: the same bits")
        raise SystemExit(bool(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "_run"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--only", default="")
    command = commands.add_parser("compare")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command = commands.add_parser("kill")
    command.add_argument("--count", type=int, default=10)
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "record":
        record(args.out, args.only)
    elif args.command == "_run":
        run_cases(args.out, args.only)
    elif args.command == "kill":
        kill(args.count, args.seed)
    else:
        before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
        found = compare(before, after)
        print("\n".join(found) or f"{len(after)} cases: the same bits")
        raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
