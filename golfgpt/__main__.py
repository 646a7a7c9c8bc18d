"""`golfgpt` and `python -m golfgpt`."""

import os
import sys

from golfgpt.errors import InputError, missing_package


def main() -> None:
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin for milliseconds where they wait for each other, which on busy cores keeps the others
        # from running: two runs at once took 2 to 10 times as long. Alone, a run takes some per cent longer (LOG.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp reads it when torch is imported
    try:
        from golfgpt.cli import main

        sys.exit(main(sys.argv[1:]))
    except ImportError as error:
        if reason := missing_package(error):
            print(f"golfgpt: {reason}", file=sys.stderr)
            sys.exit(InputError.exit_code)
        raise


if __name__ == "__main__":
    main()
