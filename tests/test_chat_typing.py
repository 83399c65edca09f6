"""What is typed while a document is read, and while an answer comes, on a real pseudo-terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_terminal import (
    CTRL_C,
    CTRL_D,
    SENTENCE,
    Terminal,
    chat,
    folder,  # noqa: F401 (a fixture)
    terminal,
)

PASTE, PASTED = "\x1b[200~", "\x1b[201~"
BAR = r"reading [━─]+ [\d,]+/[\d,]+ tokens · [\d,]+ tok/s · kept [\d,]+[^\n]*"
PATIENCE = 180.0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("typing") / "foxes.txt"
    path.write_text(SENTENCE * 130)
    return path


def reading(folder: Path, text: Path, *arguments: str) -> list[str]:  # noqa: F811
    given = ("-d", str(text), "--block-size", "1024", "-n", "20", "-ub", "64", "--lookahead", "2")
    return chat(folder, "slow", *given, *arguments)


def ready(it: Terminal, *shown: str) -> None:
    """An empty prompt with nothing under way, below what is wanted."""
    it.wait(
        lambda: it.at_prompt and all(part in it.text for part in shown),
        f"prompt, {shown}",
        PATIENCE,
    )


def test_a_question_typed_while_reading(folder: Path, text: Path) -> None:  # noqa: F811
    """It waits in sight with what is typed after it; all of it has its turn, in order."""
    with terminal(*reading(folder, text)) as it:
        it.wait_for(BAR)
        it.child.send("what jumps")
        it.wait_for(rf"{BAR}\n> what jumps$")  # typed below the bar
        it.child.send("?\r")
        it.wait_for(rf"waiting: what jumps\?\n{BAR}\n>$")
        it.child.send(f"{PASTE}and who\nis lazy?{PASTED}\r")  # one message of two lines
        it.say("/docs")
        it.wait_for(
            rf"waiting: what jumps\?\nwaiting: and who is lazy\?\nwaiting: /docs\n{BAR}\n>$"
        )
        ready(it, "foxes.txt  kept")
        assert "waiting:" not in it.text
        answered = r".{20}\nlooked again at 5,8\d\d tokens in [\d.]+ s\nsaw [^\n]+\ncut at[^\n]+\n"
        assert re.search(
            rf"read 5,8\d\d tokens in [\d.]+ s, kept [\d,]+\n"
            rf"> what jumps\?\n{answered}> and who is lazy\?\n{answered}> /docs\n *1  foxes\.txt",
            it.text,
        )
        it.child.send(CTRL_D)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_ctrl_c_drops_the_question_first_and_then_the_reading(folder: Path) -> None:  # noqa: F811
    with terminal(*reading(folder, folder / "long.txt")) as it:
        it.wait_for(BAR)
        it.say("one?")
        it.say("two?")
        it.wait_for(rf"waiting: one\?\nwaiting: two\?\n{BAR}")
        it.child.send("half")
        it.wait_for("> half")
        it.child.send(CTRL_C)  # what is typed
        it.wait_for(rf"waiting: two\?\n{BAR}\n>$")
        it.child.send(CTRL_C)
        it.wait_for(rf"waiting: one\?\n{BAR}\n>$")
        it.child.send(CTRL_C)
        it.wait(lambda: "waiting" not in it.text and re.search(BAR, it.text), "bar alone")
        it.child.send(CTRL_C)
        it.wait_for(r"stopped after reading [\d,]+ of 72,0\d\d tokens; nothing of it is kept")
        ready(it)
        shown = it.ask("hello")
        assert len(shown.splitlines()[0]) == 20
        assert "looked again" not in it.text
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


@pytest.mark.parametrize("how", ["/quit\r", pytest.param(CTRL_D, marks=pytest.mark.long)])
def test_left_while_reading(how: str, folder: Path) -> None:  # noqa: F811
    with terminal(*reading(folder, folder / "long.txt")) as it:
        it.wait_for(BAR)
        it.child.send(how)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


@pytest.mark.long
def test_half_a_line_outlives_the_reading(folder: Path, text: Path) -> None:  # noqa: F811
    with terminal(*reading(folder, text)) as it:
        it.wait_for(BAR)
        it.child.send("half a li")
        it.wait(lambda: re.search(r"kept [\d,]+\n> half a li$", it.text), "end", PATIENCE)
        it.child.send("ne\r")
        ready(it, "looked again")
        assert re.search(r"> half a line\n.{20}\n", it.text)
        it.child.send(CTRL_D)
        assert it.exit_code() == 0


@pytest.mark.parametrize("disk", [pytest.param(True, marks=pytest.mark.long), False])
def test_without_memory_for_rows(
    disk: bool,
    folder: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
) -> None:
    """A question that came early is answered; without a disk, too, what follows is said once."""
    cache = {"XDG_CACHE_HOME": str(tmp_path) if disk else "/proc/none"}
    with terminal(*reading(folder, text, "--recall-limit", "0"), **cache) as it:
        it.wait_for(BAR)
        it.say("what jumps?")
        ready(it, "> what jumps?", "tok/s\ncut at 20")
        assert ("looked again" in it.text) == disk
        assert it.text.count("recall is off") == (not disk)
        assert re.search(r"> what jumps\?\n.{20}\n", it.text)
        it.child.send(CTRL_D)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_typed_before_there_is_a_prompt(folder: Path) -> None:  # noqa: F811
    with terminal(*chat(folder, "quick", "-n", "10")) as it:
        it.child.send("early bird")
        it.wait_for(r"\n> early bird$")
        it.child.send("?\r")
        ready(it, "tok/s")
        assert re.search(r"> early bird\?\n.{10}\n", it.text)
        it.child.send(CTRL_D)
        assert it.exit_code() == 0


@pytest.mark.parametrize(
    "typed",
    [
        "next one\rand more",
        pytest.param(f"{PASTE}next one\nand more{PASTED}", marks=pytest.mark.long),
    ],
)
def test_typed_while_an_answer_comes(typed: str, folder: Path) -> None:  # noqa: F811
    """Nothing of it shows in the answer; then it is one message that nobody has sent yet."""
    with terminal(*chat(folder, "slow", "-n", "300")) as it:
        it.wait_for_prompt()
        it.say("go on")
        it.wait_for(r"> go on\n[^\n]{20}")
        it.child.send(typed)
        it.wait_for(r"cut at 300 tokens[^\n]*\n> next one\n  and more$")
        assert it.text.count("next one") == 1
        it.child.send("\r")
        it.wait_for(r"  and more\n[^\n]{20}")
        it.child.send(CTRL_C)
        it.wait_for("this turn is dropped")
        it.wait_for_prompt()
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw
