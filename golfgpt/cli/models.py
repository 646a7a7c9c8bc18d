"""`golfgpt inspect`, `budget`, `export` and `import`: show, measure and convert artifacts."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from tyro.conf import Positional

from golfgpt.cli.common import RUNS, Config, check_tokenizer, print_json, run_name, stored_config
from golfgpt.config import QuantConfig, RunConfig, differences, to_dict
from golfgpt.errors import BudgetError, InputError
from golfgpt.runs import flatten

if TYPE_CHECKING:
    from torch import Tensor

    from golfgpt.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what an artifact holds, from its header; no code in the file is executed."""

    artifact: Positional[Path]
    """Run folder or .golf file."""
    json: bool = False
    """Print the header as JSON."""


def inspect(args: Inspect) -> int:
    from golfgpt.files import sha256_file
    from golfgpt.model.plan import layer_plan
    from golfgpt.quant import artifact
    from golfgpt.runs import artifact_file
    from golfgpt.tables import table, tensor_table

    file = artifact_file(args.artifact)
    info = artifact.inspect(file)
    facts = {
        "file": str(file),
        "bytes": info.file_bytes,
        "sha256": sha256_file(file),
        "parameters": info.parameters,
        "payload_bytes": info.payload_bytes,
        "compressor": info.compressor,
        "streams": len(info.streams),
        "tokenizer_sha256": info.tokenizer_sha256,
        "seq_len": info.seq_len,
        **flatten(to_dict(info.model), "model."),
    }
    plan = layer_plan(info.model)
    if args.json:
        tensors = [report._asdict() for report in info.table()]
        print_json(facts | {"tensors": tensors, "plan": [asdict(layer) for layer in plan]})
    else:
        print(table(("artifact", ""), [(key, f"{v:,}" if type(v) is int else str(v)) for key, v in facts.items()]))
        print("\n" + tensor_table(info.table()))
        print("\n" + table(("layer", "does"), [(i, str(layer)) for i, layer in enumerate(plan)]))
    return 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Compare the bytes of a configuration (before training) or of an artifact with the budget."""

    run: Positional[Path | None] = None
    """Run folder or .golf file to measure, as first argument; without it, the configuration is measured."""
    config: Config
    recipe: str = "baseline"
    """Configuration to start from."""
    json: bool = False
    """Print the sizes as JSON."""


def budget(args: Budget) -> int:
    from golfgpt.model.parameters import parameter_shapes
    from golfgpt.quant.budget import LEAST_FORECAST, fitted, forecast_bytes
    from golfgpt.quant.quantizer import Quantizer
    from golfgpt.submit.size import counted
    from golfgpt.tables import tensor_table

    config = args.config
    if args.run:
        return _budget_of_artifact(args.run, args.json, config)
    measured = config.budget.code_bytes is None
    config = fitted(counted(config))
    quantizer = Quantizer(config.model, config.quant)
    shapes = parameter_shapes(config.model).values()
    parameters = sum(map(math.prod, shapes))
    room = config.budget.artifact_bytes - config.budget.code_bytes
    forecast = forecast_bytes(quantizer)
    if quantizer.payload_bytes <= room:
        verdict = "fits, whatever the values of the weights"
    elif forecast > room:
        verdict = "does not fit, by the forecast"
    elif forecast / LEAST_FORECAST > room:
        verdict = "fits by the forecast, but with less room than some published files took beyond theirs"
    else:
        verdict = "fits, by the forecast"
    if args.json:
        sizes = {"payload_bytes": quantizer.payload_bytes, "forecast_bytes": forecast, "model_bytes_limit": room}
        print_json({"parameters": parameters, "mlp_hidden": config.model.mlp_hidden, **sizes, "verdict": verdict})
        return BudgetError.exit_code * (forecast > room)
    print(f"recipe {args.recipe}, at most {config.budget.artifact_bytes:,} bytes (--budget.artifact-bytes)\n")
    print(tensor_table(quantizer.table()))
    if config.budget.fit == "mlp_hidden":
        reserve = config.budget.reserve_bytes
        print(f"\nmodel.mlp_hidden {config.model.mlp_hidden} is the largest that leaves {reserve:,} bytes free")
    print(
        f"\n{parameters:,} parameters, payload {quantizer.payload_bytes:,} bytes before compression\n"
        f"room for model.golf: {room:,} bytes = {config.budget.artifact_bytes:,} - code "
        f"{config.budget.code_bytes:,}{', the program with this configuration in it' * measured}"
    )
    print(
        f"forecast for Gaussian weights: {forecast:,} bytes, {forecast / quantizer.payload_bytes:.3f} of the payload; "
        f"published files were between 2 % smaller and 4 % larger than their forecasts\n{verdict}"
    )
    if forecast > room:
        raise BudgetError(
            f"{forecast - room:,} bytes more than the limit leaves for model.golf: take a smaller model, fewer bits "
            "(--quant.bits), or the width that fits (--budget.fit mlp_hidden)"
        )
    return 0


def _budget_of_artifact(path: Path, as_json: bool, config: RunConfig) -> int:
    """Print the exact bytes of a file. Raises BudgetError if they are over the cap."""
    from golfgpt.quant import artifact
    from golfgpt.quant.budget import budget_report, check_budget
    from golfgpt.runs import artifact_file
    from golfgpt.tables import budget_lines, tensor_table

    started = stored_config(path) if path.is_dir() else RunConfig()
    if changed := [d for d in differences(started, config) if not d.startswith("budget.")]:
        raise InputError(
            f"golfgpt budget {path} measures a file, so only budget.* may change; got {'; '.join(changed)}: drop the "
            "change, or use --recipe in place of the file"
        )
    info = artifact.inspect(artifact_file(path))
    if as_json:
        print_json(asdict(budget_report(info.file_bytes, config.budget)))
    else:
        print(tensor_table(info.table()))
        print("\n" + budget_lines(info, config.budget))
    check_budget(info.file_bytes, config.budget)
    return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's weights as safetensors, for transformers or with another quantization. safetensors: float32 under
    the published parameter names. hf: a folder for transformers with config, code, weights, tokenizer and model card.
    golf: the format of model.golf, with quant.* of the run unless an option overrides it; --quant.rules replaces all
    rules of the run."""

    run: Positional[Path]
    """Run folder or .golf file."""
    quant: QuantConfig
    to: Literal["safetensors", "hf", "golf"] = "safetensors"
    """Format to write."""
    source: Literal["artifact", "checkpoint"] | None = None
    """artifact: the weights decoded from model.golf; checkpoint: the trained weights, not quantized, also of a run that
    has not ended. Default: artifact for safetensors, checkpoint for golf; hf is always the artifact."""
    out: Path | None = None
    """File to write; None: export.golf in the run folder, or the name of the artifact with .safetensors. Folder to
    write for hf; None: hf beside the artifact."""
    license: str = "mit"
    """What the model card of --to hf names as the license of weights and code; the code's is MIT."""
    data: Path | None = None
    """Folder with the training data, for --quant.method gptq; None: the run's."""
    overwrite: bool = False
    """Replace an earlier export."""
    json: bool = False
    """Print file and sizes as JSON."""


def export(args: Export) -> int:
    import safetensors.torch

    from golfgpt.files import write_bytes
    from golfgpt.published.names import to_published
    from golfgpt.quant import artifact
    from golfgpt.quant.quantizer import Quantizer
    from golfgpt.runs import artifact_file
    from golfgpt.tables import tensor_table

    folder = args.run.parent if args.run.is_file() else args.run
    whole = not args.run.is_file() or (args.run.name == "model.golf" and (folder / "config.json").exists())
    source = args.source or ("checkpoint" if args.to == "golf" and whole else "artifact")
    file = args.run if args.run.is_file() else folder / "model.golf"
    file = file if source == "checkpoint" else artifact_file(args.run)
    started = stored_config(args.run).quant if (folder / "config.json").exists() else args.quant
    if args.to != "golf" and (changed := differences(started, args.quant, "quant.")):
        raise InputError(
            f"{changed[0]} has no effect on --to {args.to}, which writes float32 weights; drop it, or quantize with "
            "--to golf"
        )
    if trained := [d for d in differences(started, args.quant, "quant.") if d.startswith("quant.qat")]:
        raise InputError(
            f"{trained[0]} has no effect on export, because fake quantization is part of training; drop it"
        )
    if args.to == "hf":
        return _export_hf(args, file)
    out = args.out or (folder / "export.golf" if args.to == "golf" else file.with_suffix(".safetensors"))
    suffix, place = ".golf" if args.to == "golf" else ".safetensors", out.resolve().parent
    if out.suffix != suffix:
        raise InputError(f"--out {out} must end in {suffix} for --to {args.to}")
    if out.resolve() == file.resolve() or (out.name == "model.golf" and (place / "config.json").exists()):
        raise InputError(f"--out {out} is the exported file itself or the artifact of a run; choose another --out")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out} already exists; choose another --out, or replace it with --overwrite")
    if not place.is_dir():
        raise InputError(f"--out {out}: there is no folder {place}; create it, or choose another --out")
    if place.name == "checkpoints" and (place.parent / "config.json").exists():
        raise InputError(f"--out {out} is in the checkpoints folder of a run; choose another folder")
    found = _trained(folder, file) if source == "checkpoint" else _decoded(file)
    for note in found.notes:
        print(f"warning: {note}", file=sys.stderr)
    state, model, digest = found.state, found.model, found.tokenizer_sha256
    if args.to == "golf":
        hessians = _hessians(args, found) if args.quant.method == "gptq" else None
        print(f"compressing ({args.quant.compressor})", file=sys.stderr)
        encoded = Quantizer(model, args.quant).encode(state, hessians)
        options = {"model": model, "quant": args.quant, "tokenizer_sha256": digest, "seq_len": found.seq_len}
        written = artifact.write(out, encoded, **options)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in to_published(state).items()}
        meta = {"config": json.dumps(to_dict(model)), "tokenizer_sha256": digest}
        write_bytes(out, safetensors.torch.save(tensors, meta))
    size = out.stat().st_size
    if args.json:
        facts = {"file": str(out), "source": source, "tensors": len(to_published(state)), "bytes": size}
        print_json(facts | {"step": found.step, "finished": found.finished})
    elif args.to == "golf":
        print(tensor_table(written.table()))
        print(f"\n{out}: {size:,} bytes, {written.packing}, from {found.label}")
        here = out.resolve().parent == folder.resolve()
        print(
            f"next: golfgpt eval {shlex.quote(str(out))}"
            if here
            else f"to score it with golfgpt eval, move it into the run folder {folder}"
        )
    else:
        print(f"{out}: {len(tensors)} float32 tensors, {size:,} bytes, from {found.label}")
    return 0


class _Weights(NamedTuple):
    """What is exported."""

    state: dict[str, Tensor]
    model: ModelConfig
    tokenizer_sha256: str
    seq_len: int
    label: str
    notes: Sequence[str] = ()
    step: int | None = None
    """Of the checkpoint."""
    finished: bool = True


def _decoded(file: Path) -> _Weights:
    """The weights that an artifact decodes to."""
    from golfgpt.quant import artifact

    loaded = artifact.read(file)
    info = loaded.info
    return _Weights(loaded.state, info.model, info.tokenizer_sha256, info.seq_len, "the artifact's weights")


def _trained(folder: Path, file: Path) -> _Weights:
    """The weights of a run's newest checkpoint. What an artifact says about them comes from `file` if it exists."""
    from golfgpt.data.tokenizer import Tokenizer
    from golfgpt.quant import artifact
    from golfgpt.runs import read_config
    from golfgpt.train.run_folder import newest_weights

    config = read_config(folder)
    saved, notes = newest_weights(folder)
    if file.is_file():
        info = artifact.inspect(file)
        facts = info.model, info.tokenizer_sha256, info.seq_len
    else:
        facts = config.model, Tokenizer.from_file(folder / "tokenizer.model").digest, config.data.seq_len
    label = "the checkpoint's weights" + f" after step {saved.step}: training has not ended" * (not saved.finished)
    return _Weights(saved.model, *facts, label, notes, saved.step, saved.finished)


def _export_hf(args: Export, file: Path) -> int:
    from golfgpt.files import sha256_file
    from golfgpt.hf.export import model_card, write_folder
    from golfgpt.quant import artifact
    from golfgpt.runs import read_run
    from golfgpt.train.run_folder import load

    if args.source == "checkpoint":
        raise InputError(
            "--source checkpoint has no effect on --to hf, which writes the weights of the artifact; drop it"
        )
    out, digest, window = args.out or file.parent / "hf", sha256_file(file), artifact.inspect(file).seq_len
    model, tokenizer = load(file)
    result = read_run(file.parent).result if (file.parent / "config.json").exists() else None
    scored = result if result and result["artifact_sha256"] == digest else None
    card = model_card(model, window=window, artifact_sha256=digest, result=scored, license=args.license)
    sizes = write_folder(out, model, tokenizer, window=window, card=card, overwrite=args.overwrite)
    if args.json:
        print_json({"folder": str(out), "artifact_sha256": digest, "scored": scored is not None, "files": sizes})
    else:
        for name, size in sizes.items():
            print(f"{size:>12,}  {out / name}")
        print(
            f'next: AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True), or\n'
            f"      lm_eval --model hf --model_args pretrained={shlex.quote(str(out))},trust_remote_code=True,"
            "add_bos_token=False --tasks TASK"
        )
    return 0


def _hessians(args: Export, weights: _Weights) -> dict[str, Tensor]:
    """GPTQ's Hessians of the training data, for unquantized weights."""
    from golfgpt import distributed, vector_math
    from golfgpt.model.gpt import GPT
    from golfgpt.quant import calibration
    from golfgpt.score.evaluate import model_dataset
    from golfgpt.train.compute_dtype import select_dtype
    from golfgpt.train.reporter import Reporter

    config = replace(stored_config(args.run), quant=args.quant, model=weights.model)
    if args.data:
        config = replace(config, data=replace(config.data, path=str(args.data)))
    check_tokenizer(args.run, weights.tokenizer_sha256, config.data.path)
    vector_math.resolve()
    ranks, reporter = distributed.start(config.runtime.device), Reporter(None, quiet=True)
    try:
        dataset, gpt = model_dataset(config), GPT(weights.model)
        dataset.check_token_ids(config.model.vocab_size, "train")
        gpt.load_state_dict(weights.state)
        gpt = gpt.to(ranks.device)
        dtype = select_dtype(config.runtime.dtype, gpt, config.data, ranks).dtype
        return calibration.calibrate(config, gpt, dataset, ranks, dtype, reporter.status)
    finally:
        reporter.close()
        ranks.close()


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run from a published final_model.pt or .ptz file, to score, sample and export it. Sizes come from the
    file, and codes are kept unchanged. What the
    tensors do not show (for example the rotary reference length) comes from the recipe."""

    file: Positional[Path]
    """File in a format of the published scripts: torch.save, uncompressed or in zlib, zstd, xz or brotli, or in streams
    per group unless these are lrzip's."""
    tokenizer: Path
    """SentencePiece .model that the file was trained with."""
    config: Config
    recipe: str = "baseline"
    """Recipe that the file was trained with; `golfgpt recipes` lists them."""
    name: str | None = None
    """The run folder is runs/NAME; None: the file's name and the time."""
    json: bool = False
    """Print the facts about the imported model as JSON."""


def import_file(args: Import) -> int:
    from golfgpt.data.tokenizer import Tokenizer
    from golfgpt.importer import import_model
    from golfgpt.published.files import read_export
    from golfgpt.published.names import assumed_fields, listed
    from golfgpt.tables import tensor_table

    if args.file.is_dir():
        raise InputError(f"{args.file} is a folder; expected a file of a published script in it: .pt or .ptz")
    export = read_export(args.file)
    path = RUNS / run_name(args.name, args.file.name.split(".")[0])
    info = import_model(export, Tokenizer.from_file(args.tokenizer), args.config, path)
    assumed = {name: (attrgetter(name)(info.model), known) for name, known in assumed_fields(info.model).items()}
    if args.json:
        facts = {"run": str(path), "format": export.format, "compressor": export.compressor, "bytes": info.file_bytes}
        facts |= {"parameters": info.parameters, "model": to_dict(info.model), "decoded": list(export.decoded)}
        print_json(facts | {"assumed": list(assumed)})
        return 0
    print(tensor_table(info.table()))
    print(
        f"\n{args.file}: {export.format}, {export.compressor or 'not compressed'}, {args.file.stat().st_size:,} bytes; "
        f"{info.parameters:,} parameters\n{path}/model.golf: {info.packing}, "
        f"{info.file_bytes:,} bytes" + ("" if export.quantized else f", rounded here ({args.config.quant.bits} bits)")
    )
    if export.decoded:
        print(f"stored as float32, because model.golf has no place for their factors: {listed(export.decoded)}")
    if args.config.quant.method == "gptq" and not export.quantized:
        print(f"for GPTQ: golfgpt export {shlex.quote(str(path))} --to golf --data DIR")
    for name, (value, known) in assumed.items():
        print(f"assumed, because the tensors do not show it: model.{name} {value} ({known})")
    print(f"next: golfgpt eval {shlex.quote(str(path))} --data.path DIR")
    return 0
