"""A training run from start to score: set up, warm up, train, export `model.golf`, reload it, score it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from golfgpt import artifact, distributed
from golfgpt.artifact import ArtifactInfo
from golfgpt.attention import select_backend
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.data.yardsticks import yardsticks
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, InputError, Interrupted
from golfgpt.evaluate import PartialSums, Score, evaluate, plan_windows
from golfgpt.files import sha256_file, write_json
from golfgpt.fit import fitted, memory_advice
from golfgpt.quant import Quantizer
from golfgpt.report import score_lines, table
from golfgpt.run import Reporter, RunFolder
from golfgpt.signals import Signals
from golfgpt.train import compile_cache
from golfgpt.train.clock import Ledger
from golfgpt.train.export import Exporter
from golfgpt.train.loop import Loop
from golfgpt.train.progress import Progress, announce
from golfgpt.train.saver import Saver
from golfgpt.train.step import TrainStep


def train(config: RunConfig, path: Path, *, resume: bool = False, quiet: bool = False) -> dict:
    """Train, export to `path`/model.golf, score the reloaded file; returns what result.json holds.

    Run under torchrun for several ranks; other ranks than the first return {}. With `resume` the newest
    whole checkpoint in `path` continues. Raises InputError for configurations and data that do not fit,
    NonFiniteError for a diverged run, Interrupted after a signal (state saved), BudgetError when the clock
    is too short for one step or, after scoring, when the artifact exceeds its budget (it is kept).
    """
    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(path))
        ranks = distributed.start(config.runtime.device)
        stack.callback(ranks.close)
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        with ledger.phase("setup"):
            config, dataset = on_all_ranks(ranks, lambda: checked(config, ranks, resume))
            config, step, folder = on_all_ranks(ranks, lambda: set_up(config, path, dataset, ranks, resume))
        if folder:
            stack.callback(folder.close)
        reporter = Reporter(folder, speak=ranks.main, quiet=quiet)
        stack.callback(reporter.close)
        saver = Saver(config, path, dataset, step, ledger, folder, reporter, signals)
        exporter = Exporter(config, dataset, step, folder, reporter)
        try:
            with ledger.phase("setup"):
                done, finished = saver.restore() if resume else (0, False)
                micro = config.data.microbatch
                shapes = [(micro // config.data.seq_len, config.data.seq_len), (1, config.window)]
                attention = select_backend(config.runtime.attention, config.model, shapes, ranks, step.dtype)
                announce(config, dataset, step, attention, reporter)
            if not finished:
                warm_up(config, step, attention.backend, ledger, reporter)
            progress = Progress(config, dataset, reporter)
            validate = validation(config, dataset, exporter, ledger, reporter)
            loop = Loop(config, step, saver, progress, ledger, reporter, signals, validate, done, finished)
            loop.run()
            return finish(config, dataset, exporter, path, loop.done, ledger, reporter)
        except Exception as error:
            if folder and not resume and not isinstance(error, Interrupted):
                folder.discard()
            raise
