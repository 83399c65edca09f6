"""Lines typed into a chat: whatever they are, it answers the next question."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import strategies as st
from test_documents import pdf
from test_hostile_input import ESCAPES, OBEYED, SENTENCE, SMALL
from tiny import make

from fuzz import budget

pytest.importorskip("llama_cpp")

from laserkv_gguf import ContextOptions, LaserKV
from laserkv_gguf.cli import commands
from laserkv_gguf.cli.commands import COMMANDS, SETTINGS
from laserkv_gguf.cli.editing import Plain
from laserkv_gguf.cli.loop import Loop
from laserkv_gguf.conversation.conversation import Conversation as Talk

NUMBERS = ["0", "1", "2", "-1", "0.5", "1e400", "nan", "9" * 5000, "2147483648", "١", "²", "1_0"]
# nothing is written but under these names, in a folder of the test's own
TARGETS = ["a.lkv", "'b c.lkv'", "", ".", "no/where.lkv", "~nosuchuser/x", "a\0b", "n" * 300]
FILES = [
    "good.txt", "'good.txt'", "other.md", "latin.txt", "empty.txt", "binary", "good.pdf", "bad.pdf",
    "pipe", ".", "-", "a.lkv", "forged.lkv", "cut.lkv", "none", "~nosuchuser/x", "a\0b", "n" * 5000,
    "/dev/zero", f"no{ESCAPES}", "\udcff\udcfe", "good.txt/x", "", "'", '"', "~", "\u202egpj.exe",
]  # fmt: skip
TEXTS = st.sampled_from(
    ["why?", "", " ", "\0", "\udcff", ESCAPES, "é" * 300, "/", "//", '"""', "\\"]
)

ARGUMENTS = {
    "/add": st.sampled_from(FILES),
    "/load": st.sampled_from(FILES),
    "/save": st.sampled_from(TARGETS),
    "/drop": st.sampled_from([*FILES, *NUMBERS]),
    "/kept": st.sampled_from([*FILES, *NUMBERS]),
    "/set": st.tuples(
        st.sampled_from([*SETTINGS, "--top-k", "top_p", "none"]), st.sampled_from([*NUMBERS, "x"])
    ).map(" ".join),
}


@st.composite
def lines(draw: st.DrawFn) -> str:
    how = draw(st.sampled_from(["command", "command", "command", "text", "any", "near"]))
    if how == "text":
        return draw(TEXTS | st.text(max_size=60))
    if how == "near":
        return "/" + draw(st.text(max_size=12)) + " " + draw(TEXTS)
    name = draw(st.sampled_from([name for name in COMMANDS if name != "/quit"]))
    if how == "any" and name != "/save":
        return f"{name} {draw(TEXTS | st.text(max_size=60))}"
    return f"{name} {draw(ARGUMENTS.get(name, st.just('')))}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaserKV]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = make(folder, "small.gguf", spec=SMALL).path
    (folder / "good.txt").write_text(SENTENCE * 12)
    (folder / "other.md").write_text(f"# A title{ESCAPES}\n\n" + SENTENCE * 4)
    (folder / "latin.txt").write_bytes("naïve".encode("latin1"))
    (folder / "empty.txt").write_text("")
    (folder / "binary").write_bytes(b"\x7fELF\0\1")
    (folder / "good.pdf").write_bytes(pdf("Jack has a mother."))
    (folder / "bad.pdf").write_bytes(pdf("Jack has a mother.")[:300])
    if sys.platform != "win32":
        os.mkfifo(folder / "pipe")
    options = ContextOptions(threads=1)
    with LaserKV(model, ctx_size=1500, block_size=256, context=options) as made:
        talk = Talk(made, max_tokens=4)
        list(talk.ask("hello"))
        talk.save(folder / "whole.lkv")
        whole, chance = (folder / "whole.lkv").read_bytes(), Random(0)
        forged = bytearray(whole)
        for _ in range(20):
            forged[chance.randrange(len(forged))] ^= 1 << chance.randrange(8)
        (folder / "forged.lkv").write_bytes(forged)
        (folder / "cut.lkv").write_bytes(whole[: len(whole) // 2])
        before = Path.cwd()
        os.chdir(folder)
        try:
            yield made
        finally:
            os.chdir(before)


def test_chat_lines(engine: LaserKV, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()

    def chat_lines(typed: list[str]) -> None:
        settings = engine.settings  # /set ratio lasts
        left = iter(typed)

        def line() -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        loop = Loop(engine, engine.conversation(max_tokens=4), Plain(line), commands.run)
        loop.run()
        counts["lines"] += len(typed)
        loop.talk.max_tokens = 4
        assert list(loop.talk.ask("hello")), "the chat does not go on"
        err = capsys.readouterr().err
        counts["errors"] += err.count("\nerror: ")
        for raw in re.findall(r"error: (\w+): .*--debug shows where", err):
            counts[raw] += 1
        assert not OBEYED.search(err), repr(err)
        assert "Traceback" not in err
        engine.settings = settings
        counts["chats"] += 1

    budget.run(chat_lines, st.lists(lines(), min_size=1, max_size=12), 25, counts)
    with capsys.disabled():
        if budget.SECONDS:
            print(f"chat_lines: {dict(counts)}", file=sys.stderr, flush=True)
