"""Draw the plots of an evaluation once more, from its summary.csv.

    python scripts/redraw.py docs/evaluation/summary.csv --out FOLDER

For figures that were measured before the plots looked as they do now. Nothing is measured.
"""

from __future__ import annotations

import argparse
import csv
import typing
from pathlib import Path

from laserkv_gguf.evaluation import plots
from laserkv_gguf.evaluation.report import Line


def main() -> None:
    """Read the table, draw, say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("summary", type=Path, help="summary.csv of an evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG and SVG")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for path in plots.draw(lines(given.summary), given.out):
        print(path)


def lines(summary: Path) -> list[Line]:
    """The lines of a table, as they were before they were written."""
    hints = typing.get_type_hints(Line)
    with summary.open(encoding="utf-8", newline="") as file:
        return [
            Line(**{name: _value(text, hints[name]) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def _value(text: str, hint: object) -> object:
    if not text:
        return None
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0](text)


if __name__ == "__main__":
    main()
