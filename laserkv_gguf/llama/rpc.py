"""llama.cpp's RPC: devices of other machines, and lending this one's.

The protocol has no security of any kind, and llama.cpp ends the process whose server goes away.
So every server is asked whether it is there, and of which version, before llama.cpp meets it.
"""

from __future__ import annotations

import ctypes
import logging
import re
import socket
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import platformdirs

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import devices, library
from laserkv_gguf.llama.placement import address

log = logging.getLogger(__name__)

SECONDS = 5.0  # for a server to answer
_LIBRARY = {"win32": "ggml-rpc.dll", "darwin": "libggml-rpc.dylib"}
_HELLO, _CAPS = 14, 24  # RPC_CMD_HELLO, RPC_CONN_CAPS_SIZE
_ANSWER = struct.Struct("<QBBBx24s")  # the size of what follows, and version 1.2.3
_P, _S, _N = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_reg_by_name": (_P, [_S]),
    "ggml_backend_load": (_P, [_S]),
    "ggml_backend_register": (None, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, _S]),
}


def folder() -> Path:
    """Where `scripts/build_rpc.py` puts the backend for the llama.cpp that is installed."""
    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "rpc" / library.build_identity()


def _function(name: str) -> Any:
    base = name.endswith("proc_address")
    result, arguments = _FUNCTIONS[name]
    function = (library.ggml_base() if base else library.ggml())[name]
    function.restype, function.argtypes = result, arguments
    return function


@cache
def _registry() -> int:
    """llama.cpp's RPC backend: of its own build, or one that was built beside it; 0 for none."""
    library.start()
    found = _function("ggml_backend_reg_by_name")(b"RPC")
    if found:
        return int(found)
    names = ("libggml-rpc.so", *_LIBRARY.values())
    for place in (library.library_folder(), folder()):
        for file in (place / name for name in names):
            if file.is_file():
                if found := _function("ggml_backend_load")(str(file).encode()):
                    return int(found)
                log.warning("%s is no backend of this llama.cpp; build it again", file)
    return 0


def look_again() -> None:
    """Forgets that there was no backend: one may have been built since."""
    _registry.cache_clear()


def is_there() -> bool:
    """Whether this llama.cpp can use and lend devices over RPC."""
    return bool(_registry())


def _procedure(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    registry = _registry()
    if not registry:
        raise UserError(
            "this build of llama.cpp has no RPC; install one with "
            "CMAKE_ARGS=-DGGML_RPC=on pip install --force-reinstall --no-binary llama-cpp-python "
            "llama-cpp-python, or run scripts/build_rpc.py"
        )
    found = _function("ggml_backend_reg_get_proc_address")(registry, name.encode())
    if not found:
        raise UserError("this llama.cpp's RPC is of an unknown kind; install 0.3.36")
    return ctypes.CFUNCTYPE(result, *arguments)(found)


@cache
def own_version() -> tuple[int, int] | None:
    """Major and minor number of the protocol that this llama.cpp speaks; None where unknown."""
    headers = Path(llama_cpp.__file__).parents[1] / "include" / "ggml-rpc.h"
    try:
        text = headers.read_text("utf-8", "replace")
    except OSError:
        return None
    found = [re.search(rf"RPC_PROTO_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    if not all(found):
        return None
    major, minor = (int(one[1]) for one in found if one)
    return major, minor


def check(server: str) -> None:
    """Asks a server for the version of its protocol.

    Raises:
        UserError: no server answers there within 5 s, or one of another version.
    """
    host, port = address(server)
    request = bytes([_HELLO]) + struct.pack("<Q", _CAPS) + bytes(_CAPS)
    try:
        with socket.create_connection((host, port), SECONDS) as connection:
            connection.settimeout(SECONDS)
            connection.sendall(request)
            data = b""
            while len(data) < _ANSWER.size:
                more = connection.recv(_ANSWER.size - len(data))
                if not more:
                    raise ConnectionError("it hung up")
                data += more
    except OSError as error:
        late = isinstance(error, TimeoutError)
        why = f"no answer within {SECONDS:g} s" if late else error.strerror or str(error)
        busy = ", or another program uses it" if late else ""
        raise UserError(
            f"no RPC server at {server} ({why}{busy}); start one there with "
            "python -m laserkv_gguf rpc-server"
        ) from None
    size, major, minor, patch, _ = _ANSWER.unpack(data)
    if size != _ANSWER.size - 8:
        raise UserError(f"what answers at {server} is no RPC server of llama.cpp; check the port")
    own = own_version()
    if own is not None and (major != own[0] or minor > own[1]):
        raise UserError(
            f"the RPC server at {server} speaks version {major}.{minor}.{patch} of the protocol, "
            f"this llama.cpp {own[0]}.{own[1]}; install the same llama-cpp-python on both machines"
        )


@cache
def _add(server: str) -> None:
    """Makes a server's devices known to llama.cpp, once a process."""
    check(server)
    add = _procedure("ggml_backend_rpc_add_server", _P, _S)
    found = add(server.encode())
    if not found:
        raise UserError(f"the RPC server at {server} lends no device")
    _function("ggml_backend_register")(found)


def add(servers: Sequence[str]) -> None:
    """Makes servers' devices known to llama.cpp, in this order.

    Raises:
        UserError: a server does not answer, or this llama.cpp has no RPC.
    """
    if servers and not is_there():
        _procedure("ggml_backend_rpc_add_server", _P, _S)  # says what to do
    for server in servers:
        _add(server)


def serve(host: str, port: int, names: Sequence[str], threads: int, cache: Path | None) -> None:
    """Lends devices of this machine; returns only where it cannot.

    Args:
        names: of the devices; none for all GPUs, or the CPU where there are none.
        threads: of a CPU.
        cache: a folder where weights that were sent once are kept; None for none.

    Raises:
        UserError: there is no such device, or the address is taken.
    """
    start = _procedure(
        "ggml_backend_rpc_start_server", None, _S, _S, _N, _N, ctypes.POINTER(ctypes.c_void_p)
    )
    lent = devices.to_lend(names)
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port}: {error.strerror}; give another --host or --port"
        ) from None
    array = (ctypes.c_void_p * len(lent))(*lent)
    kept = None if cache is None else str(cache).encode()
    start(f"{host}:{port}".encode(), kept, threads, len(lent), array)
    raise LaserKVError(f"the RPC server at {host}:{port} ended; see what llama.cpp says above")
