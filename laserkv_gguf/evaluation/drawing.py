"""How plots look: alike everywhere, legible at the width of a page, in the light and in the dark.

An SVG holds the colours of ink, grid and ground as variables of its own style sheet, which the dark
changes; a PNG is for the light.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laserkv_gguf.errors import LaserKVError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID, GROUND = "#1b1b1b", "#d4d4d4", "#ffffff"
# told apart by the colour-blind, and on white as on black (Okabe and Ito); then by their marks
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
MARKS = "osD^v<>Ph*Xpd"  # 13, beside 7 colours: 91 looks
_DARK = {INK: ("--ink", "#ececec"), GRID: ("--grid", "#3a3d42"), GROUND: ("--ground", "#16181b")}


@contextmanager
def styled() -> Iterator[None]:
    """Figures that are made in the block look alike."""
    import matplotlib as mpl

    mpl.use("Agg")
    style: Any = {
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.labelsize": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "lines.markersize": 5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.edgecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "figure.facecolor": GROUND,
        "axes.facecolor": GROUND,
        "savefig.facecolor": GROUND,
    }
    with mpl.rc_context(style):
        yield


def marked(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and mark of one of several lines; `full`, which others are held to, is dashed ink."""
    mark = {"marker": MARKS[names.index(name) % len(MARKS)]}
    if name == "full":
        return {**mark, "color": INK, "linestyle": "--"}
    others = [other for other in names if other != "full"]
    return {**mark, "color": COLOURS[others.index(name) % len(COLOURS)]}


def only_drawn(axes: Any) -> None:
    """Takes panels without data out of a grid (rows, columns); labels go to those that are left."""
    for across in axes:
        for axis in across:
            if not axis.has_data():
                axis.set_visible(False)
    rows, columns = axes.shape
    for column in range(columns):
        shown = [axis for axis in axes[:, column] if axis.get_visible()]
        if shown and shown[-1] is not axes[rows - 1, column]:
            shown[-1].set_xlabel(axes[rows - 1, column].get_xlabel() or shown[-1].get_xlabel())
            shown[-1].tick_params(labelbottom=True)
    for row in range(rows):
        shown = [axis for axis in axes[row] if axis.get_visible()]
        if shown and shown[0] is not axes[row, 0]:
            shown[0].set_ylabel(axes[row, 0].get_ylabel() or shown[0].get_ylabel())
            shown[0].tick_params(labelleft=True)


def write(figure: Figure, path: Path) -> None:
    """Writes a PNG or an SVG beside its name, then renames it.

    Raises:
        LaserKVError: it cannot be written.
    """
    drawn = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    figure.savefig(drawn, format=kind, dpi=144)
    data = _for_both(drawn.getvalue().decode()).encode() if kind == "svg" else drawn.getvalue()
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise LaserKVError(f"cannot write {path}: {error.strerror}") from error


def _for_both(svg: str) -> str:
    """With variables in place of the three colours that the dark changes."""
    light = dark = ""
    for colour, (name, other) in _DARK.items():
        svg = svg.replace(colour, f"var({name})")
        light, dark = f"{light} {name}: {colour};", f"{dark} {name}: {other};"
    style = (
        f"<style>:root {{{light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}</style>"
    )
    head, end, rest = svg.partition("<defs>")
    return f"{head}{style}\n{end}{rest}"
