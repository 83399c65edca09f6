"""Files that hold a cache: arrays and facts about them, in safetensors, under one digest.

The facts say what the file was made with: it is refused where its digest, the model, the build or
the cache's types are not the same. Nothing in such a file is ever executed. It is written beside
its name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import __version__
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import library
from laserkv_gguf.recall.store import human

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.llama.model import Model

DOCUMENT, CONVERSATION = KINDS = ("document", "conversation")
_FORMAT = "laserkv-gguf {} 2"
_NO_DIGEST = "0" * 64
_TYPES = {"int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8", "uint64": "U64"} | {
    "float16": "F16",
    "float32": "F32",
}
_CHUNK = 1 << 24
_SAMPLES, _SAMPLE = 64, 1 << 16  # of a model's file, to tell it from others


@dataclass(frozen=True)
class Tensor:
    """An array to be written, as the parts it comes in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterator[NDArray[Any]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def whole(name: str, array: NDArray[Any]) -> Tensor:
    """An array in one part."""
    return Tensor(name, str(array.dtype), array.shape, iter((array,)))


# ---- writing -----------------------------------------------------------------------------------


def check_target(path: str | Path) -> Path:
    """A path that a file can be written to, before hours are spent on what goes into it.

    Raises:
        UserError: no such folder, or one that cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot save to {path}: it is a folder; give a file in it")
    if not path.parent.is_dir():
        raise UserError(f"cannot save to {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot save to {path}: {path.parent} cannot be written to")
    return path


def write(path: str | Path, kind: str, tensors: Iterable[Tensor], about: Mapping[str, Any]) -> int:
    """Writes a file beside its name, then renames it: an old one stays until the new one is whole.

    Args:
        kind: one of `KINDS`.
        about: anything JSON can say.

    Returns:
        Bytes written.

    Raises:
        UserError: the place cannot be written to.
        LaserKVError: the disk is full; nothing is left behind.
    """
    path, tensors = check_target(path), list(tensors)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            _write(file, _FORMAT.format(kind), tensors, about)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        Path(name).replace(path)
    except BaseException as error:
        with suppress(OSError):
            Path(name).unlink()
        if isinstance(error, OSError):
            needed = human(sum(tensor.bytes for tensor in tensors))
            raise LaserKVError(
                f"cannot save {needed} to {path}: {error.strerror}; nothing was saved"
            ) from error
        raise
    return size


def _write(file: BinaryIO, form: str, tensors: list[Tensor], about: Mapping[str, Any]) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"format": form, "digest": _NO_DIGEST, "about": json.dumps(about)}
    }
    end = 0
    # the wide ones first: safetensors wants no gaps, and readers want aligned numbers
    tensors.sort(key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        kind = _TYPES[tensor.dtype]
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    file.write(head)
    for tensor in tensors:
        for part in tensor.parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            for first in range(0, len(data), _CHUNK):
                piece = data[first : first + _CHUNK].tobytes()
                digest.update(piece)
                file.write(piece)
    at = head.index(_NO_DIGEST.encode())
    file.seek(at)
    file.write(digest.hexdigest().encode())
    file.seek(0, os.SEEK_END)


# ---- reading -----------------------------------------------------------------------------------


def kind(path: str | Path) -> str:
    """Which of `KINDS` a file is, as its beginning says."""
    return _header(Path(path))[2]


def settings(path: str | Path) -> dict[str, Any]:
    """The settings and context options a file was made with, by the names of their classes."""
    path = Path(path)
    try:  # its digest is looked at when it is loaded
        about = json.loads(_header(path)[1]["about"])
        found: dict[str, Any] = about["settings"] | about["context"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    return found


def checked(path: str | Path, kind: str, engine: LaserKV) -> dict[str, Any]:
    """What a file says of itself, after its digest has been found right, and what made it the same.

    Raises:
        UserError: no such file, one of another kind, damaged, or of another model, build or cache.
    """
    path = Path(path)
    head, metadata, found = _header(path)
    if found != kind:
        raise UserError(f"{path} holds a {found}, not a {kind}; ask --load {path} takes both")
    digest = hashlib.sha256(head.replace(metadata["digest"].encode(), _NO_DIGEST.encode(), 1))
    with path.open("rb") as file:
        file.seek(len(head))
        while piece := file.read(_CHUNK):
            digest.update(piece)
    if digest.hexdigest() != metadata["digest"]:
        raise _damaged(path)
    about: dict[str, Any] = json.loads(metadata["about"])
    _compare(path, about, engine)
    return about


def _header(path: Path) -> tuple[bytes, dict[str, str], str]:
    """A file's first bytes up to the data, its metadata, and its kind.

    Raises:
        UserError: nothing that `write` wrote.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            head = file.read(8 + length) if 8 + length <= size else b""
        metadata = json.loads(head[8:])["__metadata__"]
        kind = {_FORMAT.format(kind): kind for kind in KINDS}[metadata["format"]]
        if len(metadata["digest"]) != len(_NO_DIGEST):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"no saved file at {path}; ask --save and chat's /save write one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a saved file") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(
            f"{path} is not a file that --save or /save wrote with this version, or its beginning "
            "is damaged; read the document again"
        ) from None
    return head, metadata, kind


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it was cut off or changed since it was saved; read the document again"
    )


# ---- identity ----------------------------------------------------------------------------------


def made_with(engine: LaserKV) -> dict[str, Any]:
    """What a file must agree with to be loaded, and the settings it was made with."""
    options = engine.options
    return {
        "version": __version__,
        "model": model_identity(engine.model),
        "build": library.version(),
        "cache": options.said(engine.model.gpu_layers != 0),
        "settings": asdict(engine.settings) | {"recall_file": None},
        "context": {name: getattr(options, name) for name in ("type_k", "type_v", "flash_attn")},
    }


def model_identity(model: Model) -> dict[str, Any]:
    """Name, size and a digest of samples of a model's file: of 5 GB, reading all takes seconds."""
    digest = hashlib.sha256()
    with model.path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return {"name": model.name, "bytes": size, "samples": digest.hexdigest()}


def _compare(path: Path, about: dict[str, Any], engine: LaserKV) -> None:
    here, saved = made_with(engine), about["model"]
    model = here["model"]
    if (model["samples"], model["bytes"]) != (saved["samples"], saved["bytes"]):
        raise UserError(
            f"{path} was saved with another model: {saved['name']} of {saved['bytes']} bytes, not "
            f"{model['name']} of {model['bytes']}; give that one with --model"
        )
    if about["build"] != here["build"]:
        raise UserError(
            f"{path} was saved with {about['build']}, this is {here['build']}, whose rows may "
            "differ; read the document again"
        )
    if about["cache"] != here["cache"]:
        raise UserError(
            f"{path} was saved with {about['cache']}, this is {here['cache']}; load it with the "
            "types it was saved with"
        )
