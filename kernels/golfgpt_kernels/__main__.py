"""python -m golfgpt_kernels tune: check and time the kernels on this GPU, and keep what impl="auto" reads."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import tuning
from ._dispatch import environment, slug


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m golfgpt_kernels")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = 'check and time the kernels on this GPU, and keep what impl="auto" reads'
    tune = commands.add_parser("tune", help=about, description=about)
    tune.add_argument("--seconds", type=float, default=50.0, help="of measuring; default: %(default)g")
    tune.add_argument("--out", type=Path, metavar="DIR", help="write all that was measured to DIR/tune-<GPU>.json too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0)
    try:
        entries = tuning.tune(device, seconds=options.seconds)
    except tuning.CannotTune as reason:
        parser.exit(1, f"{reason}\n")
    if options.out:
        result = environment(device) | {"date": time.strftime("%Y-%m-%d"), "command": tuning.COMMAND}
        tuning.write_json(options.out / f"tune-{slug(result)}.json", result | {"entries": entries})


if __name__ == "__main__":
    main()
