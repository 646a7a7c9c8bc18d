"""The arguments of every command, as frozen dataclasses that tyro parses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from golfgpt.config import EvalConfig, QuantConfig, RunConfig

Config = Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, write model.golf, score it as reloaded from disk. Run under torchrun for several GPUs."""

    config: Config
    recipe: str | None = None
    """Configuration that a new run starts from; `golfgpt recipes` lists them."""
    name: str | None = None
    """The run folder is runs/NAME; default: the recipe's name and the time."""
    resume: Path | None = None
    """Continue the run in this folder from its newest checkpoint, under the config it was started with."""
    json: bool = False
    """Print the result as JSON on standard output, the log on standard error."""


@dataclass(frozen=True, kw_only=True)
class DataPath:
    """Text to score."""

    path: str | None = None
    """Prepared folder; it must have the run's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EvalRuntime:
    """Where to score; the fields of the run's runtime that scoring reads."""

    device: Literal["auto", "cpu", "cuda"]
    """auto: cuda where available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"]
    """Dtype of activations and matmuls."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"]
    """Backend of scaled_dot_product_attention; auto: on a GPU the fastest of those that agree with math."""
    compile: Literal["auto", "on", "off"]
    """torch.compile of the forward; auto: on cuda only."""
    threads: int
    """CPU threads for torch; 0: torch's default."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a run's model.golf on validation text; starts from the run's own config."""

    run: Positional[Path]
    """Run folder, or another .golf file in one."""
    data: DataPath
    eval: EvalConfig
    runtime: EvalRuntime
    json: bool = False
    """Print the score as JSON."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generate text from a run's model.golf."""

    run: Positional[Path]
    """Run folder, or a .golf file with its tokenizer.model beside it."""
    prompt: str = ""
    """Text to continue; empty: a new document."""
    tokens: int = 200
    """Tokens to generate at most; generation also ends where the model ends its document."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = 50
    """Choose among this many likeliest tokens; None: all."""
    seed: int = 0
    """Seed of the choices."""
    json: bool = False
    """Print prompt and text as JSON."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes of a configuration before training, or of an artifact, against the budget."""

    run: Positional[Path | None] = None
    """Run folder or .golf file to measure, given first; without it, the configuration is measured."""
    config: Config
    recipe: str = "baseline"
    """Configuration to start from."""
    json: bool = False
    """Print the sizes as JSON."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What an artifact holds, read from its header; nothing in it is executed."""

    artifact: Positional[Path]
    """Run folder or .golf file."""
    json: bool = False
    """Print the header as JSON."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run of a published final_model.pt or .ptz file, to be scored, sampled and exported. Sizes come from the
    file, codes are kept as they are; what no tensor shows (rotary reference length, say) comes from the recipe."""

    file: Positional[Path]
    """File as the published scripts write it: torch.save, bare or in zlib, zstd or xz."""
    tokenizer: Path
    """The SentencePiece .model that its tokens are of."""
    config: Config
    recipe: str = "baseline"
    """Recipe that the file is of; `golfgpt recipes` lists them."""
    name: str | None = None
    """The run folder is runs/NAME; default: the file's name and the time."""
    json: bool = False
    """Print what was found as JSON."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's weights in another format: safetensors under upstream's parameter names, or model.golf's container
    under another quantization. It starts from the run's own quant.*, rules included: --quant.rules replaces them."""

    run: Positional[Path]
    """Run folder or .golf file."""
    quant: QuantConfig
    to: Literal["safetensors", "golf"] = "safetensors"
    """Format."""
    source: Literal["artifact", "checkpoint"] | None = None
    """artifact: the weights decoded from model.golf; checkpoint: the trained ones. Default: artifact for safetensors,
    checkpoint for golf."""
    out: Path | None = None
    """File to write; default: export.golf in the run folder, or .safetensors beside the artifact."""
    overwrite: bool = False
    """Write over an earlier export."""
    json: bool = False
    """Print file and sizes as JSON."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Prepare the embedded corpus, train a small model on it, score it, sample from it: about three minutes."""

    config: Config
    name: str | None = None
    """The run folder is runs/NAME; default: demo and the time."""
    data: Path = Path("data/demo")
    """Where the prepared corpus is kept."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Turn text into token shards with byte counts and a manifest."""

    inputs: Positional[tuple[str, ...]] = ()
    """Files (.txt, .jsonl, .jsonl.zst), folders of them, or globs; none: the Python standard library's source."""
    out: Path
    """Folder to write."""
    vocab_size: int | None = None
    """Tokens of the tokenizer to train; default 1024."""
    tokenizer: Path | None = None
    """Use this SentencePiece model instead of training one."""
    val: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Separate input for validation; give the flag once for each."""
    val_fraction: float | None = None
    """Share of the documents that goes to validation when --val is not given."""
    document_separator: str | None = None
    """Text between documents in .txt files; default: blank lines, packed to at least 2 kB a document."""
    workers: int | None = None
    """Processes; default: one a core."""
    overwrite: bool = False
    """Replace a folder that was prepared before."""
    json: bool = False
    """Print the manifest as JSON."""


@dataclass(frozen=True, kw_only=True)
class DataDownload:
    """Fetch upstream's published token shards, or continue and check what was fetched before."""

    out: Path | None = None
    """Folder to write; default: data/fineweb10B_VARIANT."""
    variant: str = "sp1024"
    """Tokenizer family: sp and its number of tokens."""
    train_shards: int = 80
    """Train shards to fetch, of 100 million tokens and 200 MB each; validation is always fetched whole."""
    revision: str | None = None
    """Commit, branch or tag of the dataset; default: the folder's own commit, in a new folder a pinned one."""
    workers: int = 4
    """Files fetched at a time."""
    json: bool = False
    """Print the report as JSON."""


@dataclass(frozen=True, kw_only=True)
class DataVerify:
    """Check digests, token ids, split overlap, and the byte counts against a second count of the decoded text."""

    path: Positional[Path]
    """Prepared folder."""
    json: bool = False
    """Print the report as JSON."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes, or show one with its whole configuration."""

    action: Positional[Literal["list", "show"]] = "list"
    name: Positional[str | None] = None
    """Recipe to show."""
    json: bool = False
    """Print as JSON."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine in a minute: GPUs, links, disk, versions, kernels, speed. Below the table stands what is wrong
    and what to do; exits with 3 where a run could not work."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As runtime.device of a run: cuda says that a GPU must be there."""
    processes: int | None = None
    """Local processes of the all-reduce check, on GPUs where there are as many, else on the CPU; default: one a GPU."""
    tune: bool = False
    """Check and time the kernels too, 50 seconds more: what impl="auto" reads on this machine."""
    json: bool = False
    """Print the rows as JSON."""
