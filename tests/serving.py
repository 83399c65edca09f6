"""A server of the tiny model in a process of its own, at a free port of this machine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATIENCE = 240.0  # seconds: never what is tested
_STARTED = re.compile(r"serving at (http://\S+)")


class Served:
    """`python -m laserkv_gguf serve`, started and ended.

    Attributes:
        url: where it answers, without a path.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "laserkv_gguf", "serve", "--model", str(model)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "-t", "1", *flags],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = _STARTED.search(line)
        assert found, f"{line}{self.said}"
        self.url = found[1]

    @property
    def said(self) -> str:
        """What it wrote to standard error so far."""
        self.errors.seek(0)
        return self.errors.read()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; returns how the process ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        self.end(signal.SIGKILL)
        self.errors.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def metric(self, name: str) -> float:
        """One number of /metrics; 0 where it is not there."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[-1])
        return 0.0

    def wait_for(self, name: str, value: float) -> None:
        """Until a number of /metrics is this."""
        ends = time.monotonic() + PATIENCE
        while self.metric(name) != value:
            assert time.monotonic() < ends, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


def call(
    url: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Any]:
    """A plain request; returns the status and what JSON came back."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        url, data, {"content-type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
            return reply.status, _read(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, _read(error.read())


def _read(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")
