"""JSONL lines of a batch, and the files that it goes on from."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st
from test_cli import SMALL
from tiny import make

from fuzz import budget

pytest.importorskip("llama_cpp")

from laserkv_gguf import ContextOptions, LaserKV, Sampling
from laserkv_gguf.batch import questions as questions_in
from laserkv_gguf.batch.output import Output, Stream
from laserkv_gguf.batch.questions import FIELDS
from laserkv_gguf.batch.run import Batch
from laserkv_gguf.errors import UserError

NUMBERS = st.sampled_from([0, 1, -1, 3, 4096, 4097, 2**31, 2**32 + 1, 10**12, 10**400, 0.5, 1e308])
TEXTS = st.sampled_from(["", " ", "why?", "\0", "\ud800", "é" * 300, "<|im_end|>", "\u202e", "\n"])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from([*FIELDS, "qeustion", "documents", "note", ""])
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=6).map(
    lambda extra: {"id": "evil", "question": "why?", **extra}
)
GOOD = [{"id": f"q{n}", "question": f"why {n}?", "document": "tin. " * 80} for n in range(3)]


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line: JSON of a kind, JSON with bytes changed or cut, or bytes."""
    how = draw(st.sampled_from(["object", "object", "value", "changed", "cut", "bytes", "deep"]))
    if how == "bytes":
        return draw(st.binary(max_size=60))
    if how == "deep":
        return draw(st.sampled_from([b"[", b'{"a":', b'{"id":1,"question":"q","x":['])) * 20_000
    made = json.dumps(draw(OBJECTS if how != "value" else VALUES)).encode()
    if how == "cut":
        return made[: draw(st.integers(0, len(made)))]
    if how == "changed":
        at = draw(st.integers(0, len(made) - 1))
        return made[:at] + draw(st.binary(max_size=3)) + made[at + 1 :]
    return made


def test_lines(tmp_path: Path) -> None:
    """Every line is a question or an error of its own, and good lines stay questions."""
    counts = Counter[str]()

    def jsonl_lines(evil: list[bytes]) -> None:
        good = [json.dumps(one).encode() for one in GOOD]
        data = b"\n".join([good[0], *(line.replace(b"\n", b" ") for line in evil), *good[1:]])
        given = questions_in.read(io.BytesIO(data), "in.jsonl", tmp_path)
        sound = [item for item in given.items if not item.error]
        assert {"q0", "q1", "q2"} <= {item.id for item in sound}
        for item in given.items:
            counts["questions" if not item.error else "errors"] += 1
            assert len(item.error.splitlines()) <= 1
            assert len(item.error) < 300
        for item in sound:
            if item.inline:
                assert questions_in.digest_of(given.text(item)) == item.document

    budget.run(jsonl_lines, st.lists(lines(), max_size=4), 200, counts)


RUN, IDS = {"input": "abc", "ratio": 0.25}, ["a", 1, None, "d", "é"]


def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output and its record, changed: refused and left alone, or gone on from to the end."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path, record = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    counts = Counter[str]()

    def records(case: tuple[list[int], list[bytes], bool, Random]) -> None:
        order, evil, inside, dice = case
        for file in (path, record):
            file.unlink(missing_ok=True)
        with Output(path, RUN, IDS) as output:
            output.note_document("/book.txt", "abc")
            for index in order:
                line: dict[str, Any] = {"id": IDS[index], "answer": "x"}
                output.add(index, {**line, "retry": True} if dice.random() < 0.3 else line)
        target = record if dice.random() < 0.6 else path
        data = target.read_bytes()
        if inside and data:
            at = dice.randrange(len(data))
            data = data[:at] + b"".join(evil) + data[at + dice.choice((0, 1, 5)) :]
        else:
            data += b"".join(line.replace(b"\n", b" ") + b"\n" for line in evil)
        target.write_bytes(data)
        before = [file.read_bytes() for file in (path, record)]
        try:
            with Output(path, RUN, IDS) as output:
                for index in range(len(IDS)):
                    if index not in output.done:
                        output.add(index, {"id": IDS[index], "answer": "x"})
        except UserError as error:
            counts["refused"] += 1
            if len(str(error).splitlines()) != 1:
                raise AssertionError(str(error)) from error
            if [file.read_bytes() for file in (path, record)] != before:
                raise AssertionError("changed what it refused") from error
            return
        counts["gone on from"] += 1
        assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == IDS

    entries = st.sampled_from(
        [
            b'{"index": 1, "line": {"id": 1, "answer": "x"}}',
            b'{"index": 4, "line": {"id": "e"}}',
            b'{"document": "/book.txt", "sha256": 3}',
            b'{"index": [], "line": {}}',
        ]
    )
    cases = st.tuples(
        st.permutations(range(5)).flatmap(lambda o: st.integers(0, 5).map(lambda n: list(o[:n]))),
        st.lists(lines() | entries, max_size=2),
        st.booleans(),
        st.randoms(use_true_random=False),
    )
    budget.run(records, cases, 150, counts)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaserKV]:
    path = make(tmp_path_factory.mktemp("jsonl"), "small.gguf", spec=SMALL).path
    options = ContextOptions(threads=1, type_k="f32", type_v="f32")
    with LaserKV(path, context=options, policy="keydiff", block_size=256) as one:
        yield one


def test_batches(engine: LaserKV, tmp_path: Path) -> None:
    """Whatever stands beside them, good lines are answered as they are alone."""
    counts = Counter[str]()

    def answers(evil: list[bytes]) -> dict[Any, Any]:
        good = [json.dumps(one).encode() for one in GOOD]
        data = b"\n".join([good[0], *(line.replace(b"\n", b" ") for line in evil), *good[1:]])
        given = questions_in.read(io.BytesIO(data), "in.jsonl", tmp_path)
        out = io.BytesIO()

        def read(name: str) -> str:
            raise UserError(f"no document at {name!r}")

        with Stream(out, [item.id for item in given.items]) as output:
            Batch(engine, given, output, read, Sampling(), max_tokens=3).run()
        found = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [line["id"] for line in found] == [item.id for item in given.items]
        for line in found:
            counts["errors" if "error" in line else "answers"] += 1
            assert ("error" in line) is not ("answer" in line)
            assert len(line.get("error", "").splitlines()) <= 1
        return {
            line["id"]: line.get("answer") for line in found if line["id"] in ("q0", "q1", "q2")
        }

    alone = answers([])

    def batches(evil: list[bytes]) -> None:
        assert answers(evil) == alone

    budget.run(batches, st.lists(lines(), min_size=1, max_size=3), 25, counts)
