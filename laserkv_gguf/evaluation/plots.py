"""Accuracy and likelihood against length and against the kept fraction, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laserkv_gguf.evaluation import drawing
from laserkv_gguf.evaluation.drawing import MARKS as MARKS
from laserkv_gguf.evaluation.peers.quantised import Quantised
from laserkv_gguf.evaluation.report import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# points between policies, so that equal ones do not hide each other; and from the first to the last
ASIDE, SPREAD = 3.0, 24.0

# they keep all tokens, at one ratio: beside every other one's
ALL = ("full", Quantised.name)

Number = Callable[[Line], float | None]


def draw(found: Sequence[Line], folder: Path) -> list[Path]:
    """Writes what can be drawn of the results.

    Bars of an accuracy are Wilson's 95 % intervals of exact matches; `fidelity` has its top-1
    agreement instead. Likelihoods tell policies apart where a model is too weak to answer.

    Returns:
        The files; none where matplotlib is not installed.

    Raises:
        LaserKVError: they cannot be written.
    """
    if find_spec("matplotlib") is None:
        return []
    drawn = [line for line in found if line.run]
    if not drawn:
        return []
    ratios = sorted({line.ratio for line in drawn if line.policy not in ALL}, reverse=True) or [1.0]
    by_ratio = {
        f"r = {r:g}": [line for line in drawn if line.ratio in (r, 1.0) or line.policy in ALL]
        for r in ratios
    }
    lengths = sorted({line.length for line in drawn})
    by_length = {f"{n:,} tokens": [line for line in drawn if line.length == n] for n in lengths}
    done: list[Path] = []
    with drawing.styled():
        for name, likelihood in (("accuracy", False), ("likelihood", True)):
            for end, rows, label, x in (
                ("length", by_ratio, "tokens of the document", lambda line: line.length),
                ("kept", by_length, "kept fraction", _kept),
            ):
                figure = panels(rows, label, x, likelihood=likelihood)
                for kind in ("png", "svg"):
                    done.append((folder / f"{name}_by_{end}").with_suffix(f".{kind}"))
                    drawing.write(figure, done[-1])
    return done


def panels(
    rows: Mapping[str, Sequence[Line]], label: str, x: Number, *, likelihood: bool
) -> Figure:
    """A panel a task and row, a line a policy.

    Args:
        rows: what is drawn, by what stands above the panels of a row.
        label: of the axis across.
        x: where a line of the table stands on it.
        likelihood: the gold answer's is drawn upwards, instead of the accuracy.
    """
    from matplotlib.figure import Figure

    found = [line for row in rows.values() for line in row]
    tasks = list(dict.fromkeys(line.task for line in found))
    policies = list(dict.fromkeys(line.policy for line in found))
    figure = Figure(figsize=(2.5 + 3.6 * len(tasks), 0.8 + 2.9 * len(rows)), layout="constrained")
    # an accuracy is from 0 to 1 everywhere
    alike: Literal["all", "col"] = "col" if likelihood else "all"
    axes = figure.subplots(len(rows), len(tasks), squeeze=False, sharex=True, sharey=alike)
    handles: dict[str, Any] = {}
    step = min(ASIDE, SPREAD / len(policies))
    for across, (title, drawn) in zip(axes, rows.items(), strict=True):
        for axis, task in zip(across, tasks, strict=True):
            for index, policy in enumerate(policies):
                points = [line for line in drawn if (line.task, line.policy) == (task, policy)]
                if likelihood:
                    points = [line for line in points if line.gold_logprob is not None]
                if points:
                    points.sort(key=lambda point: x(point) or 0)
                    place = step * (index - (len(policies) - 1) / 2)
                    style = drawing.marked(policy, policies)
                    handles[policy] = _line(axis, points, style, place, x, likelihood)
            axis.set_title(f"{task}, {title}")
            if not likelihood:
                axis.set_ylim(-0.03, 1.03)
            axis.margins(x=0.1)
            axis.autoscale_view(scaley=likelihood)
        across[0].set_ylabel("gold log-probability, nats" if likelihood else "accuracy")
    for axis in axes[-1]:
        axis.set_xlabel(label)
    shown = {name: handles[name] for name in policies if name in handles}
    drawing.only_drawn(axes)
    figure.legend(list(shown.values()), list(shown), loc="outside right upper")
    return figure


def _line(
    axis: Any,
    points: Sequence[Line],
    style: dict[str, Any],
    place: float,
    x: Number,
    likelihood: bool,
) -> Any:
    """One policy's points, `place` points beside where they are; returns what the legend shows."""
    from matplotlib.transforms import ScaledTranslation

    aside = ScaledTranslation(place / 72, 0, axis.figure.dpi_scale_trans)
    style = {**style, "transform": axis.transData + aside}
    across = [x(point) or 0.0 for point in points]
    values = [(point.gold_logprob or 0.0) if likelihood else _share(point) for point in points]
    if points[0].policy == "full" and len(points) == 1:
        axis.axhline(values[0], color=drawing.INK, linestyle="--", linewidth=0.6)
    axis.update_datalim(list(zip(across, values, strict=True)))  # not done for moved points
    if likelihood or points[0].measures_fidelity:
        return axis.plot(across, values, **style)[0]
    below = [max(0.0, s - p.low) for s, p in zip(values, points, strict=True)]
    above = [max(0.0, p.high - s) for s, p in zip(values, points, strict=True)]
    return axis.errorbar(across, values, yerr=[below, above], capsize=2, elinewidth=0.6, **style)


def _kept(line: Line) -> float | None:
    """The fraction of the tokens, or of the bytes where all tokens are kept in fewer of them."""
    return line.ratio if line.policy in ALL else line.kept


def _share(line: Line) -> float:
    """Exact matches' share, or the agreement."""
    return (line.score or 0.0) if line.measures_fidelity else line.exact / line.run
