"""`golfgpt compare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from golfgpt.cli.common import print_json
from golfgpt.compare import MARGIN_NATS, Criteria, compare, compare_target
from golfgpt.errors import InputError
from golfgpt.runs import read_result


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Test whether runs of one configuration score better than those of another, or than a target. Each side is one
    configuration with several seeds; give all seeds that you trained."""

    runs: Positional[tuple[Path, ...]]
    """Run folders of A."""
    against: tuple[Path, ...] = ()
    """Run folders of B."""
    target_nats: float | None = None
    """Compare A with this loss in nats per token, also by the rule of modded-nanogpt's track 3 (there 3.28)."""
    margin_nats: float = MARGIN_NATS
    """Besides whether A is better at all, test whether it is better by more than this, in nats per token. Records of
    parameter-golf need 0.005."""
    alpha: float = 0.01
    """Significant means p < alpha, one-sided. The interval is two-sided at 1 - 2 alpha."""
    power: float = 0.8
    """Wanted probability of a significant result; the number of seeds that reaches it is printed."""
    test: Literal["auto", "welch", "paired"] = "auto"
    """auto: paired if both sides have the same seeds and the same model.*, else Welch's."""
    score: Literal["plain", "adapted"] = "plain"
    """adapted: the scores with test-time training."""
    json: bool = False
    """Print the comparison as JSON; losses, gains and margins are in nats per token."""


def compare_runs(args: Compare) -> int:
    if not args.against and args.target_nats is None:
        raise InputError("expected runs to compare with, got none: --against RUN…, or --target-nats LOSS")
    criteria = Criteria(margin=args.margin_nats, alpha=args.alpha, power=args.power)
    a, b = [read_result(path) for path in args.runs], [read_result(path) for path in args.against]
    found = {}
    if b:
        found["comparison"] = compare(a, b, criteria, test=args.test, kind=args.score)
    if args.target_nats is not None:
        found["target"] = compare_target(a, args.target_nats, criteria, kind=args.score)
    if args.json:
        print_json({name: asdict(value) for name, value in found.items()})
    else:
        print("\n\n".join(map(str, found.values())))
    return 0
