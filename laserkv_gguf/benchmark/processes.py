"""Jobs run in processes of their own, and are remembered so that a run that stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files.journal import Journal
from laserkv_gguf.models.identity import identity

Job = dict[str, Any]

PACKAGE = Path(__file__).resolve().parents[1]


class Processes:
    """Runs jobs of `child`, one after the other.

    Args:
        store: a JSONL file; every result is added to it at once, and a job that it holds already is
            not run again. A job counts as another one as soon as anything of it has changed: its
            settings, the model's file, this package's code, llama.cpp, the processor.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, store: Path | None = None) -> None:
        self._journal = None if store is None else Journal(store)
        entries = self._journal.entries if self._journal else []
        self._known: dict[str, Any] = {entry["key"]: entry["result"] for entry in entries}

    def run(self, job: Job) -> dict[str, Any]:
        """The result of a job.

        Raises:
            UserError, LaserKVError: what the job failed with.
        """
        key = _key(job)
        if key in self._known:
            found: dict[str, Any] = self._known[key]
            return found
        result = run(job)
        self._known[key] = result
        if self._journal is not None:
            named = ("kind", "length", "repeat")
            what: Job = {name: value for name, value in job.items() if name in named}
            self._journal.add({"key": key, **what, "result": result})
        return result


def run(job: Job) -> dict[str, Any]:
    """Runs a job in a process.

    Raises:
        UserError, LaserKVError: what the job failed with, or how its process ended.
    """
    path = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *([path] if path else [])]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "laserkv_gguf.benchmark.child"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end it
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise LaserKVError(f"a measurement {_ended(done.returncode)}")
    result: dict[str, Any] = json.loads(lines[-1])
    if "error" in result:
        kind = UserError if result["code"] == UserError.exit_code else LaserKVError
        raise kind(result["error"])
    return result


def _ended(code: int) -> str:
    if code in (-9, 137):
        return "was killed, as the system does where memory runs out"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _key(job: Job) -> str:
    text = json.dumps([job, _code(), str(identity(Path(job["model"])))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of this package's code, llama.cpp's libraries and the processor."""
    from laserkv_gguf.llama import library

    digest = hashlib.sha256(library.build_identity().encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
