"""`chat`'s commands, editor and endings on a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_terminal import (
    CTRL_C,
    CTRL_D,
    PATIENCE,
    QUICK,
    ROOT,
    SENTENCE,
    Terminal,
    chat,
    folder,  # noqa: F401 (a fixture)
    terminal,
)

# one model a character: what a turn holds can be counted
ALT_ENTER, TAB, UP = "\x1b\r", "\t", "\x1b[A"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


def stats(it: Terminal) -> dict[str, int]:
    it.screen.reset()  # what was asked before may have left it
    found = re.findall(r"^(\w+) +(\d+)(?: .+)?$", it.ask("/stats all"), re.MULTILINE)
    return {name: int(value) for name, value in found}


def answer_of(shown: str) -> str:
    return shown.splitlines()[0]


def plain(raw: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", raw)


def test_documents_come_and_go(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "my notes.txt").write_text("The rain in Spain. " * 60)
    given = ("-d", str(folder / "short.md"), "--block-size", "256", "-n", "20")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        before = answer_of(it.ask("hello"))
        it.ask("/reset")
        assert re.search(r"^1  short\.md  kept [\d,]+ of 1,800 tokens \(2\d", it.ask("/docs"))
        shown = it.ask(f"/add '{tmp_path}/my notes.txt'")
        assert re.search(r"read 1,1\d\d tokens of my notes\.txt, kept \d\d\d", shown)
        docs = it.ask("/docs").splitlines()
        assert len(docs) == 2
        assert "my notes.txt" in docs[1]
        assert answer_of(it.ask("hello")) != before
        for wrong, said in (
            ("/add", "name a file"),
            ("/add /none/there", "no document at /none/there"),
            ("/drop shrot.md", "did you mean short.md?"),
            ("/drop 3", "/docs lists them"),
            ("/kept", "which one?"),
            ("/docks", "did you mean /docs?"),
        ):
            assert said in it.ask(wrong)
        assert "my notes.txt is gone" in it.ask("/drop 2")
        it.ask("/reset")
        assert answer_of(it.ask("hello")) == before
        assert "short.md is gone" in it.ask("/drop short.md")
        assert "no document" in it.ask("/docs")
        assert "no document" in it.ask("/kept")
        assert len(answer_of(it.ask("hello"))) == 20
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_a_document_stopped_while_it_is_added(folder: Path) -> None:  # noqa: F811
    with terminal(*chat(folder, "slow", "-n", "20", "-ub", "64")) as it:
        it.wait_for_prompt()
        first = answer_of(it.ask("hello"))
        used = stats(it)["cells_used"]
        it.say(f"/add {folder / 'long.txt'}")
        stop_adding(it)
        it.wait_for_prompt()
        assert "nothing of long.txt is kept" in it.text
        assert stats(it)["cells_used"] == used
        assert "no document" in it.ask("/docs")
        it.ask("/reset")
        assert answer_of(it.ask("hello")) == first
        it.ask(f"/add {folder / 'short.md'}")
        it.say("/read")
        it.wait_for(r"reading .*?[\d,]+/[\d,]+ tokens")
        it.child.send(CTRL_C)
        it.wait_for("nothing of it is kept")
        it.wait_for_prompt()
        assert it.ask("/docs") == "1  short.md  not read"
        assert "not read" in it.ask("/kept")
        it.say("/quit")
        assert it.exit_code() == 0


def stop_adding(it: Terminal) -> None:
    it.wait_for(r"reading .*?[\d,]+/72,0\d\d tokens")
    it.child.send(CTRL_C)
    it.wait_for(r"stopped after reading [\d,]+ of 72,0\d\d tokens")


def test_a_talk_without_an_end(folder: Path) -> None:  # noqa: F811
    """More is said than the cells hold; at the end Ctrl-C twice leaves."""
    given = ("-c", "400", "-n", "20", "--block-size", "128", "-sys", "Be brief.")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        for number in range(12):
            assert len(answer_of(it.ask(f"and number {number}?"))) == 20
        found = stats(it)
        assert found["times_compressed"] > 2
        assert found["turns"] == 12
        assert found["ctx_cells"] == 400 >= found["cells_used"]
        it.child.send(CTRL_C)
        it.wait_for(r"Ctrl-C again leaves")
        it.wait_for_prompt()
        it.ask("hello")  # something in between: it takes two again
        it.child.send(CTRL_C)
        it.wait(lambda: len(re.findall("Ctrl-C again", it.text)) == 2, "second hint")
        it.wait_for_prompt()
        it.child.send(CTRL_C)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_settings(folder: Path) -> None:  # noqa: F811
    with terminal(*chat(folder, "quick", "-n", "10")) as it:
        it.wait_for_prompt()
        greedy = answer_of(it.ask("hello"))
        shown = it.ask("/set")
        names = re.findall(r"^([a-z-]+) +[\d.]+ +[a-z]", shown, re.MULTILINE)
        assert names == ["temp", "top-k", "top-p", "min-p", "seed", "predict", "ratio"]
        for wrong, said in (
            ("/set temp", "temp is 0.0; give a value"),
            ("/set temp hot", "temp hot: give a number of 0 or more"),
            ("/set temp nan", "give a number"),
            ("/set top-p 0", "above 0 and at most 1"),
            ("/set ratio 2", "above 0 and at most 1"),
            ("/set predict 0", "at least 1"),
            ("/set tmep 1", "did you mean temp?"),
            ("/set xyzzy 1", "/set alone lists"),
        ):
            said_now = it.ask(wrong)
            assert said in said_now
            assert len(said_now.splitlines()) == 1
        assert "predict is 7" in it.ask("/set predict 7")
        it.ask("/reset")
        assert answer_of(it.ask("hello")) == greedy[:7]
        for setting in ("temp 3", "top-k 0", "top_p 1", "--min-p 0", "seed 5", "predict 10"):
            it.ask(f"/set {setting}")
        it.ask("/reset")
        sampled = answer_of(it.ask("hello"))
        assert sampled != greedy
        it.ask("/reset")
        assert answer_of(it.ask("hello")) == sampled
        assert "next /add or /read" in it.ask("/set ratio 0.5")
        it.say("/quit")
        assert it.exit_code() == 0


def test_saved_and_loaded(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "talk"
    given = ("-d", str(folder / "short.md"), "--block-size", "256", "-n", "20")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        it.ask("hello")
        assert f"saved to {file}" in it.ask(f"/save {file}")
        expected = answer_of(it.ask("and then?"))
        it.say("/quit")
        assert it.exit_code() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]
    with terminal(*chat(folder, "quick", "-n", "20")) as it:
        it.wait_for_prompt()
        assert "not a file that --save or /save wrote" in it.ask(f"/load {folder / 'short.md'}")
        assert "loaded: 1 turn, short.md" in it.ask(f"/load {file}")
        assert answer_of(it.ask("and then?")) == expected
        assert "kept" in it.ask("/docs")
        it.say("/quit")
        assert it.exit_code() == 0


# with one pool the anchors are four tokens, which the opening of the conversation takes
EQUAL = ("--policy-option", "shares=equal")


def kept_characters(document: str, shown: str) -> int:
    """Counts what stands in brackets; without them the document is there whole."""
    assert "".join(re.sub(r"(?s)\[[alw]:(.*?)\]", r"\1", shown).split()) == "".join(
        document.split()
    )
    return sum(len(part) for part in re.findall(r"\[[alw]:(.*?)\]", shown, re.DOTALL))


def test_what_is_kept_without_colours(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    text = "".join(f"{number} is a number, and so is é{number + 1}. " for number in range(40))
    (tmp_path / "numbers.md").write_text(text)
    given = ("-d", str(tmp_path / "numbers.md"), *EQUAL, "--block-size", "256", "-n", "5")
    with terminal(*chat(folder, "quick", *given), NO_COLOR="1") as it:
        it.wait_for_prompt()
        kept = re.search(r"kept ([\d,]+) of ([\d,]+)", it.ask("/docs"))
        assert kept is not None
        shown = it.ask("/kept")
        legend, _, body = shown.partition("\n")
        assert legend == "[a:anchor] · [l:long-term] · [w:window] · evicted"
        assert {"a", "l", "w"} == set(re.findall(r"\[([alw]):", body))
        counted = kept_characters(text, body)
        # é is two tokens of one character, and spaces at line ends are not seen
        assert 0.8 * int(kept[1]) < counted <= int(kept[1])
        legend, _, only = it.ask("/kept only").partition("\n")
        assert legend.endswith("evicted is …")
        marked = re.findall(r"\[[alw]:(.*?)\]", body, re.DOTALL)
        assert re.findall(r"\[[alw]:(.*?)\]", only, re.DOTALL) == marked
        assert not re.sub(r"(?s)\[[alw]:.*?\]|…|\s", "", only)
        assert "\x1b[1;3" not in it.raw
        it.say("/quit")
        assert it.exit_code() == 0


def test_what_is_kept_in_colours_by_the_screen(folder: Path) -> None:  # noqa: F811
    given = ("-d", str(folder / "short.md"), *EQUAL, "--block-size", "256", "-n", "5")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        it.child.setwinsize(10, 130)
        it.screen.resize(10, 130)
        it.say("/kept short.md")
        more = r"-- \d+ more lines: Enter for more, k for what is kept only, q to stop --"
        it.wait_for(more)
        assert re.search(r"anchor · long-term · window · evicted\r?\n", plain(it.raw))
        it.child.send("q")  # no Enter
        it.wait_for_prompt()
        it.say("/kept short.md")
        it.wait_for(more)
        it.child.send("k")
        it.wait(lambda: "evicted is …" in plain(it.raw), "what is kept only")
        it.wait(lambda: "k for all" in it.text or it.lines[-1] == ">", "the end")
        if "k for all" in it.text:
            it.child.send("q")
        it.wait_for_prompt()
        it.say("/kept short.md")
        it.wait_for(more)
        it.child.send("/docs\r")  # no key of the pager: it is the next line
        it.wait_for(r"> /docs\n.*kept [\d,]+ of")
        it.wait_for_prompt()
        # anchors in bold cyan, evicted dim
        assert re.search(r"\x1b\[1;36mThe quick", it.raw)
        assert re.search(r"\x1b\[2m[a-zA-Z .]+\x1b\[0m", it.raw)
        it.say("/quit")
        assert it.exit_code() == 0


def test_the_status_line_breaks_between_words(folder: Path) -> None:  # noqa: F811
    given = ("-d", str(folder / "short.md"), "--block-size", "256", "-n", "5")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        it.child.setwinsize(40, 50)
        it.screen.resize(40, 50)
        it.say("hello")
        it.wait_for(r"a larger -n")
        it.wait_for_prompt()
        said = [line for line in it.lines if re.search(r"looked|saw|cache|first|tok/s|cut", line)]
        whole = {"saw", "cache", "used", "first", "token", "tok/s", "cut", "larger"}
        assert whole <= {word for line in said for word in line.split()}
        it.say("/quit")
        assert it.exit_code() == 0


# ---- the editor --------------------------------------------------------------------------------


def test_editing(folder: Path) -> None:  # noqa: F811
    """Completion; and whatever has several lines is one message, a pasted page too."""
    page = "\n".join([SENTENCE.strip()] * 40)
    with terminal(*chat(folder, "quick", "-n", "5")) as it:
        it.wait_for_prompt()
        it.child.send("/he" + TAB)
        it.wait_for(r"> /help")
        it.child.send(CTRL_C)
        it.wait_for_prompt()
        it.child.send("/set pre" + TAB)
        it.wait_for(r"> /set predict")
        it.child.send(CTRL_C)
        it.wait_for_prompt()
        it.child.send(f"/add {folder}/sho" + TAB)
        it.wait_for(r"short\.md")
        it.child.send("\r")
        it.wait_for(r"read 1,8\d\d tokens of short\.md")
        it.wait_for_prompt()
        it.child.send("/drop sho" + TAB)
        it.wait_for(r"> /drop short\.md")
        it.child.send("\r")
        it.wait_for(r"short\.md is gone")
        it.wait_for_prompt()
        it.ask("abcd")
        around = stats(it)["prompt_tokens"] - 4
        for typed, length in (
            (f"ab{ALT_ENTER}cd\r", 5),
            ("ab\\\rcd\r", 5),
            ('"""\rab\rcd\r"""\r', 5),
            (f"{PASTE}ab\ncd{PASTED}\r", 5),
            (f"{PASTE}ab\r\ncd{PASTED}\r", 5),
            (f"{PASTE}{page}{PASTED}\r", len(page)),
        ):
            it.ask("/reset")
            it.screen.reset()
            it.child.send(typed)
            it.wait_for("first token")
            it.wait_for_prompt()
            found = stats(it)
            assert found["prompt_tokens"] == around + length
            assert found["turns"] == 1
        it.child.send(CTRL_D)
        assert it.exit_code() == 0


def test_history_stays_and_is_private(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    home = {"XDG_STATE_HOME": str(tmp_path)}
    with terminal(*chat(folder, "quick", "-n", "5"), **home) as it:
        it.wait_for_prompt()
        it.ask("what I said before")
        it.say("/quit")
        assert it.exit_code() == 0
    file = tmp_path / "laserkv-gguf" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with terminal(*chat(folder, "quick", "-n", "5"), **home) as it:
        it.wait_for_prompt()
        it.child.send(UP + UP)
        it.wait_for("> what I said before")
        it.child.send("\r")
        it.wait_for_prompt()
        it.child.send(CTRL_D)
        assert it.exit_code() == 0


# ---- endings and poor terminals ----------------------------------------------------------------


@pytest.mark.parametrize("when", ["prompt", "reading"])
def test_sigterm(when: str, folder: Path) -> None:  # noqa: F811
    """The exit code is the one shells give, and the terminal is left as it was."""
    given = ("-ub", "64", "-d", str(folder / "long.txt")) if when == "reading" else ()
    with terminal(*chat(folder, "slow", "-n", "4000", *given)) as it:
        if when == "reading":
            it.wait_for(r"reading .*?[\d,]+/72,0\d\d tokens")
        else:
            it.wait_for_prompt()
        it.child.kill(signal.SIGTERM)
        assert it.exit_code() == 143
        assert "Traceback" not in it.raw


def test_sigterm_in_a_pipe(folder: Path) -> None:  # noqa: F811
    """The answer so far is on standard output."""
    command = [sys.executable, "-m", "laserkv_gguf", *chat(folder, "slow", "-n", "4000")]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"go on\n")
        child.stdin.flush()
        said = child.stdout.read(20)
        child.send_signal(signal.SIGTERM)
        rest, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 143
    assert len(said) == 20
    assert len(rest) < 4000
    assert b"Traceback" not in errors


def test_a_terminal_that_moves_no_cursor(folder: Path) -> None:  # noqa: F811
    """Without an escape sequence; lines are continued as anywhere."""
    document = str(folder / "short.md")
    given = ("-d", document, *EQUAL, "--block-size", "256", "-n", "20")
    with terminal(*chat(folder, "quick", *given), TERM="dumb") as it:
        it.wait_for_prompt()
        assert len(answer_of(it.ask("hello"))) == 20
        it.say("/kept")
        it.wait_for(r"\[a:The quick(?s:.*)-- \d+ more lines")
        it.say("q")
        it.wait_for_prompt()
        it.say("ab\\")
        it.wait(lambda: it.lines[-1] == "" or it.text.endswith("ab\\"), "second line")
        it.say("cd")
        it.wait(lambda: len(re.findall(r"first\s+token", it.text)) == 2, "answer")
        it.wait_for_prompt()
        it.child.send(CTRL_C)
        it.wait_for("Ctrl-C again")
        it.wait_for_prompt()
        it.child.send(CTRL_C)
        assert it.exit_code() == 0
        assert "\x1b" not in it.raw


def test_a_terminal_without_width(folder: Path) -> None:  # noqa: F811
    given = ("-d", str(folder / "short.md"), "--block-size", "256", "-n", "5")
    it = Terminal(*chat(folder, "quick", *given))
    it.child.setwinsize(0, 0)
    try:
        it.wait_for_prompt()
        it.say("hello")
        it.wait(lambda: re.search(r"first\s+token", plain(it.raw)), "answer")
        it.say("/kept")
        it.wait(lambda: "evicted" in plain(it.raw), "document")
        it.wait(lambda: it.lines[-1] == ">" or it.lines[-1].endswith("to stop --"), "its end")
        if it.lines[-1] != ">":
            it.child.send("q")
            it.wait(lambda: it.lines[-1] == ">", "prompt")
        it.child.send(CTRL_D)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw
    finally:
        it.child.close(force=True)


def test_lines_from_a_pipe(folder: Path) -> None:  # noqa: F811
    """Every line is a question or a command; answers alone on standard output."""
    command = [sys.executable, "-m", "laserkv_gguf", *chat(folder, "quick", "-n", "5")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    lines = f'hello\n/add {folder / "short.md"}\n"""\n/docs\nab\\\n/set temp x\n'
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0
    assert [len(line) for line in done.stdout.splitlines()] == [5, 5, 5]
    assert "read 1,8" in done.stderr
    assert "1  short.md  kept" in done.stderr
    assert "error: temp x: give a number" in done.stderr


def test_recall(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Documents are parked, each question recalls its own, and what goes is given back."""
    (tmp_path / "notes.txt").write_text("The rain in Spain. " * 60)
    given = ("-d", str(folder / "short.md"), "--block-size", "256", "-n", "20", "--recall", "ram")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        first = answer_of(it.ask("hello"))
        found = stats(it)
        assert found["parked_tokens"] == 1818
        assert found["recalled_tokens"] > 0
        assert found["recall_calls"] > 0
        heads = QUICK.layers * QUICK.kv_heads
        row = 2 * 2 * heads * QUICK.head_dim + 4 * heads  # keys, values; and how long these are
        assert found["parked_bytes"] == found["parked_tokens"] * row
        it.ask("and what of the lazy dog?")
        it.ask(f"/add {tmp_path / 'notes.txt'}")
        assert stats(it)["parked_tokens"] == 1818 + 19 * 60
        it.ask("where is the rain?")
        assert re.search(r"kept \d+ of 1,800 .*\n.*kept \d+ of 1,1\d\d ", it.ask("/docs"))
        assert "saved to" in it.ask(f"/save {tmp_path / 'talk'}")
        assert "notes.txt is gone" in it.ask("/drop 2")
        assert stats(it)["parked_tokens"] == 1818
        it.ask("/reset")
        assert answer_of(it.ask("hello")) == first
        assert "long-term" in it.ask("/kept")
        it.ask("/drop 1")
        assert stats(it)["parked_bytes"] == 0
        assert len(answer_of(it.ask("hello"))) == 20
        assert "loaded: 3 turns" in it.ask(f"/load {tmp_path / 'talk'}")
        assert len(answer_of(it.ask("hello"))) == 20
        assert stats(it)["parked_tokens"] == 1818 + 19 * 60  # they came with it
        it.say("/read")
        it.wait_for(r"read 2,9\d\d tokens in")
        it.wait_for_prompt()
        assert stats(it)["parked_tokens"] > 2900
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_recall_stopped(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Ctrl-C while a question recalls: the turn is dropped, and asked again it has its answer."""
    (tmp_path / "dogs.txt").write_text(SENTENCE * 16)
    given = ("-d", str(tmp_path / "dogs.txt"), "--block-size", "64", "-n", "5", "--lookahead", "24")
    with terminal(*chat(folder, "slow", *given, "--recall", "ram")) as it:
        it.wait_for_prompt()
        first = answer_of(it.ask("hello"))
        used = stats(it)["cells_used"]
        it.say("the lazy dog?")
        it.wait_for(r"> the lazy dog\?")
        # the editor has left the terminal to the process, which recalls: Ctrl-C is a signal again
        import termios  # not on Windows

        it.wait(lambda: termios.tcgetattr(it.child.child_fd)[3] & termios.ISIG, "signals")
        it.child.send(CTRL_C)
        it.wait_for("this turn is dropped")
        it.wait_for_prompt()
        assert stats(it)["cells_used"] == used
        it.ask("/reset")
        assert answer_of(it.ask("hello")) == first
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw
