"""RPC devices on this machine: a second device whose memory is not the host's, at a CPU's speed.

What runs on one runs on a GPU's. llama.cpp's RPC backend is built once and kept in the cache folder
of this project; where it cannot be, the tests that need it say why they are skipped.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from laserkv_gguf.llama import rpc
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.placement import Placement

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900.0  # never what is tested


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


_on: list[Server] = []


def layers() -> int | None:
    """For `gpu_layers` of models that are on the CPU unless --on-rpc was given."""
    return None if _on else 0


@contextmanager
def every_model_on(server: Server) -> Iterator[None]:
    """Models go to this server unless a test says where, and have flash attention.

    Tests that put a model on the CPU (`gpu_layers=0`) have it there: it is what they compare with.
    """
    patch = pytest.MonkeyPatch()
    load, here = Model.__init__, Placement(rpc=(server.address,))

    def loaded(self: Model, path: Any, **given: Any) -> None:
        placement = given.pop("placement", None) or Placement()
        if not placement.device and not placement.rpc and given.get("gpu_layers") != 0:
            placement = replace(placement, rpc=here.rpc)
        load(self, path, placement=placement, **given)

    def on(self: ContextOptions, model: Model) -> ContextOptions:
        return replace(self, flash_attn="on") if model.remote else self

    patch.setattr(Model, "__init__", loaded)
    patch.setattr(ContextOptions, "on", on)
    _on.append(server)
    try:
        yield
    finally:
        _on.clear()
        patch.undo()
