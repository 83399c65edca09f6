"""`python -m laserkv_gguf`."""

from __future__ import annotations

import sys

from laserkv_gguf.cli.app import run


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
