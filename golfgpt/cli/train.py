"""`golfgpt train`, `demo`, `eval` and `sample`."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from golfgpt import recipes
from golfgpt.cli.common import (
    RUNS,
    Config,
    begun_before,
    check_tokenizer,
    check_ttt,
    print_json,
    run_name,
    stored_config,
)
from golfgpt.cli.data import DataPrepare, prepare_folder
from golfgpt.config import EvalConfig, RunConfig
from golfgpt.errors import BudgetError, InputError, Interrupted
from golfgpt.runs import add_metric, artifact_file, launcher, read_result, read_run, read_stored_result, taken

if TYPE_CHECKING:  # these import torch
    from golfgpt.data.shards import Dataset
    from golfgpt.score.evaluate import Score
    from golfgpt.score.ttt.evaluate import AdaptedScore


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, write model.golf, reload it from disk and score it. For several GPUs, run it under torchrun.

    Most used:
    --recipe NAME - small on a CPU, baseline on GPUs
    --data.path DIR - the text, from golfgpt data prepare
    --name NAME - of the run folder
    --schedule.max-seconds S - how long to train, in seconds
    --model.vocab-size N - if the tokenizer has not 1,024 pieces
    --resume RUN - go on after a stop

    Dates and PR numbers below are those of records of github.com/openai/parameter-golf.
    """

    config: Config
    recipe: str | None = None
    """Configuration that a new run starts from; `golfgpt recipes` lists them."""
    name: str | None = None
    """The run folder is runs/NAME; None: the recipe's name and the time, or torchrun's id."""
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
    if not args.resume:
        _need_recipe(args.recipe)
    path, config = args.resume or RUNS / run_name(args.name, args.recipe), args.config
    check_ttt((stored_config(path) if args.resume else recipes.get(args.recipe).config).eval, config.eval)
    if again := not args.resume and begun_before(path):
        config = stored_config(path)
    elif not args.resume and "RANK" not in os.environ and (path / "config.json").exists():
        raise taken(path)  # before the seconds of set-up; of several workers one creates the folder
    code = _train(config, path, resume=again or args.resume is not None, as_json=args.json)
    if not args.json and int(os.environ.get("RANK", 0)) == 0:
        print(f"run folder: {path}    next: golfgpt sample {shlex.quote(str(path))}")
    return code


def _need_recipe(recipe: str | None) -> None:
    if not recipe:
        raise InputError(
            "expected a recipe to start from, got none: use --recipe baseline on GPUs, --recipe small on a CPU "
            "(golfgpt recipes lists all)"
        )


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
class Preflight:
    """Try in a minute or two what a run of the same configuration does until its score, in a folder that is then
    removed: two steps, checkpoint and resume, export, byte budget, a scored batch, disk, clock. The lines below the
    table say what would end the run. The exit code is the one that the run would have."""

    config: Config
    recipe: str | None = None
    """Configuration that the run starts from; `golfgpt recipes` lists them."""
    json: bool = False
    """Print the rows as JSON."""


def preflight(args: Preflight) -> int:
    from golfgpt.submit.size import counted
    from golfgpt.tables import table
    from golfgpt.train.preflight import CHECKS, COMPILE, preflight

    _need_recipe(args.recipe)
    rows, rank = preflight(args.config, counted), int(os.environ.get("RANK", 0))
    failed = [row for row in rows if row.verdict == "fails"]
    code = failed[0].exit_code if failed else 0
    if rank == 0 and args.json:
        print_json({"rows": [asdict(row) for row in rows], "exit_code": code})
    elif rank == 0:
        cells = [(row.name, row.when, row.found, row.verdict, f"{row.seconds:.1f}") for row in rows]
        print(table(("check", "in a run", "found", "verdict", "seconds"), cells) + "\n")
        for row in sorted((row for row in rows if row.advice), key=lambda row: row.verdict):
            print(f"{row.name} {row.verdict}: {row.advice}")
        apart = sum(row.seconds for row in rows if row.name == COMPILE)
        rest = sum(row.seconds for row in rows) - apart
        untried = [name for name in CHECKS if name not in {row.name for row in rows}]
        also = f", {len(untried)} not tried ({', '.join(untried)})" if untried else ""
        seconds = f"{rest:.0f} s" + (f" and {apart:.0f} s to {COMPILE}" if apart >= 1 else "")
        print(f"{len(failed)} of {len(CHECKS)} checks failed{also}, in {seconds}")
        if not failed:
            print(f"next: {launcher()} {shlex.join(['train', *sys.argv[2:]])}")
    for row in failed if rank else ():
        print(f"golfgpt: rank {rank}: {row.name}: {row.advice}", file=sys.stderr, flush=True)
    return code


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, score and sample a small model on Python's own source code, in about three minutes."""

    config: Config
    name: str | None = None
    """The run folder is runs/NAME; None: demo and the time."""
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
        steps = read_result(path).result["steps"]
        if steps < 300:
            advice = " On a busy one, use `golfgpt demo --runtime.threads 1`." if config.runtime.threads != 1 else ""
            print(f"\nonly {steps} steps fit into the time: this machine is slow or busy.{advice}")
        prompt = "    def __init__(self"
        print(f"\n--- a sample: {shlex.join(['golfgpt', 'sample', str(path), '--prompt', prompt])} ---")
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


def _store(
    folder: Path, args: Eval, config: RunConfig, dataset: Dataset, score: Score, adapted: AdaptedScore | None
) -> None:
    """Add a score to those of the run."""
    facts = {"artifact": artifact_file(args.run).name, "data": config.data.path, "dataset": dataset.digest}
    with contextlib.suppress(OSError):  # a folder that only its owner may write to is scored all the same
        add_metric(folder, "eval", **facts, **asdict(score), adapted=adapted and asdict(adapted))


def evaluate(args: Eval) -> int:
    import torch

    from golfgpt import distributed
    from golfgpt.compare import scored_whole
    from golfgpt.files import sha256_file, write_json
    from golfgpt.score.compressors import compressors_bpb
    from golfgpt.score.evaluate import evaluate, open_dataset, plan_windows, scored_shape
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
    check_ttt(started.eval, args.eval)
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
    adapts, score, adapted, continues = config.eval.ttt.kind != "off", None, None, "continues"
    try:
        folder = args.run.parent if args.run.is_file() else args.run
        with Signals(folder) as signals, distributed.lost_peers(lambda: f" The same command {continues}."):
            keep = PartialSums(folder, ranks.rank, sha256_file(artifact_file(args.run)), reporter.line)
            model, tokenizer = load(args.run)
            check_tokenizer(args.run, tokenizer.digest, config.data.path)
            dataset = open_dataset(config, ranks)
            # A trained run stores its dtype. An imported run does not, and its score must not depend on a timing.
            wanted = (
                "float32" if config.runtime.dtype == "auto" and ranks.device.type == "cpu" else config.runtime.dtype
            )
            choice = select_dtype(wanted, model, config.data, ranks)
            dtype = choice.dtype
            shapes = [scored_shape(config, ranks), *learned_shapes(config, ranks)]
            try:
                attention = select_backend(
                    config.runtime.attention, config.model, shapes, ranks, dtype, backward=adapts
                )
            except InputError as error:
                if args.runtime.attention != started.runtime.attention:
                    raise
                reporter.line(f"{error}: numbers may differ from the run's by rounding")
                attention = select_backend("auto", config.model, shapes, ranks, dtype, backward=adapts)
            targets = plan_windows(dataset, config).targets
            reporter.line(
                f"{artifact_file(args.run)} on {config.data.path}: {targets:,} tokens to score, on {ranks.device} in "
                f"{choice}, attention {attention}"
            )
            if config.eval.max_tokens and config.eval.max_tokens == started.eval.max_tokens:
                reporter.line(
                    f"eval.max_tokens {config.eval.max_tokens} is kept from training; --eval.max-tokens None scores all"
                )
            if _other_data(folder, started, config, dataset.digest):
                reporter.line(
                    "note: this data folder differs from the run's; a score of text that the model was trained on says "
                    "nothing about other text"
                )
            with choose_kernels(config, ranks):
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
        reporter.status("compressing the text with gzip, xz and zstd for comparison")
        known = compressors_bpb(dataset) if ranks.is_main and not score.partial else None
    except BudgetError:  # of test-time training; the plain score stays
        if score and ranks.is_main:
            _store(folder, args, config, dataset, score, None)
        raise
    except Interrupted as error:
        signum = error.exit_code - 128
        raise Interrupted(f"stopped by {signal.Signals(signum).name}; the same command {continues}", signum) from None
    finally:
        reporter.close()
        ranks.close()
    if ranks.is_main:
        file = artifact_file(args.run).name
        _store(folder, args, config, dataset, score, adapted)
        kept = folder / "result.json"
        result = read_stored_result(folder) if adapted and file == "model.golf" else None
        if result:
            whole = (result.get("adapted") or {}).get("partial") is False
            if result.get("dataset") == adapted.dataset and not (whole and adapted.partial):
                write_json(kept, result | {"adapted": asdict(adapted)})
        if args.json:
            print_json({"score": asdict(score), "compressors_bpb": known, "adapted": adapted and asdict(adapted)})
        else:
            print(score_lines(score, known))
            if adapted:
                print(adapted_lines(score, adapted))
            trained = read_stored_result(folder) if file == "model.golf" and not score.partial else None
            if trained and trained["score"].get("partial"):
                again = scored_whole(read_run(folder))
                print(f"the run keeps its partial score, which runs, compare and submit read; {again} replaces it")
        check_adapted(adapted)
    return 0


def _other_data(folder: Path, started: RunConfig, config: RunConfig, digest: str) -> bool:
    """Whether the run is known to have been trained on other data than `digest`; before it has a result, whether their
    path is another one."""
    with contextlib.suppress(InputError):
        if known := (read_stored_result(folder) or {}).get("dataset"):
            return known != digest
    return started.data.path not in (None, config.data.path)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generate text from a run's model.golf. Notes, such as that the model ended the document, go to standard error."""

    run: Positional[Path]
    """Run folder, or a .golf file with tokenizer.model in the same folder."""
    prompt: str = ""
    """Text to continue; empty: start a new document."""
    prompt_file: Path | None = None
    """File with the text to continue, as it stands; - is standard input."""
    samples: int = 1
    """Samples to generate: the first with --seed, the next ones with the seeds after it."""
    tokens: int = 200
    """Maximum number of tokens; generation also stops when the model ends the document, unless --past-end."""
    past_end: bool = False
    """Go on with a new document, after a blank line, when the model ends one."""
    temperature: float = 0.8
    """Softmax temperature; 0 always picks the most likely token."""
    top_k: int = 50
    """Sample from this many most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Of these, sample from the fewest whose probabilities sum to this; 1: from all."""
    seed: int = 0
    """Seed of the sampling."""
    json: bool = False
    """Print the prompt, and of each sample seed, text, number of tokens and whether the model ended it, as JSON."""


def sample(args: Sample) -> int:
    for name, value, low, high in (
        ("samples", args.samples, 1, 10**6),
        ("tokens", args.tokens, 1, 10**6),
        ("top-k", args.top_k, 0, 65_536),
        ("top-p", args.top_p, 1e-9, 1),
        ("temperature", args.temperature, 0, 100),
        ("seed", args.seed, 0, 2**63 - args.samples),
    ):
        if not low <= value <= high:
            raise InputError(f"--{name} is {value}; expected {low} to {high}")
    prompt, file = _prompt(args), artifact_file(args.run)

    import torch  # which takes seconds

    from golfgpt.quant import artifact
    from golfgpt.train.run_folder import load

    model, tokenizer = load(args.run)
    window, bos = artifact.inspect(file).seq_len, tokenizer.bos_id
    ids = [bos, *tokenizer.encode(prompt)]
    shown = prompt
    if len(ids) > window:
        print(f"the prompt has {len(ids):,} tokens, of which the model reads the last {window:,}", file=sys.stderr)
        shown = f"… {tokenizer.decode(ids[-window:])}"
    found = []
    for seed in range(args.seed, args.seed + args.samples):
        new = model.generate(
            torch.tensor(ids),
            args.tokens,
            window=window,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_id=None if args.past_end else bos,
            generator=torch.Generator().manual_seed(seed),
        )
        # What the prompt ends with, such as half a word, decides how the first new ids decode.
        first, *more = _documents([*ids, *new], bos)
        text = "\n\n".join([tokenizer.decode(first)[len(tokenizer.decode(ids)) :], *map(tokenizer.decode, more)])
        found.append({"seed": seed, "text": text, "tokens": len(new), "ended": len(new) < args.tokens})
        if args.json:
            continue
        if args.samples > 1:
            print(f"--- seed {seed}", flush=True)
        print(shown + text, flush=True)
        if len(new) < args.tokens:
            print(
                f"(the model ended the document after {len(new)} of {args.tokens} tokens; --past-end goes on)",
                file=sys.stderr,
            )
    if args.json:
        print_json({"prompt": prompt, "samples": found})
    return 0


def _prompt(args: Sample) -> str:
    if args.prompt_file is None:
        try:
            args.prompt.encode()
        except UnicodeEncodeError as error:  # bytes that are not UTF-8, as Python passes them
            raise InputError(f"--prompt: character {error.start} is not UTF-8; convert it") from None
        return args.prompt
    if args.prompt:
        raise InputError(f"expected --prompt or --prompt-file, got both; drop one (the file is {args.prompt_file})")
    data = sys.stdin.buffer.read() if str(args.prompt_file) == "-" else args.prompt_file.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {args.prompt_file}: byte {error.start} is not UTF-8; convert it") from None


def _documents(ids: list[int], bos: int) -> list[list[int]]:
    """The ids of each document, with the BOS that it starts with."""
    starts = [i for i, token in enumerate(ids) if token == bos]
    return [ids[start:end] for start, end in itertools.pairwise([*starts, len(ids)])]
