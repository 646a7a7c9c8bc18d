"""python -m golfgpt_kernels tune: check and time the kernels on this GPU, and keep what impl="auto" reads.
python -m golfgpt_kernels check OP ...: check the kernels of single ops at one model's sizes.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _cases, tuning
from ._dispatch import environment, op_dtypes, slug


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m golfgpt_kernels")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = 'check and time the kernels on this GPU, and keep what impl="auto" reads'
    tune = commands.add_parser("tune", help=about, description=about)
    tune.add_argument("--seconds", type=float, default=50.0, help="of measuring; default: %(default)g")
    tune.add_argument("--out", type=Path, metavar="DIR", help="write all that was measured to DIR/tune-<GPU>.json too")
    about = "compare the kernels of single ops with PyTorch's results: within the error budget, or bit for bit"
    check = commands.add_parser("check", help=about, description=about)
    check.add_argument("ops", nargs="+", choices=sorted(op_dtypes()), metavar="OP", help=", ".join(sorted(op_dtypes())))
    check.add_argument("--rows", type=int, default=65_536, help="tokens; default: %(default)d")
    sizes = {"dim": 512, "kv": 256, "hidden": 1024, "vocab": 1024, "layers": 9}
    for name, size in sizes.items():
        check.add_argument(f"--{name}", type=int, default=size, help="of the model; default: %(default)d")
    check.add_argument("--slope", type=float, default=0.0, help="of the MLP's leaky relu; default: %(default)g")
    check.add_argument("--softcap", type=float, default=30.0, help="of the logits; default: %(default)g")
    check.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the activations")
    check.add_argument(
        "--impl", choices=["triton", "gluon"], default="triton", help="which kernel; default: %(default)s"
    )
    check.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    check.add_argument("--json", action="store_true", help="print {op: why it is wrong, or null}")
    options = parser.parse_args(arguments)
    if "ops" in options:
        if options.device.type == "cuda" and not torch.cuda.is_available():
            parser.exit(
                1, "no CUDA device that this torch can use; to interpret: TRITON_INTERPRET=1 and --device cpu\n"
            )
        return check_ops(options)
    try:
        entries = tuning.tune(torch.device("cuda", 0), seconds=options.seconds)
    except tuning.CannotTune as reason:
        parser.exit(1, f"{reason}\n")
    if options.out:
        result = environment(torch.device("cuda", 0)) | {"date": time.strftime("%Y-%m-%d"), "command": tuning.COMMAND}
        tuning.write_json(options.out / f"tune-{slug(result)}.json", result | {"entries": entries})
    return 0


def check_ops(options: argparse.Namespace) -> int:
    dtype, wrong = getattr(torch, options.dtype), {}
    sizes = options.rows, options.dim, options.hidden, options.vocab, options.layers
    cases = _cases.op_cases(*sizes, kv=options.kv, dtype=dtype, slope=options.slope, softcap=options.softcap)
    for op in options.ops:
        try:
            wrong[op] = _cases.check(cases[op], options.device, impl=options.impl)
        except (RuntimeError, ValueError, ImportError) as error:
            wrong[op] = tuning.reason(error)
        if not options.json:
            print(f"{op}: {wrong[op] or 'passed'}", flush=True)
    if options.json:
        print(json.dumps(wrong))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
