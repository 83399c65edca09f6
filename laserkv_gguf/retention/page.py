"""The retention report: one HTML file with the text, what was kept of it, and what that cost.

It holds its own style and script and loads nothing. Documents are data to it: text is escaped where
the template writes it, and the script puts it in as text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laserkv_gguf.conversation.account import lines
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import text
from laserkv_gguf.retention.spans import BEFORE, Retention, same_text
from laserkv_gguf.version import VERSION

if TYPE_CHECKING:
    from jinja2 import Environment

MOST = 2  # reports that fit side by side

# what the bar of times is made of: a field of the account, and what it says to a reader
_STEPS = (
    ("decode_seconds", "reading"),
    ("probe_seconds", "asking each block"),
    ("lookahead_seconds", "drafting"),
    ("score_seconds", "scoring"),
    ("select_seconds", "choosing"),
    ("evict_seconds", "evicting"),
    ("park_seconds", "parking"),
    ("recall_seconds", "recalling"),
)
_ANSWER = "answering"


@dataclass(frozen=True)
class Step:
    """A part of the bar of times."""

    label: str
    seconds: str
    share: str
    kind: int


def render(reports: Sequence[Retention]) -> str:
    """A whole HTML page of one report, or of two about the same text side by side.

    Raises:
        UserError: none, more than two, or of other texts.
    """
    if not 1 <= len(reports) <= MOST:
        raise UserError(f"a page shows one report or two, not {len(reports)}")
    same_text(reports)
    environment = _environment()
    folder = files("laserkv_gguf.retention")
    template = environment.from_string((folder / "report.html.j2").read_text("utf-8"))
    from markupsafe import Markup

    named = [part.name for part in reports[0].parts if part.name != BEFORE]
    accounts = [report.account for report in reports]
    return template.render(
        name=", ".join(named[-3:]) or "no document",
        model=reports[0].model,
        version=VERSION,
        date=datetime.date.today().isoformat(),
        reports=reports,
        any_account=any(accounts),
        rows=_rows(accounts),
        times=[(report.title, *_times(report.account)) for report in reports if report.account],
        style=Markup((folder / "report.css").read_text("utf-8")),
        script=Markup((folder / "report.js").read_text("utf-8")),
        data=Markup(_in_script([report.as_dict() for report in reports])),
    )


def write(path: str | Path, reports: Sequence[Retention]) -> int:
    """Writes a page beside its name, then renames it; returns its bytes.

    Raises:
        UserError: as `render`, or the place cannot be written to.
        LaserKVError: the disk is full; nothing is left behind.
    """
    return text.write(path, render(reports))


def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _in_script(data: Any) -> str:
    """JSON that nothing in it can end early: no <, > or & is left, nor what ends a line."""
    said = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        said = said.replace(character, f"\\u{ord(character):04x}")
    return said


def _rows(accounts: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The account as a small table: what each line says of each report."""
    said = [dict(lines(account)) if account else {} for account in accounts]
    labels = list(dict.fromkeys(label for one in said for label in one))
    return [(label, [one.get(label, "") for one in said]) for label in labels]


def _times(account: Mapping[str, Any]) -> tuple[str, list[Step]]:
    """All seconds of an answer, and its parts."""
    speed, generated = account["decode_tokens_per_second"], account["generated_tokens"]
    spent = [(label, float(account[name])) for name, label in _STEPS]
    spent.append((_ANSWER, generated / speed if speed else 0.0))
    total = sum(seconds for _, seconds in spent)
    steps = [
        Step(label, _seconds(seconds), f"{seconds / total:.6f}", kind)
        for kind, (label, seconds) in enumerate(spent)
        if seconds > 0
    ]
    return _seconds(total), steps


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
