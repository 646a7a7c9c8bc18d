"""`golfgpt train`, `demo`, `eval` and `sample`."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from golfgpt.cli.common import RUNS, Config, begun_before, print_json, run_name, stored_config
from golfgpt.cli.data import DataPrepare, prepare_folder
from golfgpt.config import EvalConfig, RunConfig
from golfgpt.errors import BudgetError, InputError, Interrupted


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, write model.golf, reload it from disk and score it. For several GPUs, run it under torchrun."""

    config: Config
    recipe: str | None = None
    """Configuration that a new run starts from; `golfgpt recipes` lists them."""
    name: str | None = None
    """The run folder is runs/NAME; default: the recipe's name and the time, or torchrun's id."""
    resume: Path | None = None
    """Continue the run in this folder from its newest checkpoint, with the config that it was started with."""
    json: bool = False
    """Print the result as JSON on standard output, the log on standard error."""


def train(args: Train) -> int:
    if args.resume and args.name:
        raise InputError(
            f"expected --name or --resume, got --name {args.name} and --resume {args.resume}; a resumed run keeps its "
            "folder, so drop --name"
        )
    if not (args.resume or args.recipe):
        raise InputError(
            "expected a recipe to start from, got none: use --recipe baseline on GPUs, --recipe small on a CPU "
            "(golfgpt recipes lists all)"
        )
    path, config = args.resume or RUNS / run_name(args.name, args.recipe), args.config
    if again := not args.resume and begun_before(path):
        config = stored_config(path)
    code = _train(config, path, resume=again or args.resume is not None, as_json=args.json)
    if not args.json and int(os.environ.get("RANK", 0)) == 0:
        print(f"run folder: {path}    next: golfgpt sample {path}")
    return code


def _train(config: RunConfig, path: Path, *, resume: bool, as_json: bool) -> int:
    """Train. With `as_json`, print result.json, also if the artifact is over its budget."""
    from golfgpt.submit.size import counted
    from golfgpt.train.train import train

    try:
        result = train(config, path, resume=resume, quiet=as_json, count=counted)
    except BudgetError:
        if as_json and (path / "result.json").exists():
            print((path / "result.json").read_text(encoding="utf-8"))
        raise
    if as_json and result:
        print_json(result)
    return 0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, score and sample a small model on Python's own source code, in about three minutes."""

    config: Config
    name: str | None = None
    """The run folder is runs/NAME; default: demo and the time."""
    data: Path = Path("data/demo")
    """Folder for the prepared text; an existing one is used again."""
    json: bool = False
    """Print the result as JSON."""


def demo(args: Demo) -> int:
    from golfgpt.data.shards import MANIFEST

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            f"golfgpt demo expected one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}; for several use "
            "golfgpt data prepare, then torchrun … -m golfgpt train"
        )
    if (args.data / MANIFEST).exists():
        print(f"corpus: {args.data}, as prepared before", file=sys.stderr if args.json else sys.stdout)
    else:
        prepare_folder(DataPrepare(out=args.data, vocab_size=args.config.model.vocab_size, json=args.json))
    path = RUNS / run_name(args.name, "demo")
    config = replace(args.config, data=replace(args.config.data, path=str(args.data)))
    code = _train(config, path, resume=False, as_json=args.json)
    if not args.json:
        steps = json.loads((path / "result.json").read_text(encoding="utf-8"))["steps"]
        if steps < 300:
            advice = " On a busy one, use `golfgpt demo --runtime.threads 1`." if config.runtime.threads != 1 else ""
            print(f"\nonly {steps} steps fit into the time, 687 in README.md: this machine is slow or busy.{advice}")
        prompt = "    def __init__(self"
        print(f"\n--- a sample: golfgpt sample {path} --prompt {prompt!r} ---")
        sample(Sample(run=path, prompt=prompt, tokens=150))
        print(f"---\nrun folder: {path}")
    return code


@dataclass(frozen=True, kw_only=True)
class DataPath:
    """Text to score."""

    path: str | None = None
    """Prepared folder; it must have the run's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EvalRuntime:
    """Where and how to score: the fields of runtime that scoring reads."""

    device: Literal["auto", "cpu", "cuda"]
    """auto: cuda if available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"]
    """Dtype of activations and matmuls; auto: bfloat16 on cuda, float32 on a CPU."""
    kernels: str
    """Where Triton kernels replace PyTorch: triton, eager, some of mlp, mlp_gluon, loss, optimizer, fake_quant (of
    which scoring uses the first three), or auto: where `python -m golfgpt_kernels tune` found them faster."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"]
    """Backend of scaled_dot_product_attention; auto: on a GPU the fastest backend that agrees with math."""
    compile: Literal["auto", "on", "off"]
    """torch.compile of the forward; auto: on cuda only."""
    threads: int
    """CPU threads for torch; 0: torch's default."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a run's model.golf on validation text, with the run's own config unless an option overrides it. With
    --eval.ttt.kind also with test-time training, which adds to the run's result.json."""

    run: Positional[Path]
    """Run folder, or another .golf file in a run folder."""
    data: DataPath
    eval: EvalConfig
    runtime: EvalRuntime
    json: bool = False
    """Print the score as JSON."""


def evaluate(args: Eval) -> int:
    import torch

    from golfgpt import distributed
    from golfgpt.files import sha256_file, write_json
    from golfgpt.runs import artifact_file
    from golfgpt.score.compressors import compressors_bpb
    from golfgpt.score.evaluate import evaluate, open_dataset, scored_shape
    from golfgpt.score.sums import PartialSums
    from golfgpt.score.ttt.evaluate import check_adapted, evaluate_adapted, learned_shapes
    from golfgpt.tables import adapted_lines, score_lines
    from golfgpt.train.attention_backend import select_backend
    from golfgpt.train.compute_dtype import select_dtype
    from golfgpt.train.execution import available
    from golfgpt.train.kernels import choose_kernels
    from golfgpt.train.reporter import Reporter
    from golfgpt.train.run_folder import load
    from golfgpt.train.signals import Signals

    started = stored_config(args.run)
    data = replace(started.data, path=args.data.path)
    try:
        runtime = replace(started.runtime, **asdict(args.runtime))
        config = replace(started, data=data, eval=args.eval, runtime=runtime)
    except ValueError as error:  # fields that are valid alone but not together
        raise InputError(str(error)) from error
    ranks = distributed.start(config.runtime.device, config.runtime.peer_seconds)
    runtime, missing = available(runtime, started.runtime, ranks.device)
    config = replace(config, runtime=runtime)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    reporter = Reporter(None, speak=ranks.is_main, quiet=args.json)
    if missing:
        reporter.line(missing)
    adapts, adapted, continues = config.eval.ttt.kind != "off", None, "continues"
    try:
        folder = args.run.parent if args.run.is_file() else args.run
        keep = PartialSums(folder, ranks.rank, sha256_file(artifact_file(args.run)), reporter.line)
        model, tokenizer = load(args.run)
        dataset = open_dataset(config, ranks)
        if dataset.need_tokenizer().digest != tokenizer.digest:
            raise InputError(
                f"{config.data.path} has another tokenizer than {args.run}; choose a folder that was prepared with "
                f"--tokenizer {folder / 'tokenizer.model'}"
            )
        # A trained run stores its dtype. An imported run does not, and its score must not depend on a timing.
        wanted = "float32" if config.runtime.dtype == "auto" and ranks.device.type == "cpu" else config.runtime.dtype
        choice = select_dtype(wanted, model, config.data, ranks)
        dtype = choice.dtype
        shapes = [scored_shape(config, ranks), *learned_shapes(config, ranks)]
        try:
            attention = select_backend(config.runtime.attention, config.model, shapes, ranks, dtype, backward=adapts)
        except InputError as error:
            if args.runtime.attention != started.runtime.attention:
                raise
            reporter.line(f"{error}: numbers may differ from the run's by rounding")
            attention = select_backend("auto", config.model, shapes, ranks, dtype, backward=adapts)
        reporter.line(f"device:{ranks.device} dtype:{choice} attention:{attention} data:{config.data.path}")
        lost_peers = distributed.lost_peers(lambda: f" The same command {continues}.")
        with Signals(folder) as signals, choose_kernels(config, ranks), lost_peers:
            model = model.to(ranks.device)
            score = evaluate(model, dataset, config, ranks, dtype=dtype, progress=reporter.status, keep=keep)
            if adapts:
                reporter.line(f"{score.label} {score.val_bpb:.4f} without test-time training, which begins now")
                continues = "starts over"
                adapted = evaluate_adapted(
                    model,
                    dataset,
                    config,
                    ranks,
                    dtype=dtype,
                    progress=reporter.status,
                    say=reporter.line,
                    deferred=signals.deferring("the adapted score ends where all ranks meet"),
                )
        known = compressors_bpb(dataset) if ranks.is_main and not score.partial else None
    except Interrupted as error:
        signum = error.exit_code - 128
        raise Interrupted(f"stopped by {signal.Signals(signum).name}; the same command {continues}", signum) from None
    finally:
        reporter.close()
        ranks.close()
    if ranks.is_main:
        kept = folder / "result.json"
        if adapted and artifact_file(args.run).name == "model.golf" and kept.is_file():
            result = json.loads(kept.read_text(encoding="utf-8"))
            whole = (result.get("adapted") or {}).get("partial") is False
            if result["dataset"] == adapted.dataset and not (whole and adapted.partial):
                write_json(kept, result | {"adapted": asdict(adapted)})
        if args.json:
            print_json({"score": asdict(score), "compressors_bpb": known, "adapted": adapted and asdict(adapted)})
        else:
            print(score_lines(score, known))
            if adapted:
                print(adapted_lines(score, adapted))
        check_adapted(adapted)
    return 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generate text from a run's model.golf."""

    run: Positional[Path]
    """Run folder, or a .golf file with tokenizer.model in the same folder."""
    prompt: str = ""
    """Text to continue; empty: start a new document."""
    tokens: int = 200
    """Maximum number of tokens; generation also stops when the model ends the document."""
    temperature: float = 0.8
    """Softmax temperature; 0 always picks the most likely token."""
    top_k: int | None = 50
    """Sample from this many most likely tokens; None: all."""
    seed: int = 0
    """Seed of the sampling."""
    json: bool = False
    """Print prompt, text and number of tokens as JSON."""


def sample(args: Sample) -> int:
    import torch

    from golfgpt.quant import artifact
    from golfgpt.runs import artifact_file
    from golfgpt.train.run_folder import load

    for name, value, low, high in (
        ("tokens", args.tokens, 1, 10**6),
        ("top-k", args.top_k or 1, 1, 65_536),
        ("temperature", args.temperature, 0, 100),
        ("seed", args.seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise InputError(f"--{name} is {value}; expected {low} to {high}")
    model, tokenizer = load(args.run)
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(args.prompt)])
    new = model.generate(
        ids,
        args.tokens,
        window=artifact.inspect(artifact_file(args.run)).seq_len,
        temperature=args.temperature,
        top_k=args.top_k,
        stop_id=tokenizer.bos_id,
        generator=torch.Generator().manual_seed(args.seed),
    )
    prompt = ids.tolist()  # what the prompt ends with, such as half a word, decides how the first new ids decode
    text = tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]
    if args.json:
        print_json({"prompt": args.prompt, "text": text, "tokens": len(new)})
    else:
        print(args.prompt + text)
    return 0
