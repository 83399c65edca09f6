"""Files, lines and streams that mean harm: nothing but one-line errors comes of them."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
from test_chat_template import CHATML, TEMPLATES, assistant, system, user
from test_documents import Stdin, pdf
from tiny import TinySpec, make

pytest.importorskip("llama_cpp")

from rich.text import Text

from laserkv_gguf import shown
from laserkv_gguf.cli import commands, documents, streams, terminal
from laserkv_gguf.cli import loop as looping
from laserkv_gguf.cli.app import run
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import pdf as pdfs
from laserkv_gguf.files import texts
from laserkv_gguf.llama.chat import ChatTemplate
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.template import NODES, SOURCE, ChatFormatter, TemplateLimit

ROOT = Path(__file__).resolve().parents[1]
SMALL = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=32, ctx_train=4096, chat_template=CHATML)
SENTENCE = "The quick brown fox jumps over the lazy dog. "
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files and streams")

# what a terminal obeys: title, clear screen, clipboard, C1's CSI, and an override
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;cm0=\x07\x9b2J\x08\x7f\u202e"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e]")


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Inside = Callable[..., Ended]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hostile"), "small.gguf", spec=SMALL).path


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The command line takes over the root logger and SIGTERM."""
    root, terminated = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    monkeypatch.chdir(tmp_path)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGTERM, terminated)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    """The command line in this process, with bytes on standard input."""

    def ended(*arguments: str | Path, typed: bytes = b"") -> Ended:
        stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        code = run([str(part) for part in arguments])
        return Ended(code, *capsys.readouterr())

    return ended


def chat(model: Path, *more: str | Path) -> list[str | Path]:
    return ["chat", "-m", model, "-t", "1", "-n", "5", *more]


# ---- a chat survives its input ------------------------------------------------------------------

# typed, and what the one line about it says
BAD_LINES = {
    "no such user": (b"/add ~nosuchuser/x", "~nosuchuser/x: there is no such user"),
    "no such user, save": (b"/save ~nosuchuser/x", "there is no such user"),
    "NUL": (b"/add a\0b", "cannot hold a NUL"),
    "NUL, load": (b"/load a\0b", "cannot hold a NUL"),
    "not UTF-8": (b"/add \xff\xfe", "no document at"),
    "too long a name": (b"/add " + b"n" * 5000, "cannot read n+'?: File name too long"),
    "damaged PDF": (b"/add damaged.pdf", "damaged.pdf is a PDF that cannot be read"),
    "a pipe": (b"/add pipe", "pipe is a pipe"),
    "load a pipe": (b"/load pipe", "it is a pipe"),
    "standard input": (b"/add -", "chat reads what you type"),
    "standard input in quotes": (b"/add '-'", "chat reads what you type"),
    "standard input as a path": (b"/add ./-", "chat reads what you type"),
    "load too long a name": (b"/load " + b"n" * 5000, "n+'?: File name too long"),
    "save under too long a name": (b"/save " + b"n" * 300, "n+'?: File name too long"),
    "load a text": (b"/load garbage", "garbage is not a file that --save or /save wrote"),
    "load a folder": (b"/load .", r"cannot read \.|is a folder"),
    "thousands of digits": (b"/drop " + b"9" * 5000, "there is no document"),
    "a number beyond floats": (b"/set top-k 1" + b"0" * 400, "give a whole number"),
    "digits nobody parses": (b"/set seed " + b"9" * 5000, "give a whole number"),
    "a question beyond the cells": (b"why? " * 4000, "does not fit"),
}


@posix
def test_a_chat_goes_on_whatever_is_typed(model: Path, inside: Inside) -> None:
    """Each bad line is one error, and the answers around it are those of a chat without it."""
    Path("damaged.pdf").write_bytes(pdf("Jack")[:200])
    Path("garbage").write_bytes(random.Random(0).randbytes(4000))
    os.mkfifo("pipe")
    good = [b"hello", b"and then?", b"go on"]
    wanted = inside(*chat(model, "-c", "2000"), typed=b"\n".join(good))
    assert (wanted.code, wanted.errors) == (0, [])
    lines = [good[0], *(line for line, _ in BAD_LINES.values()), *good[1:]]
    found = inside(*chat(model, "-c", "2000"), typed=b"\n".join(lines))
    assert found.code == 0
    assert found.out == wanted.out
    assert len(found.errors) == len(BAD_LINES)
    for (name, (_, says)), error in zip(BAD_LINES.items(), found.errors, strict=True):
        assert re.match(rf"error: .*({says})", error), name
    assert "Traceback" not in found.err


def test_a_stray_byte_is_asked_as_one_character(model: Path, inside: Inside) -> None:
    found = inside(*chat(model), typed=b"what is \xff\xfe here\nhello\n")
    assert (found.code, found.errors) == (0, [])
    assert found.out == inside(*chat(model), typed="what is \ufffd\ufffd here\nhello".encode()).out
    assert found.out.count("\n") >= 2


@pytest.mark.parametrize("debug", [False, True])
def test_any_exception_is_one_line(
    model: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    """Around a command and around an answer; with --debug it says where."""

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("by\nnobody\x1b[2J")

    monkeypatch.setitem(commands.COMMANDS, "/docs", fails)
    said: list[str] = []
    real = looping.Loop.answer

    def answer(self: Any, ask: Any) -> None:
        said.append("")
        real(self, fails if len(said) == 2 else ask)

    monkeypatch.setattr(looping.Loop, "answer", answer)
    more = ["--debug"] if debug else []
    found = inside(*chat(model, *more), typed=b"hello\nhello\n/docs\nhello\n")
    assert found.code == 0
    assert len(said) == 3
    assert found.errors == ["error: ZeroDivisionError: by nobody[2J (--debug shows where)"] * 2
    assert found.err.count("Traceback (most recent call last)") == 2 * debug
    assert "\x1b" not in found.err


def test_load_of_anything_leaves_the_conversation(model: Path, inside: Inside) -> None:
    """Flipped, cut and empty files."""
    assert inside(*chat(model), typed=b"hello\n/save whole").code == 0
    whole, chance = Path("whole").read_bytes(), random.Random(1)
    names = []
    for number in range(12):
        data = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randint(1, 6) if data else 0):
            data[chance.randrange(min(len(data), 600))] ^= 1 << chance.randrange(8)
        names.append(f"forged{number}")
        Path(names[-1]).write_bytes(data)
    loads = "".join(f"/load {name}\n" for name in names).encode()
    found = inside(*chat(model), typed=b"hello\n" + loads + b"go on\n/stats\n")
    assert found.code == 0
    assert len(found.errors) == len(names)
    assert "Traceback" not in found.err
    assert found.out == inside(*chat(model), typed=b"hello\ngo on\n").out


# ---- documents ----------------------------------------------------------------------------------


@posix
def test_only_regular_files_are_documents() -> None:
    """Nobody waits for a pipe's other end, and nothing is read from a device."""
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name, kind in (("pipe", "a pipe"), ("socket", "a device"), ("/dev/zero", "a device")):
            with pytest.raises(UserError, match=f"^{name} is {kind}.*document -") as refused:
                documents.load([name])
            assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="is a folder"):
        documents.load(["/"])
    with pytest.raises(UserError, match="is no name of a file"):
        documents.load(["a\0b"])


@posix
def test_a_pipe_put_in_a_file_s_place_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the opening."""
    Path("file").write_text("text")
    real = os.open

    def swapped(name: str, flags: int) -> int:
        Path("file").unlink()
        os.mkfifo("file")
        return real(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(UserError, match="file is a pipe"):
        documents.read("file")


def test_a_document_s_size_has_a_limit() -> None:
    with Path("large.txt").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(UserError, match=r"large\.txt has 300\.0 MiB; at most [\d.]+ MiB of text"):
        documents.read("large.txt")
    with Path("large.pdf").open("wb") as file:
        file.write(b"%PDF-1.4\n")
        file.truncate(300 << 20)
    with pytest.raises(UserError, match=r"300\.0 MiB; at most 256\.0 MiB of a PDF are read"):
        documents.read("large.pdf")


def test_where_memory_is_short_the_limit_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, limit in ((None, 64), (1 << 40, 64), (750 << 20, 10), (0, 1)):
        monkeypatch.setattr(texts, "free_ram", lambda free=free: free)
        assert texts.limit() == limit << 20
    Path("a.txt").write_bytes(b"x" * (1 << 20))
    assert len(documents.read("a.txt")) == 1 << 20
    Path("a.txt").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(UserError, match=r"at most 1\.0 MiB"):
        documents.read("a.txt")


def test_standard_input_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.taken += len(buffer)
            assert self.taken < 64 << 20, "read on and on"
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    stdin = Stdin(b"")
    stdin.buffer = io.BufferedReader(Endless())  # type: ignore[assignment]
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(texts, "MOST", 2 << 20)
    with pytest.raises(UserError, match=r"standard input has more than 2\.0 MiB"):
        documents.read("-")


@posix
def test_a_batch_refuses_a_pipe_for_its_one_question(model: Path, inside: Inside) -> None:
    os.mkfifo("pipe")
    lines = [
        {"id": 1, "question": "why?"},
        {"id": 2, "question": "why?", "document_path": "pipe"},
        {"id": 3, "question": "why?", "document_path": "/dev/zero"},
    ]
    Path("in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["batch", "-m", model, "-t", "1", "-n", "4", "-i", "in", "-o", "out", "--quiet"]
    assert inside(*given).code == 1
    first, second, third = map(json.loads, Path("out").read_text().splitlines())
    assert "answer" in first
    assert "is a pipe" in second["error"]
    assert "is a device" in third["error"]


# ---- PDF ----------------------------------------------------------------------------------------


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Cut, flipped, with pieces doubled, swapped or left out."""
    data = bytearray(whole[: chance.choice([len(whole), chance.randrange(5, len(whole))])])
    for _ in range(chance.randint(0, 6)):
        at, end = sorted(chance.randrange(5, len(data) + 1) for _ in range(2))
        how = chance.randrange(5)
        if how == 0 and at < len(data):
            data[at] = chance.randrange(256)
        elif how == 1:
            data[at:at] = data[at:end]
        elif how == 2:
            del data[at : min(end, at + 20)]
        elif how == 3:  # another object instead of this one: objects refer to themselves
            data = bytearray(re.sub(rb"\b%d 0 R" % chance.randint(1, 7), b"2 0 R", bytes(data)))
        else:
            number = str(chance.choice([-1, 0, 10**6, 2**31, 2**63, 10**30])).encode()
            data = bytearray(re.sub(rb"(?<=[ h])\d+(?= )", number, bytes(data), count=1))
    return bytes(data)


def test_400_damaged_pdfs() -> None:
    """Text, or one line: here in this process, in use in a child."""
    pytest.importorskip("pypdf")
    whole, chance = pdf("Jack has a mother.", "And a cow."), random.Random(0)
    read, refusals = 0, []
    for _ in range(400):
        try:
            pdfs.extract(damaged(whole, chance), 1 << 20)
            read += 1
        except pdfs.Unreadable as error:
            refusals.append(str(error))
    assert read > 20
    assert len(refusals) > 20
    assert not any(OBEYED.search(said) or "\n" in said or not said for said in refusals)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (AttributeError("'NullObject' object\nhas no attribute 'get_data'"), "object has no"),
        (RecursionError(), "nests too deeply"),
        (MemoryError(), "too much memory"),
        (AssertionError(), "AssertionError"),
        (KeyError("\x1b[2J"), r"x1b\[2J"),
    ],
)
def test_whatever_pypdf_raises(
    raised: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pypdf = pytest.importorskip("pypdf")

    def fails(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(pypdf.PageObject, "extract_text", fails)
    with pytest.raises(pdfs.Unreadable, match=says) as refused:
        pdfs.extract(pdf("Jack"), 1000)
    assert "\n" not in str(refused.value)


def test_a_pdf_s_text_and_pages_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypdf")
    many = pdf(*["a page"] * 30)
    with pytest.raises(pdfs.Unreadable, match="more than 100 characters"):
        pdfs.extract(many, 100)
    assert pdfs.extract(many, 300).count("a page") == 30
    monkeypatch.setattr(pdfs, "PAGES", 29)
    with pytest.raises(pdfs.Unreadable, match="more than 29 pages"):
        pdfs.extract(many, 300)


def compressed(drawn: bytes) -> bytes:
    """A PDF of one page with this content, compressed."""
    stream = zlib.compress(drawn)
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, table = b"%PDF-1.4\n", b"0000000000 65535 f \n"
    for number, body in enumerate(bodies, 1):
        table += b"%010d 00000 n \n" % len(data)
        data += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    end = b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(data)
    return data + b"xref\n0 6\n" + table + end


@posix
def test_a_page_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system, in the child: half a minute of drawing in 40 KB."""
    pytest.importorskip("pypdf")
    drawn = b"BT /F1 12 Tf 1 0 0 1 72 700 Tm (x) Tj ET\n"
    Path("a.pdf").write_bytes(compressed(drawn * 3))
    assert "x" in documents.read("a.pdf")
    Path("a.pdf").write_bytes(compressed(drawn * 300_000))
    monkeypatch.setattr(pdfs, "PAGE_SECONDS", 1)
    with pytest.raises(UserError, match=r"a\.pdf is a PDF that cannot be read: it takes more than"):
        documents.read("a.pdf")


# ---- what a terminal is shown -------------------------------------------------------------------

RIGHT_TO_LEFT = "\u202b\u05e9\u05dc\u05d5\u05dd\u202c \u2067abc\u2069"


def test_the_filter() -> None:
    everything = "".join(map(chr, range(0x3000)))
    for text in (shown.harmless(everything), shown.harmless(everything, running=True)):
        assert not OBEYED.search(text)
        assert "\t" in text
        assert "\n" in text
    assert shown.harmless(RIGHT_TO_LEFT, running=True) == RIGHT_TO_LEFT
    assert shown.harmless(RIGHT_TO_LEFT) == "\u05e9\u05dc\u05d5\u05dd abc"
    assert shown.harmless("\udcffa\ud800", running=True) == "\ufffda\ufffd"
    assert shown.one_line("a\r\nb\x0bc\u2028d\x85e") == "a b c d e"
    # nothing but what is named goes
    lost = set(everything) - set(shown.harmless(everything))
    assert lost == {
        chr(c) for c in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F))
    } | {chr(c) for c in range(0x2066, 0x206A)}


def test_the_console_keeps_rich_s_own_colours() -> None:
    file = io.StringIO()
    console = terminal.Console(file=file, force_terminal=True, color_system="standard")
    console.print(Text(f"a{ESCAPES}b", "bold red"), style="dim")
    console.print(f"[bold]c{ESCAPES}[/bold]d")
    assert "\x1b[" in file.getvalue()
    without = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert not OBEYED.search(without)
    assert without.startswith("a]0;owned")


def test_answers_are_filtered_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ESCAPES + RIGHT_TO_LEFT
    assert terminal.printable(said) == said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.printable(said).endswith(RIGHT_TO_LEFT)
    assert not OBEYED.search(terminal.printable(said))


def named(folder: Path, name: str, template: str = CHATML) -> Path:
    """A model that calls itself so, in a file called so."""
    spec = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=32, ctx_train=512, chat_template=template)
    add = gguf.GGUFWriter.add_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_name", lambda self, _: add(self, name))
        return make(folder, f"{name.replace('/', '')}.gguf", spec=spec).path


HOSTILE_COMMANDS: dict[str, tuple[list[str], bytes]] = {
    "ask, no such document": (["ask", "-m", "{model}", "-q", "h", "-d", f"no{ESCAPES}"], b""),
    "no such model": (["ask", "-m", f"nowhere/{ESCAPES}", "-q", "h"], b""),
    "unknown option": (["ask", f"--{ESCAPES}"], b""),
    "chat": (
        ["chat", "-m", "{model}", "-t", "1", "-n", "3", "-d", "{document}", "--block-size", "256"],
        f"hello\n/docs\n/add no{ESCAPES}\n/{ESCAPES}\n/drop {ESCAPES}\n/set {ESCAPES} 1\n"
        f"/kept\n/save a{ESCAPES}\n/load no{ESCAPES}\n/set temp {ESCAPES}\n/stats\n".encode(),
    ),
    "plan": (["plan", "-m", "{model}"], b""),
    "template that is broken": (["ask", "-m", "{broken}", "-q", "h"], b""),
    "template that fails": (["ask", "-m", "{failing}", "-q", "h"], b""),
    "no template": (["ask", "-m", "{bare}", "-q", "h", "-n", "2"], b""),
    "debug": (["ask", "-m", "{failing}", "-q", "h", "--debug"], b""),
}


@posix
@pytest.mark.parametrize("name", HOSTILE_COMMANDS)
def test_nothing_that_others_named_reaches_a_terminal_as_it_is(
    name: str, inside: Inside, tmp_path: Path
) -> None:
    """On stderr, which is where names, errors and log lines go; `plan` prints tables."""
    arguments, typed = HOSTILE_COMMANDS[name]
    document = tmp_path / f"book{ESCAPES.replace('/', '')}\nerror: forged"
    document.write_text(SENTENCE * 20 + ESCAPES)
    raising = f"{{{{ raise_exception({ESCAPES!r}) }}}}"
    paths = {
        "model": named(tmp_path, f"a{ESCAPES}\nerror: forged"),
        "broken": named(tmp_path, f"b{ESCAPES}", f"{{% {ESCAPES} %}}"),
        "failing": named(tmp_path, f"c{ESCAPES}", raising),
        "bare": named(tmp_path, f"d{ESCAPES}", "{{ messages[-1].content }}"),
        "document": document,
    }
    found = inside(*(part.format(**paths) for part in arguments), typed=typed)
    assert not OBEYED.search(found.err)
    assert "error: forged" not in found.err.splitlines()
    if name == "plan":
        assert not OBEYED.search(found.out)
    if found.code and name != "debug":
        assert len(found.err.splitlines()) == 1


# ---- what is printed and saved ------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_is_printed_before_a_full_disk_loses_the_file(
    model: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    Path("book.txt").write_text(SENTENCE * 20)
    given = ["ask", "-m", model, "-t", "1", "-n", "5", "-q", "why?", "-d", "book.txt"]
    given += ["--json"] if as_json else []
    whole = inside(*given)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = inside(*given, "--save", "a.lkv")
    assert found.code == 1
    assert re.search(r"^error: cannot save .*No space left.*\n\Z", found.err, re.MULTILINE)
    answer, wanted = (
        json.loads(said)["answer"] if as_json else said for said in (found.out, whole.out)
    )
    assert answer == wanted
    assert not Path("a.lkv").exists()


def test_a_full_standard_output_loses_no_file(
    model: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("book.txt").write_text(SENTENCE * 20)

    def full(*_: Any, **__: Any) -> None:
        raise streams.OutputLost("cannot write to standard output: No space left on device")

    monkeypatch.setattr(streams, "say", full)
    given = ["ask", "-m", model, "-t", "1", "-n", "5", "-q", "why?", "-d", "book.txt", "--json"]
    found = inside(*given, "--save", "a.lkv")
    assert found.code == 1
    assert re.fullmatch(r"error: cannot write to standard output.*\n", found.err)
    assert Path("a.lkv").stat().st_size > 1000


# ---- streams that are closed or full ------------------------------------------------------------


def process(redirected: str, *arguments: str | Path, typed: str = "") -> Ended:
    """In a shell that closes or redirects streams first."""
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "laserkv_gguf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        [*command, *map(str, arguments)],
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


CLOSED = "error: standard output is closed; there is nowhere to write the answer\n"
FULL = "error: cannot write to standard output: No space left on device\n"
# redirection, command, what is typed, exit code, standard error
STREAMS = {
    "ask, a document on no stdin": ("<&-", "{ask} -d -", "", 2, "error: standard input is empty.*"),
    "chat, no stdin": ("<&-", "{chat}", "", 0, ".*/help.*"),
    "ask, no stdout": (">&-", "{ask}", "", 2, CLOSED),
    "ask, no stderr": ("2>&-", "{ask}", "", 0, ""),
    "an error, no stderr": ("2>&-", "ask -m none.gguf -q h", "", 2, ""),
    "nothing at all": ("<&- >&- 2>&-", "{chat}", "", 2, ""),
    "chat, a full disk": (">/dev/full", "{chat}", "hello\nhello\n", 1, f".*/help.*\n{FULL}"),
    "version, a full disk": (">/dev/full", "--version", "", 1, FULL),
    "plan, a full disk": (">/dev/full", "plan -m {model} --json", "", 1, FULL),
    "an error, a full stderr": ("2>/dev/full", "ask -m none.gguf -q h", "", 2, ""),
    "chat, a full stderr": ("2>/dev/full", "{chat}", "hello\n/docs\n", 0, ""),
}


@posix
@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_are_closed_or_full(name: str, model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    redirected, line, typed, code, said = STREAMS[name]
    ask, chats = f"ask -m {model} -t 1 -n 4 -q hi", f"chat -m {model} -t 1 -n 4"
    found = process(redirected, *line.format(ask=ask, chat=chats, model=model).split(), typed=typed)
    assert found.code == code, found.err
    assert re.fullmatch(said, found.err, re.DOTALL), found.err
    assert "Traceback" not in found.err
    assert "Exception" not in found.err
    if name == "an error, no stderr":
        assert found.out == ""
    elif code == 0 and ("ask" in name or typed):
        assert found.out


@posix
def test_a_closed_stream_s_number_is_no_other_file_s() -> None:
    """What native code writes to stderr must not go into an output file."""
    code = (
        "import os, sys; from laserkv_gguf.cli import streams; streams.prepare();"
        "print(os.open('written', os.O_CREAT | os.O_RDWR) > 2, file=open('said', 'w'));"
        "os.write(2, b'native')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    subprocess.run(command, env=environment, timeout=120, check=True)
    assert Path("said").read_text() == "True\n"
    assert Path("written").read_bytes() == b""


# ---- chat templates -----------------------------------------------------------------------------

DOUBLING = (
    "{%% set n = namespace(a=%s) %%}{%% for i in range(60) %%}{%% set n.a = %s %%}{%% endfor %%}"
)
WIDE = 3_000_000_000
RUNAWAY = {
    "loops": "{% for a in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4,
    "a loop that skips": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "long ranges": "{% for a in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "texts times a number": f"{{{{ 'a' * {WIDE} }}}}",
    "a number times texts": f"{{{{ {WIDE} * 'a' }}}}",
    "lists times a number": f"{{{{ [1] * {WIDE} }}}}",
    "powers": f"{{{{ 10 ** {WIDE} }}}}",
    "squares": DOUBLING % ("7", "n.a * n.a"),
    "sums": DOUBLING % ("'x'", "n.a + n.a") + "{{ n.a }}",
    "joined": DOUBLING % ("'x'", "n.a ~ n.a") + "{{ n.a }}",
    "blocks of text": "{% set a %}x{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "lists in lists": DOUBLING % ("['lol']", "[n.a, n.a]") + "{{ n.a }}",
    "JSON of lists in lists": DOUBLING % ("['lol']", "[n.a, n.a]") + "{{ n.a|tojson }}",
    "dicts in dicts": DOUBLING % ("{}", "{'a': n.a, 'b': n.a}") + "{{ n.a }}",
    "keys of keys": DOUBLING % ("(1, 2)", "(n.a, n.a)") + "{{ {n.a: 1} }}",
    "namespaces": "{% set a = namespace(x=1) %}"
    + "{% set a = namespace(x=a, y=a) %}" * 60
    + "{{ a }}",
    "a namespace in itself": "{% set a = namespace() %}{% set a.a = a %}{{ a }}",
    "center": f"{{{{ 'a'|center({WIDE}) }}}}",
    "ljust": f"{{{{ 'a'.ljust({WIDE}) }}}}",
    "zfill": f"{{{{ 'a'.zfill({WIDE}) }}}}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "indent": "{{ ('a\n' * 99999)|indent(99999) }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "replace, as a filter": "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
    "join": "{{ ('b' * 9999).join('a' * 9999) }}",
    "join, as a filter": "{{ ('a' * 9999)|map('upper')|join('b' * 9999) }}",
    "percent": f"{{{{ '%{WIDE}d' % 1 }}}}",
    "percent, width beside": f"{{{{ '%*d' % ({WIDE}, 1) }}}}",
    "percent, many": "{{ ('%(a)s' * 9999) % {'a': 'x' * 9999} }}",
    "percent, as a filter": f"{{{{ '%{WIDE}d'|format(1) }}}}",
    "format": f"{{{{ '{{:{WIDE}}}'.format(1) }}}}",
    "format, width beside": f"{{{{ '{{:{{}}}}'.format(1, {WIDE}) }}}}",
    "format, many": "{{ ('{0}' * 9999).format('x' * 9999) }}",
    "format_map": f"{{{{ '{{a:{WIDE}}}'.format_map({{'a': 1}}) }}}}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "tojson": f"{{{{ [1]|tojson(indent={WIDE}) }}}}",
    "slice": f"{{{{ 'a'|slice({WIDE})|list }}}}",
    "batch": f"{{{{ 'a'|batch({WIDE}, 'x')|list }}}}",
    "a sum of lists": "{{ ([[1]] * 99999)|sum(start=[]) }}",
    "a backwards search": "{{ ('a' * 200000).rfind('b' + 'a' * 100000) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro of two branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}"
        for i in range(60)
    )
    + "{% block b60 %}x{% endblock %}",
    "recursive loops": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 50
    + "{% endcall %}" * 50,
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "brackets": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "conditions": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "negations": "{{ " + "not " * 20_000 + "1 }}",
    "a long sum": "{{ " + "+".join("1" * 30_000) + " }}",
    "attributes": "{{ a" + ".b" * 20_000 + " }}",
    "a list around a list": "{% set n = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set n.a = [n.a] %}{% endfor %}{{ n.a }}",
    "a long template": "x" * (SOURCE + 1),
    "a template of many parts": "{{ a }}" * NODES,
    "searches": "{% set a = 'a' * 99999 %}{% for i in range(99999) %}{{ 'b' in a }}{% endfor %}",
    "copies": "{% set a = 'a' * 99999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "keys": "{% set t = (1,) * 99999 %}{% for i in range(99999) %}{{ {}[t] }}{% endfor %}",
    "escapes": "{% autoescape true %}"
    + DOUBLING % ("'<'", "n.a ~ '<' ~ n.a")
    + "{% endautoescape %}",
}
# not run away, but nothing a chat template does
STRANGE = {
    "bytes": "{{ 'a'.encode() }}",
    "numbers' methods": "{{ (1).to_bytes(4, 'big') }}",
    "types": "{{ dict.fromkeys([1]) }}",
    "lorem ipsum": "{{ lipsum(n=5) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "a number of 5,000 digits": "{{ " + "9" * 5000 + " }}",
    "nested loops that Python refuses": "{% for a in [1] %}" * 40 + "{% endfor %}" * 40,
}


def render(template: str, messages: list[dict[str, str]]) -> str:
    return ChatFormatter(template, bos_token="<s>", eos_token="</s>")(messages)


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_template_that_runs_away_is_stopped(name: str) -> None:
    with pytest.raises(TemplateLimit) as refused:
        render(RUNAWAY[name], [user("x")])
    assert len(str(refused.value)) < 100


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_template_is_refused(name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 (which it is says Jinja)
        render(STRANGE[name], [user("x")])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (RUNAWAY["loops"], "fails: it works too long"),
        (RUNAWAY["parentheses"], "is broken: it nests too deeply"),
        (RUNAWAY["a macro that calls itself"], "fails: it nests too deeply"),
        (RUNAWAY["a long template"], r"is broken: it has 131,073 characters"),
        (STRANGE["nested loops that Python refuses"], "is broken: too many statically nested"),
        (STRANGE["a number of 5,000 digits"], "is broken: Exceeds the limit"),
        ("{{ raise_exception('a\n' * 9999) }}", r"fails: (a )+a?$"),
    ],
)
@pytest.mark.parametrize("said", [None, "Be brief."])
def test_a_bad_template_is_one_line(
    template: str, says: str, said: str | None, tmp_path: Path
) -> None:
    path = make(tmp_path, spec=SMALL, chat_template=template).path
    with Model(path, extra_buffers=False) as model, pytest.raises(UserError, match=says) as refused:
        ChatTemplate(model).opening("why?", system=said)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


LONG_MACROS = """
{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro kind(schema, names=[]) -%}
  {%- if schema.type == 'array' -%}{{ kind(schema['items'] | default({})) }}[]
  {%- elif schema.type in ['integer', 'number'] -%}number
  {%- elif schema.enum is defined -%}"{{ schema.enum | join('" | "') }}"
  {%- else -%}{{ schema.type | default('any') }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system=none, last=-1, said=[]) -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set ns.system = text_of(messages[0].content) | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest[::-1] -%}
  {%- if message.role == 'user' and ns.last < 0 -%}
    {%- set ns.last = rest | length - 1 - loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- if tools is not none and tools is defined -%}{{ tools | tojson(indent=4) }}{%- endif -%}
{%- for message in rest -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must take turns, not ' ~ message.role) -}}
  {%- endif -%}
  {%- set ns.said = ns.said + [message.role | upper] -%}
  {{- '[%s %d/%d]' % (message.role, loop.index, loop.length) }}
  {{- '{:>6}|{}'.format(message.role[:4], text_of(message.content).replace('\\n\\n', '\\n')) }}
  {%- if loop.index0 == ns.last and ns.system %} {{ '<<' ~ ns.system ~ '>>' }}{% endif -%}
  {%- generation -%}{{ eos_token if message.role == 'assistant' else '' }}{%- endgeneration -%}
  {%- if loop.last %}{% continue %}{% endif -%}
  {{- ' ' * 2 ~ '-' * (2 ** 3) }}
{%- endfor -%}
{{- ns.said | join(', ') | indent(2, first=true) }} {{ kind({'type': 'array'}) }}
{{- messages | map(attribute='role') | unique | list | tojson }}
{{- messages | selectattr('role', 'equalto', 'tool') | list | length }}
{{- dict(a=1, b=[2, 3]).items() | list }}{{ '%.2f' % 1.5 }}{{ 'ab'.center(6, '*') }}
{%- macro around(n) %}<{{ caller(n) }}>{% endmacro -%}
{%- filter upper %}{{ messages[-1].content.split('\\n')[0] }}{% endfilter -%}
{%- call(x) around(2) %}{{ x + 1 }}{% endcall -%}
{%- if add_generation_prompt %}{{ '<|' + 'assistant' + '|>' }}{% endif -%}
"""


@pytest.mark.parametrize("template", [*TEMPLATES.values(), LONG_MACROS])
@pytest.mark.parametrize(
    "messages",
    [
        [user("x" * 50_000)],
        [system("Be\nbrief."), user("a\n\nb")],
        [user("a"), assistant("b"), user("c")],
        [system("s"), user("a"), assistant("b"), user("c")],
        [assistant("first")],
    ],
)
def test_limits_change_no_template_that_keeps_them(
    template: str, messages: list[dict[str, str]]
) -> None:
    """Against llama-cpp-python's formatter, which has none: the same text, or the same error."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def told(make_it: Callable[[], str]) -> str:
        try:
            return make_it()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    free = Jinja2ChatFormatter(template, bos_token="<s>", eos_token="</s>")
    wanted = told(lambda: str(free(messages=messages).prompt))  # type: ignore[arg-type]
    assert told(lambda: render(template, messages)) == wanted
    assert len(messages) != 1 or messages[0]["role"] != "user" or "x" * 50_000 in wanted


def test_a_template_may_be_rendered_many_times() -> None:
    """The budget is each rendering's own."""
    formatter = ChatFormatter(LONG_MACROS, bos_token="<s>", eos_token="</s>")
    wanted = formatter([user("why?")])
    assert all(formatter([user("why?")]) == wanted for _ in range(100))
