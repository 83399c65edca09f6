"""`batch`: what goes in, what comes out, and that whatever stops it loses nothing."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import (
    SENTENCE,
    SMALL,
    _logging_as_it_was,  # noqa: F401
    environment,
    process,
    refusal,
)
from tiny import make

pytest.importorskip("llama_cpp")

from laserkv_gguf.batch import questions as questions_in
from laserkv_gguf.batch import run as batch
from laserkv_gguf.batch.output import Output, OutputError
from laserkv_gguf.batch.questions import Input
from laserkv_gguf.cli.app import run
from laserkv_gguf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# f32: what an answer is decided by is not the order in which rounded numbers are added up
FLAGS = shlex.split("-t 1 -n 6 --block-size 256 --policy keydiff -ctk f32 -ctv f32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("batch"), "small.gguf", spec=SMALL).path


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    said = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in said), "utf-8")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def questions(count: int) -> list[dict[str, Any]]:
    """About two documents and none, in turn, so that most answers come before their turn."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        question: dict[str, Any] = {"id": f"q{number}", "question": f"why {number}?"}
        question["max_tokens"] = 3 + number % 5
        if number % 3 == 0:
            question["document"] = SENTENCE * 8
        elif number % 3 == 1:
            question["document_path"] = "book.txt"
        found.append(question)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(SENTENCE * 12)
    write(tmp_path / "in.jsonl", *questions(12))
    return tmp_path


def arguments(model: Path, folder: Path, *more: str | Path) -> list[str]:
    files = ["--input", folder / "in.jsonl", "--output", folder / "out.jsonl"]
    return [str(part) for part in ["batch", "-m", model, *FLAGS, *files, *more]]


def timeless(path: Path) -> bytes:
    """The file byte for byte, but for what a clock said."""
    number = rb"[0-9][0-9.e+-]*"
    return re.sub(rb'("\w*(?:_seconds|per_second)": )' + number, rb"\1T", path.read_bytes())


# ---- questions in ------------------------------------------------------------------------------


def parsed(*lines: str | bytes, strict: bool = False) -> Input:
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return questions_in.read(io.BytesIO(data), "in.jsonl", Path("/there"), strict=strict)


GOOD = '{"id": "good", "question": "why?"}'
BAD: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ('{"id": 1, "question": "why?"', r"not JSON: .*column \d+"),
    "a list": ('["why?"]', "not a JSON object"),
    "a text": ('"why?"', "not a JSON object"),
    "not UTF-8": (b'{"id": 1, "question": "na\xefve"}', r"not UTF-8 \(byte \d+\)"),
    "too deep": ("[" * 100_000, "not JSON"),
    "digits": ('{"id": ' + "1" * 10_000 + ', "question": "why?"}', "not JSON"),
    "no id": ('{"question": "why?"}', 'no "id"'),
    "id null": ('{"id": null, "question": "why?"}', 'no "id"'),
    "id a list": ('{"id": [1], "question": "why?"}', r'"id" is \[1\]'),
    "id a fraction": ('{"id": 1.5, "question": "why?"}', '"id" is 1.5'),
    "id true": ('{"id": true, "question": "why?"}', '"id" is true'),
    "id half a character": ('{"id": "\\ud800", "question": "why?"}', '"id" is '),
    "same id": ('{"id": "good", "question": "why?"}', "line 1 has the same id"),
    "no question": ('{"id": 1}', 'no "question"'),
    "another name": ('{"id": 1, "prompt": "why?"}', 'no "question"; .* by "prompt"'),
    "question blank": ('{"id": 1, "question": " "}', '"question" is empty'),
    "question a number": ('{"id": 1, "question": 3}', '"question" is 3; give a text'),
    "half a character": ('{"id": 1, "question": "\\udc00"}', '"question" is '),
    "question misspelt": ('{"id": 1, "qeustion": "why?"}', '"qeustion".*"question"'),
    "path misspelt": ('{"id": 1, "question": "q", "document_pth": "x"}', '"document_path"'),
    "two documents": (
        '{"id": 1, "question": "q", "document": "a", "document_path": "b"}',
        'both "document" and "document_path"',
    ),
    "document empty": ('{"id": 1, "question": "q", "document": " "}', '"document" is empty'),
    "document a list": ('{"id": 1, "question": "q", "document": ["a"]}', '"document" is '),
    "path empty": ('{"id": 1, "question": "q", "document_path": ""}', "empty"),
    "system a number": ('{"id": 1, "question": "q", "system": 1}', '"system" is 1'),
    "no tokens": ('{"id": 1, "question": "q", "max_tokens": 0}', '"max_tokens" is 0'),
    "half a token": ('{"id": 1, "question": "q", "max_tokens": 1.5}', '"max_tokens" is 1.5'),
    "tokens a text": ('{"id": 1, "question": "q", "max_tokens": "9"}', '"max_tokens" is "9"'),
    "tokens true": ('{"id": 1, "question": "q", "max_tokens": true}', '"max_tokens" is true'),
    "stop empty": ('{"id": 1, "question": "q", "stop": [""]}', '"stop" is '),
    "stop a number": ('{"id": 1, "question": "q", "stop": 7}', '"stop" is 7'),
    "expected blank": ('{"id": 1, "question": "q", "expected": " "}', '"expected" is '),
    "expected a number": ('{"id": 1, "question": "q", "expected": 7}', '"expected" is 7'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_an_error_of_its_own(name: str) -> None:
    line, pattern = BAD[name]
    found = parsed(GOOD, "", line).items
    assert [item.line for item in found] == [1, 3]
    assert found[0].error == ""
    assert re.search(pattern, found[1].error), found[1].error
    assert "\n" not in found[1].error
    assert len(found[1].error) < 200
    with pytest.raises(UserError, match=r"^in\.jsonl, line 3: "):
        parsed(GOOD, "", line, strict=True)


def test_a_good_line() -> None:
    first, second, third = parsed(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r",
        '{"id": 7, "question": "a", "document_path": "b/c.txt", "system": "s", "max_tokens": 3, '
        '"stop": "x", "expected": ["y", "z"], "note": "mine"}',
        '{"id": "7", "question": "a", "document": "t", "system": null, "stop": ["\\n", "x"]}',
    ).items
    assert (first.id, first.question, first.document, first.max_tokens) == (
        "good",
        "why?",
        None,
        None,
    )
    assert (second.id, second.document, second.system, second.max_tokens) == (
        7,
        str(Path("/there/b/c.txt")),
        "s",
        3,
    )
    assert (second.stop, second.expected) == (("x",), ("y", "z"))
    assert (third.id, third.inline, third.stop, third.system) == ("7", True, ("\n", "x"), None)


def test_documents_stay_in_the_file_until_they_are_read() -> None:
    long, other = "tin " * 1000, "copper " * 1000
    given = parsed(
        json.dumps({"id": 1, "question": "a", "document": long}),
        json.dumps({"id": 2, "question": "a", "document": other}),
        json.dumps({"id": 3, "question": "a", "document": long}),
    )
    one, two, three = given.items
    assert one.document == three.document != two.document
    assert [given.text(item) for item in (three, two, one)] == [long, other, long]
    assert max(len(str(item)) for item in given.items) < 400
    given.file.seek(two.offset + 60)
    given.file.write(b"X")
    with pytest.raises(Exception, match="input file was changed"):
        given.text(two)


@pytest.mark.parametrize("data", [b"", b"\n\n \r\n"])
def test_nothing_to_do(data: bytes) -> None:
    with pytest.raises(UserError, match=r"in\.jsonl is empty"):
        parsed(data)


# ---- answers out -------------------------------------------------------------------------------

RUN = {"input": "abc", "policy": "keydiff", "ratio": 0.25}
IDS = ["a", 1, None, "d", "é"]
ORDER = [1, 4, 0, 3, 2]  # as they are answered
LINES = [{"id": name, "answer": f"{name} says \u2028 {'x' * 9}", "n": 0.1} for name in IDS]


class Killed(BaseException):
    pass


def fill(path: Path) -> None:
    """A run, from wherever it stands to its end."""
    with Output(path, RUN, IDS) as output:
        for index in ORDER:
            if index not in output.done:
                output.add(index, LINES[index])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def limited(monkeypatch: pytest.MonkeyPatch, room: int, then: BaseException) -> None:
    """The disk takes so many bytes more."""
    real, left = os.write, [room]

    def write(file: int, data: Any) -> int:
        taken = bytes(data[: left[0]])
        left[0] -= len(taken)
        if taken:
            return real(file, taken)
        raise then

    monkeypatch.setattr(os, "write", write)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["killed", "full"])
def test_stopped_at_every_byte(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is ever written to both files."""
    whole = tmp_path / "whole.jsonl"
    fill(whole)
    expected = whole.read_bytes()
    assert [json.loads(line) for line in expected.splitlines()] == LINES
    record = whole.with_name("whole.jsonl.run").read_bytes()
    assert record.count(b"\n") == 1
    path, room, told = tmp_path / "out.jsonl", -1, set()
    while True:
        room += 1
        then = Killed() if how == "killed" else OSError(28, "No space left on device")
        with monkeypatch.context() as patch:
            limited(patch, room, then)
            try:
                fill(path)
                break
            except Killed:
                assert how == "killed"
            except OutputError as error:
                told.add(re.sub(r"\d+ answers", "answers", str(error).replace(".run", "")))
                assert expected.startswith(path.read_bytes())
                assert path.read_bytes()[-1:] in (b"", b"\n")
        written = path.read_bytes() if path.exists() else b""
        assert expected.startswith(written)
        fill(path)
        assert path.read_bytes() == expected
        assert path.with_name("out.jsonl.run").read_bytes() == record
        path.unlink()
    assert room > len(expected)
    if how == "full":
        (said,) = told
        assert re.search(
            r"out\.jsonl: No space left on device; the answers so far .*make room", said
        )


@pytest.mark.usefixtures("quick")
def test_no_line_waits_longer_than_it_must(tmp_path: Path) -> None:
    """Who looks at the output sees every answer whose turn has come."""
    path = tmp_path / "out.jsonl"
    with Output(path, RUN, IDS) as output:
        there = []
        for count, index in enumerate(ORDER, 1):
            output.add(index, LINES[index])
            there.append(len(path.read_bytes().splitlines()))
            again = Output(path, RUN, IDS)
            again.load()  # as the next start finds it
            assert again.done == set(ORDER[:count])
        assert there == [0, 0, 2, 2, 5]
        with pytest.raises(ValueError, match="already"):
            output.add(3, LINES[3])


@pytest.mark.usefixtures("quick")
def test_what_is_another_s_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    record = tmp_path / "out.jsonl.run"

    def refused(pattern: str, ids: list[Any] = IDS, **changes: Any) -> None:
        before = [file.read_bytes() if file.exists() else None for file in (path, record)]
        for use in (Output.load, Output.__enter__):
            with pytest.raises(UserError, match=pattern) as caught:
                use(Output(path, {**RUN, **changes}, ids))
            assert "use another --output" in str(caught.value)
            after = [file.read_bytes() if file.exists() else None for file in (path, record)]
            assert [b or b"" for b in before] == [a or b"" for a in after]

    path.write_text("my notes\n")
    refused("no batch left it")
    path.unlink()
    record.write_text("my notes\n")
    refused("in the way")
    record.unlink()
    fill(path)
    refused("ratio was 0.25 and is 0.5", ratio=0.5)
    refused('policy was "keydiff" and is "laser"', policy="laser")
    refused("the input was different", input="abd")
    refused("top_k was null and is 3", top_k=3)
    refused("line 2 of .* is not the answer", ids=["a", 2, None, "d", "é"])
    refused("line 5 of .* is not the answer", ids=IDS[:4])
    path.write_bytes(path.read_bytes().replace(b'{"id": 1', b'{"no": 1'))
    refused("line 2 of .* is not the answer")
    record.unlink()
    refused("no batch left it")


@pytest.mark.usefixtures("quick")
def test_a_new_run_where_nothing_would_be_lost(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.touch()
    with Output(path, {**RUN, "ratio": 0.5}, IDS):
        pass  # nothing was answered
    fill(path)
    expected = path.read_bytes()
    path.unlink()  # the answers are to be had anew
    with Output(path, {**RUN, "ratio": 0.5}, IDS) as output:
        assert output.done == set()
        output.add(4, LINES[4])  # this waits in the record alone
    with pytest.raises(UserError, match="another run"):
        fill(path)
    path.unlink()
    fill(path)
    assert path.read_bytes() == expected


def test_only_one_batch_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "out.jsonl"
    with Output(path, RUN, IDS) as output:
        output.add(0, LINES[0])
        with pytest.raises(UserError, match=r"another batch is writing .*out\.jsonl"):
            fill(path)
        output.add(1, LINES[1])
    fill(path)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == LINES


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anything")
def test_not_writable(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o555)
    with pytest.raises(UserError, match="no permission"):
        Output(tmp_path / "closed" / "out.jsonl", RUN, IDS).load()


# ---- the command -------------------------------------------------------------------------------

Capture = pytest.CaptureFixture[str]


def asked(model: Path, folder: Path, question: dict[str, Any], capsys: Capture) -> dict[str, Any]:
    """The same by `ask`."""
    given = ["ask", "-m", str(model), *FLAGS, "-q", question["question"], "--json"]
    if "max_tokens" in question:
        given += ["-n", str(question["max_tokens"])]
    if "document" in question:
        (folder / "inline.txt").write_text(question["document"])
        given += ["-d", str(folder / "inline.txt")]
    elif "document_path" in question:
        given += ["-d", str(folder / question["document_path"])]
    capsys.readouterr()
    assert run(given) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_answers_are_those_of_ask(model: Path, folder: Path, capsys: Capture) -> None:
    assert run(arguments(model, folder)) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d+ tokens generated in .* tok/s · documents read 3 times in .* s\n", err)
    answers = lines_of(folder / "out.jsonl")
    assert [line["id"] for line in answers] == [f"q{number}" for number in range(12)]
    for line, question in zip(answers, questions(12), strict=True):
        assert list(line) == ["id", "answer", "finish_reason", "account"]
        one = asked(model, folder, question, capsys)
        assert line["answer"] == one["answer"]
        assert line["finish_reason"] == "length"
        for key in ("policy", "document_tokens", "kept_tokens", "generated_tokens", "seed"):
            assert line["account"][key] == one["account"][key]


def test_what_fails_is_a_line_and_the_rest_goes_on(
    model: Path, folder: Path, capsys: Capture
) -> None:
    good, *others = questions(12)
    write(
        folder / "in.jsonl",
        good,
        "{broken",
        others[0],
        {"id": "gone", "question": "why?", "document_path": "gone.txt"},
        {"id": "gone too", "question": "why?", "document_path": "gone.txt"},
        {"id": "long", "question": "why? " * 60, "document": good["document"]},
        {"id": good["id"], "question": "again?"},
        others[2],
    )
    assert run(arguments(model, folder)) == 1
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0].split(":")[0]) == ("", "5 of 8 failed")
    lines = lines_of(folder / "out.jsonl")
    assert ["error" in line for line in lines] == [False, True, False, *[True] * 4, False]
    for number, said in {
        1: "not JSON",
        3: r"no document at .*gone\.txt",
        4: r"no document at .*gone\.txt",
        5: "question has .* block of 256",
        6: "line 1 has the same id",
    }.items():
        again = ["retry"] if number in (3, 4) else []  # the file may come; the rest is final
        assert list(lines[number]) == ["id", "line", "error", *again]
        assert lines[number]["line"] == number + 1
        assert re.search(said, lines[number]["error"])
    assert lines[1]["id"] is None
    before = (folder / "out.jsonl").read_bytes()
    # once more: there is nothing new, and it says so in the same way
    assert run(arguments(model, folder)) == 1
    assert capsys.readouterr().err == err.splitlines(keepends=True)[0]
    assert (folder / "out.jsonl").read_bytes() == before


def test_fail_fast(model: Path, folder: Path, capsys: Capture) -> None:
    """A bad line is refused before anything is done; what fails is asked again the next time."""
    given = questions(12)
    write(folder / "in.jsonl", *given, "{broken")
    line = refusal(capsys, arguments(model, folder, "--fail-fast"))
    assert re.search(r"in\.jsonl, line 13: not JSON", line)
    assert not (folder / "out.jsonl").exists()
    write(folder / "in.jsonl", *given)
    (folder / "book.txt").rename(folder / "away.txt")
    assert run(arguments(model, folder, "--fail-fast")) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: line 2: no document at .*book\.txt.*\n", err)
    assert len(lines_of(folder / "out.jsonl")) == 1
    (folder / "away.txt").rename(folder / "book.txt")
    assert run(arguments(model, folder, "--fail-fast")) == 0
    resumed = timeless(folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    assert run(arguments(model, folder)) == 0
    assert resumed == timeless(folder / "out.jsonl")


def test_quiet_json_and_score(model: Path, folder: Path, capsys: Capture) -> None:
    given = questions(4)
    answer = asked(model, folder, given[0], capsys)["answer"]
    loud = f" {answer.swapcase()} ".replace(answer.swapcase()[0], f"{answer.swapcase()[0]}")
    given[0]["expected"] = ["never said", loud]
    given[1]["expected"] = "never said"
    given[2] |= {"expected": "x", "document_path": "gone.txt"}
    write(folder / "in.jsonl", *given)
    assert run(arguments(model, folder, "--quiet", "--json")) == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r'3 of 4 failed: see "error" in .*\n|1 of 4 failed: see .*\n', err)
    found = json.loads(out)
    assert (found["questions"], found["failed"]) == (4, 1)
    assert (found["expected"], found["found"]) == (3, 1)
    assert found["generated_tokens"] == sum(given[number]["max_tokens"] for number in (0, 1, 3))
    assert [line.get("score") for line in lines_of(folder / "out.jsonl")] == [1, 0, None, None]
    assert run(arguments(model, folder)) == 1
    assert "score: 1 of 3 (33.3%)" in capsys.readouterr().err
    (folder / "out.jsonl").unlink()
    write(folder / "in.jsonl", *questions(2))
    assert run(arguments(model, folder, "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It was  KITCHEN\n", ("kitchen",), True),
        ("in the bath room", ("Bath\nRoom",), True),
        ("no", ("yes", "no"), True),
        ("Straße", ("STRASSE",), True),
        ("\uff11\uff12", ("12",), True),  # full width
        ("the kit chen", ("kitchen",), False),
        ("", ("a",), False),
    ],
)
def test_what_counts_as_right(answer: str, expected: tuple[str, ...], right: bool) -> None:
    assert batch.contains(answer, expected) == right


def test_a_document_for_all_and_a_system_prompt(model: Path, folder: Path, capsys: Capture) -> None:
    given = questions(3)
    del given[2]["max_tokens"]
    given[1]["system"] = "Shout."
    write(folder / "in.jsonl", *given)
    (folder / "all.txt").write_text(SENTENCE * 10)
    assert run(arguments(model, folder, "-d", folder / "all.txt", "-sys", "Be brief.")) == 0
    lines = lines_of(folder / "out.jsonl")
    around = len("<s>" + "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n") - 2
    read = [line["account"]["document_tokens"] for line in lines]
    assert read == [
        around + len("Be brief." + SENTENCE * 8),
        around + len("Shout." + SENTENCE * 12),
        around + len("Be brief." + SENTENCE * 10),
    ]
    assert lines[2]["account"]["generated_tokens"] == 6
    line = refusal(capsys, arguments(model, folder, "-d", folder / "all.txt", "-sys", "Shout."))
    assert 'system was "Be brief." and is "Shout."' in line
    line = refusal(capsys, arguments(model, folder, "-sys", "Be brief."))
    assert "the document was different" in line


def test_stop_strings_of_a_line(model: Path, folder: Path, capsys: Capture) -> None:
    given = {**questions(1)[0], "max_tokens": 30}
    whole = asked(model, folder, given, capsys)["answer"]
    write(folder / "in.jsonl", {**given, "stop": ["never", whole[4:7]]})
    assert run(arguments(model, folder)) == 0
    (line,) = lines_of(folder / "out.jsonl")
    assert (line["answer"], line["finish_reason"]) == (whole[: whole.find(whole[4:7])], "stop")


REFUSED = {
    "no input": ("batch -m {model} -o o.jsonl", "--input FILE.*--output FILE"),
    "no output": ("batch -m {model} -i in.jsonl", "--input FILE.*--output FILE"),
    "input missing": ("{batch} -i no.jsonl", r"no questions at no\.jsonl"),
    "input is a folder": ("{batch} -i sub", "folder"),
    "input empty": ("{batch} -i empty.jsonl", "empty"),
    "input is a text": ("{batch} -i book.txt", r"book\.txt, line 1: not JSON"),
    "no question usable": ("{batch} -i none.jsonl", r'none\.jsonl, line 1: no "question"'),
    "output is the input": ("{batch} -o in.jsonl", r"in\.jsonl is read and would be written"),
    "output links to the input": ("{batch} -o link.jsonl", "is read and would be written"),
    "record is the input": ("{batch} -i x.run -o x", r"x\.run is read and would be written"),
    "output is a document": ("{batch} -d book.txt -o book.txt", "is read and would be written"),
    "output is a text": ("{batch} -o book.txt", "book.txt is there already.*another --output"),
    "output is a folder": ("{batch} -o sub", "sub is a folder"),
    "no such folder": ("{batch} -o no/o.jsonl", "no folder no"),
    "output is a device": ("{batch} -o /dev/null", "no plain file"),
    "none in parallel": ("{batch} --parallel 0", "--parallel 0.*1 to "),
    "too many in parallel": ("{batch} -np 300", "--parallel 300.*1 to 253"),
    "no tokens": ("{batch} -n 0", "-n 0"),
    "stdin twice": ("{batch} -i - -d -", "standard input"),
    "document missing": ("{batch} -d no.txt", r"no\.txt"),
    "model missing": ("{batch} -m no.gguf", r"no\.gguf"),
    "model is a text": ("{batch} -m book.txt", "not a GGUF"),
    "policy unknown": ("{batch} --policy lazer", "lazer is unknown"),
    "ratio 0": ("{batch} --ratio 0", "--ratio is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(
    name: str, model: Path, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "sub").mkdir()
    (folder / "empty.jsonl").touch()
    write(folder / "none.jsonl", {"id": 1})
    shutil.copy(folder / "in.jsonl", folder / "x.run")
    (folder / "link.jsonl").symlink_to("in.jsonl")
    command, pattern = REFUSED[name]
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    given = command.replace("{batch}", "batch -m {model} -i in.jsonl -o o.jsonl -t 1 -n 3")
    line = refusal(capsys, [part.format(model=model) for part in given.split()])
    assert re.search(pattern, line), line
    for path, data in before.items():
        assert path.read_bytes() == data
    answers = folder / "o.jsonl"
    assert not answers.exists() or answers.read_bytes() == b""


def test_questions_from_a_pipe(model: Path, folder: Path) -> None:
    """With documents in them, which are read a second time; paths start here then."""
    given = [part if part != str(folder / "in.jsonl") else "-" for part in arguments(model, folder)]
    piped = (folder / "in.jsonl").read_text()
    result = process(*given, "--quiet", input=piped, cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    from_pipe = timeless(folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    assert run(arguments(model, folder)) == 0
    assert timeless(folder / "out.jsonl") == from_pipe


# ---- stopped -----------------------------------------------------------------------------------

# Everything is imported once, before llama.cpp starts; each run is a process of its own.
DRIVER = """
import os, random, signal, sys, time
import llama_cpp, numba
import laserkv_gguf.batch.run, laserkv_gguf.cli.app, laserkv_gguf.kernels, laserkv_gguf.policies
from pathlib import Path

laserkv_gguf.policies.available()
laserkv_gguf.llama.capture.Probe(1, 1, 1, 32).callback  # what Numba compiles is loaded once, too

out, kills, *arguments = sys.argv[1:]
files = [Path(out), Path(out + ".run")]
dice = random.Random(5)

def size():
    return sum(file.stat().st_size for file in files if file.exists())

def start():
    child = os.fork()
    if child:
        return child
    try:
        os._exit(laserkv_gguf.cli.app.run(arguments))
    finally:
        os._exit(99)

killed = finished = 0
while killed < int(kills):
    child, before = start(), size()
    more = before + dice.choice((0, 1, 1, 1000, 2500))
    while size() < more:
        time.sleep(0.0005)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:  # this one was quicker: begin anew
            assert status == 0
            finished += 1
            files[0].rename(f"{out}.{finished}")
            files[1].unlink()
            break
    else:
        time.sleep(dice.random() * dice.choice((0.002, 0.02)))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        print(size() - before, flush=True)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")
def test_killed_twenty_times_and_finished(model: Path, folder: Path) -> None:
    """Byte for byte what an uninterrupted run writes."""
    write(folder / "in.jsonl", *questions(90))
    given = arguments(model, folder, "--quiet", "--parallel", "3", "--policy", "streamingllm")
    assert run(given) == 0
    expected = timeless(folder / "out.jsonl")
    assert expected.count(b"\n") == 90
    (folder / "out.jsonl").unlink()
    (folder / "out.jsonl.run").unlink()
    driver = [sys.executable, "-c", DRIVER, str(folder / "out.jsonl"), "20", *given]
    result = subprocess.run(driver, capture_output=True, text=True, env=environment(), check=False)
    assert (result.returncode, result.stderr) == (0, "")
    grown = [int(line) for line in result.stdout.split()]
    assert len(grown) >= 20
    assert sum(size > 0 for size in grown) >= 5  # it came further, and was killed all the same
    for output in (folder / "out.jsonl", *folder.glob("out.jsonl.[0-9]*")):
        assert timeless(output) == expected


@pytest.fixture
def long_run(model: Path, folder: Path) -> tuple[list[str], bytes]:
    """A run of a second or two, and what it writes where nothing stops it."""
    given = [{**question, "max_tokens": 250} for question in questions(12)]
    write(folder / "in.jsonl", *given)
    command = arguments(model, folder, "--parallel", "2")
    assert run([*command, "--quiet"]) == 0
    expected = timeless(folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    return command, expected


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_stopped_by_a_signal(
    sent: signal.Signals, code: int, folder: Path, long_run: tuple[list[str], bytes]
) -> None:
    """Whole lines only, the exit code of the signal, and the same command goes on."""
    command, expected = long_run
    output = folder / "out.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-m", "laserkv_gguf", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    while not (output.exists() and output.stat().st_size) and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(sent)
    out, err = child.communicate(timeout=600)
    assert (child.returncode, out) == (code, "")
    stopped = re.fullmatch(r"stopped: (\d+) of 12 are answered; the same command goes on\n", err)
    assert stopped, err
    record = output.with_name("out.jsonl.run").read_bytes()
    assert output.read_bytes().endswith(b"\n")
    assert record.endswith(b"\n")
    written = output.read_bytes().count(b"\n")
    entries = [json.loads(line) for line in record.splitlines()[1:]]
    waiting = {entry["index"] for entry in entries if entry.get("index", -1) >= written}
    assert 1 <= written + len(waiting) == int(stopped[1]) < 12
    assert run([*command, "--quiet"]) == 0
    assert timeless(output) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_disk_that_fills(folder: Path, long_run: tuple[list[str], bytes]) -> None:
    """As a limit on the size of files has it: part of a line is written, then no more."""
    command, expected = long_run
    size = len(expected) // 2
    result = process(
        *command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"error: cannot write .*out\.jsonl(\.run)?: File too large; the \d+ answers so far are "
        r"kept: make room, and the same command goes on after them\n",
        result.stderr,
    )
    written = timeless(folder / "out.jsonl")
    assert 0 < len(written) < len(expected)
    assert written.endswith(b"\n")
    assert expected.startswith(written)
    assert run([*command, "--quiet"]) == 0
    assert timeless(folder / "out.jsonl") == expected


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
def test_the_bar_on_a_terminal(model: Path, folder: Path) -> None:
    """How many of how many, and the time left; nothing of it stays."""
    pytest.importorskip("pexpect")
    from test_terminal import Terminal

    terminal = Terminal(*arguments(model, folder))
    terminal.wait(lambda: not terminal.pump(), "end")
    drawn = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.raw)  # however briefly it stood there
    assert re.search(r"batch [━╸╺]+ \d+/12 .*tok/s +\d+:\d\d", drawn)
    assert re.fullmatch(r"[\d,]+ tokens generated in .* s", terminal.text)
    assert terminal.child.wait() == 0
