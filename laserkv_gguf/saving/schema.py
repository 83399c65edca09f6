"""What a saved file may hold, and the one function that reads it.

A saved file is data that may come from anybody, and a digest keeps out accidents, not forgers. So
everything in it is compared with what is written down here before the engine is touched: types,
ranges, lengths that agree, tokens of the vocabulary, places in order and within bounds. What is
not allowed is refused in one line. Nothing is imported or opened because a file names it, and
nothing is allocated or counted through that the file's own size does not explain.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import SHAPES, Budget
from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM, TURN
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive as saved
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.model import CACHE_TYPES, row_bytes
from laserkv_gguf.planning.settings import BITS, MODES, POSITIONS, SCORING, SHARES, WHERE
from laserkv_gguf.saving.identity import made_with
from laserkv_gguf.timings import STEPS

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model

_HEAD = 1 << 26  # bytes of a header at most: JSON is held in memory several times over
_COUNT = 1 << 31  # no number of tokens, cells or turns is larger
_POSITION = 1 << 30  # nor any position: llama.cpp counts on from there in 32 bits
_BLOCKS = 1 << 16  # of a budget, which are gone through one by one
_NAME = 4096  # characters of a name
_TEXT = 1 << 24
_DIGITS = 20  # of a whole number

DTYPES = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in saved.TYPES.items()}
WHOLE = ("I32", "I64")


class Refused(Exception):
    """A field is not what it may be; the text says which and why."""


def _refuse(field: str, why: str) -> NoReturn:
    raise Refused(f"{field} {why}")


def _need(holds: bool, field: str, why: str) -> None:
    if not holds:
        _refuse(field, why)


def shown(value: object) -> str:
    """Something out of a file, to be shown: short, and nothing that a terminal would act on."""
    text = str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
    return text + "…" * (len(str(value)) > 200)


# ---- kinds of fields ---------------------------------------------------------------------------


class Kind:
    """What a field may be."""

    def check(self, value: Any, where: str) -> None:
        """Refuses anything else."""
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `low` to `high`."""

    low: int = 0
    high: int = _COUNT

    def check(self, value: Any, where: str) -> None:
        _need(type(value) is int, where, "is no whole number")
        _need(self.low <= value <= self.high, where, f"is {value}, not {self.low} to {self.high}")


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def check(self, value: Any, where: str) -> None:
        _need(type(value) in (int, float), where, "is no number")
        _need(
            self.low <= value <= self.high,  # NaN is not
            where,
            f"is {value:g}, not {self.low:g} to {self.high:g}",
        )


@dataclass(frozen=True)
class Text(Kind):
    """A text that can be encoded; where `path` is set also one of undecodable file names."""

    most: int = _NAME
    path: bool = False

    def check(self, value: Any, where: str) -> None:
        _need(isinstance(value, str), where, "is no text")
        _need(len(value) <= self.most, where, f"has more than {self.most} characters")
        try:
            value.encode("utf-8", "surrogateescape" if self.path else "strict")
        except UnicodeEncodeError:
            _refuse(where, "is no Unicode text")


@dataclass(frozen=True)
class One(Kind):
    """One of a few values."""

    of: tuple[Any, ...]

    def check(self, value: Any, where: str) -> None:
        if not any(type(value) is type(one) and value == one for one in self.of):
            _refuse(where, f"is {shown(value)}, not one of {', '.join(map(str, self.of))}")


@dataclass(frozen=True)
class Flag(Kind):
    """True or false."""

    def check(self, value: Any, where: str) -> None:
        _need(isinstance(value, bool), where, "is neither true nor false")


@dataclass(frozen=True)
class Maybe(Kind):
    """That, or null."""

    kind: Kind

    def check(self, value: Any, where: str) -> None:
        if value is not None:
            self.kind.check(value, where)


@dataclass(frozen=True)
class Several(Kind):
    """A list of one kind; how long it can be the header's size says."""

    kind: Kind

    def check(self, value: Any, where: str) -> None:
        _need(isinstance(value, list), where, "is no list")
        for number, one in enumerate(value):
            self.kind.check(one, f"{where}[{number}]")


@dataclass(frozen=True)
class Row(Kind):
    """A list of so many values, each of its own kind."""

    kinds: tuple[Kind, ...]

    def check(self, value: Any, where: str) -> None:
        _need(isinstance(value, list), where, "is no list")
        _need(len(value) == len(self.kinds), where, f"has {len(value)} values")
        for number, (kind, one) in enumerate(zip(self.kinds, value, strict=True)):
            kind.check(one, f"{where}[{number}]")


@dataclass(frozen=True)
class Fields(Kind):
    """An object with these fields and no others; the optional ones may be missing."""

    fields: Mapping[str, Kind]
    optional: frozenset[str] = frozenset()

    def check(self, value: Any, where: str) -> None:
        _need(isinstance(value, dict), where or "about", "is no object")
        before = f"{where}." if where else ""
        for name in value:
            _need(name in self.fields, shown(f"{before}{name}"), "is no field that is known")
        for name, kind in self.fields.items():
            if name in value:
                kind.check(value[name], f"{before}{name}")
            elif name not in self.optional:
                _refuse(f"{before}{name}", "is missing")


class Options(Kind):
    """What a policy was given: plain values by name, in ranges that cost no more than they should.

    Which names a policy has, it says itself (`policies.parse`).
    """

    def check(self, value: Any, where: str) -> None:
        _need(isinstance(value, dict), where, "is no object")
        _need(len(value) <= 64, where, "has more than 64 values")
        for name, one in value.items():
            said = shown(f"{where}.{name}")
            _need(name.isidentifier() and len(name) <= 64, said, "is no option")
            if name in OPTIONS:
                OPTIONS[name].check(one, said)
            elif isinstance(one, bool) or one is None:
                continue
            elif isinstance(one, str):
                Text(64).check(one, said)
                _need(one.isprintable(), said, "is no plain text")
            else:
                Number(-(1 << 20), 1 << 20).check(one, said)


# ---- what a file says of itself ----------------------------------------------------------------

_SEED = Whole(-(1 << 63), 1 << 64)
_HASH_BITS, _HASH_TABLES = Whole(1, 16), Whole(1, 4096)

OPTIONS: Mapping[str, Kind] = {
    "seed": _SEED,
    "hash_bits": _HASH_BITS,
    "hash_tables": _HASH_TABLES,
    "sketch": Whole(1, 4096),
    "representatives": Whole(1, 4096),
}
"""Options of policies that memory or time grows with."""

SETTINGS: Mapping[str, Kind] = {
    "policy": Text(200),
    "policy_options": Options(),
    "ratio": Number(1e-9, 1),
    "keep": Maybe(Whole(1)),
    "block_size": Whole(1, 1 << 20),
    "protection_divisor": Whole(3),
    "alpha": Maybe(Number(0, 1)),
    "pool": Maybe(Whole(1, 4097)),
    "hash_bits": Maybe(_HASH_BITS),
    "hash_tables": Maybe(_HASH_TABLES),
    "lookahead": Maybe(Whole(0, 1024)),
    "probe_tokens": Maybe(Whole(0, 1 << 20)),
    "positions": One(POSITIONS),
    "recall": One(WHERE),
    "recall_mode": Maybe(One(MODES)),
    "recall_share": One(SHARES),
}
"""Those of `Settings` that a file carries: how its document was read, and no more."""

_NOT_USED: Mapping[str, Kind] = {
    "scoring": One(SCORING),
    "recall_first": Text(200),
    "recall_file": One((None,)),
    "recall_bits": One(tuple(range(64, 1025, 64))),
    "recall_shortlist": Number(1, 1024),
}  # older files have them

BUDGET = Fields(
    {
        "tokens": Whole(),
        "block_size": Whole(1),
        "ratio": Number(1e-9, 1),
        "divisor": Whole(3),
        "shape": One(SHAPES),
        "sinks": Whole(),
        "recent": Whole(),
        "protected": Whole(),
        "grows": Flag(),
    },
    frozenset({"grows"}),
)

_TYPE = One(tuple(CACHE_TYPES))
_COMMON: Mapping[str, Kind] = {
    "version": Text(100),
    "model": Fields({"name": Text(), "bytes": Whole(0, 1 << 62), "samples": Text(64)}),
    "build": Text(1000),
    "cache": Text(200),
    "settings": Fields({**SETTINGS, **_NOT_USED}, frozenset({*_NOT_USED, "keep"})),
    "context": Fields({"type_k": _TYPE, "type_v": _TYPE, "flash_attn": One(("on", "off", "auto"))}),
    "budget": BUDGET,
    "compact": Flag(),
    "system": Maybe(Text(_TEXT)),
}
_SECONDS = {step: Number(0, 1e12) for step in (*STEPS, "total")}
_PARKED = Fields(
    {
        "number": Whole(),
        "first": Flag(),
        "budget": BUDGET,
        "offset": Whole(0, _POSITION),
        "most": Whole(),
        "compact": Flag(),
    }
)
ABOUT: Mapping[str, Fields] = {
    saved.DOCUMENT: Fields(
        {
            **_COMMON,
            "parked": Flag(),
            "next_position": Whole(0, _POSITION),
            "kept_per_block": Several(Whole()),
            "timings": Fields(_SECONDS, frozenset(_SECONDS)),
        }
    ),
    saved.CONVERSATION: Fields(
        {
            **_COMMON,
            "segments": Several(
                Row(
                    (
                        Whole(),
                        One((SYSTEM, DOCUMENT, TURN)),
                        Text(path=True),
                        Whole(),
                        Whole(),
                        Flag(),
                    )
                )
            ),
            "names": Several(Text(path=True)),
            "turns": Whole(),
            "thinnings": Whole(),
            "turn_open": Maybe(Whole()),
            "unread": Flag(),
            "cells": Whole(1),
            "max_tokens": Whole(1),
            "parked": Several(_PARKED),
        },
        frozenset({"parked"}),
    ),
}
"""What files of each kind say of themselves, in JSON."""


def check_about(kind: str, about: Mapping[str, Any]) -> None:
    """Refuses to write what could not be read again.

    Args:
        kind: one of `saved.KINDS`.
        about: what will be said.

    Raises:
        UserError: which setting no file can carry.
    """
    try:
        _check_about(kind, json.loads(json.dumps(about)))
    except (Refused, TypeError, ValueError) as error:
        raise UserError(f"cannot save: {error}, which no saved file can hold") from None


def _check_about(kind: str, about: Any) -> None:
    ABOUT[kind].check(about, "")
    parked = about["parked"] if kind == saved.CONVERSATION and "parked" in about else []
    for budget in (about["budget"], *(entry["budget"] for entry in parked)):
        blocks = -(-budget["tokens"] // budget["block_size"])
        _need(blocks <= _BLOCKS, "budget", f"has {blocks} blocks, more than {_BLOCKS}")


# ---- a file that was read ----------------------------------------------------------------------


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
        kind: one of `saved.KINDS`.
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


def read(path: str | Path | Saved, engine: Engine | None = None, kind: str | None = None) -> Saved:
    """Reads a saved file, which is compared with all that is written down here.

    Args:
        path: the file, or one that was read without an engine before.
        engine: that it is for: its model, build and cache must be those it was made with. None to
            see what it says of itself first; it can be used when it was read with an engine.
        kind: one of `saved.KINDS` that it must be; None for any.

    Returns:
        The open file; the caller closes it.

    Raises:
        UserError: no such file, not a regular one, of another kind or version, damaged, made with
            another model, build or cache, or with something in it that is not allowed. Nothing has
            changed then.
    """
    found = path if isinstance(path, Saved) else _opened(Path(path))
    try:
        if kind not in (None, found.kind):
            raise UserError(
                f"{found.path} holds a {found.kind}, not a {kind}; "
                f"ask --load {found.path} takes both"
            )
        if engine is not None:
            _compare(found, engine)
            try:
                _CONTENT[found.kind](found, engine)
            except Refused as error:
                raise _unusable(found.path, error) from None
    except BaseException:
        if found is not path:
            found.close()
        raise
    return found


def _opened(path: Path) -> Saved:
    """The file with what it says of itself, its digest found right."""
    file = _open(path)
    try:
        head, header = _header(path, file)
        kind = _kind(path, header)
        _check_digest(path, file, head, header["__metadata__"]["digest"])
        try:
            size = os.fstat(file.fileno()).st_size
            tensors = _entries(header, len(head), size)
            about = _json(header["__metadata__"]["about"])
            _check_about(kind, about)
        except Refused as error:
            raise _unusable(path, error) from None
        except (ValueError, RecursionError):
            raise _unusable(path, "what it says of itself is no plain JSON") from None
    except OSError as error:
        file.close()
        raise UserError(f"cannot read {path}: {error.strerror}; name a saved file") from error
    except BaseException:
        file.close()
        raise
    return Saved(path, kind, about, tensors, file)


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
    said = "Is a directory" if stat.S_ISDIR(mode) else f"it is {saved.what(mode)}"
    raise UserError(f"cannot read {path}: {said}; name a saved file")


def _header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The first bytes up to the data, and the JSON in them, of which the metadata is as it should.

    Raises:
        UserError: nothing that `saved.write` wrote.
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
        if len(header["__metadata__"]["digest"]) != len(saved.NO_DIGEST):
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
    if name == saved.FORMAT and len(rest) == 2 and rest[0] in saved.KINDS:
        kind, version = rest
        if version == saved.VERSION:
            return str(kind)
        raise UserError(
            f"{path} has version {shown(version)} of the form of saved files, this reads "
            f"{saved.VERSION}; read the document again"
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
    digest = hashlib.sha256(head.replace(said.encode(), saved.NO_DIGEST.encode(), 1))
    while piece := file.read(saved.CHUNK):
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
        _need(len(entry["shape"]) <= 8, said, "has more than 8 axes")
        array = Entry(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        first, last = entry["data_offsets"]
        _need(last - first == array.bytes, said, "is not as long as its shape")
        found[name] = array
    at = start
    for name, array in sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)):
        _need(array.start == at, f"array {shown(name)!r}", "does not follow the one before it")
        at += array.bytes
    _need(at == size, "the data", "does not end where the file does")
    return found


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it was cut off or changed since it was saved; read the document again"
    )


def _unusable(path: Path, why: object) -> UserError:
    return UserError(f"{path} is no saved file that can be used: {why}; read the document again")


# ---- identity ----------------------------------------------------------------------------------


def _compare(found: Saved, engine: Engine) -> None:
    """Refuses a file of another model, build or form of the cache."""
    about, path = found.about, found.path
    here, was = made_with(engine), about["model"]
    model = here["model"]
    if (model["samples"], model["bytes"]) != (was["samples"], was["bytes"]):
        raise UserError(
            f"{path} was saved with another model: {shown(was['name'])} of {was['bytes']} bytes, "
            f"not {shown(model['name'])} of {model['bytes']}; "
            f"give that one with --model{_named(was['bytes'])}"
        )
    if about["build"] != here["build"]:
        raise UserError(
            f"{path} was saved with {shown(about['build'])}, this is {here['build']}, whose rows "
            "may differ; read the document again"
        )
    if about["cache"] != here["cache"]:
        raise UserError(
            f"{path} was saved with {shown(about['cache'])}, this is {here['cache']}; load it with "
            "the types it was saved with"
        )


def _named(size: int) -> str:
    """What `--model` calls a file of that size, if models.txt knows it."""
    from laserkv_gguf import models

    found = [entry.name for entry in models.entries().values() if entry.size == size]
    return f" {found[0]}" if len(found) == 1 else ""


def check_policy(found: Saved, given: str) -> None:
    """Refuses a file whose policy is neither known by name here nor the one that was given.

    What `module:Class` names would be imported, and a file must not choose what is run.

    Args:
        found: the file, from `read`.
        given: the user's `--policy`.

    Raises:
        UserError: which flag to give, if it is the user's own.
    """
    name = found.about["settings"]["policy"]
    if name != given and name not in policies.registered():
        raise UserError(
            f"{found.path} was read with --policy {shown(name)}, which is not installed here, and "
            "no file chooses what is run; if it is yours, give the same --policy"
        )


# ---- contents ----------------------------------------------------------------------------------


def _budget(about: dict[str, Any]) -> Budget:
    return Budget(**about["budget"])


def _shaped(found: Saved, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """An array that must be there, of one of these types and of that shape."""
    entry = found.tensors.get(name)
    said = f"array {name!r}"
    if entry is None:
        _refuse(said, "is missing")
    _need(entry.dtype in dtypes, said, f"is of {entry.dtype}, not {' or '.join(dtypes)}")
    _need(entry.shape == shape, said, f"is of shape {list(entry.shape)}, not {list(shape)}")


def _length(found: Saved, name: str) -> int:
    """How long an array of one axis is."""
    entry = found.tensors.get(name)
    if entry is None or len(entry.shape) != 1:
        _refuse(f"array {name!r}", "is missing, or has not one axis")
    return entry.shape[0]


def _ascending(values: NDArray[np.int64], low: int, high: int, said: str) -> None:
    """Whole numbers from low to high - 1, each larger than the one before."""
    if len(values):
        _need(low <= int(values[0]) and int(values[-1]) < high, said, "goes out of bounds")
        # differences could overflow
        _need(bool((values[1:] > values[:-1]).all()), said, "is not in ascending order")


def _within(values: NDArray[np.int64], low: int, high: int, said: str) -> None:
    if values.size:
        inside = low <= int(values.min()) and int(values.max()) < high
        _need(inside, said, f"has values that are not from {low} to {high - 1}")


def _only(found: Saved, names: set[str]) -> None:
    for name in found.tensors:
        _need(name in names, f"array {shown(name)!r}", "is none that is known")


def _tokens(found: Saved, name: str, count: int, model: Model) -> None:
    _shaped(found, name, ("I32",), (count,))
    _within(found.whole(name), 0, model.vocab_size, f"array {name!r}")


def _row_shapes(engine: Engine, count: int) -> dict[str, tuple[int, ...]]:
    """Of keys and values of so many tokens."""
    model, options = engine.model, engine.options
    key = row_bytes(options.type_k, model.kv_heads * model.head_dim)
    value = row_bytes(options.type_v, model.kv_heads * model.value_dim)
    return {"keys": (model.layers, count, key), "values": (model.layers, count, value)}


def _document(found: Saved, engine: Engine) -> None:
    """The arrays of a document agree with its budget and the model."""
    about, model = found.about, engine.model
    budget, parked = _budget(about), about["parked"]
    _need(budget.tokens > 0, "budget.tokens", "is 0")
    _need(not (parked and budget.keeps_all), "budget", "keeps everything, so nothing is parked")
    _tokens(found, "tokens", budget.tokens, model)
    count = _length(found, "kept")
    _shaped(found, "kept", WHOLE, (count,))
    kept = found.whole("kept")
    _kept(kept, budget, "array 'kept'", protected=parked)
    _need(len(about["kept_per_block"]) <= len(budget.blocks), "kept_per_block", "is too long")
    names = {"tokens", "kept", "held", "positions", "keys", "values"}
    held = budget.tokens if parked else count
    _shaped(found, "held", WHOLE, (held,))
    every = np.arange(budget.tokens) if parked else kept
    _need(np.array_equal(found.whole("held"), every), "array 'held'", "is not what rows are for")
    if parked:
        names |= _rows(found, engine, "", budget, 0, about["compact"])
        _only(found, names)
        return
    where = np.arange(count) if about["compact"] else kept
    _shaped(found, "positions", ("I32",), (count,))
    _need(np.array_equal(found.whole("positions"), where), "array 'positions'", "does not fit kept")
    end = int(where[-1]) + 1
    _need(about["next_position"] == end, "next_position", f"is not {end}, where kept ends")
    for name, shape in _row_shapes(engine, count).items():
        _shaped(found, name, ("U8",), shape)
    _only(found, names)


def _kept(kept: NDArray[np.int64], budget: Budget, said: str, *, protected: bool) -> None:
    """Tokens in the cache: ascending, no more than the budget has, the last one among them.

    Args:
        protected: whether all anchors and the window must be there, as recalling takes for granted.
    """
    _ascending(kept, 0, budget.tokens, said)
    _need(0 < len(kept) <= budget.kept, said, f"has {len(kept)} tokens, not 1 to {budget.kept}")
    _need(int(kept[-1]) == budget.tokens - 1, said, "is without the last token")
    if protected:
        first, last = _protected(budget)
        inside = np.zeros(budget.tokens, bool)
        inside[kept] = True
        ends = inside[:first].all() and inside[last:].all()
        _need(bool(ends), said, "is without some anchors or tokens of the window")


def _protected(budget: Budget) -> tuple[int, int]:
    """Tokens between the anchors and the last window, half-open."""
    return budget.anchors, max(budget.anchors, budget.tokens - budget.window)


def _rows(
    found: Saved, engine: Engine, prefix: str, budget: Budget, offset: int, compact: bool
) -> set[str]:
    """Parked rows and what finds them; returns their names."""
    _need(not budget.keeps_all, "budget", "keeps everything, so nothing is parked")
    _need(offset + budget.tokens <= _POSITION, f"{prefix}offset", "is too large")
    model, count = engine.model, budget.tokens
    said = f"array {prefix + 'positions'!r}"
    _shaped(found, f"{prefix}positions", ("I32",), (count,))
    stood, read_at = found.whole(f"{prefix}positions"), offset + np.arange(count)
    if compact:
        _need(bool(((stood >= 0) & (stood <= read_at)).all()), said, "goes out of bounds")
    else:
        _need(np.array_equal(stood, read_at), said, "is not where they were read")
    for name, shape in _row_shapes(engine, count).items():
        _shaped(found, prefix + name, ("U8",), shape)
    names = {f"{prefix}{name}" for name in ("positions", "keys", "values")}
    signed = {f"{prefix}signatures", f"{prefix}centre"}
    if signed & found.tensors.keys():
        words = found.about["settings"].get("recall_bits", BITS) // 64
        heads = (model.layers, model.kv_heads)
        _shaped(found, f"{prefix}signatures", ("U64",), (*heads, words, count))
        _shaped(found, f"{prefix}centre", ("F32",), (*heads, model.head_dim))
        names |= signed
    if f"{prefix}units" in found.tensors:
        names |= {f"{prefix}units", *_index(found, engine, prefix, count)}
    return names


def _index(found: Saved, engine: Engine, prefix: str, count: int) -> Iterator[str]:
    """What a policy noted of units of tokens, as it would note it here."""
    name = f"{prefix}units"
    units = _length(found, name)
    _shaped(found, name, WHOLE, (units,))
    starts = found.whole(name)
    _need(units > 0 and starts[0] == 0, f"array {name!r}", "does not begin with the first token")
    _ascending(starts, 0, count, f"array {name!r}")
    begins = f"{prefix}{INDEX}"
    notes = {tensor: entry for tensor, entry in found.tensors.items() if tensor.startswith(begins)}
    for tensor, entry in notes.items():
        fits = len(entry.shape) > 1 and entry.shape[:2] == (engine.model.layers, units)
        _need(fits, f"array {shown(tensor)!r}", "is not of these layers and units")
    if found.about["settings"]["policy"] == engine.policy.name and engine.policy.unit:
        wanted = _notes(engine)
        _need(
            {begins + one for one in wanted} == notes.keys(),
            f"array {shown(begins)!r}",
            "is not what the policy notes",
        )
        for one, array in wanted.items():
            shape = (array.shape[0], units, *array.shape[2:])
            _shaped(found, begins + one, (saved.TYPES[str(array.dtype)],), shape)
    return iter(notes)


def _notes(engine: Engine) -> dict[str, NDArray[Any]]:
    """What the engine's policy notes of one unit of tokens, for the shapes."""
    model = engine.model
    dtype = np.float32 if engine.options.type_k == "f32" else np.float16
    tokens = np.arange(min(engine.policy.unit, 4096))
    keys = np.zeros((model.layers, len(tokens), model.kv_heads, model.head_dim), dtype)
    asked = np.zeros((model.layers, 0, model.heads, model.head_dim), dtype)
    queries = asked if engine.policy.needs.block_queries else None
    seen = policies.Candidates(tokens, (0, len(tokens)), keys=keys, block_queries=queries)
    return engine.policy.index(seen)


INDEX = "index."  # how the names of a policy's own notes begin


def prefix_of(number: int) -> str:
    """How the names of a conversation's parked rows begin, by the number of their document."""
    return f"parked {number}."


def _conversation(found: Saved, engine: Engine) -> None:
    """Segments, rows of the ledger, cells and parked rows of a conversation agree."""
    about, model = found.about, engine.model
    segments = {segment[0]: segment for segment in about["segments"]}
    _segments(about, segments)
    names = {"state", "rows", "tokens", "pools", "pending"}
    _tokens(found, "tokens", sum(segment[3] for segment in segments.values()), model)
    _shaped(found, "pools", ("I8",), (sum(segment[4] for segment in segments.values()),))
    _within(found.whole("pools"), 0, 3, "array 'pools'")
    pending = _length(found, "pending")
    _need(pending <= 1, "array 'pending'", "has more than one token")
    _tokens(found, "pending", pending, model)
    spoken = any(segment[1] == TURN for segment in segments.values())
    _need(not pending or spoken, "array 'pending'", "has a token of no turn")
    for number in range(len(about["names"])):
        name = f"text {number}"
        _shaped(found, name, ("U8",), (_length(found, name),))
        try:
            found.array(name).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            _refuse(f"array {name!r}", "is no UTF-8")
        names.add(name)
    _ledger(found, segments)
    _state(found, engine)
    entries = about.get("parked", [])
    numbers = [entry["number"] for entry in entries]
    _need(len(set(numbers)) == len(numbers), "parked", "has a document twice")
    _need(sum(entry["first"] for entry in entries) <= 1, "parked", "has two first documents")
    if entries:
        parts = _Parts.of(found, segments)
        for entry in entries:
            names |= _parked(found, engine, parts, entry)
    _only(found, names)


def _segments(about: dict[str, Any], segments: dict[int, Any]) -> None:
    _need(len(segments) == len(about["segments"]), "segments", "has a number twice")
    numbers = [segment[0] for segment in about["segments"]]
    _need(numbers == sorted(numbers), "segments", "is not in ascending order")
    kinds = [segment[1] for segment in segments.values()]
    _need(kinds[:1] == [SYSTEM], "segments", "does not begin with what opens the conversation")
    _need(kinds.count(SYSTEM) == 1, "segments", "has several openings")
    documents = [segment[2] for segment in segments.values() if segment[1] == DOCUMENT]
    known = set(about["names"])
    _need(len(known) == len(about["names"]), "names", "has a name twice")
    _need(len(set(documents)) == len(documents), "segments", "has a document twice")
    _need(known.issuperset(documents), "segments", "has a document without a text")
    for number, segment in segments.items():
        pools = segment[3] if segment[1] == DOCUMENT else 0
        _need(segment[4] == pools, f"segments {number}", f"has {segment[4]} pools, not {pools}")
    turns = kinds.count(TURN)
    _need(about["turns"] <= turns, "turns", f"is {about['turns']}, with {turns} that were said")
    opened = about["turn_open"]
    _need(opened is None or segments.get(opened, [0, 0])[1] == TURN, "turn_open", "is no turn")


def _ledger(found: Saved, segments: dict[int, Any]) -> None:
    """Every row is a token of a segment, in the order of both."""
    said = "array 'rows'"
    shape = found.tensors["rows"].shape if "rows" in found.tensors else ()
    _need(len(shape) == 2, said, "is missing, or has not two axes")
    _shaped(found, "rows", WHOLE, (3, shape[1]))
    segment, index, position = found.whole("rows")
    _ascending(position, 0, _POSITION, f"{said}, positions")
    numbers = np.array(list(segments), np.int64)
    lengths = np.array([one[3] for one in segments.values()], np.int64)
    at = np.minimum(np.searchsorted(numbers, segment), len(numbers) - 1)
    _need(bool((numbers[at] == segment).all()), said, "has tokens of no segment")
    inside = (index >= 0) & (index < lengths[at])
    _need(bool(inside.all()), said, "has tokens out of their segment's bounds")
    order = np.argsort(segment, kind="stable")
    segment, index = segment[order], index[order]
    follows = (index[1:] > index[:-1]) | (segment[1:] != segment[:-1])
    _need(bool(follows.all()), said, "has a segment's tokens not in ascending order")


def _state(found: Saved, engine: Engine) -> None:
    """What llama.cpp's loader is given is a state as it writes them, of just these positions."""
    size = _length(found, "state")
    _shaped(found, "state", ("U8",), (size,))
    try:
        positions = rows.checked(engine.model, engine.options, found.array("state"))
    except ValueError as error:
        _refuse("array 'state'", str(error))
    same = np.array_equal(np.sort(positions), found.whole("rows")[2])
    _need(same, "array 'state'", "holds other positions than 'rows'")


@dataclass(frozen=True)
class _Parts:
    """The tokens of a conversation's opening and documents, by the numbers of their segments."""

    opening: int
    documents: dict[int, NDArray[np.int64]]
    head: NDArray[np.int64]

    @staticmethod
    def of(found: Saved, segments: dict[int, Any]) -> _Parts:
        tokens = found.whole("tokens")
        starts = np.cumsum([0, *(segment[3] for segment in segments.values())])
        parts = {
            number: tokens[start : start + segment[3]]
            for (number, segment), start in zip(segments.items(), starts, strict=False)
            if segment[1] != TURN
        }
        opening = next(iter(segments))
        return _Parts(opening, parts, parts.pop(opening))


def _parked(found: Saved, engine: Engine, parts: _Parts, entry: dict[str, Any]) -> set[str]:
    """The parked rows of one document agree with what the ledger says of it."""
    number, budget = entry["number"], _budget(entry)
    said, prefix = f"parked {number}", prefix_of(number)
    _need(number in parts.documents, said, "is no document")
    leads = number == next(iter(parts.documents)) and entry["offset"] == 0
    _need(leads if entry["first"] else entry["offset"] > 0, said, "stands in the wrong place")
    # the first one was read together with what opens the conversation
    opening = parts.head if entry["first"] else parts.head[:0]
    own = np.concatenate((opening, parts.documents[number]))
    head, read = len(opening), len(own)
    _need(budget.tokens == read, f"{said}, budget.tokens", f"is {budget.tokens}, not {read}")
    names = _rows(found, engine, prefix, budget, entry["offset"], entry["compact"])
    _tokens(found, f"{prefix}tokens", read, engine.model)
    same = np.array_equal(found.whole(f"{prefix}tokens"), own)
    _need(same, f"{said}, tokens", "are not the document's")
    start, last = _protected(budget)
    least = read - (last - start)
    fits = least <= entry["most"] <= budget.kept
    _need(fits, f"{said}, most", f"is {entry['most']}, not {least} to {budget.kept}")
    for name in ("kept", "read"):
        _shaped(found, prefix + name, WHOLE, (_length(found, prefix + name),))
        _kept(found.whole(prefix + name), budget, f"{said}, {name}", protected=True)
    _shaped(found, f"{prefix}where", WHOLE, (read,))
    where, kept = found.whole(f"{prefix}where"), found.whole(f"{prefix}kept")
    _need(np.array_equal(np.flatnonzero(where != -1), kept), f"{said}, where", "is not of 'kept'")
    _ascending(where[kept], entry["offset"], _POSITION, f"{said}, where")
    segment, index, position = found.whole("rows")
    for part, low, high in ((parts.opening, 0, head), (number, head, read)):
        if low == high:
            continue
        rows = segment == part
        there = kept[(kept >= low) & (kept < high)]
        same = np.array_equal(index[rows], there - low) and np.array_equal(
            position[rows], where[there]
        )
        _need(same, f"{said}, where", "is not what 'rows' says")
    return names | {prefix + name for name in ("tokens", "kept", "read", "where")}


_CONTENT = {saved.DOCUMENT: _document, saved.CONVERSATION: _conversation}
