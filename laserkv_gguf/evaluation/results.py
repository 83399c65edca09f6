"""Results on disk: a line a sample and policy, with the configuration beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files.journal import Journal

Row = dict[str, Any]
Key = tuple[str, int, int, str, float]


def key_of(row: Row) -> Key:
    """What a row is the result of: task, length, sample, policy, ratio."""
    return row["task"], row["length"], row["sample"], row["policy"], row["ratio"]


class Results:
    """`results.jsonl` and `config.json` of a folder.

    The configuration is written first. A row is one write of one line; a line that was torn by a
    crash is dropped when the folder is opened again. Runs that ask for other tasks, lengths,
    policies, ratios or more samples add to the folder: none of these changes what a row holds.

    Args:
        folder: made where it is missing.
        config: what decides the results, as JSON.
        command: what was typed, to be remembered with the others that led to the results.

    Attributes:
        config: what all runs into the folder asked for together, and their `commands`.

    Raises:
        UserError: the folder holds results of another configuration, or a broken line.
        LaserKVError: it cannot be written.
    """

    def __init__(self, folder: Path, config: dict[str, Any], command: str | None = None) -> None:
        self.folder, self.path = folder, folder / "results.jsonl"
        config = {**json.loads(json.dumps(config)), "commands": [command] if command else []}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.config = self._joined(folder / "config.json", config)
        except OSError as error:
            raise LaserKVError(f"cannot write {folder}: {error.strerror}") from error
        self._journal = Journal(self.path)
        self.done = {self._checked(number, row) for number, row in enumerate(self.rows, 1)}

    def _joined(self, path: Path, config: dict[str, Any]) -> dict[str, Any]:
        """What is there and what is asked for now, written where that is more than was there."""
        there = None
        if path.exists():
            try:
                there = json.loads(path.read_text("utf-8"))
                both = joined(there, config)
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is no configuration of ours; use another --out") from error
            differences = difference(_deciding(there, both), _deciding(config, both))
            if differences:
                raise UserError(
                    f"{self.folder} holds results of another configuration "
                    f"({'; '.join(differences)}); use another --out, or the settings of then"
                )
            config = both
        elif self.path.exists():
            raise UserError(f"{self.path} has no config.json beside it; use another --out")
        if config != there:
            write(path, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        return config

    @property
    def rows(self) -> list[Row]:
        """All results there are."""
        return self._journal.entries

    def _checked(self, number: int, row: Row) -> Key:
        try:
            return key_of(row)
        except KeyError as error:
            self.close()
            raise UserError(
                f"{self.path}, line {number} is broken; delete that line, and the sample runs again"
            ) from error

    def add(self, row: Row) -> None:
        """Appends a row.

        Raises:
            LaserKVError: it cannot be written; the rows before it stay whole.
        """
        self._journal.add(row)
        self.done.add(key_of(row))

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_GROWING = ("tasks", "lengths", "samples", "commands")  # more of these leaves a row as it is


def joined(there: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The configuration of two runs together: what either asked for, else what is asked now."""
    both = {**there, **now}
    for name in ("tasks", "commands"):
        both[name] = list(dict.fromkeys([*there.get(name, ()), *now.get(name, ())]))
    both["lengths"] = sorted({*there.get("lengths", ()), *now.get("lengths", ())})
    both["samples"] = max(there.get("samples", 0), now.get("samples", 0))
    both["policies"] = {**there.get("policies", {}), **now.get("policies", {})}
    for name, settings in both["policies"].items():
        ratios = [one.get("policies", {}).get(name, {}).get("ratios", ()) for one in (there, now)]
        both["policies"][name] = {**settings, "ratios": sorted({*ratios[0], *ratios[1]})[::-1]}
    return both


def _deciding(one: dict[str, Any], both: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: `one` without what may grow, with the policies only `both` have."""
    policies = {**both["policies"], **one.get("policies", {})}
    return {
        **{name: value for name, value in one.items() if name not in _GROWING},
        "policies": {name: {**known, "ratios": None} for name, known in policies.items()},
    }


def difference(there: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two configurations, in words."""
    if isinstance(there, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*there, *now}):
            inner = f"{name}.{key}" if name else key
            found += difference(there.get(key), now.get(key), inner)
        return found
    if there == now:
        return []
    return [f"{name}: {_short(there)} there, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        LaserKVError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise LaserKVError(f"cannot write {path}: {error.strerror}") from error
