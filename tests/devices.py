"""RPC devices on this machine: a second device whose memory is not the host's, at a CPU's speed.

What runs on one runs on a GPU's. llama.cpp's RPC backend is built once and kept in the cache folder
of this project; where it cannot be, the tests that need it say why they are skipped.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from laserkv_gguf.llama import rpc

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120.0


@cache
def missing() -> str:
    """Why there is no RPC backend here; empty where there is one."""
    if rpc.is_there():
        return ""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "build_rpc.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=rpc_environment(),
    )
    rpc.look_again()
    if done.returncode or not rpc.is_there():
        return (done.stderr.strip().splitlines() or ["scripts/build_rpc.py built none"])[-1]
    return ""


def rpc_environment() -> dict[str, str]:
    """For processes that import the package from this checkout."""
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def needed() -> None:
    """Skips a test where there can be no RPC device."""
    if why := missing():
        pytest.skip(f"no RPC device: {why}")


class Server:
    """An RPC server on 127.0.0.1 that lends this machine's CPU. Use `with`, or `kill` it."""

    def __init__(self, port: int = 0, threads: int = 1) -> None:
        self.port = port or free_port()
        command = [sys.executable, "-m", "laserkv_gguf", "rpc-server", "-p", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "-t", str(threads)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=rpc_environment(),
        )
        self._wait()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _wait(self) -> None:
        """Until it listens; asked without becoming its client for longer than a moment."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                rpc.check(self.address)
                return
            except Exception:
                time.sleep(0.05)
        self.kill()
        said = self.process.stderr.read() if self.process.stderr else ""
        raise RuntimeError(f"the RPC server did not start: {said}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self.process.stderr:
            self.process.stderr.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
