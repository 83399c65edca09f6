"""All policies by name: the files of this folder, entry points, or `module:Class`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy, PolicyError, checked

__all__ = [
    "Candidates",
    "Needs",
    "Policy",
    "PolicyError",
    "available",
    "checked",
    "find",
    "make",
]

GROUP = "laserkv_gguf.policies"


@cache
def available() -> dict[str, type[Policy]]:
    """The policies of this folder, by name."""
    found: dict[str, type[Policy]] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Policy) and value.name:
                found[value.name] = value
    return dict(sorted(found.items()))


def find(name: str) -> type[Policy]:
    """A policy's class: built in, of an installed package, or `module:Class`.

    Raises:
        UserError: no such policy; the message names the near ones.
    """
    if name in available():
        return available()[name]
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _policy_class(point.load(), name)
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return _policy_class(getattr(importlib.import_module(module), attribute), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--policy {name}: {error}") from error
    names = [*available(), *(point.name for point in entry_points(group=GROUP))]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise UserError(f"--policy {name} is unknown; did you mean {' or '.join(near)}?")


def _policy_class(value: Any, name: str) -> type[Policy]:
    if not (isinstance(value, type) and issubclass(value, Policy)):
        raise UserError(f"--policy {name} is not a subclass of laserkv_gguf.policies.Policy")
    return value


def make(name: str, **options: Any) -> Policy:
    """A policy with those of the options that it has; the others are for other policies."""
    kind = find(name)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    return kind(**{key: value for key, value in options.items() if key in fields})
