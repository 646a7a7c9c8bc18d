"""What a training step launches and moves on an H100, counted without a GPU.

    python -m bench.step_counts RECIPE FORM [--kernels]   count one form and print it, with --kernels each launch
    python -m bench.step_counts --all                     count what RESULTS lacks of this code, then write docs/step.md

One rank of 8: forward and backward of its span, compiled, and its optimizer step. The forms:

    published   bench/published.py; of `frontier`, bench/published_frontier.py
    eager       golfgpt with runtime.kernels = eager: torch.compile fuses what it can
    triton      golfgpt with runtime.kernels = triton

The phase "optimizer" updates every matrix; "optimizer, share of 8" is one of 8 ranks: the published rank 0, which
orthogonalizes every eighth matrix, of `frontier` an eighth of each bank, and golfgpt's sharded form. Communication is
not counted. `frontier` runs all passes of its loop over one packed row.

Inductor lowers the compiled part for a GPU that is not there (fake_cuda.py), and its kernels are counted after fusion.
Everything else is counted as it is called: the optimizer's operations, and what our ops launch (kernel_counts.py). For
one version of torch the counts are exact:

- launches, also those that Inductor's wrapper makes: sums of partial sums and their casts
- bytes: what a kernel must read and write if it touches each address once. Of a view, what it shows.
- flops: of matrix products and attention. Attention is causal: half of the full product. In a packed row every
  segment is as long as segments can be, 2048 tokens; those of real documents are shorter and cost less.

`ms` is a model: the sum over kernels of max(flops / rate, bytes / bandwidth) and a launch, at the rates in
kernel_counts.py. It knows no L2 cache, no tuned choices, no overlap. It is for differences between forms; it is not a
measured speed.
"""

from __future__ import annotations

import bench.fake_cuda as fake_cuda  # isort: skip  (before torch)

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from golfgpt_kernels import set_implementation
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from bench import published, published_frontier
from bench.kernel_counts import Count, Kernel, graph_kernels, record_launches
from golfgpt.config import RunConfig
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.model.segments import Segments
from golfgpt.optim.flat import FlatGradients
from golfgpt.optim.optimizers import Optimizers
from golfgpt.quant.compute_copies import ComputeCopies
from golfgpt.quant.quantizer import Quantizer
from golfgpt.recipes import get
from golfgpt.train.compile_cache import compile_loss

RECIPES = ("baseline", "mixed-qat", "int5-int6-swa", "frontier")
FORMS = ("published", "eager", "triton")
WORLD = 8
PHASES = ("forward", "backward", "optimizer", "optimizer, share of 8")
RESULTS = Path(__file__).parent / "results" / "step-counts.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "step.md"


# ---- the forms


def fake(module: nn.Module) -> nn.Module:
    """The module with fake CUDA tensors in place of its parameters and buffers."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = p if p is None else nn.Parameter(torch.empty_like(p, device=fake_cuda.DEVICE))
        for name, buffer in part._buffers.items():
            part._buffers[name] = torch.empty_like(buffer, device=fake_cuda.DEVICE)
    return module


class ShardedRanks(Ranks):
    """Rank 0 of 8. Communication is not counted: nothing is sent."""

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_scatter_(self, tensors: Sequence[Tensor]) -> None: ...

    def all_gather_(self, tensors: Sequence[Tensor]) -> None: ...


class Recorder:
    """Kernels by the phase in which they ran."""

    def __init__(self) -> None:
        self.phases: dict[str, list[Kernel]] = {}
        self.phase = "rest"

    def add(self, kernel: Kernel) -> None:
        self.phases.setdefault(self.phase, []).append(kernel)

    def on_graph(self, graph: GraphLowering, code: str) -> Callable[[], None]:
        """What to call when the graph runs."""
        kernels = graph_kernels(graph, code)

        def on_run() -> None:
            for kernel in kernels:
                self.add(kernel)

        return on_run

    @contextmanager
    def during(self, phase: str):
        self.phases.pop(phase, None)
        self.phase = phase
        yield
        self.phase = "rest"


def count(config: RunConfig, form: str) -> dict[str, list[Kernel]]:
    """Phase -> kernels, of one step of a form."""
    recorder = Recorder()
    torch.compiler.reset()  # what was compiled before would not be lowered again
    fake_cuda.install(recorder.on_graph)
    torch.set_num_threads(1)
    real = published_model(config) if form == "published" else GPT(config.model, seed=0)
    set_implementation("eager" if form == "published" else form)
    record_launches(recorder.add)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake(real)
        inputs = step_inputs(config)
        steps = published_steps if form == "published" else golfgpt_steps
        loss, backward, optimizers = steps(model, config)
        with recorder.during("forward"):
            value = loss(*inputs)
        with recorder.during("backward"), Count(recorder.add):
            backward(value)
        for phase, step in optimizers.items():
            for _ in range(2):  # the first makes the state
                with recorder.during(phase), Count(recorder.add):
                    step()
    return recorder.phases


def step_inputs(config: RunConfig) -> tuple[Tensor | Segments, ...]:
    """ids, targets and, of a packed row, segments: what a loss of one rank of WORLD takes."""
    data = config.data
    tokens, packed = data.batch_tokens // WORLD, data.order == "packed"
    ids = torch.zeros(tokens, dtype=torch.int64, device=fake_cuda.DEVICE).view(-1, tokens if packed else data.seq_len)
    if not packed:
        return ids, ids
    boundaries = torch.zeros(128, dtype=torch.int32, device=fake_cuda.DEVICE)
    return ids, ids, Segments.of(boundaries, tokens, data.seq_len, torch.bfloat16)


def published_model(config: RunConfig) -> nn.Module:
    if config.data.order == "packed":
        return published_frontier.Model(config.model, config.data.batch_tokens // WORLD, torch.bfloat16)
    return published.Model(config.model, config.data.seq_len, config.quant.qat, torch.bfloat16)


def published_steps(model: nn.Module, config: RunConfig) -> tuple[Callable, dict[str, Callable]]:
    source = published_frontier if isinstance(model, published_frontier.Model) else published
    compiled = torch.compile(source.newton_schulz, dynamic=False)

    def orthogonalize(u: Tensor, *options) -> Tensor:
        with _disable_current_modes():
            return compiled(u, *options)

    optimizers = source.Optimizers(model, config.optim, torch.bfloat16, orthogonalize)

    def step(world: int) -> None:
        optimizers.muon.world = world
        optimizers.step(1.0, 0.95)

    loss = torch.compile(model, dynamic=False, fullgraph=True)
    return loss, Tensor.backward, {"optimizer, share of 8": lambda: step(WORLD), "optimizer": lambda: step(1)}


def golfgpt_steps(model: GPT, config: RunConfig) -> tuple[Callable, Callable, dict[str, Callable]]:
    fake_quant = Quantizer(config.model, config.quant).fake_quant()

    def parts(model: GPT, world: int) -> tuple[FlatGradients, ComputeCopies, Callable]:
        flat = FlatGradients(model, ShardedRanks(0, world, fake_cuda.DEVICE), sharded=world > 1, control=5)
        copies = ComputeCopies(model, fake_quant, torch.bfloat16)
        optimizers = Optimizers(model, config.optim, flat, copies)
        return flat, copies, lambda: optimizers.step(1.0, 0.95)

    flat, copies, replicated = parts(model, 1)
    *_, sharded = parts(fake(GPT(config.model, seed=0)), WORLD)

    def loss(ids: Tensor, targets: Tensor, segments: Segments | None = None) -> Tensor:
        return model.loss(ids, targets, dtype=torch.bfloat16, stand_ins=copies.stand_ins(), segments=segments)

    def backward(value: Tensor) -> None:
        flat.accumulate_(torch.autograd.grad(value, copies.leaves), first=True)

    return compile_loss(loss, fake_cuda.DEVICE), backward, {"optimizer, share of 8": sharded, "optimizer": replicated}


# ---- results


def summary(phases: Mapping[str, list[Kernel]]) -> dict[str, Any]:
    """Phase -> sums, by kind of kernel and in all."""

    def sums(kernels: list[Kernel]) -> dict[str, float]:
        return {
            "launches": len(kernels),
            "bytes": sum(kernel.bytes for kernel in kernels),
            "flops": sum(kernel.flops for kernel in kernels),
            "ms": round(1e3 * sum(kernel.seconds for kernel in kernels), 3),
        }

    out = {}
    for phase, kernels in phases.items():
        kinds: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in kernels:
            kinds[kernel.kind].append(kernel)
        out[phase] = sums(kernels) | {"kinds": {kind: sums(members) for kind, members in sorted(kinds.items())}}
    return out


def lines(entry: Mapping[str, Any]) -> str:
    out = []
    for phase, sums in entry.items():
        for kind, each in {"": sums, **sums["kinds"]}.items():
            figures = f"{each['launches']:5} launches {each['bytes'] / 1e9:8.3f} GB {each['flops'] / 1e9:9.1f} GF"
            out.append(f"{'  ' + kind if kind else phase:24} {figures} {each['ms']:8.3f} ms")
    return "\n".join(out)


def sources() -> str:
    """Digest of the code that counts depend on."""
    root = Path(__file__).parent.parent
    files = [*root.glob("golfgpt/**/*.py"), *root.glob("kernels/**/*.py"), *root.glob("bench/*counts.py")]
    text = b"".join(file.read_bytes() for file in sorted([*files, *root.glob("bench/published*.py")]))
    return hashlib.sha256(text).hexdigest()[:16]


def count_all() -> None:
    """Count what RESULTS lacks, each form in a process of its own, since PyTorch is changed for good."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    of = {"sources": sources(), "torch": torch.__version__}
    for name in (f"{recipe} {form}" for recipe in RECIPES for form in FORMS):
        if results.get(name, {}).get("of") != of:
            print(name, flush=True)
            command = [sys.executable, "-m", "bench.step_counts", *name.split(), "--json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            date = datetime.date.today().isoformat()
            results[name] = {"of": of, "date": date, "phases": json.loads(done.stdout.splitlines()[-1])}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    DOCUMENT.write_text(document(results))
    print(f"wrote {DOCUMENT}")


def document(results: Mapping[str, Any]) -> str:
    """docs/step.md."""
    lines = [
        "# The training step, counted",
        "",
        "What one rank of 8 launches and moves in a step on an H100, and a modelled time: counted without a GPU by",
        f"`python -m bench.step_counts --all` with torch {torch.__version__.split('+')[0]}. The forms, what is counted",
        "and what the model leaves out: `bench/step_counts.py`. No figure here is a measured speed.",
    ]
    for recipe in RECIPES:
        header = "| form | " + " | ".join(f"{phase}: launches, GB, ms" for phase in PHASES) + " |"
        lines += ["", f"## {recipe}", "", header, "|---" * (1 + len(PHASES)) + "|"]
        for form in FORMS:
            phases = results[f"{recipe} {form}"]["phases"]
            cells = (f"{p['launches']:,}, {p['bytes'] / 1e9:.2f}, {p['ms']:.2f}" for p in map(phases.get, PHASES))
            lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=RECIPES)
    parser.add_argument("form", nargs="?", choices=FORMS)
    parser.add_argument("--all", action="store_true", help="every recipe and form")
    parser.add_argument("--kernels", action="store_true", help="print every launch")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    options = parser.parse_args()
    if options.all:
        count_all()
        return 0
    if options.form is None:
        parser.error("expected a recipe and a form, or --all")
    phases = count(get(options.recipe).config, options.form)
    if options.kernels:
        for phase, kernels in phases.items():
            for k in kernels:
                print(f"{phase:24}{k.kind:20}{k.name:44}{k.bytes / 1e6:10.1f} MB{k.flops / 1e9:8.1f} GF")
    print(json.dumps(summary(phases)) if options.json else lines(summary(phases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
