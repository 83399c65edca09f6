"""`python -m laserkv_gguf`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        from laserkv_gguf.cli.app import run

        sys.exit(run())
    except KeyboardInterrupt:  # while importing
        sys.exit(130)


if __name__ == "__main__":
    main()
