"""Where parked rows lie: arrays in memory, or one file that is mapped into it.

A store holds, for every token of a document, its key and value rows in the cache's own type, the
position its keys are turned for, and a packed signature. It is written once, block by block, while
the document is read; rows never change afterwards, so a token can go in and out of the cache any
number of times.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import memory
from laserkv_gguf.errors import LaserKVError, UserError

Bytes = NDArray[np.uint8]
Tokens = NDArray[np.int64]

MAGIC = b"laserkv-gguf parked rows 1\n"
_HEAD = 4096  # the file's first page says what it is
_PAGED = 1 << 28  # bytes of the file that are mapped in at a time, about


def human(size: int) -> str:
    """Bytes, with GiB or MiB where that is shorter."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name} ({size} bytes)"
    return f"{size} bytes"


class Store:
    """Rows of a document's tokens, in memory.

    Args:
        tokens: of the document.
        layers, key_bytes, value_bytes: of a token's rows; see `llama.rows.Format`.
        quantised: whether the cache's types are already small, for the advice in errors.

    Attributes:
        parked: tokens written so far: the first so many of the document.
        positions: (tokens,) int32: where each stood when it was parked.

    Raises:
        UserError: the memory cannot hold them.
    """

    kind = "ram"

    def __init__(
        self,
        tokens: int,
        layers: int,
        key_bytes: int,
        value_bytes: int,
        *,
        quantised: bool = False,
    ) -> None:
        self.tokens, self.layers = tokens, layers
        self.key_bytes, self.value_bytes = key_bytes, value_bytes
        self.quantised = quantised
        self.parked = 0
        self.positions = np.zeros(tokens, np.int32)
        self._allocate()

    @property
    def bytes(self) -> int:
        """What the rows of all tokens take."""
        return self.tokens * self.layers * (self.key_bytes + self.value_bytes)

    def _allocate(self) -> None:
        free = memory.free_ram()
        if free is not None and self.bytes > free:
            raise self._too_large(f"there are {human(free)}")
        try:
            self._keys: Bytes = np.empty((self.layers, self.tokens, self.key_bytes), np.uint8)
            self._values: Bytes = np.empty((self.layers, self.tokens, self.value_bytes), np.uint8)
        except MemoryError:
            raise self._too_large("there is less") from None

    def _too_large(self, found: str) -> UserError:
        smaller = "" if self.quantised else ", or -ctk q8_0 -ctv q8_0 for half of it"
        return UserError(
            f"parking {self.tokens} tokens takes {human(self.bytes)} of memory, {found}; "
            f"use --recall disk{smaller}"
        )

    def write(self, keys: Bytes, values: Bytes, positions: NDArray[Any]) -> None:
        """Parks the next tokens.

        Args:
            keys: (layers, n, key_bytes).
            values: (layers, n, value_bytes) or (layers, n, width, element).
            positions: (n,).

        Raises:
            LaserKVError: the disk is full; nothing of these tokens is parked.
        """
        count = len(positions)
        end = self.parked + count
        if end > self.tokens:
            raise ValueError(f"{end} tokens parked in a store for {self.tokens}")
        self._write(keys, values.reshape(self.layers, count, self.value_bytes))
        self.positions[self.parked : end] = positions
        self.parked = end

    def _write(self, keys: Bytes, values: Bytes) -> None:
        end = self.parked + keys.shape[1]
        self._keys[:, self.parked : end] = keys
        self._values[:, self.parked : end] = values

    def keys(self, tokens: Tokens) -> Bytes:
        """Key rows (layers, n, key_bytes); a view where the tokens follow each other."""
        found: Bytes = self._keys[:, _selection(tokens)]
        return found

    def copy(self, tokens: Tokens, keys: Bytes, values: Bytes) -> None:
        """Copies rows into `keys` (layers, n, key_bytes) and `values` (layers, n, …)."""
        chosen = _selection(tokens)
        keys[...] = self._keys[:, chosen]
        values[...] = self._values[:, chosen].reshape(values.shape)

    def close(self) -> None:
        """Gives the memory, and the file, back."""
        self._keys = self._values = np.empty((self.layers, 0, 0), np.uint8)
        self.parked = 0


def _selection(tokens: Tokens) -> Any:
    """A slice where that says it: slices are views, and read a disk in order."""
    if len(tokens) and int(tokens[-1]) - int(tokens[0]) + 1 == len(tokens):
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return tokens


class DiskStore(Store):
    """Rows in one file, mapped; about `_PAGED` bytes of it are in memory at a time.

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
        self._paged = 0
        self._file = self._open()
        try:
            _reserve(self._file.fileno(), _HEAD + self.bytes)
            self._file.write(MAGIC)
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), _HEAD + self.bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            self.close()
            where = self.path or _folder()
            raise UserError(
                f"parking {self.tokens} tokens takes {human(self.bytes)} on disk, which {where} "
                f"cannot hold ({error.strerror}); give another place with --recall-file"
                + ("" if self.quantised else ", or use -ctk q8_0 -ctv q8_0 for half of it")
            ) from error
        size = self.layers * self.tokens * self.key_bytes
        whole = np.frombuffer(self._map, np.uint8, offset=_HEAD)
        self._keys = whole[:size].reshape(self.layers, self.tokens, self.key_bytes)
        self._values = whole[size:].reshape(self.layers, self.tokens, self.value_bytes)

    def _open(self) -> BinaryIO:
        try:
            if self.path is None:
                _folder().mkdir(parents=True, exist_ok=True)
                return tempfile.TemporaryFile(dir=_folder(), buffering=0)
            file, made = _open_or_make(self.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot park rows in {self.path or _folder()}: "
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
        """With pwrite: on a full disk a mapped page would kill the process."""
        assert self._file is not None
        start = _HEAD
        try:
            for rows in (keys, values):
                row = rows.shape[2]
                for layer in range(self.layers):
                    at = start + (layer * self.tokens + self.parked) * row
                    _write_at(self._file.fileno(), np.ascontiguousarray(rows[layer]), at)
                start += self.layers * self.tokens * row
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise LaserKVError(
                    f"cannot park rows in {self.path or _folder()}: {error.strerror}"
                ) from error
            raise LaserKVError(
                f"the disk of {self.path or _folder()} is full after {self.parked} of "
                f"{self.tokens} tokens were parked ({human(self.bytes)} are needed); free some "
                "room, or give another place with --recall-file"
            ) from error

    def keys(self, tokens: Tokens) -> Bytes:
        self._page(len(tokens) * self.layers * self.key_bytes)
        return super().keys(tokens)

    def copy(self, tokens: Tokens, keys: Bytes, values: Bytes) -> None:
        self._page(keys.nbytes + values.nbytes)
        super().copy(tokens, keys, values)

    def _page(self, wanted: int) -> None:
        """Lets go of what was mapped in before, once it is too much."""
        self._paged += wanted
        if self._paged > _PAGED:
            self._paged = wanted
            if hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        super().close()
        if self._file is None:
            return
        if self.path is not None:
            self._give_back(self.path, self._file.fileno())
            unlock(self._file.fileno())  # the map, which goes with its last view, would keep it
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


def _folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "recall"


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


def lock(handle: int) -> bool:
    """Whether this process has the file for itself, until it closes it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def unlock(handle: int) -> None:
    """Lets other processes have the file."""
    with suppress(OSError):
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_UN)
