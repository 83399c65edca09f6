"""All policies by name: the files of this folder, entry points, or `module:Class`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Held, Needs, Policy, PolicyError, checked

__all__ = [
    "Candidates",
    "Held",
    "Needs",
    "Policy",
    "PolicyError",
    "available",
    "checked",
    "find",
    "make",
    "named",
    "parse",
    "registered",
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


def registered() -> list[str]:
    """The names of all policies that are installed: built in, and of other packages."""
    return [*available(), *(point.name for point in entry_points(group=GROUP))]


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
        if str(Path.cwd()) not in sys.path:  # a scratch file lies where the user is
            sys.path.append(str(Path.cwd()))
        try:
            return _policy_class(getattr(importlib.import_module(module), attribute), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--policy {name}: {error}") from error
    names = registered()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise UserError(f"--policy {name} is unknown; did you mean {' or '.join(near)}?")


def _policy_class(value: Any, name: str) -> type[Policy]:
    if not (isinstance(value, type) and issubclass(value, Policy)):
        raise UserError(f"--policy {name} is not a subclass of laserkv_gguf.policies.Policy")
    return value


def make(name: str, **options: Any) -> Policy:
    """A policy with those of the options that it has; the others are for other policies."""
    kind = find(name)
    return kind(**{key: value for key, value in options.items() if key in _options(kind)})


def named(said: str, **options: Any) -> Policy:
    """A policy of a name with options, such as "kvzip values=norm".

    Args:
        **options: for those that have them, where `said` does not say otherwise.

    Raises:
        UserError: as of `find`, `parse` and the policy itself.
    """
    name, *given = said.split() or [""]
    return make(name, **{**options, **parse(name, given)})


def parse(name: str, given: Iterable[str]) -> dict[str, Any]:
    """`key=value` options of a policy, as its fields' types.

    Raises:
        UserError: not `key=value`, an option the policy does not have (near ones are named), or a
            value of another type.
    """
    fields, values = _options(find(name)), {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--policy-option {text!r} is not key=value")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.4) or list(fields)
            known = f"it has {', '.join(near)}" if near else "it has none"
            raise UserError(f"policy {name} has no option {key!r}; {known}")
        values[key] = _value(key, value.strip(), fields[key])
    return values


def _options(kind: type[Policy]) -> dict[str, Any]:
    """The options of a policy and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.init}


def _value(key: str, text: str, default: Any) -> Any:
    """A value of the default's type; None stands for whatever a number would be."""
    kind = float if default is None else type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(f"--policy-option {key}={text}: give a {kind.__name__}") from None
