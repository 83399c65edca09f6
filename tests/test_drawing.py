"""Plots look alike: no panel without data, and colours that the dark can change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.evaluation import drawing


def drawn() -> Figure:
    with drawing.styled():
        figure = Figure(layout="constrained")
        axes = figure.subplots(2, 2, squeeze=False, sharex=True, sharey=True)
        for row, column in ((0, 0), (0, 1), (1, 1)):
            style = drawing.marked("full" if column else "laser", ["laser", "full"])
            axes[row, column].plot([1, 2], [1, 2], **style)
        axes[1, 0].set(xlabel="below", ylabel="left")
        drawing.only_drawn(axes)
    return figure


def test_a_panel_without_data_goes_and_its_labels_stay() -> None:
    axes = drawn().axes
    assert [axis.get_visible() for axis in axes] == [True, True, False, True]
    assert axes[0].get_xlabel() == "below"
    assert axes[3].get_ylabel() == "left"


def test_an_svg_suits_the_light_and_the_dark(tmp_path: Path) -> None:
    with drawing.styled():
        drawing.write(drawn(), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    body = re.sub(r"<style>:root.*?</style>", "", text, flags=re.DOTALL)
    for colour in (drawing.INK, drawing.GRID, drawing.GROUND):
        assert colour not in body
    assert "var(--ink)" in body
    with pytest.raises(LaserKVError, match="cannot write"):
        drawing.write(drawn(), tmp_path / "none" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]
