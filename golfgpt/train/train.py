"""A training run from set-up to score: set up, warm up, train, export `model.golf`, reload it, score it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from golfgpt import distributed, vector_math
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, InputError, VerificationError, interruption
from golfgpt.files import sha256_file, write_json
from golfgpt.quant import artifact
from golfgpt.quant.budget import budget_report, check_budget, fitted
from golfgpt.quant.calibration import check_tokens, seconds_needed
from golfgpt.quant.codecs import require_compressor
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import read_stored_result, resume_hint, write_config
from golfgpt.score.compressors import compressors_bpb
from golfgpt.score.evaluate import Score, open_dataset, scored_shape
from golfgpt.score.sums import PartialSums
from golfgpt.score.ttt.evaluate import check_adapted, learned_shapes
from golfgpt.tables import adapted_lines, plural, score_lines, table
from golfgpt.train import compile_cache
from golfgpt.train.attention_backend import Selection, Shape, select_backend
from golfgpt.train.clock import Ledger
from golfgpt.train.execution import FIELDS, SLOW_STEP, available, select_execution
from golfgpt.train.export import Exporter
from golfgpt.train.forecast import forecast
from golfgpt.train.kernels import choose_kernels
from golfgpt.train.loop import Loop
from golfgpt.train.memory import memory_advice
from golfgpt.train.progress import Progress, announce, announce_time
from golfgpt.train.reporter import Reporter
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.saver import Saver, newest
from golfgpt.train.score import ModelScorer
from golfgpt.train.signals import Signals
from golfgpt.train.step import TrainStep
from golfgpt.train.trackers import require_tracker


def train(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    count: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> dict:
    """Train, export to `path`/model.golf and score the reloaded file. Returns the content of result.json.

    For several ranks, run under torchrun; ranks other than 0 return {}. With `resume`, the run continues from the
    newest intact checkpoint in `path`. `count` measures budget.code_bytes if it is None
    (`golfgpt.submit.size.counted`); without it, code is not counted. Raises InputError for configurations and data that
    do not fit together, BusyError for a folder in use, NonFiniteError for a diverged run and for test-time training
    that diverged (its score up to there is in result.json), Interrupted after a signal (state saved),
    LostPeerError if another rank is gone, InputError also for files that cannot be written, and VerificationError for a
    score that fails its checks. Raises BudgetError if no width fits the budget, if the time is
    too short for one step, or, after scoring, if the artifact exceeds its budget (the artifact is kept).
    """
    ledger = Ledger()
    vector_math.resolve()
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(path))
        stack.enter_context(distributed.lost_peers(lambda: resume_hint(path)))
        ranks = distributed.start(config.runtime.device, config.runtime.peer_seconds)
        stack.callback(ranks.close)
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        reporter = Reporter(None, speak=ranks.is_main, quiet=quiet)
        stack.callback(reporter.close)
        reporter.status("opening the data, and counting the code that ships with the model")
        with ledger.phase("setup"):
            with ranks.raise_on_any():
                config, dataset = check(config, ranks, resume, count)
            missing, found = "", None
            if resume:
                runtime, missing = available(config.runtime, config.runtime, ranks.device)
                config = replace(config, runtime=runtime)
            with ranks.raise_on_any():
                stack.enter_context(choose_kernels(config, ranks))
                step = TrainStep(config, dataset, ranks)
            config = replace(config, runtime=replace(config.runtime, dtype=step.dtype_choice.name))
            with ranks.raise_on_any():
                if ranks.is_main:
                    tokenizer = dataset.need_tokenizer().model_bytes
                    reporter.folder = RunFolder.open(path) if resume else RunFolder.create(path, config, tokenizer)
                    found = newest(reporter.folder, config, dataset) if resume else None
        folder, begun = reporter.folder, not resume
        try:
            if missing:
                reporter.line(f"warning: {missing}")
            with ledger.phase("setup"):
                # Orthogonal initialization uses QR, which rounds differently on other CPUs.
                for p in step.model.parameters():
                    ranks.broadcast_(p.data)
                step.prepare(0)
                step.average.begin()
                attention = choose_attention(config, step)
                announce(config, dataset, step, attention, reporter)
            with ledger.phase("trials"), memory_advice(config, step.dtype.itemsize):
                trials = not resume and forecast_time(config, step, reporter)
                config = choose_execution(config, step, attention, reporter, trials)
                config = reserve_time(config, step, dataset, reporter)
                if folder and not resume:
                    write_config(path, config)
            saver = Saver(config, path, dataset, step, ledger, folder, reporter, signals)
            exporter = Exporter(config, dataset, step, folder, reporter)
            scorer = ModelScorer(config, dataset, step, ledger, reporter, signals)
            progress = Progress(config, dataset, reporter)
            with ledger.phase("setup"):
                reporter.track(config)
                done, finished = saver.restore(found) if resume else (0, False)
            begun = True
            if not finished:
                warm_up(config, step, ledger, reporter)
            loop = Loop(config, step, saver, progress, ledger, reporter, signals, scorer, exporter, done, finished)
            loop.run()
            return export_and_score(config, path, dataset, exporter, scorer, loop.done)
        except Exception as error:
            stopped = interruption(error)
            if isinstance(error, OSError) and not stopped:  # such as a full disk
                hint = resume_hint(path)
                stopped = InputError(f"{error}{'; what was saved is whole.' if hint else ''}{hint}")
            if folder and begun:  # a resume that is refused leaves the run as it is
                folder.metric("end", reason=str(stopped or error))
            if folder and not resume:
                folder.discard()
            if stopped and stopped is not error:
                raise stopped from error
            raise


def check(
    config: RunConfig, ranks: Ranks, resume: bool, count: Callable[[RunConfig], RunConfig]
) -> tuple[RunConfig, Dataset]:
    """Open the data, count the code, fit the MLP width, and check config and data against each other. Returns the final
    config and the data. Raises InputError, and BudgetError if no width fits the budget."""
    require_compressor(config.quant.compressor)
    require_tracker(config.runtime.tracker)
    dataset = open_dataset(config, ranks)
    if (tokens := dataset.train_tokens) <= config.data.seq_len:
        raise InputError(
            f"{config.data.path} has {tokens:,} tokens to train on, and a sequence takes {config.data.seq_len + 1:,} "
            "(--data.seq-len and the next token): prepare more text"
        )
    if config.quant.method == "gptq" and config.quant.calibration == "train":
        check_tokens(config.quant.calibration_tokens, dataset)
    if not resume:  # which keeps its width
        config = fitted(count(config))
    artifact.check_payload_bytes(Quantizer(config.model, config.quant).formats)
    return config, dataset


def choose_attention(config: RunConfig, step: TrainStep) -> Selection:
    """Select the attention backend of this process, for training and scoring."""
    data = config.data
    longest = min(data.seq_len, data.row_tokens) if data.order == "packed" else 0
    shapes = [Shape(data.microbatch // data.row_tokens, data.row_tokens, longest)]
    shapes += [Shape(1, config.window), *learned_shapes(config, step.ranks)]
    shapes += [Shape(*scored_shape(config, step.ranks))] if config.eval.rule == "varlen" else []
    return select_backend(config.runtime.attention, config.model, shapes, step.ranks, step.dtype)


def forecast_time(config: RunConfig, step: TrainStep, reporter: Reporter) -> bool:
    """Forecast the time of training, on a CPU. Returns whether whole steps are quick enough to try alternatives on."""
    if step.cuda:
        return True
    reporter.status("timing parts of a training step")
    expected = forecast(step)
    announce_time(config, expected, reporter)
    return expected.seconds <= SLOW_STEP


def choose_execution(
    config: RunConfig, step: TrainStep, attention: Selection, reporter: Reporter, trials: bool
) -> RunConfig:
    """Choose what runtime leaves to "auto", by `trials` or not, and return the config with it, as it is stored."""
    compile_cache.load(compile_cache.cache_file(config, step.dtype, step.ranks.device))
    found = select_execution(step, attention, reporter.status, trials=trials)
    runtime = found.runtime
    shown = replace(runtime, threads=torch.get_num_threads())
    chosen = " ".join(f"{name}:{getattr(shown, name)}" for name in FIELDS)
    reporter.log(f"execution:{chosen}{' (trials of an earlier run)' if found.kept else ''}")
    for trial in found.trials:
        reporter.log(f"  {trial}")
    threads = plural(shown.threads, "CPU thread")
    compiled = ", compiled" if step.compiled else ""
    reporter.show(f"on {step.ranks.device} in {step.dtype_choice}, {threads}{compiled}")
    return replace(config, runtime=runtime)


def reserve_time(config: RunConfig, step: TrainStep, dataset: Dataset, reporter: Reporter) -> RunConfig:
    """`config` with the time that calibration needs, if it is inside the budget and no number is given."""
    schedule = config.schedule
    if config.quant.method != "gptq" or schedule.max_seconds is None or schedule.reserve_seconds is not None:
        return config
    reporter.status("timing a small calibration")
    seconds = round(seconds_needed(config, step.model, dataset, step.ranks, step.dtype), 3)
    if seconds >= schedule.max_seconds:
        raise BudgetError(
            f"calibration would take about {seconds:.1f} s of schedule.max_seconds {schedule.max_seconds:g}; lower "
            "quant.calibration_tokens"
        )
    reporter.line(f"reserve:{seconds:.1f}s for calibration on {config.quant.calibration_tokens:,} tokens, from a trial")
    config = replace(config, schedule=replace(schedule, reserve_seconds=seconds))
    step.reschedule(config.schedule)
    return config


def warm_up(config: RunConfig, step: TrainStep, ledger: Ledger, reporter: Reporter) -> None:
    """Compile the step before the clock starts. Raises VerificationError if it then overwrites a weight."""
    if not (step.compiled and config.runtime.warmup_steps):
        return
    with ledger.phase("compile"), memory_advice(config, step.dtype.itemsize):
        file = compile_cache.cache_file(config, step.dtype, step.ranks.device)
        cache = "loaded" if file.exists() else "new"
        step.warm_up(config.runtime.warmup_steps, reporter.status)
        with step.undone():
            if name := next(filter(None, map(step.overwritten, step.ways())), None):
                raise VerificationError(
                    f"the step that torch {torch.__version__} compiled overwrites {name}, which it only reads, so it "
                    "would train another model: use --runtime.compile off"
                )
        if step.ranks.is_main:
            compile_cache.save(file)
    reporter.log(f"compile_time:{ledger.seconds['compile']:.1f}s graphs:{compile_cache.graphs()} cache:{cache} {file}")


def keep_replaced(folder: RunFolder, score: Score, config: RunConfig, say: Callable[[str], None]) -> None:
    """Before `score` replaces another one in result.json: list that one with those of golfgpt eval."""
    result = read_stored_result(folder.path)
    old = result and result["score"]
    if not old or all(old.get(name) == getattr(score, name) for name in ("label", "window", "stride", "nats")):
        return
    facts = {"artifact": folder.artifact.name, "data": config.data.path, "dataset": result.get("dataset")}
    folder.metric("eval", **facts, **old, adapted=result.get("adapted"))
    if score.partial and not old.get("partial"):
        say(
            f"warning: {score.label} replaces the score of the whole text in result.json (runs show lists both); "
            "golfgpt eval scores a part and replaces nothing"
        )


def export_and_score(
    config: RunConfig, path: Path, dataset: Dataset, exporter: Exporter, scorer: ModelScorer, steps: int
) -> dict:
    """Export, reload, score, report. The artifact is on disk before scoring starts, and the score before those of
    the reference compressors are computed."""
    ranks, ledger, reporter = exporter.step.ranks, scorer.ledger, exporter.reporter
    say, log = reporter.line, reporter.log
    hessians = None
    if config.quant.method == "gptq":
        with ledger.phase("export"):
            exporter.write_rounded()
        with ledger.phase("calibrate"):
            hessians = exporter.calibrate()
        used, most = ledger.seconds["train"] + ledger.seconds["calibrate"], config.schedule.max_seconds
        if most is not None and used > most:
            say(
                f"warning: training and calibration took {used:.1f} s, more than schedule.max_seconds {most:g}: "
                f"calibration took {ledger.seconds['calibrate']:.1f} s, and schedule.reserve_seconds leaves "
                f"{config.schedule.reserve_seconds or 0.0:g}"
            )
    with ledger.phase("export"):
        info = exporter.export(steps, hessians)
    with ledger.phase("eval"):
        digest = ranks.broadcast_object(sha256_file(path / "model.golf") if ranks.is_main else None)
        keep = PartialSums(path, ranks.rank, digest, say)
        score = scorer.score("scoring model.golf", config.eval, keep)
    if not ranks.is_main:
        with ledger.phase("eval"):
            scorer.adapted("adapting to the text")
        return {}
    keep_replaced(exporter.folder, score, config, say)
    stage = f"final_{exporter.quantizer.label.replace('/', '_')}_{info.compressor.replace('/', '_')}_roundtrip"
    ms = score.seconds * 1000
    again = config.quant.method == "gptq" and config.quant.qat != "off"
    log(f"{stage} val_loss:{score.val_loss:.4f} {score.key}:{score.val_bpb:.4f} eval_time:{ms:.0f}ms")
    log(f"{stage}_exact val_loss:{score.val_loss:.8f} {score.key}:{score.val_bpb:.8f}")
    budget = budget_report(info.file_bytes, config.budget)
    result = {
        "score": asdict(score),
        "artifact_bytes": info.file_bytes,
        "code_bytes": budget.code_bytes,
        "total_bytes": budget.total_bytes,
        "margin_bytes": budget.margin_bytes,
        "compressor": info.compressor,
        "quantized_again": again,
        "parameters": info.parameters,
        "steps": steps,
        "seconds": {name: round(seconds, 3) for name, seconds, _ in ledger.report()},
        "dataset": dataset.digest,
        "artifact_sha256": digest,
        "compressors_bpb": None,
        "adapted": None,
    }
    write_json(path / "result.json", result)
    with ledger.phase("eval"):
        adapted = scorer.adapted("adapting to the text")
    result["adapted"] = adapted and asdict(adapted)
    result["seconds"]["eval"] = round(ledger.seconds["eval"], 3)
    write_json(path / "result.json", result)
    reporter.status("compressing the text with gzip, xz and zstd for comparison")
    result["compressors_bpb"] = None if score.partial else compressors_bpb(dataset)
    write_json(path / "result.json", result)
    reporter.metric("result", **result)
    phases = [(name, round(used, 2), "yes" if counted else "no") for name, used, counted in ledger.report()]
    log(table(("phase", "seconds", "in the budget"), phases))
    reporter.show(", ".join(f"{name} {used:,.1f} s" for name, used, _ in phases if used >= 0.05))
    if again:
        say("quantized again after QAT: the weights that were trained are not those that were scored")
    say(str(budget))
    say(score_lines(score, result["compressors_bpb"]))
    if adapted:
        say(adapted_lines(score, adapted))
    check_budget(info.file_bytes, config.budget)
    check_adapted(adapted)
    return result
