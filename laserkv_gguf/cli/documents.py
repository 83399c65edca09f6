"""Documents from files and standard input: UTF-8 text, Markdown, PDF."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from laserkv_gguf.errors import UserError

STANDARD_INPUT = "-"


def load(names: Sequence[str]) -> str | None:
    """The text of all documents, a blank line between them; None where none are named.

    Raises:
        UserError: missing, empty, not UTF-8, binary, or a PDF that has no text or needs an extra.
    """
    if not names:
        return None
    if list(names).count(STANDARD_INPUT) > 1:
        raise UserError("--document - was given twice; standard input can be read once")
    return "\n\n".join(read(name) for name in names)


def read(name: str) -> str:
    """The text of one document; `-` is standard input."""
    data = _bytes(name)
    said = "standard input" if name == STANDARD_INPUT else name
    text = _pdf(said, data) if data.startswith(b"%PDF-") else _text(said, data)
    if not text.strip():
        raise UserError(f"{said} is empty; there is nothing to read")
    return text


def _bytes(name: str) -> bytes:
    if name == STANDARD_INPUT:
        if sys.stdin.isatty():
            print("reading the document from standard input; end with Ctrl-D", file=sys.stderr)
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except FileNotFoundError:
        raise UserError(f"no document at {name}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; name the file to read") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error


def _text(said: str, data: bytes) -> str:
    if b"\0" in data:
        raise UserError(f"{said} is binary; documents are UTF-8 text, Markdown or PDF")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{said} is not UTF-8 (byte {error.start}); "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error


def _pdf(said: str, data: bytes) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise UserError(
            f"{said} is a PDF; install the reader with pip install 'laserkv-gguf[pdf]'"
        ) from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings are not for users
    try:
        pages = PdfReader(io.BytesIO(data)).pages
        text = "\n\n".join(page.extract_text() for page in pages)
    except (PyPdfError, ValueError, KeyError) as error:
        raise UserError(f"{said} is a PDF that cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"{said} is a PDF without text (scanned pages?); run OCR over it first")
    return text
