"""Offline gate: compile every shipped tile of every kernel for GPUs that are not there, and read the machine code.

    python -m bench.offline [--sm 80 90 100] [--only CASE] [--out DIR]

Prints a line per compiled kernel. A whole run writes offline-triton<version>.json to DIR (default: results/ beside this
file); one of fewer cases or architectures writes only to a DIR that is named.
Exit code 1 if a kernel fails its gate. Needs torch, triton and the standard library, and no GPU; takes minutes.
TRITON_CACHE_DIR, if set, keeps what was compiled.

What is compiled is what would be launched: the launchers run on CPU tensors of the real widths, and `_jit.launch` is
replaced by one that compiles and does not run. Rows are few, since a kernel is specialized on the divisibility of its
arguments and not on their values.

The gate (`failures`), for each kernel:
- it compiles, keeps its values in registers (no spills) and fits the shared memory of a program, and on Blackwell its
  tensor memory: 227 KB from sm_90 on; for sm_80 the 99 KB of sm_86 and sm_89, which take the same tiles;
- its 16-bit and tf32 matmuls run on tensor cores: HGMMA on sm_90 and no HMMA, whose rate is lower there, HMMA on sm_80,
  tcgen05 on sm_100. fp32 "ieee" has no tensor cores: it runs on the FMA units, as torch's default does.

A new kernel gets a case below: a function that calls its launcher once.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from golfgpt_kernels import _jit, _relu2_mlp_gluon, _tiles
from golfgpt_kernels._dispatch import KERNEL_DTYPES, dtype_name
from golfgpt_kernels._tiles import TABLES
from golfgpt_kernels._weight_grad import weight_grad_parts
from golfgpt_kernels.fake_quant import RowQuant, codes_linear, quantize_matrices
from golfgpt_kernels.muon import momentum_launch, square_parts, update_launch, update_rows_launch
from golfgpt_kernels.newton_schulz import gram, normalize, polynomial, update
from golfgpt_kernels.relu2_mlp import linear_relu2_fwd, relu2_dz, relu2_mlp_dz
from golfgpt_kernels.softcap_logprobs import softcap_logits_grad, softcap_logprobs_fwd

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}
TENSOR_MEMORY = 512  # columns
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100, B200

# ---- cases


@dataclass(frozen=True)
class Case:
    launch: Callable[..., object]  # (dtype, tile, **variant)
    table: str | None
    dtypes: Sequence[torch.dtype]
    variants: Sequence[Mapping[str, object]]
    dots: bool
    architectures: Sequence[int]


CASES: dict[str, Case] = {}


def case(
    name: str, *, table: str | None = None, dtypes=KERNEL_DTYPES, dots=True, architectures=ARCHITECTURES,
    **variants: Iterable,
):  # fmt: skip
    """Register launch(dtype, tile, **variant): for every tile of `table` (default: the table called `name`; without one
    once, with tile None), every dtype and every combination of the given values. fp32 comes twice, ieee and tf32,
    unless the kernel has no dots."""

    def register(launch: Callable) -> Callable:
        combinations = [dict(zip(variants, values, strict=True)) for values in itertools.product(*variants.values())]
        table_name = table or (name if name in TABLES else None)
        CASES[name] = Case(launch, table_name, dtypes, combinations, dots, architectures)
        return launch

    return register


ROWS, DIM, HIDDEN, VOCAB = 1024, 512, 1024, 1024
SLOPES = (0.0, 0.5)  # relu² and LeakyReLU²
CLIPS = ("deviation", "max", "quantile")
SOFTCAPS = (30.0, 50.0, None)  # bounded softmax, running maximum, no cap


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def row_quant(clip: str) -> RowQuant:
    return RowQuant(bits=6, clip=clip, deviations=12.85 if clip == "deviation" else 0.0)


def banks(dtype: torch.dtype) -> list[torch.Tensor]:
    """The matrices of 9 layers, as the trainer keeps them. They take no memory, since they are never written."""
    return [empty(*shape, dtype=dtype) for shape in ((18, 512, 512), (18, 256, 512), (9, 1536, 512), (9, 512, 1536))]


@case("linear_relu2_fwd", slope=SLOPES)
def _(dtype, tile, slope):
    linear_relu2_fwd(empty(ROWS, DIM, dtype=dtype), empty(HIDDEN, DIM, dtype=dtype), slope, tile)


@case("relu2_mlp_dz", slope=SLOPES)
def _(dtype, tile, slope):
    dy, w, h = empty(ROWS, DIM, dtype=dtype), empty(DIM, HIDDEN, dtype=dtype), empty(ROWS, HIDDEN, dtype=dtype)
    relu2_mlp_dz(dy, w, h, slope, tile)


@case("relu2_mlp_gluon", slope=SLOPES, grad=(False, True), dtypes=(torch.float16, torch.bfloat16), architectures=(90,))
def _(dtype, tile, slope, grad):
    wide, narrow, w = (empty(*shape, dtype=dtype) for shape in ((ROWS, HIDDEN), (ROWS, DIM), (HIDDEN, DIM)))
    if grad:
        _relu2_mlp_gluon.relu2_mlp_dz(narrow, empty(DIM, HIDDEN, dtype=dtype), wide, slope)
    else:
        _relu2_mlp_gluon.linear_relu2_fwd(narrow, w, slope)


@case("relu2_dz", slope=SLOPES, dots=False)
def _(dtype, tile, slope):
    relu2_dz(empty(ROWS, HIDDEN, dtype=dtype), empty(ROWS, HIDDEN, dtype=dtype), slope)


@case("weight_grad")
def _(dtype, tile):
    weight_grad_parts(empty(ROWS, HIDDEN, dtype=dtype), empty(ROWS, DIM, dtype=dtype), tile=tile)


@case("quantize_rows", columns=(512, 8192), clip=CLIPS, dots=False)
def _(dtype, tile, columns, clip):
    w, codes, scale = (
        empty(ROWS, columns, dtype=dtype),
        empty(ROWS, columns, dtype=torch.int8),
        empty(ROWS, dtype=dtype),
    )
    quantize_matrices([w], [codes], [scale], [row_quant(clip)], tile=tile)


@case("fake_quantize_banks", table="quantize_rows", clip=CLIPS, dots=False)
def _(dtype, tile, clip):
    ws, specs = banks(dtype), [row_quant(clip)] * 4
    quantize_matrices(ws, banks(torch.bfloat16), None, specs, torch.tensor(True), tile)


@case("muon_momentum", sums=(False, True), dots=False)
def _(dtype, tile, sums):
    momentum, ok, outs = torch.tensor(0.95), torch.tensor(True), banks(torch.bfloat16)
    shapes = [(u.shape[0], square_parts(*u.shape[1:])) for u in outs] if sums else []
    squares = [empty(*shape, dtype=torch.float32) for shape in shapes]
    momentum_launch(banks(dtype), banks(dtype), outs, squares, momentum, True, ok, tile)


@case("muon_update", dots=False)
def _(dtype, tile):
    lr, ok, scales = torch.tensor(0.02), torch.tensor(True), [1.0, 1.0, 2.0, 1.0]
    update_launch(banks(dtype), banks(torch.bfloat16), lr, scales, 0.1, banks(torch.bfloat16), ok, tile)


@case("muon_update_rows", columns=(None, 8192), clip=CLIPS, dots=False)
def _(dtype, tile, columns, clip):
    """The model's matrices, or one whose rows are longer than a block."""
    like = banks if columns is None else lambda dtype: [empty(ROWS, columns, dtype=dtype)]
    params, yes = like(dtype), torch.tensor(True)
    update_rows_launch(
        params, like(torch.bfloat16), torch.tensor(0.02), [1.0] * len(params), 0.1, like(torch.bfloat16), yes, yes,
        [row_quant(clip)] * len(params), tile,
    )  # fmt: skip


@case("codes_linear")
def _(dtype, tile):
    x, codes, scale = empty(ROWS, DIM, dtype=dtype), empty(HIDDEN, DIM, dtype=dtype), empty(HIDDEN, dtype=torch.float16)
    codes_linear(x, codes, scale, tile)


@case("normalize", sums=(False, True), dots=False)
def _(dtype, tile, sums):
    squares = empty(9, square_parts(DIM, HIDDEN), dtype=torch.float32) if sums else None
    normalize(empty(9, DIM, HIDDEN, dtype=torch.float32), dtype, 1e-7, squares)


@case("gram", table="newton_schulz", tall=(False, True))
def _(dtype, tile, tall):
    gram(empty(9, *((HIDDEN, DIM) if tall else (DIM, HIDDEN)), dtype=dtype), tile)


@case("polynomial", table="newton_schulz")
def _(dtype, tile):
    polynomial(empty(9, DIM, DIM, dtype=dtype), -4.775, 2.0315, tile)


@case("update", table="newton_schulz")
def _(dtype, tile):
    update(empty(9, DIM, HIDDEN, dtype=dtype), empty(9, DIM, DIM, dtype=dtype), 3.4445, torch.float32, tile)


@case("softcap_logprobs_fwd", softcap=SOFTCAPS, vocab=(VOCAB, VOCAB - 1))
def _(dtype, tile, softcap, vocab):
    hidden, weight = empty(ROWS, DIM, dtype=dtype), empty(vocab, DIM, dtype=dtype)
    softcap_logprobs_fwd(hidden, weight, empty(ROWS, dtype=torch.int64), softcap, -100, tile)


@case("softcap_logits_grad", softcap=SOFTCAPS)
def _(dtype, tile, softcap):
    hidden, weight = empty(ROWS, DIM, dtype=dtype), empty(VOCAB, DIM, dtype=dtype)
    targets, out = empty(ROWS, dtype=torch.int64), empty(ROWS, VOCAB, dtype=dtype)
    vectors = [empty(ROWS, dtype=torch.float32) for _ in range(4)]
    softcap_logits_grad(hidden, weight, targets, *vectors, softcap, -100, out, tile)


# ---- jobs: one call of one launcher


@dataclass(frozen=True)
class Job:
    """Of types that JSON has."""

    case: str
    sm: int
    dtype: str
    tf32: bool = False
    variant: Mapping[str, object] = field(default_factory=dict)
    tile: Mapping[str, int] | None = None

    def __str__(self) -> str:
        """linear_relu2_fwd sm90 bfloat16 slope=0.5 128x256x64 8 warps 4 stages"""
        parts = [self.case, f"sm{self.sm}", "tf32" if self.tf32 else self.dtype]
        parts += [f"{name}={value}" for name, value in self.variant.items()]
        if self.tile:
            parts.append("x".join(str(value) for name, value in self.tile.items() if name.isupper()))
            parts += [f"{value} {k.removeprefix('num_')}" for k, value in self.tile.items() if not k.isupper()]
        return " ".join(parts)


def job_of(row: Mapping) -> Job:
    return Job(**{name: row[name] for name in Job.__annotations__})


def shipped_tiles(table: str, sm: int, itemsize: int) -> list[dict[str, int]]:
    """What TileTable.select can return on a GPU of this architecture."""
    reached = [t for t in TABLES[table].tiles if 0 < t.sm <= sm and t.itemsize == itemsize]
    newest = max(t.sm for t in reached)
    return [dict(t.launch) for t in reached if t.sm == newest]


def all_jobs(architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Job]:
    for (name, this), sm in itertools.product(CASES.items(), architectures):
        for dtype in this.dtypes if sm in this.architectures else ():
            tiles = shipped_tiles(this.table, sm, dtype.itemsize) if this.table else [None]
            precisions = (False, True) if this.dots and dtype == torch.float32 else (False,)
            for variant, tile, tf32 in itertools.product(this.variants, tiles, precisions):
                yield Job(name, sm, dtype_name(dtype), tf32, variant, tile)


# ---- compilation


class OfflineDriver:
    """All that triton asks of a driver when it compiles and does not launch."""

    def __init__(self, sm: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", sm, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_job(job: Job) -> list[dict]:
    """A row, and its machine code, for each kernel that is launched. Changes this process: each job gets its own."""
    from triton.runtime import driver

    driver.set_active(OfflineDriver(job.sm))
    torch.backends.cuda.matmul.allow_tf32 = job.tf32
    rows = []

    def launch(kernel, grid, device, *args, **options):
        compiled = kernel.warmup(*args, grid=tuple(grid), **options)
        rows.append({**vars(job), "kernel": kernel_name(kernel), **resources(compiled)})

    replace(_jit.launch, launch)
    replace(_jit.num_programs, lambda device: MULTIPROCESSORS[job.sm])
    replace(_tiles.compute_capability, lambda device: job.sm)  # for tiles that a launcher selects itself
    CASES[job.case].launch(getattr(torch, job.dtype), job.tile, **job.variant)
    return rows


def kernel_name(kernel) -> str:
    """relu2_mlp._linear_relu2_fwd_kernel"""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def replace(function: Callable, by: Callable) -> None:
    """Kernel files import by name: wherever golfgpt_kernels has `function`, let it have `by`."""
    for name, module in list(sys.modules.items()):
        if name.startswith("golfgpt_kernels") and getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, by)


def hash_kernels() -> None:
    """Hash all, in one order: triton's key of a compiled kernel lacks the constants of a helper that was not hashed
    before, so that the keys of two processes may differ."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith("golfgpt_kernels"):
            for function in list(vars(module).values()):
                getattr(function, "cache_key", None)


def resources(compiled) -> dict:
    from triton import knobs

    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    return {
        "dots": dots(compiled.asm.get("ttir") or compiled.asm["ttgir"]),
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", 0) or 0,
        "code": machine_code(cubin),
    }


def run_tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dots(ir: str) -> list[str]:
    """What the kernel multiplies, before instructions are chosen: ["bf16"], ["f32 tf32"], [] without matmul.
    Gluon, whose first form is ttgir, names the instruction itself."""
    found = set()
    for options, dtype in re.findall(r"(?:tt\.dot|warp_group_dot) (.*?) : [\w.!]+<[\dx]+x(\w+)[,>]", ir):
        precision = re.search(r"inputPrecision = (\w+)", options)
        found.add(dtype if dtype != "f32" else f"f32 {precision[1] if precision else 'ieee'}")
    return sorted(found)


def machine_code(cubin: bytes) -> bytes:
    """The .text sections of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = sections[names][4]
    code = [s for s in sections if cubin.startswith(b".text", start + s[0])]
    return b"".join(cubin[offset : offset + length] for _, _, _, _, offset, length in code)


COUNTED = (
    "HGMMA", "HMMA", "UTCMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "LDGSTS", "FFMA", "MUFU", "STL", "LDL",
)  # fmt: skip
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def count_instructions(rows: list[dict]) -> None:
    """Replace each row's machine code by counts. All code of an architecture is disassembled at once: nvdisasm needs
    longer to start than triton and ptxas together to compile."""
    from triton import knobs

    for sm in {row["sm"] for row in rows if "code" in row}:
        these = [row for row in rows if row["sm"] == sm and "code" in row]
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(b"".join(row["code"] for row in these))
            file.flush()
            sass = run_tool(knobs.nvidia.nvdisasm.path, "-b", f"SM{sm}{'a' if sm >= 90 else ''}", file.name)
        opcodes = iter([re.sub("^UTC.*MMA$", "UTCMMA", opcode) for opcode in INSTRUCTION.findall(sass)])
        for row in these:
            length = len(row.pop("code")) // 16
            found = Counter(itertools.islice(opcodes, length))
            assert found.total() == length, "nvdisasm left out instructions"
            row["instructions"] = length - found["NOP"]
            found["FFMA"] += 2 * found["FFMA2"]
            row |= {name: found[name] for name in COUNTED}
        assert next(opcodes, None) is None, "nvdisasm found instructions of no kernel"


def compile_all(jobs: Iterable[Job], workers: int | None = None) -> list[dict]:
    """Rows in the order of `jobs`."""
    from triton.runtime.cache import triton_key

    triton_key()  # a hash of all of triton. Both take longer than to compile a small kernel; forks inherit them.
    hash_kernels()
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ):
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        rows = dict(in_processes(list(jobs), workers or len(os.sched_getaffinity(0))))
    rows = [row for _, found in sorted(rows.items()) for row in found]
    count_instructions(rows)
    return rows


def in_processes(jobs: list[Job], workers: int) -> Iterator[tuple[int, list[dict]]]:
    """(index, rows) of each job, from a process of its own: where the compiler aborts the others live on."""
    context = multiprocessing.get_context("fork")  # importing torch and triton takes seconds
    waiting, running = list(enumerate(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            index, job = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the last reference
            process = context.Process(target=compile_to, args=(send, log.fileno(), job))
            process.start()
            send.close()
            running[receive] = index, job, process, log
        for receive in multiprocessing.connection.wait(list(running)):
            index, job, process, log = running.pop(receive)
            try:
                rows = receive.recv()
            except EOFError:
                rows = "the compiler died"
            process.join()
            if isinstance(rows, str):
                log.seek(0)
                said = [line.strip() for line in log.read(1 << 20).decode(errors="replace").splitlines()]
                said = [line for line in said if re.search("error|assert", line, re.IGNORECASE)]
                rows = [{**vars(job), "error": " | ".join([rows, *said[:2]])[:400]}]
            yield index, rows


def compile_to(send, log: int, job: Job) -> None:
    os.dup2(log, 1)  # a failing ptxas has its whole input printed, a failing pass its whole module
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        send.send(compile_job(job))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        send.send(f"{type(error).__name__}: {' | '.join(lines[:3])}"[:300])


# ---- the gate


def failures(row: dict) -> list[str]:
    """Why this kernel must not ship."""
    if "error" in row:
        return [row["error"]]
    sm, found = row["sm"], []
    if spills := row["STL"] + row["LDL"]:
        found.append(f"{spills} spill instructions")
    if row["shared"] > SHARED_LIMIT[sm]:
        found.append(f"{row['shared']} bytes of shared memory; expected at most {SHARED_LIMIT[sm]}")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"{row['tensor_memory']} columns of tensor memory; expected at most {TENSOR_MEMORY}")
    if set(row["dots"]) - {"f32 ieee"} and not row[TENSOR_CORES[sm]]:
        found.append(f"a matmul in {row['dots'][0]} without {TENSOR_CORES[sm]}")
    if sm >= 90 and row["HMMA"]:
        found.append(f"{row['HMMA']} HMMA, of lower rate than {TENSOR_CORES[sm]}")
    return found


def print_rows(rows: list[dict]) -> None:
    """A line per kernel, and one for each reason why it fails."""
    for row in rows:
        if "error" not in row:
            print(f"{row['kernel']:40} {job_of(row)}: {row['registers']} registers, {row['shared']} bytes shared")
        for failure in failures(row):
            print(f"{row.get('kernel', 'not compiled'):40} {job_of(row)} FAILS: {failure}")


def versions() -> dict[str, str]:
    import triton
    from triton import knobs

    tools = {"ptxas": knobs.nvidia.ptxas.path, "ptxas_blackwell": knobs.nvidia.ptxas_blackwell.path}
    released = {name: re.search(r"V([\d.]+)", run_tool(path, "--version"))[1] for name, path in tools.items()}
    return {"triton": triton.__version__, **released, "torch": torch.__version__}


def write_json(rows: list[dict], folder: Path) -> Path:
    """One line per row."""
    head = {**versions(), "date": datetime.date.today().isoformat()}
    lines = ",\n".join(json.dumps(row) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"offline-triton{head['triton']}.json"
    file.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--out", type=Path, help="default: bench/results if everything is compiled, else nothing")
    options = parser.parse_args()
    if _jit.MISSING or _jit.INTERPRETING:
        parser.error(_jit.MISSING or "nothing compiles under TRITON_INTERPRET=1; unset it")
    rows = compile_all(job for job in all_jobs(options.sm) if options.only in job.case)
    print_rows(rows)
    failing = sum(bool(failures(row)) for row in rows)
    print(f"\n{len(rows)} kernels, {failing} fail. " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    everything = not options.only and set(options.sm) == set(ARCHITECTURES)
    if folder := options.out or (Path(__file__).parent / "results" if everything else None):
        print(f"Written to {write_json(rows, folder)}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
