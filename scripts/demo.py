"""Ask a question about a document, on a machine that has nothing but Python.

    python3 scripts/demo.py [options of `ask`]

Sets the environment up the first time, then runs `python -m laserkv_gguf ask` in it. Without a
document it takes the one that comes with the package, and a question that suits it.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import environment

DOCUMENT = environment.PROJECT / environment.PACKAGE / "data" / "sample.txt"
QUESTION = "What is the number of the safe?"
# Several blocks, so that something is left out; so small a model does best with few positions.
OPTIONS = ("--block-size", "2048", "--positions", "compact", "--predict", "24")
EXTRAS = ("model", "pdf")


def given(option: str, arguments: list[str]) -> bool:
    """Whether an option stands among the arguments, alone or as --option=value."""
    return any(item == option or item.startswith(option + "=") for item in arguments)


def ask_arguments(arguments: list[str]) -> list[str]:
    """The user's options, with a document and a question where none is given."""
    if given("--help", arguments) or given("--document", arguments):
        return arguments
    added = ["--document", str(DOCUMENT), *OPTIONS]
    if not given("--question", arguments):
        added += ["--question", QUESTION]
    return [*added, *arguments]


def shown(command: list[str]) -> str:
    """The command as the user's shell takes it."""
    return subprocess.list2cmdline(command) if environment.WINDOWS else shlex.join(command)


def main() -> int:
    """Set up, say what is run, run it."""
    python = environment.prepare(EXTRAS)
    command = [str(python), "-m", environment.PACKAGE, "ask", *ask_arguments(sys.argv[1:])]
    environment.say(f"$ {shown(command)}")
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait()
            break
        except environment.Terminated:
            process.terminate()
        except KeyboardInterrupt:
            continue  # a terminal interrupts both: it ends by itself, and says so by its code
    if code < 0 and not environment.WINDOWS:
        name = signal.Signals(-code).name
        if name in ("SIGINT", "SIGTERM"):
            return 130
        raise environment.SetupError(
            f"the run was ended by {name}; see llama.cpp's log with: {shown(command)} --debug"
        )
    return code


if __name__ == "__main__":
    sys.exit(environment.call(main))
