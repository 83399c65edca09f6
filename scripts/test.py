"""Check the project: lint, format, types, then the tests.

    python3 scripts/test.py [options of pytest]
    python3 scripts/test.py --marked devices ray

Sets the environment up the first time. Everything runs even where something before it failed; the
exit code is 1 if anything did. With --marked there are, instead, the tests with these marks that
are left out otherwise, each mark in a process of its own and with the extra of its name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import environment

EXTRAS = ("test",)
EXTRAS_OF_MARKS = ("browser", "ray")
# a file of tests a process, so that what its tests share is made once
AT_ONCE = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
CHECKS = (
    ("ruff check", ("ruff", "check", ".")),
    ("ruff format", ("ruff", "format", "--check", ".")),
    ("mypy", ("mypy",)),
)


def marked(marks: Sequence[str]) -> int:
    """Run the tests with each of these marks."""
    extras = (*EXTRAS, *(mark for mark in marks if mark in EXTRAS_OF_MARKS))
    python = str(environment.prepare(extras))
    failed = []
    for mark in marks:
        print(f"== tests marked {mark}", flush=True)
        command = [python, "-m", "pytest", "-m", mark]
        if subprocess.run(command, cwd=environment.PROJECT, check=False).returncode:
            failed.append(mark)
    print(f"== failed: {', '.join(failed) or 'nothing'}", flush=True)
    return 1 if failed else 0


def main() -> int:
    """Set up, run all of it, say what failed."""
    if sys.argv[1:2] == ["--marked"]:
        return marked(sys.argv[2:])
    python = str(environment.prepare(EXTRAS))
    failed = []
    for name, command in CHECKS:
        print(f"== {name}", flush=True)
        done = subprocess.run([python, "-m", *command], cwd=environment.PROJECT, check=False)
        if done.returncode:
            failed.append(name)
    print(f"== failed so far: {', '.join(failed) or 'nothing'}; now the tests", flush=True)
    tests = subprocess.run(
        [python, "-m", "pytest", *AT_ONCE, *sys.argv[1:]], cwd=environment.PROJECT, check=False
    )
    return 1 if failed or tests.returncode else 0


if __name__ == "__main__":
    sys.exit(environment.call(main))
