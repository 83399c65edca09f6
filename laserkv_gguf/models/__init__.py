"""Which file `--model` means: a path, a name of models.txt, or the embedded SmolLM2."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from laserkv_gguf.errors import UserError

EMBEDDED = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Entry:
    """A line of models.txt; `size` (bytes) and `sha256` are None where nobody verified them."""

    name: str
    source: str
    file: str
    size: int | None
    sha256: str | None
    licence: str
    context: int

    @property
    def package(self) -> str | None:
        """The Python package that ships the file, if one does."""
        kind, _, name = self.source.partition(":")
        return name if kind == "package" else None


def entries() -> dict[str, Entry]:
    """The models of models.txt, by name."""
    listed = {}
    for line in _list_file().read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, source, file, size, sha256, licence, context = line.split()
            listed[name] = Entry(
                name,
                source,
                file,
                None if size == "-" else int(size),
                None if sha256 == "-" else sha256,
                licence,
                int(context),
            )
    return listed


def _list_file() -> Path:
    """models.txt: beside the package in a checkout, in it when installed."""
    package = Path(str(files("laserkv_gguf")))
    beside = package.parent / "models.txt"
    return beside if beside.exists() else package / "models.txt"


def find(model: str | None, *, begun: bool = False) -> Path:
    """The file of a model.

    Args:
        model: a path, a name of models.txt, or None for the embedded model.
        begun: whether a download that is not finished will do.

    Raises:
        UserError: there is none; the message says how to get it.
    """
    if model == "":
        raise UserError("--model is empty; give a GGUF file, or leave it out for the embedded one")
    # os.path.exists says no to names that no file can have; Path.exists raises
    if model is not None and (model.lower().endswith(".gguf") or os.path.exists(model)):  # noqa: PTH110
        return Path(model)
    entry = named(model or EMBEDDED)
    place = present(entry) or (unfinished(entry) if begun else None)
    if place:
        return place
    if entry.package:
        raise UserError(
            f"{'the embedded model' if model is None else entry.name} is not installed; "
            "install it with pip install 'laserkv-gguf[model]', or give --model FILE"
        )
    raise UserError(
        f"{entry.name} is not on this machine; download {entry.file} of {entry.source} "
        f"with python -m laserkv_gguf pull {entry.name}"
    )


def named(name: str) -> Entry:
    """The line of models.txt with that name.

    Raises:
        UserError: there is none; the near ones are named.
    """
    known = entries()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3) or list(known)
        raise UserError(
            f"no model at {name}, and models.txt knows no such name; "
            f"give the path of a GGUF file, or one of: {', '.join(near)}"
        )
    return known[name.lower()]


def present(entry: Entry) -> Path | None:
    """Where the file lies, if it is here."""
    return next((place for place in _places(entry) if place.is_file()), None)


def unfinished(entry: Entry) -> Path | None:
    """What there is of a download that is not finished, `pull`'s or the hub's own."""
    blobs = [cache / folder(entry) / "blobs" for cache in caches()]
    for pattern in (f"{entry.file}.part", f"{entry.sha256}*.incomplete"):
        for place in (path for blob in blobs for path in sorted(blob.glob(pattern))):
            if place.stat().st_size:
                return place
    return None


def caches() -> list[Path]:
    """Folders where llama.cpp and the hub keep models, ours first.

    As llama.cpp's common/common.cpp and hf-cache.cpp and huggingface_hub's constants.py say; newer
    llama.cpp keeps its files as the hub does.
    """
    environ, home = os.environ, Path.home()
    places = [hub_cache()]
    if environ.get("LLAMA_CACHE"):
        places.append(Path(environ["LLAMA_CACHE"]))
    elif sys.platform == "win32":
        places.append(Path(environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "llama.cpp")
    elif sys.platform == "darwin":
        places.append(home / "Library" / "Caches" / "llama.cpp")
    places.append(_xdg() / "llama.cpp")
    return list(dict.fromkeys(places))


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads, and `pull` with it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    return Path(os.environ.get("HF_HOME") or _xdg() / "huggingface").expanduser() / "hub"


def _xdg() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def folder(entry: Entry) -> str:
    """The name of a repository's folder in the hub's cache."""
    return f"models--{entry.source.replace('/', '--')}"


def _places(entry: Entry) -> Iterator[Path]:
    """Where a file may lie already: its package, llama.cpp's cache, the hub's cache."""
    if entry.package:
        found = importlib.util.find_spec(entry.package.replace("-", "_"))
        if found and found.origin:
            yield Path(found.origin).parent / entry.file
        return
    for cache in caches():
        yield cache / entry.file
        yield cache / f"{entry.source.replace('/', '_')}_{entry.file}"
        snapshots = cache / folder(entry) / "snapshots"
        if snapshots.is_dir():
            yield from sorted(snapshots.glob(f"*/{entry.file}"))
