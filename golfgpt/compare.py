"""Is A better than B? Tests on the scores of runs of two configurations, each trained with several seeds.

    gain = mean of B - mean of A           lower values are better, so a positive gain means that A is better
    p    = P(T >= (gain - margin) / SE)    one-sided, of "the gain is at most the margin"

Welch's test (Welch 1947) lets both sides have their own spread. The paired test is a t test of the differences by seed.
Both ask two things: is there a gain at all, and is it above a margin. The interval is two-sided at 1 - 2 alpha, so its
lower end is above the margin exactly when p < alpha. The number of seeds that a power needs comes from the
noncentral t distribution at the observed gain and spread, and is as uncertain as these.

`welch`, `paired` and `one_sample` work on {seed: value} in any unit; `compare` works on runs, in nats per token, and
converts to bits per byte with the tokens and bytes that the runs themselves scored.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from golfgpt.config import RunConfig, differences, to_dict
from golfgpt.errors import InputError
from golfgpt.recipes import RECIPES, get
from golfgpt.runs import MEASURED, RUNS, Run, as_configured, flatten, listed_run, recipe_name
from golfgpt.score.config import TTT_READS
from golfgpt.sweep import space
from golfgpt.tables import table

MARGIN_NATS = 0.005
"""By how much a record of parameter-golf must beat the last one, at p < 0.01 (its README, "Submission")."""

TRACK3_MARGIN = 0.004
"""modded-nanogpt's track 3 accepts `(3.28 - mean) * sqrt(n) >= 0.004`, in nats per token."""

NO_EFFECT = ("seed:", "data.path:", "runtime.", "budget.", "eval.", "schedule.reserve_seconds:")
"""Config fields in which the runs of a side may differ. The data and the evaluation are compared by what the result
says. schedule.reserve_seconds holds the time of a trial if it was not given."""

Kind = Literal["plain", "adapted"]


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """What counts as better. Raises InputError for values that make no test."""

    margin: float = MARGIN_NATS
    """In the unit of the values."""
    alpha: float = 0.01
    """Significant means p < alpha."""
    power: float = 0.8
    """Probability of a significant result that `Claim.seeds` promises."""

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", 0, 0.5), ("power", 0, 1)):
            if not low < getattr(self, name) < high:
                raise InputError(f"{name} is {getattr(self, name)}; expected more than {low} and less than {high}")
        if not 0 <= self.margin < math.inf:
            raise InputError(f"margin is {self.margin}; expected a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The test of "A is better than B by more than `margin`"."""

    margin: float
    p: float
    significant: bool
    seeds: int | None
    """Seeds per side with which the power is reached at this gain and spread; None if the gain is not above the
    margin, where no number is enough."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better A is than B, or than a target."""

    test: Literal["welch", "paired", "one-sample"]
    criteria: Criteria
    gain: float
    untested: str | None = None
    """Why there is no test. The fields below are then empty."""
    standard_error: float | None = None
    degrees_of_freedom: float | None = None
    low: float | None = None
    high: float | None = None
    """The interval of the gain, two-sided at 1 - 2 alpha."""
    claims: tuple[Claim, ...] = ()
    """For the margin 0, and for that of the criteria."""


def welch(a: Mapping[int, float], b: Mapping[int, float], criteria: Criteria = Criteria()) -> Difference:
    """Welch's test of {seed: value}, lower is better. A side with one seed gives a gain without a test."""
    gain = statistics.fmean(b.values()) - statistics.fmean(a.values())
    if min(len(a), len(b)) < 2:
        return Difference(test="welch", criteria=criteria, gain=gain, untested=ONE_SEED)
    var_a, var_b = statistics.variance(a.values()), statistics.variance(b.values())
    if not var_a + var_b:
        return Difference(test="welch", criteria=criteria, gain=gain, untested=NO_SPREAD)
    of_mean_a, of_mean_b = var_a / len(a), var_b / len(b)
    df = (of_mean_a + of_mean_b) ** 2 / (of_mean_a**2 / (len(a) - 1) + of_mean_b**2 / (len(b) - 1))
    ratio = (var_a + var_b) ** 2 / (var_a**2 + var_b**2)
    return _tested("welch", gain, math.sqrt(of_mean_a + of_mean_b), df, var_a + var_b, ratio, criteria)


def paired(a: Mapping[int, float], b: Mapping[int, float], criteria: Criteria = Criteria()) -> Difference:
    """The t test of the differences by seed. Raises InputError if the seeds of the two sides are not the same."""
    if parts := _unshared(a, b):
        raise InputError(f"the paired test expected the same seeds on both sides; {parts}: train it, or use Welch's")
    return _of_gains("paired", [b[seed] - a[seed] for seed in a], criteria)


def one_sample(a: Mapping[int, float], target: float, criteria: Criteria = Criteria()) -> Difference:
    """The t test of A against a target without a spread of its own."""
    return _of_gains("one-sample", [target - value for value in a.values()], criteria)


ONE_SEED = "one seed shows no spread; train at least two"
NO_SPREAD = "all seeds have the same value, so there is no spread to test against"


def _of_gains(test: Literal["paired", "one-sample"], gains: list[float], criteria: Criteria) -> Difference:
    gain, n = statistics.fmean(gains), len(gains)
    if n < 2:
        return Difference(test=test, criteria=criteria, gain=gain, untested=ONE_SEED)
    variance = statistics.variance(gains)
    if not variance:
        return Difference(test=test, criteria=criteria, gain=gain, untested=NO_SPREAD)
    return _tested(test, gain, math.sqrt(variance / n), n - 1, variance, 1.0, criteria)


def _tested(
    test: Literal["welch", "paired", "one-sample"],
    gain: float,
    error: float,
    df: float,
    variance: float,
    ratio: float,
    criteria: Criteria,
) -> Difference:
    """With n seeds per side the standard error is sqrt(variance / n), with (n - 1) * ratio degrees of freedom."""
    from scipy.special import stdtr, stdtrit

    claims = []
    for margin in dict.fromkeys((0.0, criteria.margin)):
        p = float(stdtr(df, (margin - gain) / error))
        seeds = _seeds(gain - margin, variance, ratio, criteria)
        claims.append(Claim(margin=margin, p=p, significant=p < criteria.alpha, seeds=seeds))
    half = float(stdtrit(df, 1 - criteria.alpha)) * error
    return Difference(
        test=test,
        criteria=criteria,
        gain=gain,
        standard_error=error,
        degrees_of_freedom=df,
        low=gain - half,
        high=gain + half,
        claims=tuple(claims),
    )


def _seeds(effect: float, variance: float, ratio: float, criteria: Criteria) -> int | None:
    """The fewest seeds per side with which an effect of this size is significant with the probability `power`."""
    from scipy.special import nctdtr, ndtri, stdtrit

    if effect <= 0:
        return None
    normal = variance * ((ndtri(1 - criteria.alpha) + ndtri(criteria.power)) / effect) ** 2
    if normal > 10_000:  # the t distribution is normal there
        return math.ceil(normal)
    n = max(2, math.floor(normal))  # too few, as t has heavier tails
    while True:
        df = (n - 1) * ratio
        missed = nctdtr(df, effect / math.sqrt(variance / n), stdtrit(df, 1 - criteria.alpha))
        if not missed > 1 - criteria.power:
            return n
        n += 1


def _unshared(a: Mapping[int, Any], b: Mapping[int, Any]) -> str:
    """Which seeds only one side has, in words."""
    parts = []
    for name, seeds in (("A", a.keys() - b.keys()), ("B", b.keys() - a.keys())):
        if seeds:
            parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))} only in {name}")
    return " and ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One run, in both units."""

    run: str
    seed: int
    val_loss: float
    """Nats per token."""
    val_bpb: float
    steps: int | None


@dataclass(frozen=True, kw_only=True)
class Side:
    """Runs of one configuration, by seed."""

    seeds: tuple[Seed, ...]
    mean_loss: float
    mean_bpb: float
    sd_loss: float | None
    """Standard deviation over the seeds, with n - 1; None for one seed."""
    varied: tuple[str, ...]
    """Fields of `NO_EFFECT` in which its runs differ, apart from the seed."""
    left_out: tuple[str, ...]
    """Runs beside those of the side that have its configuration too."""

    @property
    def losses(self) -> dict[int, float]:
        return {seed.seed: seed.val_loss for seed in self.seeds}

    def rows(self, name: str) -> list[tuple[object, ...]]:
        """Its rows of the table of seeds."""
        seeds = [(name, s.run, str(s.seed), f"{s.val_bpb:.5f}", f"{s.val_loss:.5f}", s.steps or "") for s in self.seeds]
        spread = "" if self.sd_loss is None else f" (SD {self.sd_loss:.5f})"
        return [*seeds, (name, "mean", "", f"{self.mean_bpb:.5f}", f"{self.mean_loss:.5f}{spread}", "")]

    def notes(self, name: str, named: Sequence[str] = ()) -> list[str]:
        """`named`: runs left out that need no further note."""
        left_out = [run for run in self.left_out if run not in named]
        notes = [f"{run} has the configuration of {name} too, and is not in the comparison" for run in left_out]
        if self.varied:
            notes.append(f"the runs of {name} also differ in {', '.join(self.varied)}")
        return notes


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of two sides. Losses, gains and margins are in nats per token."""

    a: Side
    b: Side
    label: str
    """Of the scores; those of test-time training can differ between the sides."""
    bpb_per_nat: float
    """Bits per byte of one nat per token, on the text that all runs scored."""
    difference: Difference
    """The test that decides."""
    welch: Difference | None
    """Welch's test, if the paired one decides."""
    pairing: str
    """Why the test is paired, or why not."""
    changes: tuple[str, ...]
    """Config fields in which the sides differ, as 'section.field: A -> B'."""
    next: tuple[str, ...]
    """Commands that train what a test lacks."""

    def __str__(self) -> str:
        head = ("side", "run", "seed", "val_bpb", "nats/token", "steps")
        lines = [table(head, [*self.a.rows("A"), *self.b.rows("B")]), _unit(self.label, self.bpb_per_nat)]
        changes = f"A and B differ in {'; '.join(self.changes)} (A -> B)"
        lines.append(changes if self.changes else SAME)
        steps = [seed.steps for side in (self.a, self.b) for seed in side.seeds if seed.steps]
        if steps and max(steps) > MORE_STEPS * min(steps):
            lines.append(f"the runs took {min(steps):,} to {max(steps):,} steps: the difference may come from these")
        lines += [*self.a.notes("A"), *self.b.notes("B", self.a.left_out), ""]
        lines += _words(self.difference, "B", self.bpb_per_nat, (len(self.a.seeds), len(self.b.seeds)))
        lines += [*self.next, *((self.pairing,) if self.difference.untested is None else ())]
        if self.welch and self.welch.claims:
            p = ", ".join(f"p = {c.p:.2g} for a gain above {c.margin:g}" for c in self.welch.claims)
            lines.append(f"Welch's test, which does not decide here: {p}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class TargetComparison:
    """One side against a fixed loss, in nats per token."""

    a: Side
    target: float
    label: str
    bpb_per_nat: float
    difference: Difference
    track3: float
    """(target - mean) * sqrt(n)"""
    track3_passed: bool
    next: tuple[str, ...]
    """Commands that train what a test lacks."""

    def __str__(self) -> str:
        head = ("side", "run", "seed", "val_bpb", "nats/token", "steps")
        verdict = "passed" if self.track3_passed else "not passed"
        lines = [table(head, self.a.rows("A")), _unit(self.label, self.bpb_per_nat), *self.a.notes("A"), ""]
        lines += _words(self.difference, f"{self.target:g} nats/token", self.bpb_per_nat, (len(self.a.seeds),))
        lines += self.next
        lines.append(
            f"track 3: ({self.target:g} - {self.a.mean_loss:.5f}) * sqrt({len(self.a.seeds)}) = {self.track3:.5f}, "
            f"expected at least {TRACK3_MARGIN}: {verdict}"
        )
        return "\n".join(lines)


def compare(
    a: Sequence[Run],
    b: Sequence[Run],
    criteria: Criteria = Criteria(),
    *,
    test: Literal["auto", "welch", "paired"] = "auto",
    kind: Kind = "plain",
) -> Comparison:
    """Compare the runs of two configurations on the same text.

    auto: the paired test if both sides have the same seeds and the same config.model, so that a pair starts from the
    same initial weights; else Welch's. Raises InputError for a run without such a score, for a seed or a run that comes
    twice, for runs of one side that differ in more than `NO_EFFECT`, for scores of other text or by other rules, and
    for test "paired" with seeds of one side only.
    """
    of_a = {run.path.resolve() for run in a}
    if twice := [run.path for run in b if run.path.resolve() in of_a]:
        raise InputError(f"{twice[0]} is on both sides; expected a run on one side only")
    side_a, side_b = one_side(a, kind, b), one_side(b, kind, a)
    _same_text([a[0], b[0]], kind, RULE if kind == "plain" else TEXT)
    different = differences(as_configured(a[0], MEASURED), as_configured(b[0], MEASURED))
    changes = tuple(d for d in different if not d.startswith(("seed:", "runtime.", "eval.compile:")))
    paired_test, pairing = _pairing(side_a.losses, side_b.losses, changes, test)
    by_welch = welch(side_a.losses, side_b.losses, criteria)
    labels = dict.fromkeys(str(_score(side[0], kind).get("label")) for side in (a, b))
    return Comparison(
        a=side_a,
        b=side_b,
        label=" | ".join(labels),
        bpb_per_nat=_bpb_per_nat(a[0], kind),
        difference=paired(side_a.losses, side_b.losses, criteria) if paired_test else by_welch,
        welch=by_welch if paired_test else None,
        pairing=pairing,
        changes=changes,
        next=(*_next_seed("A", side_a, a, b), *_next_seed("B", side_b, b, a)) if changes else (),
    )


def compare_target(
    a: Sequence[Run], target: float, criteria: Criteria = Criteria(), *, kind: Kind = "plain"
) -> TargetComparison:
    """Compare the runs of one configuration with a loss in nats per token that has no spread of its own. Raises
    InputError as `compare`."""
    if not 0 < target < math.inf:
        raise InputError(f"the target is {target}; expected a loss above 0, in nats per token")
    side = one_side(a, kind)
    track3 = (target - side.mean_loss) * math.sqrt(len(side.seeds))
    return TargetComparison(
        a=side,
        target=target,
        label=str(_score(a[0], kind).get("label")),
        bpb_per_nat=_bpb_per_nat(a[0], kind),
        difference=one_sample(side.losses, target, criteria),
        track3=track3,
        track3_passed=track3 >= TRACK3_MARGIN,
        next=tuple(_next_seed("A", side, a)),
    )


MORE_STEPS = 1.5
"""Times the fewest steps: a difference worth a note. Under a cap by time, the load of the machine decides them."""
SAME = (
    "A and B have the same configuration: unless golfgpt itself was changed between them, a difference shows only how "
    "much seeds vary"
)


def _next_seed(name: str, side: Side, runs: Sequence[Run], other: Sequence[Run] = ()) -> Iterator[str]:
    """How to train a second seed of a side that has one: its run's command with another seed, one of the other side's
    if there is one. Nothing if there are runs that were left out."""
    run, *more = runs
    words, world = run.env.get("command", ()), run.env.get("world_size", 1)
    recipe = recipe_name(run.env)
    if more or side.left_out or list(words[:2]) != ["golfgpt", "train"] or recipe not in RECIPES:
        return
    seed = min({each.config.seed for each in other} - {run.config.seed}, default=run.config.seed + 1)
    path = run.path.with_name(f"{run.name.removesuffix(f'-s{run.config.seed}')}-s{seed}")
    if not path.exists() and path.parent.resolve().is_relative_to(RUNS.resolve()):
        folder = path.resolve().relative_to(RUNS.resolve())
        options = _without(words, "--seed", "--name", "--eval.")  # it may have been scored again by other rules
        options += space.flags(_scoring(get(recipe).config, run.config))
        start = ["torchrun", "--standalone", "--nproc-per-node", str(world), "-m"] if world > 1 else []
        yield f"  one more of {name}: {shlex.join([*start, *options, '--seed', str(seed), '--name', str(folder)])}"


def _scoring(base: RunConfig, config: RunConfig) -> dict[str, Any]:
    """The fields of the evaluation in which `config` differs from `base`, without those of test-time training that its
    kind does not read."""
    reads = ("kind", *TTT_READS[config.eval.ttt.kind])
    changed = space.changes(base, replace(base, eval=config.eval))
    return {
        name: value
        for name, value in changed.items()
        if not name.startswith("eval.ttt.") or name.removeprefix("eval.ttt.").startswith(reads)
    }


def _without(words: Sequence[str], *options: str) -> list[str]:
    """A command line without some options, or all that begin with `--section.`, and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            dropping = name in options or name[: name.find(".") + 1] in options
        if not dropping:
            kept.append(word)
    return kept


TEXT = ("dataset", "tokens", "bytes")
RULE = ("dataset", "label", *TEXT[1:], "window", "stride", "document_aware")
"""What scores must share to be compared; `TEXT` for test-time training, whose windows are part of the method."""


def _score(run: Run, kind: Kind) -> dict[str, Any]:
    """The score with the digest of its data. Raises InputError if the run has none."""
    result = run.result or {}
    score = result.get("score" if kind == "plain" else "adapted")
    if not isinstance(score, dict):
        path = shlex.quote(str(run.path))
        how = f"golfgpt train --resume {path}" if kind == "plain" else f"golfgpt eval {path} --eval.ttt.kind …"
        raise InputError(f"{run.path} has no {kind} score; make it with {how}")
    for name in ("val_loss", "val_bpb", "tokens", "bytes"):
        value = score.get(name)
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            file = run.path / "result.json"
            raise InputError(f"{file} has the {kind} score's {name} as {value!r}; expected a finite number above 0")
    score = {"dataset": result.get("dataset"), **score}
    return score


def _bpb_per_nat(run: Run, kind: Kind) -> float:
    score = _score(run, kind)
    return score["tokens"] / (score["bytes"] * math.log(2))


def _same_text(runs: Sequence[Run], kind: Kind, fields: Sequence[str]) -> None:
    first = _score(runs[0], kind)
    for run in runs[1:]:
        other = _score(run, kind)
        parts = bool(first.get("partial")), bool(other.get("partial"))
        for field in fields:
            if first.get(field) != other.get(field):
                what = "validation data" if field in TEXT else "rules of scoring"
                if any(parts) and field in ("label", "tokens", "bytes"):
                    what = "parts of the validation text"
                pair = (runs[0], run) if parts == (True, False) else (run, runs[0])  # the part is scored again
                again = "" if field == "dataset" else _rescore(*pair, kind)
                raise InputError(
                    f"{runs[0].path} and {run.path} have other {what}: {field} is {first.get(field)!r} and "
                    f"{other.get(field)!r}; expected scores of the same text by the same rules{again}"
                )


def _rescore(run: Run, like: Run, kind: Kind) -> str:
    """The command that scores `run` by the rules of `like`; empty if their rules are equal."""
    # The first two change a score by rounding only.
    without = ("eval.batch_tokens", "eval.compile", *(("eval.ttt.",) if kind == "plain" else ()))
    options = {n: value for n, value in _scoring(run.config, like.config).items() if not n.startswith(without)}
    if like.config.window != run.config.window:  # a default that data.seq_len decides
        options |= {"eval.window": like.config.window, "eval.stride": like.config.stride}
    if not options:
        return ""
    return f": {scored_again(run, *space.flags(options))} (scores it again, trains nothing)"


def scored_again(run: Run, *options: str) -> str:
    """The command that scores a finished run by other rules."""
    return shlex.join(["golfgpt", "train", "--resume", str(run.path), *options])


def scored_whole(run: Run) -> str:
    """The command that scores a finished run on the whole text."""
    if run.config.eval.max_tokens is not None:
        return scored_again(run, "--eval.max-tokens", "None")
    if run.config.eval.rule != "every_token":
        return scored_again(run, "--eval.rule", "every_token")
    return scored_again(run, "--eval.ttt.max-seconds", "SECONDS")


def one_side(runs: Sequence[Run], kind: Kind, against: Sequence[Run] = ()) -> Side:
    """Check that the runs differ in their seeds only. `against`: the runs of the other side."""
    if not runs:
        raise InputError("expected at least one run, got none: golfgpt compare RUN… --against RUN…")
    first = runs[0]
    by_seed: dict[int, Run] = {}
    varied: dict[str, None] = {}  # in order
    check_one_configuration(runs)
    for run in runs:
        changed = differences(as_configured(first, MEASURED), as_configured(run, MEASURED))
        if (other := by_seed.setdefault(run.config.seed, run)) is not run:
            raise InputError(
                f"{other.path} and {run.path} both have seed {run.config.seed}; a seed counts once: leave out the run "
                "that started later"
            )
        varied |= dict.fromkeys(name for d in changed if (name := d.split(":")[0]) != "seed")
    _same_text(runs, kind, (*RULE, "settings"))
    seeds = []
    for seed, run in sorted(by_seed.items()):
        score = _score(run, kind)
        values = {"val_loss": score["val_loss"], "val_bpb": score["val_bpb"]}
        seeds.append(Seed(run=str(run.path), seed=seed, steps=(run.result or {}).get("steps"), **values))
    losses = [seed.val_loss for seed in seeds]
    return Side(
        seeds=tuple(seeds),
        mean_loss=statistics.fmean(losses),
        mean_bpb=statistics.fmean(seed.val_bpb for seed in seeds),
        sd_loss=statistics.stdev(losses) if len(losses) > 1 else None,
        varied=tuple(varied),
        left_out=tuple(_left_out(runs, against)),
    )


def check_one_configuration(runs: Sequence[Run]) -> None:
    """Raise InputError for runs that differ in more than `NO_EFFECT`."""
    for run in runs[1:]:
        changed = differences(as_configured(runs[0], MEASURED), as_configured(run, MEASURED))
        if any(not d.startswith(NO_EFFECT) for d in changed):
            raise InputError(
                f"expected runs of one configuration that differ in their seed, got several: {_by_value(runs)}"
            )


def _by_value(runs: Sequence[Run]) -> str:
    """Which runs have which values of the fields that make several configurations of them."""
    configs = {str(run.path): flatten(to_dict(run.config)) for run in runs}
    parts = []
    for field in next(iter(configs.values())):
        by_value: dict[str, list[str]] = {}
        for path, config in configs.items():
            by_value.setdefault(repr(config[field]), []).append(path)
        if len(by_value) > 1 and not f"{field}:".startswith(NO_EFFECT):
            values = [f"{value} in {', '.join(paths)}" for value, paths in by_value.items()]
            parts.append(f"{field} is {' and '.join(values)}")
    return "; ".join(parts)


def _left_out(runs: Sequence[Run], against: Sequence[Run]) -> list[str]:
    """Runs of the same configuration in the folders of `runs` that are on neither side: a comparison of chosen seeds
    proves nothing."""
    given = {run.path.resolve() for run in (*runs, *against)}
    config = json.loads(json.dumps(to_dict(runs[0].config)))  # tuples become lists, as in config.json

    def relevant(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in flatten(values).items() if not f"{name}:".startswith(NO_EFFECT)}

    wanted, out = relevant(config), []
    beside = {file.parent for run in runs for file in run.path.parent.glob("*/config.json")}
    for path in sorted(path for path in beside if path.resolve() not in given):
        run = listed_run(path)
        if run.status != "broken" and relevant({name: run.values.get(name) for name in config}) == wanted:
            out.append(f"{path} (seed {run.get('seed')}, {run.status})")
    return out


def _pairing(
    a: Mapping[int, float], b: Mapping[int, float], changes: Sequence[str], test: Literal["auto", "welch", "paired"]
) -> tuple[bool, str]:
    """Whether the paired test decides, and why."""
    model = [change.split(":")[0] for change in changes if change.startswith("model.")]
    if test == "welch":
        return False, "Welch's test, as asked for"
    if test == "paired":
        return True, "paired by seed, as asked for" + (f", although the models differ in {model[0]}" if model else "")
    if parts := _unshared(a, b):
        return False, f"Welch's test, not paired: {parts}"
    if model:
        return False, f"Welch's test, not paired: a seed is other initial weights where {', '.join(model)} differ"
    return True, "paired by seed: both sides have the same seeds and models, so each pair has the same initial weights"


def _unit(label: str, bpb_per_nat: float) -> str:
    return f"score: {label}; 1 nat per token is {bpb_per_nat:.4f} bits per byte of this text"


def _words(difference: Difference, other: str, bpb_per_nat: float, counts: Sequence[int]) -> list[str]:
    """The verdict, and then the numbers behind it, in sentences. `counts`: seeds of each side that has seeds."""

    def both(*nats: float) -> str:
        per_token, per_byte = (" to ".join(f"{x * unit:.5f}" for x in nats) for unit in (1, bpb_per_nat))
        return f"{per_token} nats/token, {per_byte} bits per byte"

    criteria, gain = difference.criteria, difference.gain
    side = "lower than" if gain > 0 else "higher than" if gain < 0 else "away from"
    seen = f"the mean of A is {both(abs(gain))} {side} {other} (lower is better)"
    if difference.untested:
        why = difference.untested + " per side" * (difference.untested == ONE_SEED and len(counts) > 1)
        return [f"no test, so not known whether A is better or worse than {other}: {why}", seen]
    if difference.claims[0].significant:
        verdict = f"A is better than {other}"
    elif difference.high < 0:
        verdict = f"A is worse than {other}: the interval of the gain is below 0"
    else:
        verdict = f"it is not shown that A is better or worse than {other}"
    interval = f"{100 - 200 * criteria.alpha:.4g} % confidence interval of the gain"
    lines = [verdict, seen, f"{interval}: {both(difference.low, difference.high)}"]
    for claim in difference.claims:
        what = f"better by more than {claim.margin:g} nats/token" if claim.margin else "better at all"
        verdict = f"{'' if claim.significant else 'not '}significant at p < {criteria.alpha:g}"
        df = f"{difference.degrees_of_freedom:.3g}"
        degrees = f"{df} degree{'s' * (df != '1')} of freedom"
        lines.append(f"{what}: {verdict} (p = {claim.p:.2g}, {difference.test}, {degrees})")
        if not claim.significant and claim.seeds is None:
            lines.append("  the gain seen is not above this, so more seeds like these would not show it")
        elif not claim.significant:
            more = [f"{max(0, claim.seeds - n)} more of {side}" for n, side in zip(counts, "AB", strict=False)]
            per_side = " per side" * (len(counts) > 1)
            lines.append(
                f"  for a power of {criteria.power:g} at this gain and spread: {claim.seeds} seeds{per_side}, "
                f"{' and '.join(more)}"
            )
    return lines
