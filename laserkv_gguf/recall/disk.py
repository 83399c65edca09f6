"""Parked rows in one file."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files.lock import lock, unlock
from laserkv_gguf.machine import human
from laserkv_gguf.planning import parking
from laserkv_gguf.recall.store import Bytes, Indices, Store

MAGIC = b"laserkv-gguf parked rows 1\n"
_HEAD = 4096  # the file's first page says what it is
_GAP = 1 << 14  # bytes between two rows of the file that are sooner read than left out
_PART = 1 << 24  # bytes read at a time where all of it is


class DiskStore(Store):
    """Rows in one file.

    They are read, not mapped: a page of a mapped file that somebody cut short kills the process.

    Args:
        path: the file, which only its owner can read and which is locked. It is removed at the
            end, unless another file has its name by then; one that was there before, empty, is
            emptied. None for one without a name in the user's cache folder, which the system
            removes even after a crash.

    Raises:
        UserError: the disk has no room, another process uses the file, or it is something else.
    """

    kind = "disk"

    def __init__(self, *args: Any, path: str | Path | None = None, **options: Any) -> None:
        self.path = None if path is None else Path(path)
        self._file: BinaryIO | None = None
        self._found = False  # whether the file was there before, with nothing of ours in it
        super().__init__(*args, **options)

    def _allocate(self) -> None:
        self._file = self._open()
        self._process = os.getpid()
        try:
            _reserve(self._file.fileno(), _HEAD + self.bytes)
            self._file.write(MAGIC)
            self._file.flush()
        except OSError as error:
            self.close()
            where = self.path or parking.folder()
            raise UserError(
                f"parking {self.tokens} tokens takes {human(self.bytes)} on disk, which {where} "
                f"cannot hold ({error.strerror}); give another place with --recall-file"
                + ("" if self.quantised else ", or use -ctk q8_0 -ctv q8_0 for half of it")
            ) from error

    def _open(self) -> BinaryIO:
        try:
            if self.path is None:
                parking.folder().mkdir(parents=True, exist_ok=True)
                return tempfile.TemporaryFile(dir=parking.folder(), buffering=0)
            file, made = _open_or_make(self.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot park rows in {self.path or parking.folder()}: "
                f"{getattr(error, 'strerror', None) or error}; "
                "give another place with --recall-file"
            ) from error
        try:
            head = self._taken(file)
        except BaseException:
            file.close()
            raise
        self._found = not (made or head)
        file.seek(0)
        return file

    def _taken(self, file: BinaryIO) -> bytes:
        """Locks the file for this process and its user; returns how it begins.

        Raises:
            UserError: it is in use, or not one of parked rows, and left as it is.
        """
        handle = file.fileno()
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # a pipe would be waited for
            raise UserError(f"{self.path} is no ordinary file; give another --recall-file")
        if not lock(handle):
            raise UserError(f"{self.path} is in use by another process; give another --recall-file")
        head = file.read(len(MAGIC))
        if head and head != MAGIC:
            raise UserError(
                f"{self.path} is not a file of parked rows and is left as it is; "
                "give another --recall-file"
            )
        if hasattr(os, "fchmod"):  # not on Windows
            try:
                os.fchmod(handle, 0o600)
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be kept from other users: {error.strerror}; "
                    "give another --recall-file"
                ) from error
        return head

    def _write(self, keys: Bytes, values: Bytes) -> None:
        handle = self._whole()
        try:
            for kind, rows in (("keys", keys), ("values", values)):
                for layer in range(self.layers):
                    at = self._at(kind, layer, self.parked)
                    _write_at(handle, np.ascontiguousarray(rows[layer]), at)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise LaserKVError(
                    f"cannot park rows in {self.path or parking.folder()}: {error.strerror}"
                ) from error
            raise LaserKVError(
                f"the disk of {self.path or parking.folder()} is full after {self.parked} of "
                f"{self.tokens} tokens were parked ({human(self.bytes)} are needed); free some "
                "room, or give another place with --recall-file"
            ) from error

    def keys(self, tokens: Indices) -> Bytes:
        found = np.empty((self.layers, len(tokens), self.key_bytes), np.uint8)
        self._read("keys", tokens, found)
        return found

    def values(self, tokens: Indices) -> Bytes:
        found = np.empty((self.layers, len(tokens), self.value_bytes), np.uint8)
        self._read("values", tokens, found)
        return found

    def copy(self, tokens: Indices, keys: Bytes, values: Bytes) -> None:
        for kind, into in (("keys", keys), ("values", values)):
            self._read(kind, tokens, into)

    def all(self, kind: str) -> Iterator[Bytes]:
        row = self.key_bytes if kind == "keys" else self.value_bytes
        step = max(1, _PART // row)
        for layer in range(self.layers):
            for first in range(0, self.tokens, step):
                part = np.empty((min(step, self.tokens - first), row), np.uint8)
                self._read_at(self._whole(), part, self._at(kind, layer, first))
                yield part

    def _at(self, kind: str, layer: int, token: int) -> int:
        """Where in the file a row begins."""
        if kind == "keys":
            return _HEAD + (layer * self.tokens + token) * self.key_bytes
        before = self.layers * self.tokens * self.key_bytes
        return _HEAD + before + (layer * self.tokens + token) * self.value_bytes

    def _read(self, kind: str, tokens: Indices, into: Bytes) -> None:
        """Rows of ascending tokens; neighbours come together, with what little lies between."""
        row = self.key_bytes if kind == "keys" else self.value_bytes
        count, handle = len(tokens), self._whole()
        if not count:
            return
        cuts = np.flatnonzero(np.diff(tokens) > max(1, _GAP // row)) + 1
        bounds = [0, *cuts.tolist(), count]
        spans = [
            (first, last, int(tokens[first]), int(tokens[last - 1]) + 1)
            for first, last in pairwise(bounds)
        ]
        found = np.empty((count, row), np.uint8)
        between = np.empty((max(end - start for _, _, start, end in spans), row), np.uint8)
        for layer in range(self.layers):
            for first, last, start, end in spans:
                whole = end - start == last - first
                part = found[first:last] if whole else between[: end - start]
                self._read_at(handle, part, self._at(kind, layer, start))
                if not whole:
                    np.take(part, tokens[first:last] - start, axis=0, out=found[first:last])
            into[layer] = found.reshape(into.shape[1:])

    def _whole(self) -> int:
        """The file's handle, while the file has all its bytes.

        Raises:
            LaserKVError: somebody has cut it short.
        """
        if self._file is None:
            raise LaserKVError("the parked rows were given back; read the document again")
        handle = self._file.fileno()
        if os.fstat(handle).st_size < _HEAD + self.bytes:
            raise self._cut_short()
        return handle

    def _read_at(self, handle: int, rows: Bytes, at: int) -> None:
        try:
            complete = _read_at(handle, rows, at)
        except OSError as error:
            raise LaserKVError(
                f"cannot read parked rows from {self.path or parking.folder()}: {error.strerror}; "
                "read the document again"
            ) from error
        if not complete:
            raise self._cut_short()

    def _cut_short(self) -> LaserKVError:
        return LaserKVError(
            f"{self.path or 'the file of parked rows'} was cut short while it was in use: what was "
            "parked is lost; read the document again"
        )

    def close(self) -> None:
        super().close()
        if self._file is None:
            return
        if self.path is not None and os.getpid() == self._process:  # a fork leaves it to its owner
            self._give_back(self.path, self._file.fileno())
            unlock(self._file.fileno())
        self._file.close()
        self._file = None

    def _give_back(self, path: Path, handle: int) -> None:
        """Removes our file, or empties one that was there before.

        Never a file that somebody else has put in its place meanwhile.
        """
        with suppress(OSError):
            if not self._found and os.path.samestat(path.lstat(), os.fstat(handle)):
                path.unlink()
                return
        with suppress(OSError):  # somebody's own, or it has another name by now: no rows stay
            os.ftruncate(handle, 0)


def _open_or_make(path: Path) -> tuple[BinaryIO, bool]:
    """A file to read and write, and whether it was made now; nothing is waited for."""
    flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle, made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except FileExistsError:
        handle, made = os.open(path, flags), False
    return os.fdopen(handle, "r+b", buffering=0), made


def _reserve(handle: int, size: int) -> None:
    """Takes the room now, so that a disk is full at the start and not half-way."""
    os.ftruncate(handle, 0)
    os.ftruncate(handle, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it
                raise


def _write_at(handle: int, rows: Bytes, at: int) -> None:
    data = rows.reshape(-1).data
    if not hasattr(os, "pwrite"):  # Windows
        os.lseek(handle, at, os.SEEK_SET)
        while data:
            data = data[os.write(handle, data) :]
        return
    while data:
        written = os.pwrite(handle, data, at)
        data, at = data[written:], at + written


def _read_at(handle: int, rows: Bytes, at: int) -> bool:
    """Fills `rows`, which lie together in memory; whether the file had as much."""
    data = memoryview(rows.reshape(-1).data)
    while data:
        if hasattr(os, "preadv"):
            count = os.preadv(handle, [data], at)
        else:  # Windows, an old macOS
            os.lseek(handle, at, os.SEEK_SET)
            read = os.read(handle, len(data))
            count = len(read)
            data[:count] = read
        if not count:
            return False
        data, at = data[count:], at + count
    return True
