"""Lines that survive a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from laserkv_gguf.benchmark import processes
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files import journal
from laserkv_gguf.files.journal import Journal
from laserkv_gguf.files.lock import lock


def test_lines_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    with Journal(path) as one:
        assert one.entries == []
        one.add({"n": 1})
        one.add({"n": "ü\udcff"})
    with Journal(path) as again:
        assert [entry["n"] for entry in again.entries] == [1, "ü\udcff"]


@given(some.integers(0, 60))
def test_a_torn_line_is_cut_off(cut: int) -> None:
    """Wherever a kill tore the file: whole lines stay, and the next line is whole too."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        whole = b"".join(journal.encoded({"number": n, "text": "x" * n}) for n in range(3))
        cut = min(cut, len(whole))
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        with Journal(path) as one:
            assert [entry["number"] for entry in one.entries] == list(range(lines))
            one.add({"number": 9})
        with Journal(path) as again:
            assert [entry["number"] for entry in again.entries] == [*range(lines), 9]


def test_a_broken_line_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(UserError, match="line 2 is broken"):
        Journal(path)
    assert path.read_text() == '{"n": 1}\nnonsense\n{"n": 2}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "lines.jsonl", os.write
    with Journal(path) as one:
        one.add({"n": 1})
        with monkeypatch.context() as patched:

            def some_of_it(handle: int, data: Any) -> int:
                if len(data) < 5:
                    raise OSError(28, "No space left on device")
                return real(handle, bytes(data)[: len(data) - 4])

            patched.setattr(os, "write", some_of_it)
            with pytest.raises(LaserKVError, match="No space left"):
                one.add({"n": 2, "text": "x" * 100})
        one.add({"n": 3})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_measurement_behind_a_torn_line_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was killed while it wrote; the next one's results must count for the one after."""
    store, calls = tmp_path / "runs.jsonl", list[int]()

    def measured(job: dict[str, Any]) -> dict[str, Any]:
        calls.append(job["repeat"])
        return {"seconds": job["repeat"]}

    monkeypatch.setattr(processes, "run", measured)
    monkeypatch.setattr(processes, "_key", lambda job: str(job["repeat"]))
    processes.Processes(store).run({"repeat": 1})
    with store.open("ab") as file:
        file.write(b'{"key": "torn by a ki')
    for _ in range(2):  # as if the command had been given twice
        both = processes.Processes(store)
        assert [both.run({"repeat": repeat})["seconds"] for repeat in (1, 2)] == [1, 2]
    assert calls == [1, 2]


KILLED = """
import os, signal, sys
from pathlib import Path
from laserkv_gguf.files.journal import Journal
one = Journal(Path(sys.argv[1]))
one.add({"n": 1})
real = os.write
def killed(handle, data):
    real(handle, bytes(data)[:7])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = killed
one.add({"n": 2})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    with Journal(path) as one:
        one.add({"n": 3})
        assert [entry["n"] for entry in one.entries] == [1, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="a lock of one's own process")
def test_a_lock_is_for_one(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "held", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(first)
    assert not lock(second)
    os.close(first)
    assert lock(second)
    os.close(second)
