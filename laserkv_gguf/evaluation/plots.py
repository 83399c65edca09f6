"""Accuracy against length and against the kept fraction, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.evaluation.report import Line

MARKS = "osD^v<>Ph*Xpd8"


def draw(found: Sequence[Line], folder: Path) -> list[Path]:
    """Writes what can be drawn of the results.

    Bars are Wilson's 95 % intervals of exact matches; `fidelity` has its top-1 agreement instead.

    Returns:
        The files; none where matplotlib is not installed.

    Raises:
        LaserKVError: they cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    done: list[Path] = []
    drawn = [line for line in found if line.run]
    if not drawn:
        return done
    ratios = sorted({line.ratio for line in drawn if line.policy != "full"}, reverse=True) or [1.0]
    done += _panels(
        folder / "accuracy_by_length",
        {f"r = {r:g}": [line for line in drawn if line.ratio in (r, 1.0)] for r in ratios},
        "tokens of the document",
        lambda line: line.length,
    )
    lengths = sorted({line.length for line in drawn})
    done += _panels(
        folder / "accuracy_by_kept",
        {f"{n:,} tokens": [line for line in drawn if line.length == n] for n in lengths},
        "kept fraction",
        lambda line: line.kept,
    )
    return done


def _panels(
    path: Path,
    rows: Mapping[str, Sequence[Line]],
    label: str,
    x: Callable[[Line], float | None],
) -> list[Path]:
    """A panel a task and row, a line a policy."""
    from matplotlib.figure import Figure

    found = [line for row in rows.values() for line in row]
    tasks = list(dict.fromkeys(line.task for line in found))
    policies = list(dict.fromkeys(line.policy for line in found))
    figure = Figure(figsize=(2.5 + 3.6 * len(tasks), 0.8 + 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(tasks), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for across, (title, drawn) in zip(axes, rows.items(), strict=True):
        for axis, task in zip(across, tasks, strict=True):
            for index, policy in enumerate(policies):
                points = [line for line in drawn if (line.task, line.policy) == (task, policy)]
                if points:
                    handles[policy] = _line(axis, sorted(points, key=lambda p: x(p) or 0), index, x)
            axis.set_title(f"{task}, {title}", fontsize=9)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.3)
        across[0].set_ylabel("accuracy")
    for axis in axes[-1]:
        axis.set_xlabel(label)
    shown = {name: handles[name] for name in policies}
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", fontsize=8)
    made = []
    for kind in ("png", "svg"):
        name = path.with_suffix(f".{kind}")
        beside = name.with_name(f".{name.name}.part")
        try:
            figure.savefig(beside, format=kind, dpi=144)
            beside.replace(name)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise LaserKVError(f"cannot write {name}: {error.strerror}") from error
        made.append(name)
    return made


def _line(axis: Any, points: Sequence[Line], index: int, x: Callable[[Line], float | None]) -> Any:
    """One policy's points; returns what stands for it in the legend."""
    import matplotlib as mpl

    color = mpl.colormaps["tab20"](index % 20)
    style: dict[str, Any] = {"color": color, "marker": MARKS[index % len(MARKS)], "markersize": 4}
    across, shares = [x(point) for point in points], [_share(point) for point in points]
    if points[0].measures_fidelity:
        return axis.plot(across, shares, linewidth=1, **style)[0]
    below = [max(0.0, s - p.low) for s, p in zip(shares, points, strict=True)]
    above = [max(0.0, p.high - s) for s, p in zip(shares, points, strict=True)]
    style |= {"capsize": 2, "linewidth": 1, "elinewidth": 0.6}
    return axis.errorbar(across, shares, yerr=[below, above], **style)


def _share(line: Line) -> float:
    """What is drawn: exact matches' share, or the agreement."""
    return (line.score or 0.0) if line.measures_fidelity else line.exact / line.run
