"""Files that hold a cache: arrays and facts about them, in safetensors, under one digest.

The facts say what the file was made with: it is refused where its digest, the model, the build or
the cache's types are not the same. Nothing in such a file is ever executed. It is written beside
its name and renamed when it is whole. `saving.schema` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files.lock import lock
from laserkv_gguf.machine import human

DOCUMENT, CONVERSATION = KINDS = ("document", "conversation")
FORMAT, VERSION = "laserkv-gguf", "2"
NO_DIGEST = "0" * 64
TYPES = {"int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8", "uint64": "U64"} | {
    "float16": "F16",
    "float32": "F32",
}
CHUNK = 1 << 24
_PART = ".part"  # how files end that are being written
_NAMED = 32  # characters of the target's name in theirs: of a long one the whole would be too long
_BEGINS = b'{"__metadata__": {"format": "laserkv-gguf '  # after the header's length
_OURS = len(_BEGINS)
_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class Tensor:
    """An array to be written, as the parts it comes in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterator[NDArray[Any]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def whole(name: str, array: NDArray[Any]) -> Tensor:
    """An array in one part."""
    return Tensor(name, str(array.dtype), array.shape, iter((array,)))


# ---- writing -----------------------------------------------------------------------------------


def check_target(path: str | Path) -> Path:
    """A path that a file can be written to, before hours are spent on what goes into it.

    Raises:
        UserError: no such folder, or one that cannot be written to; or something that is no file
            stands there (a folder, a pipe, a device), which renaming would replace.
    """
    path = Path(path)
    try:
        found = path.stat().st_mode
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot save to {str(path)!r}: {_reason(error)}; give a file") from None
    else:
        if not stat.S_ISREG(found):
            raise UserError(f"cannot save to {path}: it is {what(found)}; give a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot save to {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot save to {path}: {path.parent} cannot be written to")
    return path


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def what(mode: int) -> str:
    """What something that is no ordinary file is, by its `st_mode`."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no ordinary file")


def write(path: str | Path, kind: str, tensors: Iterable[Tensor], about: Mapping[str, Any]) -> int:
    """Writes a file beside its name, then renames it: an old one stays until the new one is whole.

    Args:
        kind: one of `KINDS`.
        about: anything JSON can say.

    Returns:
        Bytes written.

    Raises:
        UserError: the place cannot be written to.
        LaserKVError: the disk is full; nothing is left behind.
    """
    path, tensors = check_target(path), list(tensors)
    _remove_left(path)
    form = f"{FORMAT} {kind} {VERSION}"
    file, name = _beside(path, sum(tensor.bytes for tensor in tensors))
    try:
        with file:
            _write(file, form, tensors, about)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        name.replace(path)
    except BaseException as error:
        with suppress(OSError):
            name.unlink()
        if isinstance(error, OSError):
            raise _not_saved(path, sum(tensor.bytes for tensor in tensors), error) from error
        raise
    return size


def _not_saved(path: Path, needed: int, error: OSError) -> LaserKVError:
    return LaserKVError(
        f"cannot save {human(needed)} to {path}: {error.strerror}; nothing was saved"
    )


def _beside(path: Path, needed: int) -> tuple[BinaryIO, Path]:
    """A file of our own beside a target, for its owner alone and locked while it is written.

    Raises:
        LaserKVError: the disk or the folder takes none.
    """
    for _ in range(100):
        try:
            handle, name = tempfile.mkstemp(_PART, _part_prefix(path), path.parent)
        except OSError as error:
            raise _not_saved(path, needed, error) from error
        file = os.fdopen(handle, "w+b")
        # another save may have taken it for one that was left, before it was locked
        if lock(file.fileno()) and Path(name).exists():
            return file, Path(name)
        file.close()
    raise LaserKVError(f"cannot save to {path}: other programs remove its files")


def _part_prefix(path: Path) -> str:
    return f".{path.name[:_NAMED]}."


def _remove_left(path: Path) -> None:
    """Removes what saves to this target left when they were killed: of this user, and unlocked."""
    wanted = re.compile(re.escape(_part_prefix(path)) + r"[a-z0-9_]{8}" + re.escape(_PART))
    try:
        names = [name for name in os.listdir(path.parent) if wanted.fullmatch(name)]  # noqa: PTH208
    except OSError:
        return
    for left in (path.parent / name for name in names):
        with suppress(OSError):
            handle = os.open(left, os.O_RDWR | _NO_LINK | _NO_WAIT)
            with os.fdopen(handle, "r+b") as file:
                found = os.fstat(handle)
                own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
                begins = file.read(_OURS + 8)[8:]
                stale = (
                    stat.S_ISREG(found.st_mode)
                    and own
                    and begins == _BEGINS[: len(begins)]
                    and lock(handle)
                )
                if stale and os.name != "nt":  # while it is locked: nobody else can take it
                    left.unlink()
            if stale and os.name == "nt":
                left.unlink()


def _write(file: BinaryIO, form: str, tensors: list[Tensor], about: Mapping[str, Any]) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"format": form, "digest": NO_DIGEST, "about": json.dumps(about)}
    }
    end = 0
    # the wide ones first: safetensors wants no gaps, and readers want aligned numbers
    tensors.sort(key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        kind = TYPES[tensor.dtype]
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    file.write(head)
    for tensor in tensors:
        for part in tensor.parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            for first in range(0, len(data), CHUNK):
                piece = data[first : first + CHUNK].tobytes()
                digest.update(piece)
                file.write(piece)
    at = head.index(NO_DIGEST.encode())
    file.seek(at)
    file.write(digest.hexdigest().encode())
    file.seek(0, os.SEEK_END)
