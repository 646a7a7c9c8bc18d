"""`golfgpt` and `python -m golfgpt`."""

import sys


def main() -> None:
    from golfgpt.cli import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    main()
