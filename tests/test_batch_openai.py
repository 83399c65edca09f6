"""OpenAI's batch lines, and answers of a shape, on the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from test_batch import FLAGS, lines_of, write
from test_cli import SENTENCE, SMALL, _logging_as_it_was, refusal  # noqa: F401
from tiny import make

from laserkv_gguf.cli.app import run

DOCUMENT = SENTENCE * (2400 // len(SENTENCE))
SCHEMA = {"enum": ["ore", "tin"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("batches"), "small.gguf", spec=SMALL).path


def line(name: str, *messages: tuple[str, Any], **body: Any) -> dict[str, Any]:
    said = [{"role": role, "content": content} for role, content in messages]
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "any", "messages": said, **body},
    }


def batch(model: Path, source: Path, target: Path, *more: str) -> int:
    return run(["batch", "-m", str(model), "-i", str(source), "-o", str(target), *FLAGS, *more])


def test_lines_of_openai_s_are_answered_as_our_own(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = f"{DOCUMENT}\n\nWhat is it?"
    theirs = write(
        tmp_path / "theirs.jsonl",
        line("a", ("system", "Be brief."), ("user", asked), max_completion_tokens=4),
        line("b", ("user", [{"type": "text", "text": "Who?"}]), stop=["zz"], seed=3),
        line("c", ("user", "Who?"), tools=[]),
        line("d", ("user", "Who?"), ("assistant", "Me."), ("user", "Who?")),
        line("e", ("user", "Which?"), max_tokens=40, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        line("f", ("user", "Which?"), max_tokens=3, logit_bias={"300": 100}),
    )  # fmt: skip
    own = write(
        tmp_path / "own.jsonl",
        {"id": "a", "question": "What is it?", "document": DOCUMENT, "system": "Be brief.",
         "max_tokens": 4},
        {"id": "b", "question": "Who?", "stop": ["zz"]},
    )  # fmt: skip
    assert batch(model, own, tmp_path / "own.out") == 0
    target = tmp_path / "theirs.out"
    assert batch(model, theirs, target) == 1
    expected, found = lines_of(tmp_path / "own.out"), lines_of(target)
    assert [one["custom_id"] for one in found] == list("abcdef")
    for mine, his in zip(expected, found, strict=False):
        answer = ChatCompletion.model_validate(his["response"]["body"])
        assert his["error"] is None
        assert answer.choices[0].message.content == mine["answer"]
        assert answer.choices[0].finish_reason == mine["finish_reason"]
    for at, name in ((2, "tools"), (3, "message 2")):
        assert found[at]["response"] is None
        assert name in found[at]["error"]["message"]
    bodies = [one["response"]["body"]["choices"][0] for one in found[4:]]
    assert json.loads(bodies[0]["message"]["content"]) in ("ore", "tin")
    assert bodies[1]["message"]["content"] == "I" * 3
    # stopped after two lines it goes on, and writes the same
    whole = target.read_bytes()
    target.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"custom')
    assert batch(model, theirs, target) == 1
    again = lines_of(target)
    for one in (*found, *again):  # but for the time
        if one["response"]:
            one["response"]["body"].pop("created")
            one["response"]["body"].pop("laserkv")
    assert again == found
    assert "2 of 6 failed" in capfd.readouterr().err


def test_answers_of_a_shape(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "yes" | "no"')
    asked = ["ask", "-m", str(model), "-q", "Which?", *shlex.split("-t 1 -n 40 --block-size 256")]
    assert run([*asked, "--json-schema", str(schema)]) == 0
    assert json.loads(capfd.readouterr().out) in ("ore", "tin")
    assert run([*asked, "--grammar", str(grammar)]) == 0
    assert capfd.readouterr().out.strip() in ("yes", "no")
    source = write(tmp_path / "in.jsonl", {"id": 1, "question": "Which?"})
    assert batch(model, source, tmp_path / "out", "--grammar", str(grammar)) == 0
    assert lines_of(tmp_path / "out")[0]["answer"] in ("yes", "no")
    capfd.readouterr()
    # a run with another grammar is another run
    grammar.write_text('root ::= "a" | "b"')
    again = ["batch", "-m", str(model), "-i", str(source), "-o", str(tmp_path / "out"), *FLAGS]
    assert "another run" in refusal(capfd, [*again, "--grammar", str(grammar)])


@pytest.mark.parametrize(
    ("flag", "text", "says"),
    [
        ("--grammar", "root ::= (", "GBNF"),
        ("--grammar", "", "empty"),
        ("--grammar", "x ::= y", "root"),
        ("--json-schema", "{", "not JSON"),
        ("--json-schema", "[]", "no JSON schema"),
        ("--json-schema", '{"type": "object", "$ref": "file:///etc/passwd"}', "into itself"),
        ("--json-schema", '{"type": "array", "maxItems": 1000000000}', "at most"),
        ("--json-schema", '{"type": "nothing of this kind"}', "grammar"),
        ("--json-schema", '{"a": ' * 400 + "1" + "}" * 400, "deep"),
    ],
)
def test_shapes_that_cannot_be(
    flag: str, text: str, says: str, model: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text(text)
    asked = ["ask", "-m", str(model), "-q", "Which?", "-t", "1", "-n", "8"]
    assert says in refusal(capfd, [*asked, flag, str(tmp_path / "file")])
