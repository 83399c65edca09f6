"""Errors a user can cause: one line each, what is wrong and what to do about it.

Messages are written with the command line's flags, for that is what most people type. Who calls
from Python reads the arguments of `LaserKV` in their place (`arguments.py`).
"""

from __future__ import annotations

import numbers
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from laserkv_gguf.arguments import by_arguments

_FLAGS = False  # whether errors are read by somebody who types flags


@contextmanager
def named_by_flags() -> Iterator[None]:
    """In the block errors name flags: what the command line runs in."""
    global _FLAGS
    before, _FLAGS = _FLAGS, True
    try:
        yield
    finally:
        _FLAGS = before


class LaserKVError(Exception):
    """Something failed while running; the command line ends with exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        said = self.with_flags
        # at the end of the interpreter there is nothing left to rewrite it with
        return said if _FLAGS or sys.is_finalizing() else by_arguments(said)

    @property
    def with_flags(self) -> str:
        """The message as the command line says it."""
        return super().__str__()


class UserError(LaserKVError):
    """Unusable arguments or input; the message names the remedy; exit code 2."""

    exit_code = 2


class Closed(UserError):
    """The engine, or what it works with, was closed, or belongs to another process; exit code 2.

    What was under way when it was closed ends with this, and so does every call afterwards.
    """


class OutOfMemory(UserError):
    """What is asked for does not fit into memory; it may elsewhere, or another time."""


class Busy(LaserKVError):
    """Too many calls wait for the engine already; ask again later."""


class Cancelled(LaserKVError):
    """Reading or answering was stopped on request; exit code 130."""

    exit_code = 130


def check_type(name: str, value: object, hint: Any) -> None:
    """Refuses an argument of another type than it is declared with.

    Args:
        hint: a class, or a union of some. Numbers of NumPy are numbers; True and False are none.

    Raises:
        UserError: with the remedy in one line.
    """
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    for kind in kinds:
        if isinstance(value, bool) and kind in (int, float):
            continue
        if isinstance(value, _WIDER.get(kind, kind)):
            return
    wanted = " or ".join(_CALLED.get(kind, kind.__name__) for kind in kinds)
    said = repr(value)
    shown = said if len(said) <= 40 else f"{said[:40]}…"
    raise UserError(f"{name} is {shown}, of type {type(value).__name__}; give {wanted}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


_WIDER: dict[type, type] = {int: numbers.Integral, float: numbers.Real}
_CALLED: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    Mapping: "a dict",
    bool: "True or False",
    type(None): "None",
}
