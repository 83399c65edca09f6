"""What a terminal may be shown: the one filter for everything that others wrote.

A model's name, a file's name, a template's error, a document and an answer may all hold what a
terminal obeys instead of showing: escape sequences that move the cursor, set the title, answer for
the user or write the clipboard, and marks that make a line read other than it is.

- Control characters are never shown: C0 but tab and line feed, DEL, and C1, which some terminals
  take for escape sequences. Without its ESC a sequence is plain text.
- The overrides U+202D and U+202E are never shown. They turn letters round whatever the script, so
  that "exe.txt" may stand where "txt.exe" does; no text needs them.
- The other marks of direction, U+202A to U+202C and U+2066 to U+2069, belong into Arabic and Hebrew
  text, and what they do ends with the line. Answers and documents (`running`) keep them; names,
  errors and whatever else stands in a line of the program's own do not.
- Lone surrogates, which stand for bytes that are no UTF-8, are shown as U+FFFD.

Only what is shown is filtered: answers in a pipe or a file are as the model gave them.
"""

from __future__ import annotations

import logging
import re

_CONTROLS = [code for code in (*range(32), *range(127, 160)) if code not in (9, 10)]
_OVERRIDES, _DIRECTIONS = (0x202D, 0x202E), (0x202A, 0x202B, 0x202C, *range(0x2066, 0x206A))
_RUNNING = dict.fromkeys((*_CONTROLS, *_OVERRIDES))
_LINE = dict.fromkeys((*_RUNNING, *_DIRECTIONS))
_SURROGATES = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """Text that UTF-8 can say: lone surrogates become U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def harmless(text: str, *, running: bool = False) -> str:
    """Text without what a terminal would obey.

    Args:
        running: an answer or a document, which may be written from right to left.
    """
    return whole(text).translate(_RUNNING if running else _LINE)


def one_line(text: str) -> str:
    """As `harmless`, in one line: what others wrote cannot begin a line of its own."""
    return harmless(" ".join(text.splitlines()))


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def short(value: object, most: int = 40) -> str:
    """Something out of a file, in a line of at most so many characters."""
    said = value if isinstance(value, str) else repr(value)
    said = "".join(char if char.isprintable() else "?" for char in said[: most + 1])
    return said if len(said) <= most else f"{said[: most - 1]}…"


class Formatter(logging.Formatter):
    """Log records as they may be shown."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def counted(number: int, what: str) -> str:
    """1 block, 2 blocks, 1,000 blocks."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
