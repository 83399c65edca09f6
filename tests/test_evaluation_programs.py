"""`evaluation.recall` and `evaluation.memory`: what they write and print, and that they go on."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from tiny import TinySpec, make

pytest.importorskip("llama_cpp")

from laserkv_gguf.evaluation import memory, plots, recall
from laserkv_gguf.evaluation.report import as_csv

ROOT = Path(__file__).resolve().parents[1]
STORY = ROOT / "laserkv_gguf" / "data" / "sample.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    return make(folder, spec=TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64, ctx_train=4096)).path


def table(out: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return [row for row in rows if not row[0].startswith("---")][1:]


def test_plots_are_drawn_once_more_from_a_table(tmp_path: Path) -> None:
    """What is read of the CSV is what was written to it; both brightnesses are drawn of it."""
    script, table = ROOT / "scripts" / "redraw.py", ROOT / "docs" / "evaluation" / "summary.csv"
    spec = importlib.util.spec_from_file_location("redraw", script)
    assert spec is not None
    assert spec.loader is not None
    redraw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(redraw)
    lines = redraw.lines(table)
    written = as_csv(lines).splitlines()
    columns = table.read_text("utf-8").splitlines()[0].split(",")
    assert [dict(zip(written[0].split(","), line.split(","), strict=True)) for line in written][
        1:
    ] == [{**row, "f1": ""} for row in csv.DictReader(table.open(encoding="utf-8"))]
    assert written[0].split(",")[: len(columns)] == columns
    (tmp_path / "one.csv").write_text(as_csv(lines[:3]))
    drawn = plots.draw(redraw.lines(tmp_path / "one.csv"), tmp_path)
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert all("prefers-color-scheme: dark" in p.read_text() for p in drawn if p.suffix == ".svg")


def test_recall(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a question and method; what a killed run left is gone on from."""
    book, out = tmp_path / "book.txt", tmp_path / "rows.jsonl"
    book.write_text(STORY.read_text("utf-8")[:6000], "utf-8")
    given = ["--model", str(model), "--book", str(book), "--out", str(out), "--tokens", "900"]
    given += ["--documents", "1", "--questions", "2", "--ratios", "0.25", "--threads", "1"]
    given += ["--only", "replay", "shortlist", "read again"]
    recall.main(given)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(rows) == 6
    assert {row["method"] for row in rows} == {"replay", "shortlist", "read again"}
    for row in rows:
        assert 0 < row["kept"] < row["document_tokens"]
        assert (row["parked_bytes"] > 0) == (row["method"] != "read again")
    printed = capsys.readouterr().out
    assert [row[2:4] for row in table(printed)] == [
        [method, f"{sum(r['found'] for r in rows if r['method'] == method)} of 2"]
        for method in ("read again", "replay", "shortlist")
    ]
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # killed while it wrote
    recall.main(given)
    again = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["topic"] for row in again] == [row["topic"] for row in rows]
    assert again[:5] == rows[:5]
    assert again[5]["answer"] == rows[5]["answer"]


def test_memory(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way of making room ends with the fact's question; oldest turns are gone, whole."""
    out = tmp_path / "memory.jsonl"
    given = ["--model", str(model), "--out", str(out), "--turns", "6", "--samples", "1"]
    given += ["--ctx-size", "768", "--predict", "8", "--threads", "1"]
    given += ["--only", "laser", "truncation", "context shift"]
    memory.main(given)
    rows = {row["way"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}
    assert list(rows) == ["laser", "truncation", "context shift"]
    assert all(row["cells"] <= 768 for row in rows.values())
    assert rows["truncation"]["kept_of_fact"] in (0, rows["truncation"]["fact"])
    assert 0 < rows["laser"]["kept_of_fact"] < rows["laser"]["fact"]
    assert len(table(capsys.readouterr().out)) == 3
    before = out.read_bytes()
    memory.main(given)
    assert out.read_bytes() == before
