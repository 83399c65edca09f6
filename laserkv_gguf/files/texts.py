"""Text of what was given as a document: UTF-8 text, Markdown, PDF."""

from __future__ import annotations

import importlib.util

from laserkv_gguf.errors import UserError
from laserkv_gguf.files import pdf
from laserkv_gguf.machine import free_ram

PDF = b"%PDF-"
# Making tokens of English took 28 times a text's size, of Chinese 75 times (SmolLM2, 8 to 32 MiB).
MEMORY = 75
MOST, LEAST = 64 << 20, 1 << 20  # bytes of text
MOST_PDF = 256 << 20  # bytes; most of a large PDF are pictures


def of_bytes(said: str, data: bytes) -> str:
    """The text of a document, whatever its name says: what it begins with decides.

    Args:
        said: what to call it in errors.

    Raises:
        UserError: empty, not UTF-8, binary, or a PDF that has no text, is damaged or needs an
            extra.
    """
    text = _pdf(said, data) if data.startswith(PDF) else _text(said, data)
    if not text.strip():
        raise UserError(f"{said} is empty; there is nothing to read")
    return text


def limit() -> int:
    """Most bytes of text that are read: `MOST`, or less where memory is short."""
    free = free_ram()
    return MOST if free is None else max(min(MOST, free // MEMORY), LEAST)


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
    if importlib.util.find_spec("pypdf") is None:
        raise UserError(f"{said} is a PDF; install the reader with pip install 'laserkv-gguf[pdf]'")
    try:
        text = pdf.text(data, limit())
    except pdf.Unreadable as error:
        raise UserError(f"{said} is a PDF that cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"{said} is a PDF without text (scanned pages?); run OCR over it first")
    return text
