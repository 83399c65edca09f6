"""Files that hold a cache: arrays and facts about them, in safetensors, with a digest.

Nothing in such a file is ever executed. It is written beside its name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError, UserError

Arrays = Mapping[str, NDArray[Any]]

_KEY = "laserkv_gguf"
_ENDS = 1 << 20  # bytes of a model's beginning and end that tell it from others


def write(path: str | Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """Writes a file that `read` takes.

    Args:
        arrays: by name.
        metadata: anything JSON can say.

    Raises:
        UserError: the place cannot be written to. What was there before stays.
        LaserKVError: the disk is full, or fails.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write")
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    said = json.dumps(metadata, sort_keys=True)
    facts = {_KEY: said, "sha256": _digest(arrays, said)}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            save_file(dict(arrays), beside, metadata=facts)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (PermissionError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another place") from error
    except Exception as error:  # the library's own errors too: a full disk is one of them
        if _has_no_folder(path):
            raise UserError(f"cannot write {path}: there is no folder {path.parent}") from error
        raise LaserKVError(f"cannot write {path}: {error}; nothing was saved") from error


def _has_no_folder(path: Path) -> bool:
    return not path.absolute().parent.is_dir()


def read(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and metadata of a file that `write` made.

    Raises:
        UserError: missing, cut short, altered, or something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with path.open("rb"):
            pass
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"no file at {path}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the file to load") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is no saved cache, or not all of it: {error}; save it again"
        ) from error
    if _KEY not in facts:
        raise UserError(f"{path} was not saved by laserkv-gguf; name a file that was")
    if facts.get("sha256") != _digest(arrays, facts[_KEY]):
        raise UserError(f"{path} was altered since it was saved; save it again")
    return arrays, json.loads(facts[_KEY])


def _digest(arrays: Arrays, said: str) -> str:
    digest = hashlib.sha256(said.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def model_identity(path: Path) -> str:
    """A digest that tells a model's file from others without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(size - _ENDS, 0))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()


def check_identity(path: str | Path, found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses a cache that another model, build or context made.

    Args:
        found, here: what the file says and what is here, by what people call it.

    Raises:
        UserError: names what differs.
    """
    for what, wanted in here.items():
        if found.get(what) != wanted:
            said = found.get(what)
            short = (f" ({said}, not {wanted})") if len(f"{said}{wanted}") < 40 else ""
            raise UserError(
                f"{path} was saved with another {what}{short}; "
                "load it with the one it was made with, or read the documents again"
            )
