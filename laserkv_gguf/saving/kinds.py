"""Kinds of fields that a saved file may have, and how each is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from laserkv_gguf.shown import short

_COUNT = 1 << 31  # no number of tokens, cells or turns is larger
_NAME = 4096  # characters of a name


class Refused(Exception):
    """A field is not what it may be; the text says which and why."""


def refuse(field: str, why: str) -> NoReturn:
    """Refuses a field."""
    raise Refused(f"{field} {why}")


def need(holds: bool, field: str, why: str) -> None:
    """Refuses a field of which something does not hold."""
    if not holds:
        refuse(field, why)


def shown(value: object) -> str:
    """Something out of a file, to be shown: short, and nothing that a terminal would act on."""
    return short(value, 200)


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
        need(type(value) is int, where, "is no whole number")
        need(self.low <= value <= self.high, where, f"is {value}, not {self.low} to {self.high}")


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def check(self, value: Any, where: str) -> None:
        need(type(value) in (int, float), where, "is no number")
        need(
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
        need(isinstance(value, str), where, "is no text")
        need(len(value) <= self.most, where, f"has more than {self.most} characters")
        try:
            value.encode("utf-8", "surrogateescape" if self.path else "strict")
        except UnicodeEncodeError:
            refuse(where, "is no Unicode text")


@dataclass(frozen=True)
class One(Kind):
    """One of a few values."""

    of: tuple[Any, ...]

    def check(self, value: Any, where: str) -> None:
        if not any(type(value) is type(one) and value == one for one in self.of):
            refuse(where, f"is {shown(value)}, not one of {', '.join(map(str, self.of))}")


@dataclass(frozen=True)
class Flag(Kind):
    """True or false."""

    def check(self, value: Any, where: str) -> None:
        need(isinstance(value, bool), where, "is neither true nor false")


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
        need(isinstance(value, list), where, "is no list")
        for number, one in enumerate(value):
            self.kind.check(one, f"{where}[{number}]")


@dataclass(frozen=True)
class Row(Kind):
    """A list of so many values, each of its own kind."""

    kinds: tuple[Kind, ...]

    def check(self, value: Any, where: str) -> None:
        need(isinstance(value, list), where, "is no list")
        need(len(value) == len(self.kinds), where, f"has {len(value)} values")
        for number, (kind, one) in enumerate(zip(self.kinds, value, strict=True)):
            kind.check(one, f"{where}[{number}]")


@dataclass(frozen=True)
class Fields(Kind):
    """An object with these fields and no others; the optional ones may be missing."""

    fields: Mapping[str, Kind]
    optional: frozenset[str] = frozenset()

    def check(self, value: Any, where: str) -> None:
        need(isinstance(value, dict), where or "about", "is no object")
        before = f"{where}." if where else ""
        for name in value:
            need(name in self.fields, shown(f"{before}{name}"), "is no field that is known")
        for name, kind in self.fields.items():
            if name in value:
                kind.check(value[name], f"{before}{name}")
            elif name not in self.optional:
                refuse(f"{before}{name}", "is missing")
