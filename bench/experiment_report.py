"""docs/experiments.md, from the lines of results alone: differences paired by seed, their noise, verdicts, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from bench.experiment_table import BASE, EXPERIMENTS, RESULTS, SEEDS, Claim, Experiment, key, trained
from golfgpt.config import RunConfig


def values(rows: dict[str, dict], config: RunConfig, metric: str) -> dict[int, float]:
    """bpb, before, penalty or bytes of `config` by seed, of the seeds that were run and did not diverge."""
    if metric == "penalty":
        before = values(rows, config, "before")
        return {seed: bpb - before[seed] for seed, bpb in values(rows, config, "bpb").items() if seed in before}
    found = {seed: rows.get(key(replace(config, seed=seed)), {}).get(metric) for seed in SEEDS}
    return {seed: value for seed, value in found.items() if value is not None}


def paired(rows: dict[str, dict], a: RunConfig, b: RunConfig, metric: str) -> list[float]:
    """a minus b, for each seed that both have."""
    x, y = values(rows, a, metric), values(rows, b, metric)
    return [x[seed] - y[seed] for seed in x if seed in y]


def variances(rows: dict[str, dict], metric: str, shared: bool) -> list[float]:
    """Variance over seeds of each difference between a config and the first of its experiment that two seeds or more
    give. `shared`: of two exports or evaluations of one training, else of two trainings."""
    found = []
    for experiment in EXPERIMENTS:
        first, *others = experiment.configs.values()
        for config in others:
            sample = paired(rows, config, first, metric)
            if len(sample) > 1 and shared == (trained(config) == trained(first)):
                found.append(statistics.variance(sample))
    return found


def noise(rows: dict[str, dict], metric: str, shared: bool, sample: Sequence[float] = (0.0,)) -> float:
    """Standard deviation over seeds of the differences `sample`: their own, but no less than what half of all
    comparisons have; for one seed the root of the mean variance of all; nan without any."""
    found = variances(rows, metric, shared)
    if not found:
        return math.nan
    if len(sample) < 2:
        return math.sqrt(statistics.mean(found))
    return math.sqrt(max(statistics.variance(sample), statistics.median(found)))


def judged(rows: dict[str, dict], experiment: Experiment, claim: Claim) -> tuple[list[float], str]:
    """worse minus better by seed, and what follows: an effect counts beyond three standard errors of the mean."""
    better, worse = experiment.configs[claim.better], experiment.configs[claim.worse]
    found = paired(rows, worse, better, claim.metric)
    if not found:
        return found, "not run"
    sigma = noise(rows, claim.metric, trained(better) == trained(worse), found)
    mean, limit = statistics.mean(found), 3 * sigma / math.sqrt(len(found))
    if math.isnan(limit):
        return found, "not judged: no estimate of the noise"
    if abs(mean) <= limit:
        return found, "not resolvable at this scale"
    words = ("appears", "does not appear, the opposite does") if claim.source else ("yes", "no, the opposite")
    return found, ("published direction " if claim.source else "") + words[mean < 0]


def spread(found: Sequence[float], sign: str = "") -> str:
    """Mean and, of several, the standard deviation."""
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):{sign}.4f}{deviation}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def section(rows: dict[str, dict], experiment: Experiment) -> str:
    """One experiment: its table."""
    lines, left, first = [], [], next(iter(experiment.configs.values()))
    for label, config in experiment.configs.items():
        scores, size = (values(rows, config, metric) for metric in ("bpb", "bytes"))
        if not scores:
            left.append(label)
            continue
        before, penalty = (list(values(rows, config, metric).values()) for metric in ("before", "penalty"))
        against = "–" if config is first else spread(paired(rows, config, first, "bpb"), "+")
        figures = (spread(before), spread(list(scores.values())), spread(penalty, "+"), against)
        lines.append((label, str(len(scores)), *figures, f"{statistics.mean(size.values()):,.0f}"))
    header = ("config", "seeds", "before export", "after export", "penalty", "against the first", "bytes")
    text = [f"## {experiment.name}", experiment.question, *([markdown(header, lines)] if lines else [])]
    text += [f"Not run: {', '.join(left)}."] if left else []
    text += [experiment.note] if experiment.note and lines else []
    return "\n\n".join(text)


_FACTS = ("machine", "dtype", "torch", "python", "golfgpt", "sources", "dataset", "date")
_CLAIMS = (
    "experiment",
    "should be better",
    "than",
    "measure",
    "difference",
    "seeds",
    "verdict",
    "source in recipes.md",
)


def report(rows: dict[str, dict]) -> str:
    """docs/experiments.md. Raises ValueError for results on several data sets."""
    facts = {name: ", ".join(sorted({row[name] for row in rows.values()})) for name in _FACTS}
    if "," in facts["dataset"]:
        raise ValueError(f"results on several data sets: {facts['dataset']}")
    cpu = {row["training"]: row["train_cpu_seconds"] for row in rows.values()}
    sizes = [row["parameters"] for row in rows.values()]
    claims = []
    for experiment in EXPERIMENTS:
        for c in experiment.claims:
            found, verdict = judged(rows, experiment, c)
            if not found:
                continue  # the section says what was not run
            figures = (spread(found, "+"), str(len(found)), verdict)
            claims.append((experiment.name, c.better, c.worse, c.metric, *figures, c.source or "none published"))
    sections = [section(rows, experiment) for experiment in EXPERIMENTS]
    errors = [f"- {', '.join(row['config'])}: {row['error']}" for row in rows.values() if "error" in row]
    if errors:
        sections.append("## Diverged\n\n" + "\n".join(errors))
    steps, tokens = BASE.schedule.max_steps, BASE.data.batch_tokens
    intro = f"""# Experiments

Written by `python -m bench.experiments --out bench/results --report` from `bench/results/{RESULTS}`; every figure is
measured. To repeat, with the books corpus:

    golfgpt data prepare books_train.jsonl.zst --val books_val.jsonl.zst --vocab-size {BASE.model.vocab_size} --out DIR
    python -m bench.experiments --data DIR --out OUT
    python -m bench.experiments --out OUT --report

**Scale.** {BASE.model.num_layers} layers of width {BASE.model.model_dim}, {min(sizes):,} to {max(sizes):,} parameters,
{steps} steps of {tokens:,} tokens in sequences of {BASE.data.seq_len} unless stated: {steps * tokens:,} tokens. Such a
model is far from converged, its weights are small and few; what is not resolved here may matter at 17 M parameters and
6 billion tokens, and the other way round. Scores are bits per byte of the first {BASE.eval.max_tokens:,} tokens of the
validation text, in chunks unless stated. Seeds ({", ".join(map(str, SEEDS))}, in this order) change the initial weights
only: the data and their order are the same, and no run depends on a clock.

**Where.** {len(cpu)} trainings, {len(rows)} scores, {sum(cpu.values()) / 3600:.1f} CPU hours of training, one thread
each, on {facts["machine"]}; activations {facts["dtype"]}. torch {facts["torch"]}, Python {facts["python"]}, golfgpt
{facts["golfgpt"]} (SHA-256 of the sources begins {facts["sources"]}), data set {facts["dataset"][:16]},
{facts["date"]}.

**Verdicts.** Differences are paired by seed. An effect counts when their mean exceeds three standard errors. The
standard deviation over seeds is that of the comparison itself, but at least the median of all comparisons with several
seeds; where there is one seed, it is the root of the mean variance of all: {noise(rows, "bpb", False):.4f} bpb between
two trainings and {noise(rows, "bpb", True):.4f} between two averages or exports of one; of the penalty, the score after
export minus the score before, {noise(rows, "penalty", False):.4f} and {noise(rows, "penalty", True):.4f}.

## Claims

A positive difference is in favour of the second column.

{markdown(_CLAIMS, claims)}"""
    return "\n\n".join([intro, *sections]) + "\n"
