"""Which published effects appear at a scale that a CPU trains: experiments, their runs, and docs/experiments.md.

    python -m bench.experiments --data DIR --out DIR [--only NAME ...] [--processes 2] [--seconds N]
    python -m bench.experiments --out DIR --report [--document FILE]

The experiments are those of bench/experiment_table.py. Configs that train the same weights share a training: from it
come all averages, exports and evaluations that were asked for. Each config and seed gives one line in
OUT/experiments-cpu.jsonl, under a hash of the config; what is there is not run again. --seconds starts no training
after that time. bench/experiment_report.py makes the report, from the lines alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import golfgpt_kernels
import torch
from golfgpt_kernels._dispatch import dtype_name

import golfgpt
from bench.experiment_report import report
from bench.experiment_table import BASE, EXPERIMENTS, RESULTS, SEEDS, Experiment, key, trained
from golfgpt.config import AverageConfig, RunConfig, differences
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError
from golfgpt.files import write_bytes
from golfgpt.model.gpt import GPT
from golfgpt.optim.averaging import Average
from golfgpt.quant import artifact
from golfgpt.score.evaluate import evaluate
from golfgpt.train.step import TrainStep


def jobs(experiments: Sequence[Experiment]) -> list[list[RunConfig]]:
    """Configs to score, those of one training together. In the experiments' order, third seeds last: two already tell
    the noise."""
    wanted: dict[str, dict[str, RunConfig]] = {}
    for seeds, experiment in product((SEEDS[:2], SEEDS[2:]), experiments):
        for seed, config in product(seeds, experiment.configs.values()):
            if SEEDS.index(seed) < experiment.seeds:
                config = replace(config, seed=seed)
                wanted.setdefault(key(trained(config)), {})[key(config)] = config
    return [list(configs.values()) for configs in wanted.values()]


def run_job(configs: list[RunConfig], data: str) -> list[dict]:
    """Train once, then average, export and score as each of `configs` says; one line of results for each."""
    torch.set_num_threads(1)
    dataset, ranks = Dataset.open(Path(data)), Ranks(0, 1, torch.device("cpu"))
    first, begun = configs[0], time.process_time()
    trainer = TrainStep(replace(trained(first), runtime=first.runtime), dataset, ranks)
    parameters = dict(trainer.model.named_parameters())
    averages = {config.average: Average(parameters, config.average) for config in configs}
    failed = None
    try:
        for step in range(first.schedule.max_steps):
            pending = trainer.launch(step)
            multiplier = trainer.update(pending)
            trainer.wait(pending)
            for average in averages.values():
                average.update(step + 1, multiplier)
        trainer.check_finite()
    except NonFiniteError as error:
        failed = {"error": str(error)}
    facts = {
        "training": key(trained(first)),
        "train_cpu_seconds": round(time.process_time() - begun, 1),
        "parameters": trainer.model.num_parameters(),
        "dtype": dtype_name(trainer.dtype),
        "dataset": dataset.digest,
        **environment(),
    }

    def score(config: RunConfig, state: dict[str, torch.Tensor]) -> float:
        model = GPT(config.model)
        model.load_state_dict(state)
        return evaluate(model, dataset, config, ranks, dtype=trainer.dtype).val_bpb

    @cache
    def before(average: AverageConfig) -> float:
        return score(replace(first, eval=BASE.eval), weights(average))

    def weights(average: AverageConfig) -> dict[str, torch.Tensor]:
        return trainer.model.state_dict() | averages[average].weights()

    def export(config: RunConfig) -> dict[str, Any]:
        stored = {"tokenizer_sha256": dataset.need_tokenizer().digest, "seq_len": config.data.seq_len}
        blob = artifact.pack(weights(config.average), model=config.model, quant=config.quant, **stored)
        return {
            "before": before(config.average) if config.eval == BASE.eval else None,
            "bpb": score(config, artifact.unpack(blob).state),
            "bytes": len(blob),
            "averaged": averages[config.average].count,
        }

    return [
        {"key": key(config), "seed": config.seed, "config": differences(BASE, config), **facts}
        | (failed or export(config))
        for config in configs
    ]


def environment() -> dict[str, Any]:
    """Of a line: machine, versions, the sources' digest, date."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = [Path(module.__file__).parent for module in (golfgpt, golfgpt_kernels)]
    sources = [file.read_bytes() for package in packages for file in sorted(package.rglob("*.py"))]
    return {
        "machine": f"{names[0]}, {os.cpu_count()} cores",
        "golfgpt": golfgpt.__version__,
        "sources": hashlib.sha256(b"".join(sources)).hexdigest()[:12],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def read_rows(file: Path) -> dict[str, dict]:
    """Lines by key; a last line that was torn by a kill is cut off."""
    data = file.read_bytes() if file.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_bytes(file, whole)
    return {row["key"]: row for row in map(json.loads, whole.splitlines())}


def run(experiments: Sequence[Experiment], data: Path, file: Path, processes: int, seconds: float) -> None:
    """Run what `file` does not hold yet of `experiments`."""
    work_off(jobs(experiments), run_job, data, file, processes, seconds)


def work_off(
    wanted: Sequence[list[RunConfig]],
    job: Callable[[list[RunConfig], str], list[dict]],
    data: Path,
    file: Path,
    processes: int,
    seconds: float,
) -> None:
    """Add to `file` the lines of the configs that it lacks: what `job` returns for the configs of each training, in
    their order. Each training is a job of one thread in one of `processes` processes."""
    begun, done = time.monotonic(), read_rows(file)
    digest = Dataset.open(data).digest
    if others := {row["dataset"] for row in done.values()} - {digest}:
        raise SystemExit(f"{file} holds results on other data ({', '.join(others)}); take another --out")
    open_jobs = [[config for config in configs if key(config) not in done] for configs in wanted]
    open_jobs = [configs for configs in open_jobs if configs]
    total, running = len(open_jobs), set()
    print(f"{total} trainings, {sum(map(len, open_jobs))} scores to go", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool, open(file, "ab", buffering=0) as out:
        while open_jobs or running:
            while open_jobs and len(running) < processes and time.monotonic() - begun < seconds:
                running.add(pool.submit(job, open_jobs.pop(0), str(data)))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                rows = future.result()
                out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                os.fsync(out.fileno())
            left = len(open_jobs) + len(running)
            print(f"{time.monotonic() - begun:.0f} s: {total - left} of {total} trainings", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="prepared folder, vocabulary 1024")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULTS}")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="write --document, run nothing")
    parser.add_argument("--document", type=Path, default=Path(__file__).parent.parent / "docs" / "experiments.md")
    args = parser.parse_args(argv)
    if args.report:
        return write_bytes(args.document, report(read_rows(args.out / RESULTS)).encode())
    if args.data is None:
        parser.error("--data names the prepared folder")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a job's process imports torch
    chosen = [experiment for experiment in EXPERIMENTS if experiment.name in args.only]
    run(chosen, args.data, args.out / RESULTS, args.processes, args.seconds)


if __name__ == "__main__":
    main()
