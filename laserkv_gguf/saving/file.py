"""A saved file, opened: its header, its digest, and its arrays as they are asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.saving.fields import check_fields
from laserkv_gguf.saving.kinds import Fields, One, Refused, Row, Several, Text, Whole, need, shown

_HEAD = 1 << 26  # bytes of a header at most: JSON is held in memory several times over
_DIGITS = 20  # of a whole number


DTYPES = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in archive.TYPES.items()}
WHOLE = ("I32", "I64")


@dataclass(frozen=True)
class Entry:
    """Where an array lies: `start` in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class Saved:
    """An opened file that has passed; close it, or use it as a context manager.

    Attributes:
        path: as it was given.
        kind: one of `archive.KINDS`.
        about: what it says of itself, as `ABOUT` has it.
        tensors: its arrays by name.
    """

    path: Path
    kind: str
    about: dict[str, Any]
    tensors: dict[str, Entry]
    _file: BinaryIO
    # what was compared with the schema is what is used, whatever becomes of the file meanwhile
    _read: dict[str, NDArray[Any]] = field(default_factory=dict)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def array(self, name: str) -> NDArray[Any]:
        """One whole array; the same one every time."""
        if name not in self._read:
            entry = self.tensors[name]
            self._read[name] = self._at(entry.start, DTYPES[entry.dtype], entry.shape)
        return self._read[name]

    def whole(self, name: str) -> NDArray[np.int64]:
        """An array of whole numbers as int64."""
        return self.array(name).astype(np.int64)

    def rows(self, name: str, first: int, end: int) -> NDArray[np.uint8]:
        """Of an array (layers, n, bytes) the rows first … end - 1; it is never read whole."""
        entry = self.tensors[name]
        layers, count, row = entry.shape
        found = np.empty((layers, end - first, row), np.uint8)
        for layer in range(layers):
            start = entry.start + (layer * count + first) * row
            found[layer] = self._at(start, np.dtype(np.uint8), (end - first, row))
        return found

    def _at(self, start: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        found = np.empty(shape, dtype)
        into = found.reshape(-1).view(np.uint8).data
        self._file.seek(start)
        done = 0
        while done < len(into):
            count = self._file.readinto(into[done:])  # type: ignore[attr-defined]
            if not count:
                raise _damaged(self.path)
            done += count
        return found


def opened(path: Path) -> Saved:
    """The file with what it says of itself, its digest found right.

    Raises:
        UserError: it cannot be read, is damaged, or says what it may not.
    """
    file = _open(path)
    try:
        head, header = _header(path, file)
        kind = _kind(path, header)
        _check_digest(path, file, head, header["__metadata__"]["digest"])
        try:
            size = os.fstat(file.fileno()).st_size
            tensors = _entries(header, len(head), size)
            about = _json(header["__metadata__"]["about"])
            check_fields(kind, about)
        except Refused as error:
            raise unusable(path, error) from None
        except (ValueError, RecursionError):
            raise unusable(path, "what it says of itself is no plain JSON") from None
    except OSError as error:
        file.close()
        raise UserError(f"cannot read {path}: {error.strerror}; name a saved file") from error
    except BaseException:
        file.close()
        raise
    return Saved(path, kind, about, tensors, file)


def tokens_of(path: Path) -> NDArray[np.int32]:
    """The tokens that a file holds, in order; nothing else of it is read or checked.

    Raises:
        UserError: it cannot be read, or its beginning is damaged.
    """
    with _open(path) as file:
        try:
            head, header = _header(path, file)
            entries = _entries(header, len(head), os.fstat(file.fileno()).st_size)
            found = Saved(path, "", {}, entries, file).array("tokens")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name a saved file") from error
        except (Refused, KeyError) as error:
            raise unusable(path, error) from None
    return found.astype(np.int32)


def _open(path: Path) -> BinaryIO:
    """Opens regular files only, and never waits: a pipe has no end, a device no size."""
    wait_for_nothing = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        mode = path.stat().st_mode  # before it is opened: that alone can do something to a device
        if stat.S_ISREG(mode):
            file = os.fdopen(os.open(path, wait_for_nothing), "rb")
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except FileNotFoundError:
        raise UserError(f"no saved file at {path}; ask --save and chat's /save write one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a saved file") from error
    except ValueError:  # a name that no file can have
        raise UserError(f"no saved file at {str(path)!r}; name a saved file") from None
    said = "Is a directory" if stat.S_ISDIR(mode) else f"it is {archive.what(mode)}"
    raise UserError(f"cannot read {path}: {said}; name a saved file")


def _header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The first bytes up to the data, and the JSON in them, of which the metadata is as it should.

    Raises:
        UserError: nothing that `archive.write` wrote.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(size - 8, _HEAD):
            raise ValueError
        head = start + file.read(length)
        header: dict[str, Any] = _json(head[8:].decode("utf-8"))
        Fields({"format": Text(), "digest": Text(64), "about": Text(_HEAD)}).check(
            header["__metadata__"], ""
        )
        if len(header["__metadata__"]["digest"]) != len(archive.NO_DIGEST):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError, Refused):
        raise UserError(
            f"{path} is not a file that --save or /save wrote with this version, or its beginning "
            "is damaged; read the document again"
        ) from None
    return head, header


def _kind(path: Path, header: dict[str, Any]) -> str:
    """The kind of a file of this version.

    Raises:
        UserError: it is of another version, or none of ours.
    """
    name, *rest = header["__metadata__"]["format"].split(" ")
    if name == archive.FORMAT and len(rest) == 2 and rest[0] in archive.KINDS:
        kind, version = rest
        if version == archive.VERSION:
            return str(kind)
        raise UserError(
            f"{path} has version {shown(version)} of the form of saved files, this reads "
            f"{archive.VERSION}; read the document again"
        )
    raise UserError(
        f"{path} is not a file that --save or /save wrote with this version; "
        "read the document again"
    )


def _json(text: str) -> Any:
    """Plain JSON: no name twice in an object, no NaN or infinity, no endless numbers."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in an object")
        return found

    def never(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number")

    def whole(text: str) -> int:
        if len(text) > _DIGITS:
            never("that")
        return int(text)

    def number(text: str) -> float:
        found = float(text)
        return found if math.isfinite(found) else never(text[:_DIGITS])

    return json.loads(
        text,
        object_pairs_hook=once,
        parse_constant=never,
        parse_int=whole,
        parse_float=number,
    )


def _check_digest(path: Path, file: BinaryIO, head: bytes, said: str) -> None:
    digest = hashlib.sha256(head.replace(said.encode(), archive.NO_DIGEST.encode(), 1))
    while piece := file.read(archive.CHUNK):
        digest.update(piece)
    if digest.hexdigest() != said:
        raise _damaged(path)


_ENTRY = Fields(
    {
        "dtype": One(tuple(DTYPES)),
        "shape": Several(Whole(0, 1 << 62)),
        "data_offsets": Row((Whole(0, 1 << 62), Whole(0, 1 << 62))),
    }
)


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The arrays, one after the other without gaps from the header's end to the file's."""
    found: dict[str, Entry] = {}
    described = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in described.items():
        said = f"array {shown(name)!r}"
        _ENTRY.check(entry, said)
        need(len(entry["shape"]) <= 8, said, "has more than 8 axes")
        array = Entry(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        first, last = entry["data_offsets"]
        need(last - first == array.bytes, said, "is not as long as its shape")
        found[name] = array
    at = start
    for name, array in sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)):
        need(array.start == at, f"array {shown(name)!r}", "does not follow the one before it")
        at += array.bytes
    need(at == size, "the data", "does not end where the file does")
    return found


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it was cut off or changed since it was saved; read the document again"
    )


def unusable(path: Path, why: object) -> UserError:
    """The error for a file that holds what it may not."""
    return UserError(f"{path} is no saved file that can be used: {why}; read the document again")
