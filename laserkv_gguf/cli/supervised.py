"""Commands that use other machines' devices run in a child process, which may die.

llama.cpp ends the process whose RPC server goes away. Here that is a child; the process that the
user started stays, says one line, and where the command goes on from what is on disk, as `batch`
does, it starts it again with the servers that still answer.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from laserkv_gguf.cli import terminal
from laserkv_gguf.errors import LaserKVError, UserError

AGAIN = ("batch", "serve")
"""Commands that are started again; a second start of these goes on where the first one ended."""
_MARK = "LASERKV_GGUF_SUPERVISED"
_LOST = 75  # exit code of a child whose server went away
_IN_VAIN = 3  # deaths in a row of a child although all servers answer
_given: list[str] = []


def remember(arguments: Sequence[str]) -> None:
    """The command line, for the child."""
    _given[:] = arguments


def is_child() -> bool:
    """Whether this process was started by `run`."""
    return _MARK in os.environ


def prepare() -> None:
    """The child's part: it ends at once where llama.cpp would abort, and with its parent."""
    from laserkv_gguf.llama import library

    library.on_abort(lambda: os._exit(_LOST))
    pipe = int(os.environ[_MARK])
    if pipe >= 0:

        def watch() -> None:
            os.read(pipe, 1)  # nothing is ever written: this ends with the parent
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, name="parent", daemon=True).start()


def run(servers: Sequence[str]) -> int:
    """The parent's part; returns the exit code.

    Args:
        servers: of --rpc.

    Raises:
        LaserKVError: a server went away, and the command cannot go on by itself.
    """
    from laserkv_gguf.llama import rpc

    command = next((part for part in _given if part in AGAIN), None)
    using, in_vain = list(servers), 0
    reads = any(part == "-" or part.endswith("=-") for part in _given)
    with _standard_input(copied=reads and command is not None) as file:
        while True:
            code = _run_child(with_servers(_given, using), file)
            if code != _LOST and code >= 0:
                return code
            if code in (-signal.SIGINT, -signal.SIGTERM):
                return 128 - code
            there = [server for server in servers if _answers(rpc, server)]
            lost = [server for server in using if server not in there]
            in_vain = 0 if lost else in_vain + 1
            said = (
                f"the RPC server at {' and '.join(lost)} went away"
                if lost
                else (f"the process that used {' and '.join(using)} died")
            )
            if command is None:
                raise LaserKVError(f"{said} in the middle; start it there and ask again")
            if not there:
                raise LaserKVError(
                    f"{said}, and no other is left; what is done is kept, and the same command "
                    "goes on"
                )
            if in_vain == _IN_VAIN:
                raise LaserKVError(
                    f"{said} {_IN_VAIN} times; what is done is kept: see --debug, then go on with "
                    "the same command"
                )
            terminal.note(f"warning: {said}; going on with {' and '.join(there)}")
            using = there


def _answers(rpc: Any, server: str) -> bool:
    try:
        rpc.check(server)
    except UserError:
        return False
    return True


def with_servers(arguments: Sequence[str], servers: Sequence[str]) -> list[str]:
    """The command line with these servers."""
    found, skip = [], False
    for part in arguments:
        if skip or part.startswith("--rpc="):
            skip = False
        elif part == "--rpc":
            skip = True
        else:
            found.append(part)
    return [*found, "--rpc", ",".join(servers)]


@contextmanager
def _standard_input(*, copied: bool) -> Iterator[IO[bytes] | None]:
    """What a child reads: ours, or a copy of it that a second one can read as well."""
    if not copied or sys.stdin is None or sys.stdin.isatty():
        yield None
        return
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        yield file


def _run_child(arguments: Sequence[str], file: IO[bytes] | None) -> int:
    """Runs the command line once; its exit code, negative for the signal that ended it."""
    if file is not None:
        file.seek(0)
    pipe = os.pipe() if sys.platform != "win32" else None
    environment = {**os.environ, _MARK: str(pipe[0] if pipe else -1)}
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    paths = filter(None, [package, os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "laserkv_gguf", *arguments],
            stdin=file,
            env=environment,
            pass_fds=(pipe[0],) if pipe else (),
        )
    finally:
        if pipe:
            os.close(pipe[0])
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # the child gets it as well
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
            child.wait()
        if pipe:
            os.close(pipe[1])
