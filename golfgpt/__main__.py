"""`golfgpt` and `python -m golfgpt`."""

import sys

from golfgpt.errors import InputError, missing_package


def main() -> None:
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
