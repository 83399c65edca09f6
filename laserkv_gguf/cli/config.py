"""What one always types: flags from a file and from the environment.

A flag wins over the environment, the environment over the file, the file over what is built in. The
file is `laserkv.toml` in the user's own folder for settings, or the one that LASERKV_CONFIG names.
None is looked for in the folder one stands in: whoever made that folder would choose a policy, and
with it code that is run.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import one_line

PREFIX = "LASERKV_"
NAME = "laserkv.toml"
_LARGEST = 1 << 20  # bytes of a file with settings


def variable(field: str) -> str:
    """The environment variable of a flag: LASERKV_CTX_SIZE for --ctx-size."""
    return PREFIX + field.upper()


def place() -> Path | None:
    """The file with settings; None where there is none.

    Raises:
        UserError: LASERKV_CONFIG names a file that is not there.
    """
    named = os.environ.get(PREFIX + "CONFIG")
    if named is not None:
        if not named:
            return None
        path = Path(named).expanduser()
        if not path.is_file():
            raise UserError(f"LASERKV_CONFIG names {named}, which is no file; unset it or mend it")
        return path
    import platformdirs

    path = platformdirs.user_config_path("laserkv-gguf") / NAME
    return path if path.is_file() else None


def load(commands: Mapping[str, Mapping[str, type]]) -> dict[str, dict[str, Any]]:
    """The file's settings for every command, as the command line's defaults.

    Args:
        commands: the flags of each command that may be set, by field, with their types.

    Raises:
        UserError: the file cannot be read, is no TOML, or sets what cannot be set.
    """
    path = place()
    if path is None:
        return {}
    known: dict[str, type] = {}
    for flags in commands.values():
        known.update(flags)
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    content = _read(path)
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name, value in content.items():
        if name not in tables:
            field = _field(path, name, known)
            _check(path, name, value, known[field])
            for command, flags in commands.items():
                if field in flags:
                    found[command][field] = value
    for name, table in tables.items():
        if name not in commands:
            raise UserError(f"{path}: [{one_line(name)}] is no command{_near(name, commands)}")
        for flag, value in table.items():
            field = _field(path, flag, commands[name])
            _check(path, flag, value, commands[name][field])
            found[name][field] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} is no file with settings: it has more than 1 MiB")
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no TOML: {one_line(str(error))}") from error


def _field(path: Path, flag: str, known: Mapping[str, type]) -> str:
    field = flag.replace("-", "_")
    if field not in known:
        raise UserError(f"{path}: {one_line(flag)} cannot be set{_near(field, known)}")
    return field


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    said = near[0].replace("_", "-") if near else ""
    return f"; did you mean {said}?" if said else "; --help lists what can"


def _check(path: Path, flag: str, value: Any, kind: type) -> None:
    wanted = {
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
        bool: "true or false",
    }
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind is list:
        fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not fits:
        said = wanted.get(kind, 'a list of texts, such as ["values=norm"]')
        raise UserError(f"{path}: {one_line(flag)} must be {said}")
