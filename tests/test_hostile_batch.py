"""Batches that somebody made to do harm, or that met what nobody meant: the other lines stay."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_batch import (  # noqa: F401
    IDS,
    LINES,
    RUN,
    Capture,
    arguments,
    fill,
    folder,
    lines_of,
    model,
    questions,
    quick,
    timeless,
    write,
)
from test_cli import (
    SENTENCE,
    _logging_as_it_was,  # noqa: F401
    environment,
    process,
    refusal,
)
from test_parallel import QUESTIONS, answered, loaded  # noqa: F401
from test_session import Loaded

pytest.importorskip("llama_cpp")

from laserkv_gguf.batch import run as batch
from laserkv_gguf.batch.output import Output, OutputError, Stream
from laserkv_gguf.cli.app import run
from laserkv_gguf.conversation.parallel import NotRead, Question
from laserkv_gguf.errors import LaserKVError, OutOfMemory, UserError
from laserkv_gguf.llama.context import Context, ContextOptions

# ---- F5: one line of a batch never fails its neighbours -----------------------------------------


def hostile(**fields: Any) -> str:
    return json.dumps({"id": "evil", "question": "why?", "document": SENTENCE * 8, **fields})


HOSTILE: dict[str, str | bytes] = {
    "max_tokens 10^12": hostile(max_tokens=10**12),
    "max_tokens 10^400": hostile(max_tokens=10**400),
    "max_tokens 2^32 + 3": hostile(max_tokens=2**32 + 3),  # as 32 bits it would be 3
    "max_tokens past the model": hostile(max_tokens=4097),
    "max_tokens endless": '{"id": "evil", "question": "why?", "max_tokens": Infinity}',
    "max_tokens no number": '{"id": "evil", "question": "why?", "max_tokens": NaN}',
    "a question of a megabyte": hostile(question="why? " * 200_000),
    "a system prompt of a megabyte": hostile(system="be " * 300_000, max_tokens=4000),
    "an id of 5,000 digits": '{"id": ' + "1" * 5000 + ', "question": "why?"}',
    "nested lists": '{"id": "evil", "question": "why?", "x": ' + "[" * 100_000,
    "nested objects": '{"id": "evil", "question": "why?", "x": ' + '{"a":' * 100_000,
    "half a character": '{"id": "evil", "question": "why \\ud800?"}',
    "NUL bytes": b"\0" * 4096,
    "not UTF-8": b'{"id": "evil", "question": "na\xefve"}',
    "UTF-16": '{"id": "evil", "question": "why?"}'.encode("utf-16"),
    "two objects": '{"id": "evil", "question": "a"}{"id": "evil2", "question": "b"}',
    "a folder": hostile(document=None, document_path="."),
    "a name with NUL": hostile(document=None, document_path="book\0.txt"),
    "a binary document": hostile(document=None, document_path="in.jsonl.gz"),
}


@pytest.fixture(scope="module")
def undisturbed(
    model: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> bytes:
    """What the neighbours are answered without anybody beside them."""
    place = tmp_path_factory.mktemp("undisturbed")
    write(place / "in.jsonl", *neighbours())
    assert run([*arguments(model, place), "--quiet"]) == 0
    return timeless(place / "out.jsonl")


def neighbours() -> list[dict[str, Any]]:
    """Six questions about the same document, as the hostile one."""
    return [
        {"id": f"q{number}", "question": f"why {number}?", "document": SENTENCE * 8}
        for number in range(6)
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_neighbours_of_a_hostile_line(
    name: str,
    undisturbed: bytes,
    model: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """19 files: its line is an error, theirs are what they are without it, also when resumed."""
    line = HOSTILE[name]
    given = [json.dumps(question).encode() for question in neighbours()]
    given.insert(2, line if isinstance(line, bytes) else line.encode())
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(given) + b"\n")
    (tmp_path / "in.jsonl.gz").write_bytes(b"\x1f\x8b\0\0")
    for _ in range(2):
        assert run(arguments(model, tmp_path)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("1 of 7 failed")
        assert "Traceback" not in err
        lines = timeless(tmp_path / "out.jsonl").splitlines(keepends=True)
        assert len(lines) == 7
        (error,) = [json.loads(line) for line in lines if b'"error"' in line]
        assert lines.index(next(line for line in lines if b'"error"' in line)) == 2
        assert 0 < len(error["error"]) < 300
        assert b"".join(lines[:2] + lines[3:]) == undisturbed


def test_no_file_but_lines(tmp_path: Path, model: Path, capsys: Capture) -> None:  # noqa: F811
    """Files that are no questions at all are refused before anything is read with a model."""
    for data in (b"\0" * 100_000, os.urandom(5000) + b"\n", b"\x1f\x8b\0\0", b"[" * 100_000):
        (tmp_path / "in.jsonl").write_bytes(data)
        line = refusal(capsys, arguments(model, tmp_path))
        assert "in.jsonl, line " in line
        assert len(line) < 300
    if sys.platform == "linux":
        given = arguments(model, tmp_path)
        given[given.index("--input") + 1] = "/dev/zero"
        assert "/dev/zero is a device" in refusal(capsys, given)


@pytest.mark.parametrize(("policy", "recall"), [("keydiff", "off"), ("laser", "ram")])
def test_too_much_memory_is_refused_alone(
    policy: str,
    recall: str,
    loaded: Loaded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest question that memory does not hold fails; others are tried without it."""
    made: list[int] = []
    real = Context.__init__

    def limited(self: Context, model: Any, cells: int, options: ContextOptions) -> None:  # noqa: F811
        made.append(cells)
        if cells > 1500:
            raise OutOfMemory(f"no memory for {cells} cells")
        real(self, model, cells, options)

    asked = [*QUESTIONS[:2], Question("all?", max_tokens=3000), *QUESTIONS[2:4]]
    with loaded.engine(policy=policy, recall=recall) as engine:
        expected = answered(engine, QUESTIONS[:4], parallel=2).tokens
    monkeypatch.setattr(Context, "__init__", limited)
    with loaded.engine(policy=policy, recall=recall) as engine:
        answers = answered(engine, asked, parallel=2)
        assert isinstance(answers[2], OutOfMemory)
        del answers[2]
        assert answers.tokens == expected
    assert made[0] > 1500 >= made[-1]


def test_fewer_at_a_time_where_memory_is_short(
    loaded: Loaded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each fits alone, four together do not."""
    real = Context.__init__

    def limited(self: Context, model: Any, cells: int, options: ContextOptions) -> None:  # noqa: F811
        if cells > 1500:
            raise OutOfMemory(f"no memory for {cells} cells")
        real(self, model, cells, options)

    asked = [Question(f"number {number}?", max_tokens=600) for number in range(4)]
    asked = [Question(one.text, max_tokens=600, stop=tuple("abcdefghijklmno ")) for one in asked]
    with loaded.engine(policy="keydiff") as engine:
        expected = answered(engine, asked, parallel=1).tokens
    monkeypatch.setattr(Context, "__init__", limited)
    with loaded.engine(policy="keydiff") as engine:
        assert answered(engine, asked, parallel=4).tokens == expected


def test_any_error_while_planning_is_one_question_s(
    loaded: Loaded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that nobody foresaw."""
    with loaded.engine(policy="keydiff") as engine:
        expected = answered(engine, QUESTIONS[:3]).tokens
        real = engine.template.opening

        def opening(question: str, **options: Any) -> Any:
            if question == QUESTIONS[1].text:
                raise RecursionError("too deep")
            return real(question, **options)

        monkeypatch.setattr(engine.template, "opening", opening)
        answers = answered(engine, QUESTIONS[:3])
        assert isinstance(answers[1], RecursionError)
        assert [answers[0].tokens, answers[2].tokens] == [expected[0], expected[2]]


@pytest.mark.parametrize("gpu_layers", [0, -1])
def test_numbers_beyond_32_bits_make_no_context(
    gpu_layers: int,
    loaded: Loaded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a card's memory is asked for, which is not known beforehand."""
    monkeypatch.setattr(loaded.model, "gpu_layers", gpu_layers)
    for cells in (2**32 + 256, 2**31, 10**12):
        with pytest.raises(OutOfMemory, match="no memory for a KV cache"):
            Context(loaded.model, cells)


# ---- errors that are asked again ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (UserError("the question is too long"), True),
        (OutOfMemory("no memory for a KV cache"), False),
        (NotRead("the document could not be read"), False),
        (LaserKVError("llama.cpp failed"), False),
        (RuntimeError("nobody knows"), False),
    ],
)
def test_what_is_asked_again(
    error: Exception,
    final: bool,
    model: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the question itself explains is final; the rest is what a whole run writes, at last."""
    assert run(arguments(model, folder, "--quiet")) == 0
    expected = timeless(folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    real = batch.answer

    def failing(engine: Any, asked: Any, on_reply: Any, **options: Any) -> Any:
        def reply(number: int, said: Any) -> None:
            on_reply(number, error if number % 2 else said)

        return real(engine, asked, reply, **options)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "answer", failing)
        assert run(arguments(model, folder)) == 1
    err = capsys.readouterr().err
    assert err.startswith("6 of 12 failed")
    assert ("the same command asks 6 of them again" in err) is not final
    lines = lines_of(folder / "out.jsonl")
    assert sum("error" in line for line in lines) == 6
    assert sum(line.get("retry", False) for line in lines) == (0 if final else 6)
    assert run(arguments(model, folder, "--quiet")) == (1 if final else 0)
    if not final:
        assert timeless(folder / "out.jsonl") == expected
        assert len((folder / "out.jsonl.run").read_bytes().splitlines()) == 1


@pytest.mark.usefixtures("quick")
def test_stopped_at_every_byte_of_asking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays is in one of the files at any moment."""
    whole = tmp_path / "whole.jsonl"
    fill(whole)
    expected = whole.read_bytes()
    path, record = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    real = os.write
    room = -1
    while True:
        room += 1
        for file in (path, record):
            file.unlink(missing_ok=True)
        with Output(path, RUN, IDS) as output:
            output.note_document("/book.txt", "abc")
            for index in (1, 4, 0, 3, 2):
                failed = {"id": IDS[index], "error": "no memory", "retry": True}
                output.add(index, failed if index in (1, 3) else LINES[index])
        left = [room]

        def limited(file: int, data: Any, left: list[int] = left) -> int:
            taken = bytes(data[: left[0]])
            left[0] -= len(taken)
            if not taken and data:
                raise OSError(28, "No space left on device")
            return real(file, taken)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", limited)
            try:
                fill(path)
                stopped = False
            except OutputError:
                stopped = True
        again = Output(path, RUN, IDS)
        again.load()
        assert {0, 2, 4} <= again.done  # what was answered is never asked again
        fill(path)
        assert path.read_bytes() == expected
        if not stopped:
            break
    assert room > 100


RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "nested": lambda data: data + b"[" * 100_000 + b"\n",
    "an index that is a text": lambda data: data + b'{"index": "1", "line": {"id": 1}}\n',
    "an index beyond": lambda data: data + b'{"index": 99, "line": {"id": 1}}\n',
    "an index below": lambda data: data + b'{"index": -1, "line": {"id": 1}}\n',
    "no line": lambda data: data + b'{"index": 1}\n',
    "a line that is a list": lambda data: data + b'{"index": 1, "line": [1]}\n',
    "another's line": lambda data: data + b'{"index": 1, "line": {"id": 7, "answer": "x"}}\n',
    "a document without a digest": lambda data: data + b'{"document": [1], "sha256": 3}\n',
    "NUL bytes": lambda data: data + b"\0" * 512 + b"\n",
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_somebody_wrote_in(name: str, tmp_path: Path) -> None:
    """It costs asking again at most."""
    path, record = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    with Output(path, RUN, IDS) as output:
        output.add(0, LINES[0])
        output.add(3, LINES[3])
    record.write_bytes(RECORDS[name](record.read_bytes()))
    with Output(path, RUN, IDS) as output:
        assert output.done == {0, 3}
        for index in (1, 2, 4):
            output.add(index, LINES[index])
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == LINES


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("run_said", ["[1]", '"x"', "7", "{}", "[" * 5000])
def test_a_record_of_no_run(run_said: str, tmp_path: Path) -> None:
    path, record = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    path.write_text("mine\n")
    record.write_text(f'{{"laserkv_gguf batch": 1, "run": {run_said}}}\n')
    with pytest.raises(UserError, match="use another --output"):
        Output(path, RUN, IDS).load()
    assert path.read_text() == "mine\n"


# ---- F12: no two versions of a document ---------------------------------------------------------


def begun(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """A batch that was stopped when some of the questions about book.txt had been answered."""
    given = arguments(model, folder, "--parallel", "1")
    real, added = Output.add, []

    def add(self: Output, index: int, line: Any) -> None:
        real(self, index, line)
        added.append(index)
        if len(added) == 6:  # four about the document in the file, then two about book.txt
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", add)
        assert run(given) == 130
    assert added == [0, 3, 6, 9, 1, 4]
    return given


def test_a_changed_document_is_refused(
    model: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the model is loaded; put back as it was, the batch goes on."""
    assert run(arguments(model, folder, "--parallel", "1", "--quiet")) == 0
    expected = timeless(folder / "out.jsonl")
    for name in ("out.jsonl", "out.jsonl.run"):
        (folder / name).unlink()
    given = begun(model, folder, monkeypatch)
    book = folder / "book.txt"
    before = book.read_text()
    book.write_text(before.replace("a", "e"))
    written = (folder / "out.jsonl").read_bytes()
    line = refusal(capsys, given)
    assert "book.txt was changed after some of its questions had been answered" in line
    assert "put it back" in line
    assert "another --output" in line
    assert (folder / "out.jsonl").read_bytes() == written
    book.write_text(before)
    assert run([*given, "--quiet"]) == 0
    assert timeless(folder / "out.jsonl") == expected


def test_a_document_that_changes_under_way(
    model: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the look at it and its reading: its lines are errors, and are asked again."""
    given = begun(model, folder, monkeypatch)
    book = folder / "book.txt"
    before = book.read_text()
    real = batch.check_documents

    def check(*arguments: Any) -> None:
        real(*arguments)
        book.write_text("Something else. " * 90)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "check_documents", check)
        assert run(given) == 1
    assert "2 of 12 failed" in capsys.readouterr().err
    lines = lines_of(folder / "out.jsonl")
    assert [line["id"] for line in lines if line.get("retry")] == ["q7", "q10"]
    assert all("was changed" in line["error"] for line in lines if line.get("retry"))
    book.write_text(before)
    assert run([*given, "--quiet"]) == 0


def test_documents_that_may_change(
    model: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that nothing was answered about, and one that was missing; old records know none."""
    given = begun(model, folder, monkeypatch)
    record = folder / "out.jsonl.run"
    kept = [line for line in record.read_bytes().splitlines(True) if b'"sha256"' not in line]
    assert len(kept) < len(record.read_bytes().splitlines())
    record.write_bytes(b"".join(kept))  # as an older version wrote it
    (folder / "book.txt").write_text(SENTENCE * 11)
    assert run([*given, "--quiet"]) == 0
    for name in ("out.jsonl", "out.jsonl.run"):
        (folder / name).unlink()
    (folder / "book.txt").rename(folder / "away.txt")
    assert run([*given, "--quiet"]) == 1
    (folder / "book.txt").write_text(SENTENCE * 13)
    capsys.readouterr()
    assert run([*given, "--quiet"]) == 0


# ---- F13 and row 11 -----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
@pytest.mark.usefixtures("quick")
def test_who_may_read_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as the umask has it, the record only who runs the batch; also one that was there."""

    def refused(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o022)
    try:
        for mask, said in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(mask)
            path = tmp_path / f"{mask}.jsonl"
            fill(path)
            record = path.with_name(f"{mask}.jsonl.run")
            assert (mode(path), mode(record)) == (said, 0o600)
        monkeypatch.setattr(os, "fchmod", refused)  # as where the file is somebody else's
        fill(tmp_path / "new.jsonl")
        assert mode(tmp_path / "new.jsonl.run") == 0o600
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda _: None)
        record.chmod(0o644)
        path.chmod(0o640)
        fill(path)
        assert (mode(path), mode(record)) == (0o640, 0o600)
    finally:
        os.umask(before)


def through(
    model: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    *more: str,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    given = arguments(model, folder, *more)
    given[given.index("--input") + 1] = given[given.index("--output") + 1] = "-"
    piped = (folder / "in.jsonl").read_text()
    return process(*given, input=piped, cwd=folder, **options)


def test_standard_input_and_output(model: Path, folder: Path, capsys: Capture) -> None:  # noqa: F811
    """Row 11: the same lines in the same order, and no file named -."""
    write(folder / "in.jsonl", *questions(12), {"id": "evil", "question": "w", "max_tokens": 9999})
    assert run(arguments(model, folder)) == 1
    expected = timeless(folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    (folder / "out.jsonl.run").unlink()
    result = through(model, folder)
    assert result.returncode == 1
    (folder / "shown.jsonl").write_text(result.stdout, "utf-8")
    assert timeless(folder / "shown.jsonl") == expected
    assert result.stderr.startswith('1 of 13 failed: see "error" in their lines\n')
    assert sorted(path.name for path in folder.iterdir()) == ["book.txt", "in.jsonl", "shown.jsonl"]
    given = arguments(model, folder, "--json")
    given[given.index("--output") + 1] = "-"
    assert "--json prints where --output - writes" in refusal(capsys, given)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_whoever_reads_the_answers_goes_away(model: Path, folder: Path) -> None:  # noqa: F811
    """After the first line; the batch ends without a word, as other filters do."""
    given = arguments(model, folder, "--quiet")
    given[given.index("--output") + 1] = "-"
    child = subprocess.Popen(
        [sys.executable, "-m", "laserkv_gguf", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert json.loads(child.stdout.readline())["id"] == "q0"
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1


class Full(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_standard_output() -> None:
    with (
        Stream(Full(), IDS) as output,
        pytest.raises(OutputError, match=r"cannot write standard output: No space left.*--output"),
    ):
        output.add(0, LINES[0])


def test_a_stream_keeps_the_order() -> None:
    file = io.BytesIO()
    with Stream(file, IDS) as output:
        seen = []
        for index in (1, 4, 0, 3, 2):
            output.add(index, LINES[index])
            seen.append(file.getvalue().count(b"\n"))
        assert seen == [0, 0, 2, 2, 5]
        assert output.complete
    assert [json.loads(line) for line in file.getvalue().splitlines()] == LINES


_Fixtures = Iterator[None]  # of test_batch and test_parallel, used by name
