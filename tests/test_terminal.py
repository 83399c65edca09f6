"""`chat` and `ask` on a real pseudo-terminal, whose screen is what the tests look at."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny import FIRST_ASCII, FIRST_BYTE, TinySpec, make

if sys.platform == "win32":
    pytest.skip("POSIX terminals", allow_module_level=True)
pexpect: Any = pytest.importorskip("pexpect")
pyte: Any = pytest.importorskip("pyte")
pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[1]
ROWS, COLUMNS = 200, 140
PATIENCE = 300.0  # for what takes a second on an idle machine
SIZES = "COLUMNS", "LINES"  # pytest-xdist sets them; the program is to ask its terminal
CTRL_C, CTRL_D = "\x03", "\x04"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUICK = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64, ctx_train=1 << 17, chat_template=CHATML)
# Some 4 ms a token, and 30 s and more for the long document.
SLOW = TinySpec(
    layers=4, heads=8, kv_heads=2, head_dim=64, n_ff=1024, ctx_train=1 << 17, chat_template=CHATML
)
SENTENCE = "The quick brown fox jumps over the lazy dog. "
SHORT_TEXT, LONG_TEXT = SENTENCE * 40, SENTENCE * 1600
ACCOUNT = re.compile(r"cache [\d,]+ of [\d,]+ used · first token [\d.]+ s")
READING = re.compile(r"reading .*?([\d,]+)/([\d,]+) tokens · ([\d,]+) tok/s")
STOPPED = re.compile(r"stopped after reading ([\d,]+) of ([\d,]+) tokens")


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    for name, spec in (("quick", QUICK), ("slow", SLOW)):
        _speak_plainly(make(folder, f"{name}.gguf", spec=spec).path)
    (folder / "short.md").write_text(SHORT_TEXT)
    (folder / "long.txt").write_text(LONG_TEXT)
    return folder


def _speak_plainly(model: Path) -> None:
    """Takes the bytes out of what the model says: some would move the cursor."""
    reader = gguf.GGUFReader(model, "r+")
    output = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    output.data[FIRST_BYTE:FIRST_ASCII] = 0
    reader.data.flush()


class Screen(pyte.Screen):  # type: ignore[misc]
    """Answers the program's questions about the cursor, as a terminal does."""

    child: Any = None

    def write_process_input(self, data: str) -> None:
        self.child.send(data)


class Terminal:
    """A program on a pseudo-terminal, and the screen it draws."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "laserkv_gguf", *map(str, arguments)],
            env={
                **{name: value for name, value in os.environ.items() if name not in SIZES},
                "PYTHONPATH": str(ROOT),
                "OPENBLAS_NUM_THREADS": "1",
                "TERM": "xterm-256color",
                "LC_ALL": "C.UTF-8",
                "XDG_STATE_HOME": "/dev/null/none",  # what is typed here is nobody's history
                **environment,
            },
            dimensions=(ROWS, COLUMNS),
            encoding="utf-8",
            codec_errors="replace",
        )
        self.child.delaybeforesend = None
        self.screen = Screen(COLUMNS, ROWS)
        self.screen.child = self.child
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        self._rows = [""] * ROWS

    def pump(self, seconds: float = 0.02) -> bool:
        """Draws what comes within so many seconds; False at the end of the program's output."""
        try:
            text = self.child.read_nonblocking(1 << 16, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += text
        self.stream.feed(text)
        return True

    @property
    def lines(self) -> list[str]:
        """The screen down to its last line that is not empty."""
        # drawn anew only where something changed: it is looked at after every few characters
        for y in self.screen.dirty:
            row = self.screen.buffer[y]
            self._rows[y] = "".join(row[x].data for x in range(self.screen.columns)).rstrip()
        self.screen.dirty.clear()
        lines = self._rows[: self.screen.lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self, wanted: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """Until `wanted()` is true; returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = wanted()
            if found:
                return found
            if not self.pump():
                found = wanted()
                assert found, f"ended before {what}:\n{self.text}"
                return found
        pytest.fail(f"no {what} within {seconds:.0f} s; the screen:\n{self.text}")

    def wait_for(self, pattern: str | re.Pattern[str], seconds: float = PATIENCE) -> re.Match[str]:
        found: re.Match[str] = self.wait(
            lambda: re.search(pattern, self.text), repr(pattern), seconds
        )
        return found

    def wait_for_prompt(self) -> None:
        """An empty prompt in the last line, with the cursor behind it."""
        self.wait(lambda: self.at_prompt, "prompt")

    @property
    def at_prompt(self) -> bool:
        y, x = self.screen.cursor.y, self.screen.cursor.x
        lines = self.lines
        busy = 0 < y < len(lines) and lines[y - 1].startswith("reading ")
        return y < len(lines) and lines[y] == ">" and x == 2 and not busy

    def say(self, line: str) -> None:
        self.child.send(line + "\r")

    def ask(self, line: str) -> str:
        """One line from prompt to prompt; returns what was printed below it."""
        before = self.text.count(f"> {line}")
        self.say(line)
        self.wait(
            lambda: self.text.count(f"> {line}") > before and self.at_prompt, f"answer to {line!r}"
        )
        return self.text.rpartition(f"> {line}")[2].rstrip(">").strip()

    def exit_code(self) -> int:
        """Waits for the end."""
        self.wait(lambda: not self.pump(0.1), "end of the program")
        self.child.close()
        assert self.child.signalstatus is None
        return int(self.child.exitstatus)


@contextmanager
def terminal(*arguments: str | Path, **environment: str) -> Iterator[Terminal]:
    it = Terminal(*arguments, **environment)
    try:
        yield it
    finally:
        it.child.close(force=True)


def chat(folder: Path, model: str, *arguments: str) -> list[str]:
    return ["chat", "-m", str(folder / f"{model}.gguf"), "-t", "1", *arguments]


# ---- a conversation ----------------------------------------------------------------------------


def test_a_conversation(folder: Path) -> None:
    document = str(folder / "short.md")
    with terminal(*chat(folder, "quick", "-d", document, "--block-size", "512", "-n", "40")) as it:
        it.wait_for_prompt()
        # the bar has been and gone; its figures are for what takes longer (`stop_reading`)
        assert "reading" in it.raw
        assert "reading" not in it.text
        assert re.search(r"read 1,818 tokens in [\d.]+ s, kept \d+", it.text)
        assert "/help" in it.text

        first = it.ask("hello")
        answer, again, account, cut = first.splitlines()
        assert len(answer) == 40
        assert re.fullmatch(r"looked again at 1,8\d\d tokens in [\d.]+ s", again)
        assert re.match(r"saw \d+ of 1,800 tokens of the document \(2\d%\) · ", account)
        assert ACCOUNT.search(account)
        assert account.endswith("tok/s")
        assert cut.startswith("cut at 40 tokens; a larger -n")
        assert _is_dim(it, account)
        assert not _is_dim(it, answer)
        second = it.ask("and what then?").splitlines()
        assert len(second[0]) == 40
        assert ACCOUNT.search(second[2])

        commands = re.findall(r"^(/\w+) +\S", it.ask("/help"), re.MULTILINE)
        assert {"/help", "/read", "/stats", "/reset", "/quit"} <= set(commands)
        assert "/stats" in it.ask("/stat")
        assert "/help" in it.ask("/xyzzy")
        stats = it.ask("/stats").splitlines()
        said = [line.split()[0] for line in stats]
        assert said == ["saw", "cache", "reading", "recall", "answer", "talk"]
        assert re.search(r" of 1,800 tokens of the document \(\d+%\), chosen by laser", stats[0])
        assert stats[5].endswith(" 2 turns")
        every = it.ask("/stats all")
        assert "document_tokens            1818 tokens" in every
        assert re.search(r"cells_used +\d+ cells", every)
        assert re.search(r"prefill_seconds +\d+\.\d{3} s\n", every)
        assert re.search(r"kv_bytes +\d+ bytes \([\d.]+ [KM]iB\)", every)

        it.ask("/reset")
        assert it.ask("hello").splitlines()[0] == answer  # as at the beginning
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def _is_dim(it: Terminal, line: str) -> bool:
    """Whether a line of the screen was written faint (SGR 2), which pyte does not keep."""
    return f"\x1b[2m{line[:30]}" in it.raw


def test_read_for_a_question(folder: Path) -> None:
    document = str(folder / "short.md")
    given = ("-d", document, "--block-size", "512", "-n", "30", "-q", "what jumps?")
    with terminal(*chat(folder, "quick", *given)) as it:
        it.wait_for_prompt()
        assert ACCOUNT.search(it.text)
        answer = it.lines[-4]
        assert len(answer) == 30
        again = it.ask("/read what jumps?").splitlines()
        assert again[0] == answer
        assert ACCOUNT.search(again[1])
        it.child.send(CTRL_D)
        assert it.exit_code() == 0


def test_without_a_document(folder: Path) -> None:
    with terminal(*chat(folder, "quick", "-n", "10")) as it:
        it.wait_for_prompt()
        assert "no document" in it.ask("/read")
        assert "nothing has been answered" in it.ask("/stats")
        it.child.send("half a li")
        it.wait_for("half a li")
        it.child.send(CTRL_C)  # drops what is typed
        it.wait_for_prompt()
        it.say("")  # nothing to ask
        assert len(it.ask("hello").splitlines()[0]) == 10
        it.child.send(CTRL_D)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


# ---- stopping ----------------------------------------------------------------------------------


def cells_used(it: Terminal) -> int:
    found = re.search(r"cells_used +(\d+)", it.ask("/stats all"))
    assert found is not None
    return int(found[1])


def test_ctrl_c_drops_an_answer(folder: Path) -> None:
    """The document and the turns before it stay; then the chat goes on."""
    document = str(folder / "short.md")
    given = ("-d", document, "--block-size", "512", "-n", "4000")
    with terminal(*chat(folder, "slow", *given)) as it:
        it.wait_for_prompt()
        for question in ("go on", "go further"):
            it.say(question)
            # a line of the answer below the question
            it.wait_for(rf"> {question}\n[^\n]{{20}}")
            it.child.send(CTRL_C)
            it.wait_for_prompt()
            shown = it.text.rpartition(f"> {question}")[2]
            assert re.search(r"\(stopped; .*dropped\)", shown)
            assert len(shown) < 4000
            assert not ACCOUNT.search(it.text)
            assert "nothing has been answered" in it.ask("/stats")
            it.ask("/reset")
        it.say("/quit")
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_ctrl_c_leaves_earlier_turns(folder: Path) -> None:
    """A turn dropped half-way is as if it had never been asked."""
    model = chat(folder, "slow", "-n", "250")
    with terminal(*model) as it:
        it.wait_for_prompt()
        first = it.ask("hello").splitlines()[0]
        used = cells_used(it)
        it.say("drop this")
        it.wait(lambda: re.search(r"> drop this\n[^\n]{10}", it.text), "answer")
        it.child.send(CTRL_C)
        it.wait_for_prompt()
        assert re.search(r"\(stopped; .*dropped\)", it.text)
        assert cells_used(it) == used
        second = it.ask("and then?").splitlines()[0]
        it.ask("/reset")
        assert it.ask("hello").splitlines()[0] == first
        assert it.ask("and then?").splitlines()[0] == second
        it.say("/quit")
        assert it.exit_code() == 0


def stop_reading(it: Terminal) -> re.Match[str]:
    """Ctrl-C after the first progress; checks that the rest of the document is not read."""
    it.wait_for(READING)
    it.wait_for(r"reading ━+─* [\d,]+/[\d,]+ tokens · [\d,]+ tok/s")
    # let it read a little, so that there is something to say
    progress = it.wait(
        lambda: (m := READING.search(it.text)) and number(m[1]) >= 1024 and m, "progress"
    )
    read, total = (number(part) for part in progress.groups()[:2])
    it.child.send(CTRL_C)
    stopped = it.wait_for(STOPPED)
    assert read <= number(stopped[1]) < number(stopped[2]) == total == len(LONG_TEXT) + 18
    return stopped


def test_ctrl_c_stops_reading(folder: Path) -> None:
    document = str(folder / "long.txt")
    with terminal(*chat(folder, "slow", "-d", document, "-n", "30")) as it:
        stop_reading(it)
        it.wait_for_prompt()
        assert "/read" in it.text  # how to begin again
        answer = it.ask("hello").splitlines()
        assert len(answer[0]) == 30
        assert answer[1].startswith("cache ")  # nothing of the document
        it.screen.reset()
        it.say("/read what is it?")
        stop_reading(it)
        it.wait_for_prompt()
        assert it.ask("hello").splitlines()[0] == answer[0]
        it.child.send(CTRL_D)
        assert it.exit_code() == 0
        assert "Traceback" not in it.raw


def test_ask_interrupted_while_reading(folder: Path) -> None:
    given = ["ask", "-m", folder / "slow.gguf", "-t", "1", "-d", folder / "long.txt", "-q", "what?"]
    with terminal(*given) as it:
        stop_reading(it)
        assert it.exit_code() == 130
        assert "Traceback" not in it.raw


def test_ask_interrupted_while_answering(folder: Path) -> None:
    given = ["ask", "-m", folder / "slow.gguf", "-t", "1", "-n", "4000", "-q", "what?"]
    with terminal(*given) as it:
        it.wait(lambda: re.search(r"[^\n]{30}", it.text), "answer")
        it.child.send(CTRL_C)
        assert it.exit_code() == 130
        assert len(it.text.replace("\n", "")) < 4000
        assert "Traceback" not in it.raw
        assert "cache" not in it.text


def test_ask_on_a_terminal(folder: Path) -> None:
    given = ["ask", "-m", folder / "quick.gguf", "-t", "1", "-n", "30", "-q", "what?"]
    with terminal(*given) as it:
        assert it.exit_code() == 0
        answer, account, _ = it.lines
        assert len(answer) == 30
        assert ACCOUNT.search(account)
        assert _is_dim(it, account)
