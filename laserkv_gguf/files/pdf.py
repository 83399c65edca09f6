"""The text of a PDF, taken out by a process of its own.

A PDF is objects that refer to each other, and a damaged or hostile one can make its reader loop,
recurse or allocate without an end. So pypdf runs in a child that the system bounds: `PAGE_SECONDS`
of computing for a page and `SECONDS` for all, memory by the file's size. Windows does neither;
there only `PATIENCE` ends the child.
"""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys

from laserkv_gguf.shown import one_line, whole

PAGES = 20_000
PAGE_SECONDS, SECONDS = 30, 1800  # of computing, not of waiting
PATIENCE = 7200  # seconds
MEMORY, MEMORY_PER_BYTE = 1 << 30, 8  # what reading may take: so much, and so much times the file
MESSAGE = 200  # characters
_REFUSED = 3  # exit code of a child that says why on standard output

_TOO_LONG = f"it takes more than {PAGE_SECONDS} s for a page, or {SECONDS:,} s in all"
_TOO_MUCH = "it takes too much memory"


class Unreadable(Exception):
    """Why a PDF cannot be read, in a few words."""


def text(data: bytes, most: int) -> str:
    """The text of all pages, a blank line between them.

    Args:
        most: characters of text.

    Raises:
        Unreadable: damaged, locked, or more than what is bounded here.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from laserkv_gguf.files import pdf; "
        f"sys.exit(pdf.main({most}, {PAGE_SECONDS}, {MEMORY + MEMORY_PER_BYTE * len(data)}))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            # Ctrl-C is for us: we end the child
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreadable(_TOO_LONG) from None
    except (OSError, ValueError):  # no Python to start: we are part of another program
        return extract(data, most)
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode == 0:
        return said
    if done.returncode == _REFUSED:
        raise Unreadable(said)
    late = -done.returncode == getattr(signal, "SIGXCPU", 0)
    raise Unreadable(_TOO_LONG if late else _TOO_MUCH)


def main(most: int, seconds: int, memory: int) -> int:
    """In the child: standard input in, text or the reason out.

    Args:
        most: characters of text.
        seconds: of computing for a page.
        memory: bytes.
    """
    _bound_memory(memory)
    try:
        said, code = extract(sys.stdin.buffer.read(), most, seconds), 0
    except Unreadable as error:
        said, code = str(error), _REFUSED
    sys.stdout.buffer.write(said.encode())
    sys.stdout.buffer.flush()
    return code


def extract(data: bytes, most: int, seconds: int | None = None) -> str:
    """As `text`, in this process.

    Args:
        seconds: the system may end this process when a page takes longer; None: it may not.
    """
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings are not for users
    parts: list[str] = []
    left = most
    try:
        if seconds is not None:
            _bound_time(seconds)
        from pypdf import PdfReader

        for page in PdfReader(io.BytesIO(data)).pages:
            if len(parts) == PAGES:
                raise Unreadable(f"it has more than {PAGES:,} pages")
            if seconds is not None:
                _bound_time(seconds)
            parts.append(whole(page.extract_text()))
            left -= len(parts[-1]) + 2
            if left < 0:
                raise Unreadable(f"it has more than {most:,} characters")
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable("it nests too deeply") from None
    except MemoryError:
        raise Unreadable(_TOO_MUCH) from None
    except Exception as error:  # pypdf meets damage with whatever its code runs into
        said = one_line(str(error)).strip()[:MESSAGE]
        raise Unreadable(said or type(error).__name__) from error
    return "\n\n".join(parts)


def _bound_memory(memory: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    _lower(resource.RLIMIT_AS, memory)
    _lower(resource.RLIMIT_CORE, 0)


def _bound_time(seconds: int) -> None:
    """So many more from now on."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    _lower(resource.RLIMIT_CPU, min(spent + seconds, SECONDS))


def _lower(what: int, wanted: int) -> None:
    """Sets a limit of this process, unless the user's own is lower."""
    if sys.platform == "win32":
        return
    import contextlib
    import resource

    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS knows no limit of this kind
        resource.setrlimit(what, (wanted, hard))
