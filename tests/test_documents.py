"""What is read from files, standard input and PDF, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import pytest

from laserkv_gguf.cli import documents
from laserkv_gguf.errors import UserError


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(name: str, data: str | bytes) -> str:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    return name


# ---- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "two\nlines\n",
        "naïve – 漢字 😀 \u2063D\u2063",
        "<|im_end|></s>",
        "# Title\n\n* `x`\n",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "no suffix", "wrong.pdf"])
def test_text_comes_as_it_is(text: str, name: str) -> None:
    """What a file is called says nothing; nothing of it is stripped."""
    assert documents.load([written(name, text)]) == text


def test_a_byte_order_mark_is_no_text() -> None:
    assert documents.load([written("a.txt", b"\xef\xbb\xbftext")]) == "text"


def test_line_ends_stay() -> None:
    assert documents.load([written("a.txt", b"one\r\ntwo\r\n")]) == "one\r\ntwo\r\n"


def test_none() -> None:
    assert documents.load([]) is None


def test_several_are_joined_by_a_blank_line_in_order() -> None:
    names = [written("b.txt", "one"), written("a.txt", "two"), written("c.md", "# three\n")]
    assert documents.load(names) == "one\n\ntwo\n\n# three\n"
    assert documents.load(["a.txt", "a.txt"]) == "two\n\ntwo"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "x is empty"),
        (b" \n\t\r\n", "x is empty"),
        (b"\xef\xbb\xbf", "x is empty"),
        ("\u00a0\u3000".encode(), "x is empty"),
        ("voilà".encode("latin1"), "x is not UTF-8 (byte 4); convert it, for example with iconv"),
        (b"text\xff", "x is not UTF-8 (byte 4)"),
        (b"cut \xe6\xbc", "x is not UTF-8 (byte 4)"),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            "x is binary; documents are UTF-8 text, Markdown or PDF",
        ),
        ("UTF-16".encode("utf-16"), "x is binary"),
    ],
)
def test_refused(data: bytes, says: str) -> None:
    written("x", data)
    with pytest.raises(UserError) as refused:
        documents.load(["x"])
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_missing() -> None:
    with pytest.raises(UserError, match=r"no document at .*no\.txt"):
        documents.load(["no.txt"])
    with pytest.raises(UserError, match=r"no document at no/where\.txt"):
        documents.load(["no/where.txt"])


def test_a_folder() -> None:
    Path("books").mkdir()
    with pytest.raises(UserError, match="books is a folder; name the file"):
        documents.load(["books"])


def test_below_a_file() -> None:
    written("a.txt", "text")
    with pytest.raises(UserError, match=r"cannot read a\.txt/b"):
        documents.load(["a.txt/b"])


def test_one_bad_document_refuses_all() -> None:
    with pytest.raises(UserError, match=r"no document at no\.txt"):
        documents.load([written("a.txt", "text"), "no.txt"])


# ---- standard input ----------------------------------------------------------------------------


class Stdin:
    def __init__(self, data: bytes, terminal: bool = False) -> None:
        self.buffer, self._terminal = io.BytesIO(data), terminal

    def isatty(self) -> bool:
        return self._terminal


def test_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("from the pipe: é".encode()))
    assert documents.load(["-"]) == "from the pipe: é"
    assert capsys.readouterr() == ("", "")


def test_standard_input_between_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"piped"))
    names = [written("a.txt", "one"), "-", written("b.txt", "two")]
    assert documents.load(names) == "one\n\npiped\n\ntwo"


def test_a_terminal_is_told_how_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"typed", terminal=True))
    assert documents.load(["-"]) == "typed"
    out, err = capsys.readouterr()
    assert out == ""
    assert "Ctrl-D" in err


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff", b"\0"])
def test_standard_input_is_named_when_refused(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    with pytest.raises(UserError, match=r"^standard input is "):
        documents.load(["-"])


def test_standard_input_can_be_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"piped"))
    with pytest.raises(UserError, match="twice; standard input can be read once"):
        documents.load(["-", "-"])
    assert sys.stdin.buffer.tell() == 0  # found before anything is read


# ---- PDF ---------------------------------------------------------------------------------------


def pdf(*pages: str) -> bytes:
    """A PDF by hand: one line of text a page, "" for an empty page."""
    count = len(pages)
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(count))
    font = 3 + 2 * count
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
    ]
    for i, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * i} 0 R "
            f"/Resources << /Font << /F1 {font} 0 R >> >> >>"
        )
        bodies.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    bodies.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin1")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    return (
        data
        + f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}".encode()
        + f"trailer\n<< /Size {len(bodies) + 1} /Root 1 0 R >>\n".encode()
        + f"startxref\n{len(data)}\n%%EOF\n".encode()
    )


@pytest.fixture
def _pypdf() -> None:
    pytest.importorskip("pypdf")


@pytest.mark.usefixtures("_pypdf")
@pytest.mark.parametrize("name", ["a.pdf", "a.txt"])
def test_a_pdf(name: str) -> None:
    """What a file begins with decides, not its name."""
    assert documents.load([written(name, pdf("Jack has a mother."))]) == "Jack has a mother."


@pytest.mark.usefixtures("_pypdf")
def test_pages_are_in_order() -> None:
    text = documents.load([written("a.pdf", pdf("First page.", "", "Third page.")), "a.pdf"])
    assert text is not None
    assert text.split() == ["First", "page.", "Third", "page."] * 2


@pytest.mark.usefixtures("_pypdf")
def test_a_pdf_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(pdf("Piped.")))
    assert documents.load(["-"]) == "Piped."


@pytest.mark.usefixtures("_pypdf")
def test_a_pdf_without_text() -> None:
    with pytest.raises(UserError, match=r"a\.pdf is a PDF without text .*OCR"):
        documents.load([written("a.pdf", pdf("", ""))])


@pytest.mark.usefixtures("_pypdf")
def test_a_pdf_under_lock() -> None:
    from pypdf import PdfWriter

    writer, file = PdfWriter(), io.BytesIO()
    writer.append(io.BytesIO(pdf("Secret.")))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(file)
    with pytest.raises(UserError, match=r"a\.pdf is a PDF that cannot be read: .*decrypted"):
        documents.load([written("a.pdf", file.getvalue())])


@pytest.mark.usefixtures("_pypdf")
@pytest.mark.parametrize(
    "data", [b"%PDF-1.4\n", b"%PDF-1.7\nno such thing\n%%EOF\n", pdf("x")[:200]]
)
def test_a_damaged_pdf(data: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.pdf is a PDF that cannot be read") as refused:
        documents.load([written("a.pdf", data)])
    assert "\n" not in str(refused.value)


def test_pypdf_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pypdf" else real(name)
    )
    with pytest.raises(UserError, match=r"a\.pdf is a PDF; .*pip install 'laserkv-gguf\[pdf\]'"):
        documents.load([written("a.pdf", pdf("Jack has a mother."))])
