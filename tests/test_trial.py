"""Whether the fast CPU kernels work is found out in a child, once, and never at the user's cost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from tiny import TinySpec, make

from laserkv_gguf.api import LaserKV
from laserkv_gguf.engine import engine
from laserkv_gguf.llama import library, trial
from laserkv_gguf.llama.model import Model

WORKS = "pass"
SEGFAULT = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
ABORT = "import os; os.abort()"
PYTHON_ERROR = "raise RuntimeError('no such luck')"

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are remembered in this test; the folder is not there yet."""
    file = tmp_path / "cache" / "trials.json"
    monkeypatch.setattr(trial, "memory_file", lambda: file)
    return file


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Lets the trial's child run other code; the list returned grows with every child."""
    real = subprocess.run

    def becomes(code: str) -> list[Any]:
        started: list[Any] = []

        def run(command: list[str], **options: Any) -> Any:
            started.append(command)
            assert command[:2] == [sys.executable, "-m"]
            return real([sys.executable, "-c", code], **options)

        monkeypatch.setattr(trial.subprocess, "run", run)
        return started

    return becomes


Child = Callable[[str], list[Any]]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_child_that_works_is_remembered(
    memory: Path, child: Child, caplog: pytest.LogCaptureFixture
) -> None:
    started = child(WORKS)
    assert trial.extra_buffers_work() is True
    assert trial.extra_buffers_work() is True
    assert len(started) == 1
    assert json.loads(memory.read_text()) == {library.build_identity(): True}
    assert warnings(caplog) == []
    assert [p.name for p in memory.parent.iterdir()] == [memory.name]


@posix
@pytest.mark.parametrize(("code", "signal"), [(SEGFAULT, "-11"), (ABORT, "-6")])
def test_a_child_that_is_killed(
    code: str, signal: str, memory: Path, child: Child, caplog: pytest.LogCaptureFixture
) -> None:
    started = child(code)
    assert trial.extra_buffers_work() is False
    (warning,) = warnings(caplog)  # told when found, with what it costs
    assert signal in warning
    assert "slower" in warning
    caplog.clear()
    assert trial.extra_buffers_work() is False
    assert warnings(caplog) == []
    assert len(started) == 1
    assert json.loads(memory.read_text()) == {library.build_identity(): False}


@posix
def test_tried_again_on_request(memory: Path, child: Child) -> None:
    child(SEGFAULT)
    assert trial.extra_buffers_work() is False
    child(WORKS)
    assert trial.extra_buffers_work() is False
    assert trial.extra_buffers_work(again=True) is True
    assert trial.extra_buffers_work() is True


def test_an_error_of_python_is_no_verdict(
    memory: Path, child: Child, caplog: pytest.LogCaptureFixture
) -> None:
    started = child(PYTHON_ERROR)
    assert trial.extra_buffers_work() is False
    assert not memory.exists()
    (warning,) = warnings(caplog)
    assert "no such luck" in warning
    assert trial.extra_buffers_work() is False
    assert len(started) == 2


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no python"), subprocess.TimeoutExpired("python", 120)]
)
def test_a_child_that_cannot_run_is_no_verdict(
    error: Exception,
    memory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(trial.subprocess, "run", run)
    assert trial.extra_buffers_work() is False
    assert not memory.exists()
    assert len(warnings(caplog)) == 1


def test_a_child_that_hangs_is_given_up(
    memory: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 1)
    child("import time; time.sleep(60)")
    assert trial.extra_buffers_work() is False
    assert not memory.exists()


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b"\xff\xfe\0", b'{"other build": fal', b'"text"', b"12"]
)
def test_a_damaged_memory_is_written_anew(damage: bytes, memory: Path, child: Child) -> None:
    memory.parent.mkdir()
    memory.write_bytes(damage)
    started = child(WORKS)
    assert trial.extra_buffers_work() is True
    assert len(started) == 1
    assert json.loads(memory.read_text()) == {library.build_identity(): True}


def test_a_memory_that_cannot_be_written_costs_a_trial(memory: Path, child: Child) -> None:
    memory.parent.write_text("a file where the folder should be")
    started = child(WORKS)
    assert trial.extra_buffers_work() is True
    assert trial.extra_buffers_work() is True
    assert len(started) == 2


def test_a_memory_that_cannot_be_replaced_costs_a_trial(memory: Path, child: Child) -> None:
    memory.mkdir(parents=True)
    started = child(WORKS)
    assert trial.extra_buffers_work() is True
    assert trial.extra_buffers_work() is True
    assert len(started) == 2


@posix
def test_two_builds_have_two_answers(
    memory: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(name: str) -> None:
        monkeypatch.setattr(library, "build_identity", lambda: name)

    build("one")
    child(WORKS)
    assert trial.extra_buffers_work() is True
    build("two")
    started = child(SEGFAULT)
    assert trial.extra_buffers_work() is False
    build("one")
    assert trial.extra_buffers_work() is True
    assert len(started) == 1
    assert json.loads(memory.read_text()) == {"one": True, "two": False}


def test_the_identity_is_of_libraries_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = library.build_identity.__wrapped__
    real = identity()
    assert real == identity()
    monkeypatch.setattr(library, "_processor", lambda: "another")
    assert identity() != real
    monkeypatch.undo()
    (tmp_path / "libggml-cpu.so").write_bytes(b"another")
    monkeypatch.setattr(library, "library_folder", lambda: tmp_path)
    assert identity() != real


# ---- the real child ----------------------------------------------------------------------------


def test_the_real_child(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It ends orderly, or is killed where the kernels crash; Python errors are ours."""
    code = trial._try_in_child()
    assert code is not None, warnings(caplog)
    assert code <= 0, code
    assert trial.extra_buffers_work() is (code == 0)


def test_the_real_child_finds_the_package_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert trial._try_in_child() is not None, warnings(caplog)


def test_the_model_of_the_trial_has_every_type(tmp_path: Path) -> None:
    import gguf

    trial.write_model(tmp_path / "trial.gguf")
    reader = gguf.GGUFReader(tmp_path / "trial.gguf")
    types = {t.tensor_type.name for t in reader.tensors if t.name.endswith("attn_q.weight")}
    assert types == set(trial._TYPES)
    # those that llama.cpp repacks or hands to AMX
    assert {"Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"} <= types


# ---- what is done with the answer --------------------------------------------------------------


@pytest.mark.parametrize("works", [True, False])
def test_the_model_is_loaded_as_the_trial_says(
    works: bool,
    memory: Path,
    child: Child,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    class Watched(Model):
        def __init__(self, *args: Any, **options: Any) -> None:
            seen.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(engine, "Model", Watched)
    started = child(WORKS)
    memory.parent.mkdir()
    memory.write_text(json.dumps({library.build_identity(): works}))
    model = make(tmp_path, spec=TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64)).path
    with LaserKV(model) as one:
        assert one.ask("hi", max_tokens=2).finish_reason == "length"
    assert seen["extra_buffers"] is works
    assert started == []


@posix
def test_a_crash_is_not_the_users(
    memory: Path,
    child: Child,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first run on a machine whose kernels crash: one warning, and an answer."""
    passed: list[bool] = []
    real = llama_cpp.llama_model_load_from_file

    def watched(path: bytes, params: Any) -> Any:
        passed.append(bool(params.use_extra_bufts))
        return real(path, params)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", watched)
    child(SEGFAULT)
    # with a template, whose lack would be a warning too
    small = TinySpec(
        layers=1, heads=2, kv_heads=1, n_ff=64, chat_template="{{ messages[0].content }}"
    )
    model = make(tmp_path, spec=small).path
    with LaserKV(model) as one:
        assert one.ask("hi", max_tokens=2).text
    assert passed == [False]
    (warning,) = warnings(caplog)
    assert "crash" in warning
