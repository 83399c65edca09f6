"""Reports of what was kept: the same as the ledger and the policy say, and safe to open."""

from __future__ import annotations

import html.parser
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import TinySpec, forward, make

pytest.importorskip("llama_cpp")

from laserkv_gguf import LaserKV
from laserkv_gguf.cli.app import run
from laserkv_gguf.conversation import parallel
from laserkv_gguf.conversation.conversation import Conversation, Exchange
from laserkv_gguf.conversation.framing import Framing
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import text as text_file
from laserkv_gguf.retention import page, spans
from laserkv_gguf.retention.spans import EVICTED, POOL, Retention
from laserkv_gguf.shown import harmless

HOSTILE = (
    "</script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> ]]> &lt; & \u2028\u2029 "
    "\x1b[2J \u202e{{ 7*7 }} {% for %} '\"` 𝄞 e\u0301 \x00 \r\n\t<svg onload=alert(3)>"
)
TEXT = "The rain in Spain stays mainly in the plain, and the boats stay in. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = TinySpec(layers=2, heads=2, kv_heads=1, n_ff=64, ctx_train=4096)
    return make(tmp_path_factory.mktemp("retention"), spec=spec).path


def asked(engine: LaserKV, document: str, question: str = "Where?") -> Conversation:
    stream = engine.stream(question, document=document, max_tokens=6)
    conversation: Conversation = stream.conversation
    conversation.watches = True
    for _ in stream:
        pass
    return conversation


def test_what_stands_in_a_report_is_what_the_ledger_says(model: Path) -> None:
    with LaserKV(model, block_size=128, ratio=0.25) as engine:
        talk = asked(engine, TEXT)
        found, reply = spans.of(talk), talk.last.reply
        assert "".join(found.pieces).endswith(TEXT)
        assert int((found.states != EVICTED).sum()) == reply.account.kept_tokens
        assert np.array_equal(found.states != EVICTED, found.positions >= 0)
        kept = found.positions[found.positions >= 0]
        assert np.array_equal(kept, talk.ledger.position[: len(kept)])
        assert "".join(found.answer) == harmless(reply.text, running=True)
        assert found.question == "Where?"
        assert found.drafts
        assert found.account == reply.account.as_dict()
        assert [part.name for part in found.parts][-1] == "document"
        assert found.parts[-1].blocks[1] % 128 == 0


@pytest.mark.parametrize("policy", ["laser", "magicpig", "snapkv", "chunkkv", "keydiff", "lagkv"])
def test_a_pool_is_what_scored_highest(model: Path, policy: str) -> None:
    """For policies whose choice is the best by one number in every block of an accumulating run."""
    options = {"shares": "equal"} if policy == "laser" else {}
    settings = {"block_size": 128, "ratio": 0.25, "policy": policy, "policy_options": options}
    with LaserKV(model, **settings) as engine:
        talk = asked(engine, TEXT)
        found = spans.of(talk)
        scored = ~np.isnan(found.scores)
        assert scored.any()
        assert scored[found.states == POOL].all()
        if policy not in ("laser", "magicpig"):
            return
        for block in talk.run.budget.blocks:
            if not block.evicts:
                continue
            inside = np.arange(*block.candidates)
            pool, out = (
                found.scores[inside[found.states[inside] == state]] for state in (POOL, EVICTED)
            )
            assert pool.min() >= out.max()


def test_a_policy_that_names_no_scores_is_reported_without(model: Path) -> None:
    with LaserKV(model, block_size=128, policy="streamingllm") as engine:
        assert np.isnan(spans.of(asked(engine, TEXT)).scores).all()


def test_what_an_answer_looked_at_is_attention(tmp_path: Path) -> None:
    """With everything kept: against a forward pass in NumPy over the whole sequence."""
    tiny = make(tmp_path, spec=TinySpec(layers=2, heads=4, kv_heads=2, ctx_train=512))
    with LaserKV(tiny.path, policy="full", block_size=256) as engine:
        talk = Conversation(engine, document="abcdefgh" * 6, max_tokens=5, framing=Framing(True))
        talk.watches = True
        answer = talk.begin("why?")
        for _ in answer:
            pass
        segments = talk.ledger.segments.values()
        tokens = np.concatenate([segment.tokens for segment in segments])
        tokens = np.concatenate((tokens, talk.pending)).astype(np.int64)
        said, looks = len(answer.reply.tokens), talk.last.looks
        assert said == 5
        asking = np.arange(len(tokens) - said - 1, len(tokens) - 1)
        truth = forward(tiny.weights, tiny.spec, tokens[:-1]).attention.mean(axis=(0, 1))[asking]
        assert looks.share == pytest.approx(truth[:, : len(looks.share)].mean(axis=0), abs=2e-3)
        for token, (rows, weights) in enumerate(zip(looks.most, looks.weights, strict=True)):
            assert weights == pytest.approx(truth[token, rows], abs=2e-3)
            assert weights[0] == pytest.approx(truth[token, : len(looks.share)].max(), abs=2e-3)


def test_what_answers_looked_at_that_were_generated_together_is_attention(tmp_path: Path) -> None:
    """Each in a sequence of its own, beside the other: against NumPy, as above."""
    tiny = make(tmp_path, spec=TinySpec(layers=2, heads=4, kv_heads=2, ctx_train=512))
    found: dict[int, tuple[Exchange, NDArray[np.int32]]] = {}

    def kept(number: int, talk: Conversation) -> None:
        assert talk.last is not None
        segments = [segment.tokens for segment in talk.ledger.segments.values()]
        found[number] = talk.last, np.concatenate(segments)

    asked = [parallel.Question("why?", max_tokens=5), parallel.Question("and how?", max_tokens=3)]
    with LaserKV(tiny.path, policy="full", block_size=256) as engine:
        document, prompts = "abcdefgh" * 6, []
        for question in asked:
            opening = engine.template.opening(question.text, system=None, document=True)
            prompts.append(opening.after.tokens)
        parallel.answer(
            engine, asked, lambda *_: None, document=document, on_kept=kept, watches=True
        )
    assert sorted(found) == [0, 1]
    for number, (last, read) in found.items():
        said, looks = last.reply.tokens, last.looks
        assert looks is not None
        assert len(said) == asked[number].max_tokens
        tokens = np.concatenate((read, prompts[number], said)).astype(np.int64)
        asking = np.arange(len(tokens) - len(said) - 1, len(tokens) - 1)
        truth = forward(tiny.weights, tiny.spec, tokens[:-1]).attention.mean(axis=(0, 1))[asking]
        assert len(looks.share) == len(read) + len(prompts[number])
        assert looks.share == pytest.approx(truth[:, : len(looks.share)].mean(axis=0), abs=2e-3)
        for token, (rows, weights) in enumerate(zip(looks.most, looks.weights, strict=True)):
            assert weights == pytest.approx(truth[token, rows], abs=2e-3)


def test_watching_changes_no_answer_and_is_off(model: Path) -> None:
    with LaserKV(model, block_size=128) as engine:
        watched = asked(engine, TEXT).last
        plain = engine.ask("Where?", document=TEXT, max_tokens=6)
        assert watched.reply.tokens == plain.tokens
        assert watched.looks is not None
        stream = engine.stream("Where?", document=TEXT, max_tokens=6)
        for _ in stream:
            pass
        assert stream.conversation.last.looks is None
        assert spans.of(stream.conversation).looked is None


def test_recall_shows_what_the_last_question_chose(model: Path) -> None:
    with LaserKV(model, block_size=128, recall="ram") as engine:
        talk = engine.conversation(document=TEXT, max_tokens=4)
        talk.read()
        first = spans.of(talk)
        "".join(talk.ask("Where do the boats stay?"))
        second = spans.of(talk)
        assert int((second.states != EVICTED).sum()) == talk.last.reply.account.kept_tokens
        assert second.drafts
        assert not np.array_equal(first.scores, second.scores, equal_nan=True)
        assert (~np.isnan(second.scores[second.states == POOL])).all()


def test_several_documents_stand_one_after_the_other(model: Path) -> None:
    with LaserKV(model, block_size=128) as engine:
        talk = engine.conversation(documents={"one.txt": TEXT, "two.txt": "Boats. " * 60})
        talk.read()
        talk.add("three.txt", "Rain. " * 60)
        found = spans.of(talk)
        assert [part.name for part in found.parts][-3:] == ["one.txt", "two.txt", "three.txt"]
        for part, after in zip(found.parts, found.parts[1:], strict=False):
            assert part.end == after.start
        assert "".join(found.pieces[found.parts[-1].start :]).strip() == ("Rain. " * 60).strip()
        talk.drop("one.txt")
        assert len(spans.of(talk)) == len(found) - (found.parts[-3].end - found.parts[-3].start)


def test_nothing_read_is_refused(model: Path) -> None:
    with LaserKV(model) as engine, pytest.raises(UserError, match="nothing has been read"):
        spans.of(engine.conversation(document=TEXT))


def sample(text: str = HOSTILE, count: int = 0) -> Retention:
    pieces = tuple(text) * (count // len(text) + 1) if count else tuple(text)
    count = len(pieces)
    generator = np.random.default_rng(0)
    states = generator.integers(0, 4, count).astype(np.uint8)
    return Retention(
        title="laser, 25 % kept",
        pieces=pieces,
        states=states,
        scores=generator.random(count, np.float32),
        positions=np.where(states == EVICTED, -1, np.arange(count)).astype(np.int32),
        looked=generator.random(count, np.float32),
        parts=(spans.Part(text, 0, count, tuple(range(0, count, 4096))),),
        question=text,
        drafts=tuple(text),
        answer=tuple(text),
        most=(((0, 0.5),),) * len(text),
        model=text,
    )


def test_json_gives_the_same_back() -> None:
    given = sample()
    said = json.loads(json.dumps(given.as_dict()))
    found = Retention.from_dict(said)
    assert found.pieces == given.pieces
    for name in ("states", "scores", "positions", "looked"):
        assert np.array_equal(getattr(found, name), getattr(given, name))
        assert getattr(found, name).dtype == getattr(given, name).dtype
    assert (found.parts, found.most, found.question) == (given.parts, given.most, given.question)
    with pytest.raises(UserError, match="no report"):
        Retention.from_dict({**said, "format": "other"})


class Elements(html.parser.HTMLParser):
    """What a browser would see as elements, and what stands in scripts of data."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "script":
            self.within.append("")

    def handle_data(self, data: str) -> None:
        if self.within and self.lasttag == "script":
            self.within[-1] += data


def test_a_hostile_document_is_text() -> None:
    """The elements are those of a page about nothing; its data is the document as it was."""
    plain, hostile = Elements(), Elements()
    plain.feed(page.render([replace(sample("x" * len(HOSTILE)))]))
    shown = page.render([sample()])
    hostile.feed(shown)
    assert hostile.seen == plain.seen
    assert hostile.seen.count("script") == 2
    (found,) = json.loads(hostile.within[0])
    assert found["text"] == HOSTILE
    assert "alert(1)</script>" not in shown
    assert "{{" not in shown.replace("{{ 7*7 }}", "")


def test_a_page_loads_nothing() -> None:
    shown = page.render([sample("plain")])
    assert not re.findall(r"(?:src|href)\s*=|https?:|@import|url\(", shown)


def test_only_the_same_text_stands_side_by_side() -> None:
    one = sample("abc")
    assert page.render([one, replace(one, title="other")]).count('class="letter"') == 2
    with pytest.raises(UserError, match="same documents"):
        page.render([one, sample("abd")])
    with pytest.raises(UserError, match="one report or two"):
        page.render([])


def test_a_file_is_whole_or_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_file.os, "fsync", full)
    with pytest.raises(Exception, match="nothing was written"):
        text_file.write(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == "old"
    monkeypatch.undo()
    text_file.write(target, "new")
    assert target.read_text() == "new"


# ---- the commands ------------------------------------------------------------------------------


def test_ask_writes_a_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, target = tmp_path / "book.txt", tmp_path / "kept.html"
    document.write_text(TEXT)
    words = ["ask", "-m", str(model), "-d", str(document), "-q", "Where?", "-n", "6"]
    words += ["--block-size", "128"]
    assert run([*words, "--report", str(target), "--against", "snapkv 0.5"]) == 0
    answered = capsys.readouterr().out
    assert run(words) == 0
    assert capsys.readouterr().out == answered
    found = Elements()
    found.feed(target.read_text("utf-8"))
    first, second = map(Retention.from_dict, json.loads(found.within[0]))
    assert (first.account["policy"], second.account["policy"]) == ("laser", "snapkv")
    assert second.account["ratio"] == 0.5
    assert first.pieces == second.pieces
    assert first.looked is not None
    assert first.parts[-1].name == "book.txt"


def test_batch_writes_a_page_for_every_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"id": "a", "document": TEXT, "question": "Where?"},
        {"id": "b", "document": TEXT, "question": "Why?"},
        {"id": "c", "question": "And?"},
        {"id": "d", "document": TEXT, "question": ""},
    ]
    source, pages = tmp_path / "in.jsonl", tmp_path / "pages"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["batch", "-m", str(model), "-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    words += ["-n", "4", "--block-size", "128", "--quiet", "--report"]
    assert run([*words, str(pages)]) == 1
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in pages.iterdir()) == ["0001.html", "0002.html", "0003.html"]
    for number, line in enumerate(lines[:3], 1):
        found = Elements()
        found.feed((pages / f"{number:04d}.html").read_text("utf-8"))
        shown = Retention.from_dict(json.loads(found.within[0])[0])
        assert shown.question == line["question"]
        assert shown.account == answers[number - 1]["account"]
        assert shown.looked is not None
        assert 0 < shown.looked.sum() < 1
        assert len(shown.most) == len(shown.answer) > 0
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.run").unlink()
    for path in pages.iterdir():
        path.unlink()
        path.mkdir()  # no page can be written there
    assert run([*words, str(pages)]) == 1
    assert capsys.readouterr().err.count("the answers go on without") == 1
    again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("answer") for line in again] == [line.get("answer") for line in answers]
    assert run([*words, str(source)]) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--report", "nowhere/x.html"], "there is no folder nowhere"),
        (["--report", "."], "it is a folder"),
        (["--against", "snapkv"], "add --report FILE.html"),
        (["--report", "x.html", "--against", " "], "--against is empty"),
        (["--report", "x.html", "--against", "snapvk"], "snapvk"),
    ],
)
def test_what_cannot_be_reported_is_refused_first(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    assert run(["ask", "-m", str(model), "-d", "book.txt", "-q", "Where?", *more]) == 2
    assert said in capsys.readouterr().err


def test_chat_writes_a_report(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    typed = "Where?\n/report one.html\nAnd why?\n/report two.html\n/report\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    words = ["chat", "-m", str(model), "-d", "book.txt", "-n", "6", "--block-size", "128"]
    assert run(words) == 0
    assert "name a file: /report FILE.html" in capsys.readouterr().err
    reports = []
    for name in ("one.html", "two.html"):
        found = Elements()
        found.feed(Path(name).read_text("utf-8"))
        reports.append(Retention.from_dict(json.loads(found.within[0])[0]))
    assert [report.question for report in reports] == ["Where?", "And why?"]
    assert reports[0].looked is None
    assert reports[1].looked is not None
