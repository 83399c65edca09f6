"""Answers a minute by how many are asked at a time: what is counted, not how fast it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_session import TEMPLATE
from tiny import TinySpec, make

from laserkv_gguf.cli.app import run


def test_answers_a_minute_by_how_many_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many answers each time; eight at a time take fewer batches, and full caches fewer fit."""
    model, _, _ = make(tmp_path, spec=TinySpec(layers=1, ctx_train=4096, chat_template=TEMPLATE))
    given = ["--parallel", "1,4", "--documents", "4", "--tokens", "400", "-n", "6", "--json"]
    more = ["--block-size", "128", "--ratio", "0.2", "-t", "1", "-tb", "1"]
    assert run(["bench", "-m", str(model), *given, *more]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["at_a_time"]) for row in rows] == [
        (policy, number) for policy in ("laser", "full") for number in (1, 4)
    ]
    assert {(row["answers"], row["tokens"]) for row in rows} == {(8, 48)}
    assert len({row["cells"] for row in rows}) == 1
    assert [row["fit"] for row in rows] == [4, 4, 1, 1]
    assert rows[1]["batches"] < rows[0]["batches"] == rows[2]["batches"]
    for text in ("0", "x"):
        assert run(["bench", "-m", str(model), "--parallel", text]) == 2
