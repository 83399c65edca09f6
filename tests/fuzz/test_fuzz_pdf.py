"""PDF bytes: text or one line comes of them."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from test_documents import pdf
from test_hostile_input import OBEYED, compressed

from fuzz import budget
from laserkv_gguf.files import pdf as pdfs

pypdf: Any = pytest.importorskip("pypdf")

NUMBERS = [b"0", b"-1", b"1", b"2", b"3", b"7", b"65536", b"2147483648", b"9" * 30, b"1e9", b"."]
PIECES = [
    b"<<", b">>", b"[", b"]", b"(", b")", b"<", b">", b"/", b"%", b"\0", b"null", b"true", b"R",
    b"obj", b"endobj", b"stream\n", b"endstream", b"xref\n", b"trailer\n", b"startxref\n",
    b"/Type", b"/Pages", b"/Page", b"/Kids", b"/Count", b"/Parent", b"/Length", b"/Filter",
    b"/FlateDecode", b"/LZWDecode", b"/ASCII85Decode", b"/ASCIIHexDecode", b"/RunLengthDecode",
    b"/DCTDecode", b"/DecodeParms << /Predictor 15 /Columns 1 >>", b"/Contents", b"/Resources",
    b"/Font", b"/ToUnicode", b"/Encoding", b"/Differences", b"/Encrypt", b"/Prev", b"/Root",
    b"/XObject", b"Do", b"BT", b"ET", b"Tf", b"Tj", b"TJ", b"Tm", b"q", b"Q", b"cm", b"BI ID EI",
]  # fmt: skip


def written(compress: bool) -> bytes:
    """As pypdf writes it: with a table of contents, and notes about the document."""
    writer, file = pypdf.PdfWriter(), io.BytesIO()
    writer.append(io.BytesIO(pdf("Jack has a mother.", "And a cow.")))
    writer.add_metadata({"/Title": "Jack"})
    writer.add_outline_item(title="Cow", page_number=1)
    if compress:
        for page in writer.pages:
            page.compress_content_streams()
    writer.write(file)
    return file.getvalue()


WHOLE = [
    pdf("Jack has a mother.", "And a cow."),
    compressed(b"BT /F1 12 Tf 72 700 Td (Jack) Tj [(has) -250 (a cow)] TJ ET\n"),
    written(False),
    written(True),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A PDF with bytes, numbers, references and names changed, moved, doubled or cut off."""
    data = draw(st.sampled_from(WHOLE))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(5, max(len(data), 5)))
        how = draw(st.sampled_from(["byte", "number", "reference", "piece", "move", "cut", "drop"]))
        if how == "byte":
            data = data[:at] + draw(st.binary(min_size=1, max_size=3)) + data[at + 1 :]
        elif how == "number":
            data = data[:at] + re.sub(
                rb"\d+", draw(st.sampled_from(NUMBERS)), data[at:], count=draw(st.integers(1, 3))
            )
        elif how == "reference":
            number = str(draw(st.integers(0, 9))).encode()
            data = data[:at] + re.sub(rb"\b\d+ 0 R", number + b" 0 R", data[at:], count=1)
        elif how == "piece":
            data = data[:at] + b" " + draw(st.sampled_from(PIECES)) + b" " + data[at:]
        elif how == "move":
            end = at + draw(st.integers(0, 200))
            to = draw(st.integers(5, max(len(data), 5)))
            data = data[:to] + data[at:end] + data[to:]
        elif how == "drop":
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
        elif draw(st.booleans()):
            data = data[:at]
    return data


class Late(BaseException):
    """A page takes longer than the child may."""


def test_pdf_bytes() -> None:
    counts: Counter[str] = Counter()

    def late(*_: Any) -> None:
        raise Late

    def pdf_bytes(data: bytes) -> None:
        # here nothing ends a loop as the system ends the child's
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 20)
        try:
            # every so often as in use, in a child
            child = len(data) % 250 == 0
            text = pdfs.text(data, 1 << 20) if child else pdfs.extract(data, 1 << 20)
            counts["in a child"] += child
            counts["read"] += 1
            assert len(text) <= 1 << 20
            text.encode()
        except pdfs.Unreadable as error:
            counts["refused"] += 1
            said = str(error)
            assert said
            assert len(said) <= pdfs.MESSAGE
            assert "\n" not in said
            assert not OBEYED.search(said)
        except Late:
            counts["late"] += 1
        finally:
            if sys.platform != "win32":
                signal.setitimer(signal.ITIMER_PROF, 0)

    if sys.platform == "win32":
        budget.run(pdf_bytes, damaged(), 300, counts)
        return
    before = signal.signal(signal.SIGPROF, late)
    try:
        budget.run(pdf_bytes, damaged(), 300, counts)
    finally:
        signal.signal(signal.SIGPROF, before)
