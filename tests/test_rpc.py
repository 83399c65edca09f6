"""Layers and cache on other machines: RPC servers here, alive, of another kind, dying."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rpc_device import ROOT, SECONDS, Server, free_port, needed, rpc_environment
from serving import Served, call
from test_cli import Files, files  # noqa: F401
from tiny import TinySpec, make

from laserkv_gguf.cli import supervised
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import rpc

SPEC = TinySpec(ctx_train=2048, head_dim=64, layers=4, chat_template=None)
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "laserkv_gguf", *arguments]


def ended(*arguments: str, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=ROOT, env=rpc_environment()
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


# ---- what answers, and what does not -----------------------------------------------------------


@contextmanager
def answering(reply: bytes | None) -> Iterator[str]:
    """Something that listens and answers the first request so, or not at all for None."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(64)
                if reply is None:
                    done.wait(SECONDS)
                else:
                    connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        done.set()
        thread.join(SECONDS)


def hello(major: int, minor: int) -> bytes:
    return struct.pack("<QBBBx24s", 28, major, minor, 0, bytes(24))


def test_a_server_of_the_same_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "own_version", lambda: (7, 1))
    for minor in (0, 1):
        with answering(hello(7, minor)) as address:
            rpc.check(address)


@pytest.mark.parametrize("version", [(6, 0), (8, 0), (7, 2)])
def test_another_version_is_refused(
    version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp would, but for ending the process."""
    monkeypatch.setattr(rpc, "own_version", lambda: (7, 1))
    said = rf"speaks version {version[0]}\.{version[1]}\.0 .* this llama.cpp 7\.1; install the same"
    with answering(hello(*version)) as address, pytest.raises(UserError, match=said):
        rpc.check(address)


def test_what_is_no_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        answering(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(40)) as address,
        pytest.raises(UserError, match=r"is no RPC server of llama\.cpp; check"),
    ):
        rpc.check(address)
    with answering(b"") as address, pytest.raises(UserError, match="it hung up"):
        rpc.check(address)
    with pytest.raises(UserError, match=r"no RPC server at .*refused.*; start one"):
        rpc.check(f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(rpc, "SECONDS", 0.2)
    with answering(None) as address, pytest.raises(UserError, match=r"no answer within 0.2 s"):
        rpc.check(address)


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:0", "host:99999", "::1:5"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"write HOST:PORT|IPv4"):
        rpc.check(address)


def test_the_protocols_version_is_known() -> None:
    """Of the headers that llama-cpp-python installs."""
    assert rpc.own_version() is not None


def test_the_command_line_with_other_servers() -> None:
    """--rpc in both of its forms is replaced; all else stays."""
    given = ["batch", "--rpc", "a:1,b:2", "-i", "q", "--rpc=c:3", "-o", "x"]
    said = supervised.with_servers(given, ["b:2"])
    assert said == ["batch", "-i", "q", "-o", "x", "--rpc", "b:2"]


class Children:
    """Stands in for the child processes and the servers: what each of them does, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
        self.codes: list[int] = []
        self.there = {"a:1", "b:2"}
        self.used: list[str] = []
        supervised.remember(given)

        def child(arguments: list[str], _: Any) -> int:
            self.used.append(arguments[-1])
            return self.codes.pop(0)

        def check(server: str) -> None:
            if server not in self.there:
                raise UserError("gone")

        monkeypatch.setattr(supervised, "_run_child", child)
        monkeypatch.setattr(rpc, "check", check)


def test_a_batch_goes_on_with_the_servers_that_are_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = Children(monkeypatch, ["batch", "--rpc", "a:1,b:2"])
    children.codes, children.there = [75, 1], {"b:2"}
    assert supervised.run(("a:1", "b:2")) == 1  # the second child's own code
    assert children.used == ["a:1,b:2", "b:2"]
    said = "warning: the RPC server at a:1 went away; going on with b:2\n"
    assert capsys.readouterr().err == said


def test_a_batch_ends_where_no_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch, ["batch", "--rpc", "a:1,b:2"])
    children.codes, children.there = [-6], set()
    with pytest.raises(LaserKVError, match="no other is left; what is done is kept"):
        supervised.run(("a:1", "b:2"))
    children.codes, children.there = [-6] * 9, {"a:1", "b:2"}  # dies of something else
    with pytest.raises(LaserKVError, match="died 3 times; what is done is kept"):
        supervised.run(("a:1", "b:2"))


def test_other_commands_end_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch, ["ask", "--rpc", "a:1,b:2"])
    children.codes, children.there = [75], {"b:2"}
    with pytest.raises(LaserKVError, match="a:1 went away in the middle; start it there and ask"):
        supervised.run(("a:1", "b:2"))


# ---- real servers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("rpc"), spec=SPEC).path


def asked(model: Path, *flags: str) -> list[str]:
    """A question whose answer random weights make up; the same for everyone who computes alike."""
    return [
        *("ask", "-m", str(model), "-q", "why?", "-n", "12", "--block-size", "64", "-fa", "on"),
        *("-ctk", "f32", "-ctv", "f32", "-t", "1", *flags),
    ]


@pytest.mark.devices
def test_layers_on_two_servers_answer_as_alone(model: Path, tmp_path: Path) -> None:
    needed()
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    alone, _ = ended(*asked(model, "-d", str(book)))
    with Server() as first, Server() as second:
        servers = f"{first.address},{second.address}"
        out, _ = ended(*asked(model, "-d", str(book), "--rpc", servers))
        assert out == alone
        listed, _ = ended("ask", "--rpc", servers, "--list-devices")
        assert re.findall(r"RPC\d: \S+", listed) == [
            f"RPC0: {first.address}",
            f"RPC1: {second.address}",
        ]
        for flags, said in (
            (("-ts", "1,1,1"), "has 3 shares for 2 devices (RPC0, RPC1)"),
            (("-sm", "none", "-mg", "2"), "--main-gpu 2: there are 2 devices"),
            (("-fa", "off"), "-fa off cannot be with --rpc"),
            (("-dev", "RPC7"), "there is no device RPC7; --list-devices shows RPC0, RPC1"),
        ):
            _, err = ended(*asked(model, "--rpc", servers, *flags), code=2)
            assert said in err
            assert len(err.splitlines()) == 1
    _, err = ended(*asked(model, "--rpc", servers), code=2)
    assert err.startswith(f"error: no RPC server at {first.address}")


def write_questions(folder: Path) -> Path:
    lines = [
        {"id": number, "question": f"What is {number}?", "document": TEXT + str(number % 5)}
        for number in range(40)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[tuple[int, str]]:
    return [(line["id"], line["answer"]) for line in map(json.loads, path.open())]


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


@pytest.mark.devices
def test_a_server_that_is_killed_takes_no_answer_with_it(model: Path, tmp_path: Path) -> None:
    """Forty questions: the file is the undisturbed run's, but for the time that answers took."""
    needed()
    questions, out = write_questions(tmp_path), tmp_path / "answers.jsonl"
    flags = [
        *("-m", str(model), "-i", str(questions), "-n", "6", "--block-size", "64", "-fa", "on"),
        *("-ctk", "f32", "-ctv", "f32", "-t", "1", "--recall", "off"),
    ]
    with Server() as calm:
        ended("batch", *flags, "-o", str(tmp_path / "alone.jsonl"), "--rpc", calm.address)
    with Server() as first, Server() as second:
        process = subprocess.Popen(
            command(
                *("batch", *flags, "-o", str(out)),
                *("--rpc", f"{first.address},{second.address}"),
            ),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=rpc_environment(),
        )
        until(lambda: out.exists() and out.read_text().count("\n") >= 12, process)
        second.kill()
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
    assert f"warning: the RPC server at {second.address} went away; going on with" in err
    assert "ggml" not in err
    assert answers(out) == answers(tmp_path / "alone.jsonl")
    assert len(answers(out)) == 40


@pytest.mark.devices
def test_a_server_that_is_killed_does_not_end_serve(tmp_path: Path) -> None:
    """In the middle of an answer: who asks again, at the same address, is told the same."""
    needed()
    tiny = make(tmp_path, spec=TinySpec(ctx_train=2048, head_dim=64, layers=4)).path
    flags = ("--block-size", "64", "-fa", "on", "-ctk", "f32", "-ctv", "f32")
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{TEXT}\n\nWhy?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    with Server() as first, Server() as second:
        servers = f"{first.address},{second.address}"
        # nothing on disk: what starts again reads the document as the first one did
        own = ("--port", str(free_port()), "--cache-limit", "0")
        with Served(tiny, *flags, *own, "--rpc", servers) as served:
            status, told = call(f"{served.url}/v1/chat/completions", body)
            assert status == 200, told
            with socket.create_connection(served.address) as asking:
                endless = {"stream": True, "max_tokens": 1500, "logit_bias": {"300": 100}}
                sent = json.dumps({**body, **endless}).encode()
                asking.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (f"127.0.0.1:{served.address[1]}".encode(), len(sent), sent)
                )
                asking.settimeout(SECONDS)
                seen = b""
                while seen.count(b"data:") < 3:
                    more = asking.recv(4096)
                    assert more, seen
                    seen += more
                second.kill()
                while asking.recv(4096):  # ends: nothing is waited for that never comes
                    pass
            status, again = asked_until_there(served, body)
            assert status == 200, again
            assert again["choices"] == told["choices"]
            said = f"warning: the RPC server at {second.address} went away; going on with"
            assert f"{said} {first.address}\n" in served.said
            assert "ggml" not in served.said
            assert served.process.poll() is None
            served.end()


def asked_until_there(served: Served, body: dict[str, Any]) -> tuple[int, Any]:
    """A client that tries again while nobody listens."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return call(f"{served.url}/v1/chat/completions", body)
        except OSError:
            assert served.process.poll() is None, served.said
            assert time.monotonic() < end, "nobody listens any more"
            time.sleep(0.05)


@pytest.mark.devices
def test_a_signal_ends_parent_and_child(model: Path, tmp_path: Path) -> None:
    needed()
    questions, out = write_questions(tmp_path), tmp_path / "answers.jsonl"
    with Server() as server:
        process = subprocess.Popen(
            command(
                *("batch", "-m", str(model), "-i", str(questions), "-o", str(out)),
                *("-n", "200", "--block-size", "64", "--rpc", server.address),
            ),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=rpc_environment(),
        )
        until(lambda: out.exists() and out.read_text().count("\n") >= 1, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)  # its end of the pipe is the child's, too
        assert process.returncode == 143
        assert "the same command goes on" in err
        rpc.check(server.address)  # it waits for the next client


@pytest.mark.devices
def test_an_open_address_is_warned_of() -> None:
    needed()
    process = subprocess.Popen(
        command("rpc-server", "-H", "0.0.0.0", "-p", str(free_port())),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=rpc_environment(),
    )
    assert process.stderr
    with process.stderr as said:
        line = said.readline()
        process.kill()
        process.wait()
    assert line.startswith("warning: whoever reaches 0.0.0.0:")


@pytest.mark.devices
def test_a_port_that_is_taken_is_refused() -> None:
    needed()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _, err = ended("rpc-server", "-p", str(port), code=2)
    assert f"cannot listen at 127.0.0.1:{port}" in err
