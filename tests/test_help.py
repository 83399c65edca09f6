"""`--help` answers at once: nothing heavy is imported for it, by any command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("numpy", "numba", "llama_cpp", "huggingface_hub", "gguf", "matplotlib", "jinja2", "pypdf")
CODE = """
import sys
sys.path.insert(0, {root!r})
from laserkv_gguf.cli.app import app, run
names = sorted(one.name or one.callback.__name__ for one in app.registered_commands)
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in names)]:
    assert run(arguments) == 0, arguments
    heavy = [name for name in {heavy!r} if name in sys.modules]
    assert not heavy, (arguments, heavy)
print("commands:", *names)
"""


def test_help_imports_nothing_heavy() -> None:
    code = CODE.format(root=str(ROOT), heavy=HEAVY)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    commands = result.stdout.splitlines()[-1].split()[1:]
    assert {"ask", "chat", "plan", "doctor", "pull"} <= set(commands)


@pytest.mark.parametrize("command", ["plan", "doctor", "pull"])
def test_help_says_what_a_command_does(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "laserkv_gguf", command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0
    assert "Usage" in result.stdout
    assert len(result.stdout.splitlines()) > 5
