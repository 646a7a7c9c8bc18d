"""What each command does; torch is imported inside, so that help and mistakes answer at once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from golfgpt import recipes
from golfgpt.cli.arguments import (
    Budget,
    DataDownload,
    DataPrepare,
    DataVerify,
    Demo,
    Doctor,
    Eval,
    Export,
    Import,
    Inspect,
    Recipes,
    Sample,
    Train,
)
from golfgpt.config import RunConfig, differences, to_dict
from golfgpt.errors import BudgetError, InputError, Interrupted

RUNS = Path("runs")


def stored_config(path: Path) -> RunConfig:
    """The config that a run was started with."""
    from golfgpt.train.run_folder import read_config

    return read_config(path.parent if path.is_file() else path)


def train(args: Train) -> int:
    if args.resume and args.name:
        raise InputError(f"--name {args.name} and --resume {args.resume} exclude each other: a run keeps its folder")
    if not (args.resume or args.recipe):
        raise InputError(
            "name the recipe to start from: --recipe baseline on GPUs, --recipe small on a CPU (golfgpt recipes lists "
            "them)"
        )
    path = args.resume or RUNS / _run_name(args.name, args.recipe)
    code = _train(args.config, path, resume=args.resume is not None, as_json=args.json)
    if not args.json and int(os.environ.get("RANK", 0)) == 0:
        print(f"run folder: {path}    next: golfgpt sample {path}")
    return code


def _train(config: RunConfig, path: Path, *, resume: bool, as_json: bool) -> int:
    """Train; with `as_json` print result.json, also when the artifact is over its budget."""
    from golfgpt.train.train import train

    try:
        result = train(config, path, resume=resume, quiet=as_json)
    except BudgetError:
        if as_json and (path / "result.json").exists():
            print((path / "result.json").read_text(encoding="utf-8"))
        raise
    if as_json and result:
        _print_json(result)
    return 0


def evaluate(args: Eval) -> int:
    import torch

    from golfgpt import distributed
    from golfgpt.files import sha256_file
    from golfgpt.score.baselines import yardsticks
    from golfgpt.score.evaluate import batch_windows, evaluate
    from golfgpt.score.sums import PartialSums
    from golfgpt.train.attention_backend import select_backend
    from golfgpt.train.compute_dtype import select_dtype
    from golfgpt.train.reporter import score_lines
    from golfgpt.train.run_folder import Reporter, artifact_file, load
    from golfgpt.train.signals import Signals
    from golfgpt.train.train import open_dataset

    started = stored_config(args.run)
    data = replace(started.data, path=args.data.path)
    runtime = replace(started.runtime, **asdict(args.runtime))
    try:
        config = replace(started, data=data, eval=args.eval, runtime=runtime)
    except ValueError as error:  # fields that are right alone and wrong together
        raise InputError(str(error)) from error
    ranks = distributed.start(config.runtime.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    reporter = Reporter(None, speak=ranks.is_main, quiet=args.json)
    try:
        folder = args.run.parent if args.run.is_file() else args.run
        keep = PartialSums(folder, ranks.rank, sha256_file(artifact_file(args.run)), reporter.line)
        model, tokenizer = load(args.run)
        dataset = open_dataset(config, ranks)
        if dataset.need_tokenizer().digest != tokenizer.digest:
            raise InputError(f"{config.data.path} was made with another tokenizer than {args.run}")
        # A run has stored its dtype. One that was imported has not: its score must not depend on a timing.
        wanted = "float32" if config.runtime.dtype == "auto" and ranks.device.type == "cpu" else config.runtime.dtype
        choice = select_dtype(wanted, model, config.data, ranks)
        dtype = choice.dtype
        shape = (batch_windows(config, ranks), config.window)
        attention = select_backend(config.runtime.attention, config.model, [shape], ranks, dtype, backward=False)
        reporter.line(f"device:{ranks.device} dtype:{choice} attention:{attention} data:{config.data.path}")
        with Signals(folder):
            score = evaluate(
                model.to(ranks.device), dataset, config, ranks, dtype=dtype, progress=reporter.status, keep=keep
            )
        known = yardsticks(dataset) if ranks.is_main and not score.partial else None
    except Interrupted as error:
        signum = error.exit_code - 128
        raise Interrupted(f"stopped by {signal.Signals(signum).name}; the same command continues", signum) from None
    finally:
        reporter.close()
        ranks.close()
    if ranks.is_main:
        if args.json:
            _print_json({"score": asdict(score), "yardsticks_bpb": known})
        else:
            print(score_lines(score, known))
    return 0


def sample(args: Sample) -> int:
    import torch

    from golfgpt.quant import artifact
    from golfgpt.train.run_folder import artifact_file, load

    for name, value, low, high in (
        ("tokens", args.tokens, 1, 10**6),
        ("top-k", args.top_k or 1, 1, 65_536),
        ("temperature", args.temperature, 0, 100),
        ("seed", args.seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise InputError(f"--{name} must lie in {low}..{high}, got {value}")
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
    text = tokenizer.decode(new)
    if args.json:
        _print_json({"prompt": args.prompt, "text": text, "tokens": len(new)})
    else:
        print(args.prompt + text)
    return 0


def budget(args: Budget) -> int:
    from golfgpt.model.parameters import parameter_shapes
    from golfgpt.quant.budget import fitted, forecast_bytes
    from golfgpt.quant.quantizer import Quantizer
    from golfgpt.train.reporter import tensor_table

    config = args.config
    if args.run:
        return _budget_of_artifact(args.run, args.json, config)
    config = fitted(config)
    quantizer = Quantizer(config.model, config.quant)
    shapes = parameter_shapes(config.model).values()
    parameters = sum(map(math.prod, shapes))
    room = config.budget.artifact_bytes - config.budget.code_bytes
    forecast = forecast_bytes(quantizer)
    if args.json:
        sizes = {"payload_bytes": quantizer.payload_bytes, "forecast_bytes": forecast, "model_bytes_limit": room}
        _print_json({"parameters": parameters, "mlp_hidden": config.model.mlp_hidden, **sizes})
        return 0
    print(f"recipe {args.recipe}, at most {config.budget.artifact_bytes:,} bytes (--budget.artifact-bytes)\n")
    print(tensor_table(quantizer.table()))
    if config.budget.fit == "mlp_hidden":
        reserve = config.budget.reserve_bytes
        print(f"\nmodel.mlp_hidden {config.model.mlp_hidden} is the widest that leaves {reserve:,} bytes")
    print(
        f"\n{parameters:,} parameters, payload {quantizer.payload_bytes:,} bytes before compression\n"
        f"room for model.golf: {room:,} bytes = {config.budget.artifact_bytes:,} - code allowance "
        f"{config.budget.code_bytes:,}"
    )
    ratio = room / quantizer.payload_bytes
    if ratio >= 1:
        print("fits whatever the weights are")
    else:
        print(f"fits if the trained weights compress to {ratio:.3f} of the payload")
    print(
        f"forecast for Gaussian weights: {forecast:,} bytes, {forecast / quantizer.payload_bytes:.3f} of the payload; "
        "published files ended 2 % below to 4 % above theirs"
    )
    return 0


def _budget_of_artifact(path: Path, as_json: bool, config: RunConfig) -> int:
    """Exact bytes of a file; BudgetError over the cap."""
    from golfgpt.quant import artifact
    from golfgpt.train.reporter import budget_lines, tensor_table
    from golfgpt.train.run_folder import artifact_file

    started = stored_config(path) if path.is_dir() else RunConfig()
    if changed := [d for d in differences(started, config) if not d.startswith("budget.")]:
        raise InputError(f"a file has the bytes it has; not for budget {path}: {'; '.join(changed)}")
    info = artifact.inspect(artifact_file(path))
    if as_json:
        _print_json(asdict(artifact.budget_report(info.file_bytes, config.budget)))
    else:
        print(tensor_table(info.table()))
        print("\n" + budget_lines(info, config.budget))
    artifact.check_budget(info.file_bytes, config.budget)
    return 0


def inspect(args: Inspect) -> int:
    from golfgpt.files import sha256_file
    from golfgpt.model.plan import layer_plan
    from golfgpt.quant import artifact
    from golfgpt.train.reporter import table, tensor_table
    from golfgpt.train.run_folder import artifact_file

    file = artifact_file(args.artifact)
    info = artifact.inspect(file)
    facts = {
        "file": str(file),
        "bytes": info.file_bytes,
        "sha256": sha256_file(file),
        "parameters": info.parameters,
        "payload_bytes": info.payload_bytes,
        "compressor": f"{info.compressor} level {info.level}",
        "tokenizer_sha256": info.tokenizer_sha256,
        "seq_len": info.seq_len,
        **{f"model.{key}": value for key, value in to_dict(info.model).items()},
    }
    plan = layer_plan(info.model)
    if args.json:
        tensors = [report._asdict() for report in info.table()]
        _print_json(facts | {"tensors": tensors, "plan": [asdict(layer) for layer in plan]})
    else:
        print(table(("artifact", ""), [(key, f"{v:,}" if type(v) is int else str(v)) for key, v in facts.items()]))
        print("\n" + tensor_table(info.table()))
        print("\n" + table(("layer", "does"), [(i, str(layer)) for i, layer in enumerate(plan)]))
    return 0


def import_file(args: Import) -> int:
    from golfgpt.data.tokenizer import Tokenizer
    from golfgpt.importer import import_model
    from golfgpt.published import assumed_fields, read_export
    from golfgpt.train.reporter import tensor_table

    export = read_export(args.file)
    path = RUNS / _run_name(args.name, args.file.name.split(".")[0])
    info = import_model(export, Tokenizer.from_file(args.tokenizer), args.config, path)
    assumed = {name: (getattr(info.model, name), known) for name, known in assumed_fields(export.state).items()}
    if args.json:
        facts = {"run": str(path), "format": export.format, "compressor": export.compressor, "bytes": info.file_bytes}
        _print_json(facts | {"parameters": info.parameters, "model": to_dict(info.model), "assumed": list(assumed)})
        return 0
    print(tensor_table(info.table()))
    print(
        f"\n{args.file}: {export.format}, {export.compressor or 'not compressed'}, {args.file.stat().st_size:,} bytes; "
        f"{info.parameters:,} parameters\n{path}/model.golf: {info.compressor} level {info.level}, "
        f"{info.file_bytes:,} bytes" + ("" if export.codes else f", quantized here ({args.config.quant.bits} bits)")
    )
    for name, (value, known) in assumed.items():
        print(f"assumed, because no tensor shows it: model.{name} {value} ({known})")
    print(f"next: golfgpt eval {path} --data.path DIR")
    return 0


def export(args: Export) -> int:
    import safetensors.torch

    from golfgpt.files import write_bytes
    from golfgpt.published import to_published
    from golfgpt.quant import artifact
    from golfgpt.train.reporter import tensor_table
    from golfgpt.train.run_folder import artifact_file, trained_weights

    folder = args.run.parent if args.run.is_file() else args.run
    whole = not args.run.is_file() or (args.run.name == "model.golf" and (folder / "config.json").exists())
    source = args.source or ("checkpoint" if args.to == "golf" and whole else "artifact")
    file = artifact_file(args.run)
    info = artifact.inspect(file)
    started = stored_config(args.run).quant if (folder / "config.json").exists() else args.quant
    if args.to == "safetensors" and (changed := differences(started, args.quant, "quant.")):
        raise InputError(f"safetensors holds float32 weights: {changed[0]} changes nothing; --to golf quantizes")
    if trained := [d for d in differences(started, args.quant, "quant.") if d.startswith("quant.qat")]:
        raise InputError(f"{trained[0]} changes nothing here: fake quantization is part of training")
    state = artifact.read(file).state if source == "artifact" else trained_weights(folder)
    out = args.out or (folder / "export.golf" if args.to == "golf" else file.with_suffix(".safetensors"))
    suffix, place = ".golf" if args.to == "golf" else ".safetensors", out.resolve().parent
    if out.suffix != suffix:
        raise InputError(f"--out {out} must end in {suffix}")
    if out.resolve() == file.resolve() or (out.name == "model.golf" and (place / "config.json").exists()):
        raise InputError(f"{out} is what is exported, or a run's own artifact; choose another --out")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out} exists: name another --out, or give --overwrite")
    if place.name == "checkpoints" and (place.parent / "config.json").exists():
        raise InputError(f"{place} holds the checkpoints of a run; choose another --out")
    if args.to == "golf":
        options = {"tokenizer_sha256": info.tokenizer_sha256, "seq_len": info.seq_len}
        print(f"compressing ({args.quant.compressor})", file=sys.stderr)
        written = artifact.write(out, state, model=info.model, quant=args.quant, **options)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in to_published(state).items()}
        meta = {"config": json.dumps(to_dict(info.model)), "tokenizer_sha256": info.tokenizer_sha256}
        write_bytes(out, safetensors.torch.save(tensors, meta))
    size = out.stat().st_size
    if args.json:
        _print_json({"file": str(out), "source": source, "tensors": len(to_published(state)), "bytes": size})
    elif args.to == "golf":
        print(tensor_table(written.table()))
        print(f"\n{out}: {size:,} bytes, {written.compressor} level {written.level}, from the {source}'s weights")
        here = out.resolve().parent == folder.resolve()
        print(f"next: golfgpt eval {out}" if here else f"golfgpt eval wants it in the run folder, {folder}")
    else:
        print(f"{out}: {len(tensors)} float32 tensors, {size:,} bytes, from the {source}'s weights")
    return 0


def demo(args: Demo) -> int:
    from golfgpt.data.shards import MANIFEST

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("demo is one process; for several: golfgpt data prepare, then torchrun … -m golfgpt train")
    if (args.data / MANIFEST).exists():
        print(f"corpus: {args.data}, as prepared before", file=sys.stderr if args.json else sys.stdout)
    else:
        _prepare(DataPrepare(out=args.data, vocab_size=args.config.model.vocab_size, json=args.json))
    path = RUNS / _run_name(args.name, "demo")
    config = replace(args.config, data=replace(args.config.data, path=str(args.data)))
    code = _train(config, path, resume=False, as_json=args.json)
    if not args.json:
        steps = json.loads((path / "result.json").read_text(encoding="utf-8"))["steps"]
        if steps < 300:
            advice = (
                " On a busy one `golfgpt demo --runtime.threads 1` does better." if config.runtime.threads != 1 else ""
            )
            print(f"\nonly {steps} steps in the time: this machine is slow or busy (README's figure took 687).{advice}")
        prompt = "    def __init__(self"
        print(f"\n--- a sample: golfgpt sample {path} --prompt {prompt!r} ---")
        sample(Sample(run=path, prompt=prompt, tokens=150))
        print(f"---\nrun folder: {path}")
    return code


def data_prepare(args: DataPrepare) -> int:
    manifest = _prepare(args)
    if args.json:
        _print_json(manifest.to_json())
    else:
        vocabulary = "" if manifest.vocab_size == 1024 else f" --model.vocab-size {manifest.vocab_size}"
        print(f"next: golfgpt train --recipe small --data.path {args.out}{vocabulary}")
    return 0


def _prepare(args: DataPrepare) -> Any:
    from golfgpt.data.demo_text import demo_text
    from golfgpt.data.prepare import prepare
    from golfgpt.train.reporter import table

    say = sys.stderr if args.json else sys.stdout
    if args.vocab_size is not None and args.tokenizer is not None:
        raise InputError("--vocab-size trains a tokenizer and --tokenizer takes one; give one of them")
    if not args.inputs and (args.val or args.document_separator):
        raise InputError("--val and --document-separator need inputs to train on: name them first")
    if not args.inputs:
        text = demo_text()
        skipped = ", ".join(f"{count} {reason}" for reason, count in text.skipped.items())
        print(f"corpus: {text.name}; skipped: {skipped or 'none'}", file=say)
    with _progress(say) as progress:
        manifest = prepare(
            args.inputs or None,
            args.out,
            vocab_size=1024 if args.vocab_size is None else args.vocab_size,
            tokenizer=args.tokenizer,
            val=args.val or None,
            val_fraction=args.val_fraction,
            separator=args.document_separator,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
        )
    splits = (("train", manifest.train), ("val", manifest.val))
    rows = [(name, s.documents, s.raw_bytes, s.tokens, round(s.decoded_bytes / s.tokens, 3)) for name, s in splits]
    print(table(("split", "documents", "bytes", "tokens", "bytes/token"), rows), file=say)
    if not manifest.lossless:
        for name, s in splits:
            print(
                f"the tokenizer changes {s.changed_documents:,} of {s.documents:,} {name} documents "
                f"({s.raw_bytes - s.decoded_bytes:,} bytes fewer): scores are of the normalized text",
                file=say,
            )
    print(f"{args.out}: digest {manifest.digest[:16]}", file=say)
    return manifest


def data_download(args: DataDownload) -> int:
    from golfgpt.data.download import download

    out = args.out or Path("data") / f"fineweb10B_{args.variant}"
    with _progress(sys.stderr if args.json else sys.stdout) as progress:
        report = download(
            out,
            variant=args.variant,
            train_shards=args.train_shards,
            revision=args.revision,
            workers=args.workers,
            progress=progress,
        )
    for damaged in report.damaged:
        print(f"damaged, fetched again: {damaged}", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        _print_json(asdict(report))
    else:
        vocabulary = "" if args.variant == "sp1024" else f" --model.vocab-size {args.variant.removeprefix('sp')}"
        print(
            f"{out}: {report.variant} of {report.repo} at {report.revision}\n"
            f"{report.train_shards} train shards, {report.train_tokens:,} tokens; {report.val_shards} val shards, "
            f"{report.val_tokens:,} tokens\n"
            f"fetched {report.fetched_files} of {report.files} files, {report.fetched_bytes:,} of {report.bytes:,} "
            "bytes; every file has the SHA-256 of the record\n"
            f"next: golfgpt train --recipe baseline --data.path {out}{vocabulary}"
        )
    return 0


def data_verify(args: DataVerify) -> int:
    from golfgpt.data.shards import verify
    from golfgpt.train.reporter import table

    with _progress(sys.stderr if args.json else sys.stdout) as progress:
        report = asdict(verify(args.path, progress=progress))
    if args.json:
        _print_json(report)
    else:
        print(table(("checked", ""), [(key, f"{v:,}" if type(v) is int else str(v)) for key, v in report.items()]))
        print("verified: every count was made twice, independently")
    return 0


def show_recipes(args: Recipes) -> int:
    if args.action == "list" and args.name is not None:
        raise InputError(f"golfgpt recipes list takes no name; to see one: golfgpt recipes show {args.name}")
    if args.action == "show":
        if args.name is None:
            raise InputError(f"name the recipe to show: {', '.join(recipes.RECIPES)}")
        recipe = recipes.get(args.name)
        if args.json:
            facts = {"name": recipe.name, "summary": recipe.summary, "notes": recipe.notes}
            _print_json(facts | {"config": to_dict(recipe.config)})
        else:
            fill = partial(textwrap.fill, width=100, break_on_hyphens=False)
            print(fill(f"{recipe.name}: {recipe.summary}"))
            for note in recipe.notes:
                print(fill(note, initial_indent="- ", subsequent_indent="  "))
            print(f"\n{json.dumps(to_dict(recipe.config), indent=2)}")
    elif args.json:
        _print_json({name: recipe.summary for name, recipe in recipes.RECIPES.items()})
    else:
        for name, recipe in recipes.RECIPES.items():
            print(
                textwrap.fill(f"{name:<18} {recipe.summary}", 110, subsequent_indent=" " * 19, break_on_hyphens=False)
            )
        print("\ngolfgpt recipes show NAME explains one; golfgpt train --recipe NAME --data.path DIR trains it")
    return 0


def doctor(args: Doctor) -> int:
    from golfgpt.doctor import diagnose, exit_code, text

    say = sys.stderr if args.json else sys.stdout

    def progress(name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name} …", end="", file=sys.stderr, flush=True)

    rows = diagnose(
        args.device,
        processes=args.processes,
        retune=args.tune,
        say=lambda line: print(line, file=say, flush=True),
        progress=progress,
    )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if args.json:
        _print_json({"rows": [asdict(row) for row in rows], "exit_code": exit_code(rows)})
    else:
        print(text(rows))
    return exit_code(rows)


def _run_name(name: str | None, recipe: str) -> str:
    """A folder name under runs/. Raises InputError for one that would leave it."""
    name = name or f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if name in (".", "..") or any(c in name for c in "/\\\0"):
        raise InputError(f"--name {name!r} is not a folder name; runs are kept in {RUNS}/NAME")
    return name


@contextlib.contextmanager
def _progress(file: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """progress(stage, done, total): a bar per stage on a terminal, a line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=file)
    stages: dict[str, Any] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total or None)
                if not console.is_terminal:
                    print(f"{stage} …", file=file, flush=True)
            bars.update(stages[stage], completed=done)

        yield report


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
