"""Text files that are whole, or what they were before."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.files.archive import check_target


def write(path: str | Path, text: str) -> int:
    """Writes UTF-8 beside its name, for its owner alone, then renames it.

    Returns:
        Bytes written.

    Raises:
        UserError: the place cannot be written to.
        LaserKVError: the disk is full; nothing is left behind.
    """
    path, data = check_target(path), text.encode("utf-8")
    beside: str | None = None
    try:
        handle, beside = tempfile.mkstemp(".part", f".{path.name[:100]}.", path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)  # noqa: PTH105
    except BaseException as error:
        if beside is not None:
            with contextlib.suppress(OSError):
                os.unlink(beside)  # noqa: PTH108
        if isinstance(error, OSError):
            raise LaserKVError(
                f"cannot write {path}: {error.strerror}; nothing was written"
            ) from error
        raise
    return len(data)
