"""Check the project: lint, format, types, then the tests.

    python3 scripts/test.py [options of pytest]

Sets the environment up the first time. Everything runs even where something before it failed; the
exit code is 1 if anything did.
"""

from __future__ import annotations

import subprocess
import sys

import environment

EXTRAS = ("test",)
CHECKS = (
    ("ruff check", ("ruff", "check", ".")),
    ("ruff format", ("ruff", "format", "--check", ".")),
    ("mypy", ("mypy",)),
)


def main() -> int:
    """Set up, run all of it, say what failed."""
    python = str(environment.prepare(EXTRAS))
    failed = []
    for name, command in CHECKS:
        print(f"== {name}", flush=True)
        done = subprocess.run([python, "-m", *command], cwd=environment.PROJECT, check=False)
        if done.returncode:
            failed.append(name)
    print(f"== failed so far: {', '.join(failed) or 'nothing'}; now the tests", flush=True)
    tests = subprocess.run(
        [python, "-m", "pytest", *sys.argv[1:]], cwd=environment.PROJECT, check=False
    )
    return 1 if failed or tests.returncode else 0


if __name__ == "__main__":
    sys.exit(environment.call(main))
