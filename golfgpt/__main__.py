"""`golfgpt` and `python -m golfgpt`."""

import os
import sys


def main() -> None:
    # libgomp's threads spin at every barrier; on a machine that others use too, that doubles the time of a
    # step (two cores and one busy neighbour: 519 ms against 345). Read once, when torch loads the library.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from golfgpt.cli import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    main()
