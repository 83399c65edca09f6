"""Documents that clients send ahead and name later by an id."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files import texts
from laserkv_gguf.server.errors import ApiError, refused
from laserkv_gguf.shown import one_line

log = logging.getLogger(__name__)

_ID = re.compile(r"file-[0-9a-f]{32}")
_MOST = 4096  # files of all clients together
_NAME = 200  # characters


class Uploads:
    """Uploaded documents' texts, by ids that nobody can guess; each is its owner's alone.

    Args:
        folder: where they are kept, one file each; None for memory alone.
        limit: bytes of all texts together.

    Raises:
        LaserKVError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._held: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise LaserKVError(f"cannot keep files in {folder}: {error.strerror}") from error
            for path in folder.iterdir():
                self._load(path)

    def _load(self, path: Path) -> None:
        if not path.name.endswith(".json") or not _ID.fullmatch(path.stem):
            return
        try:
            found = json.loads(path.read_bytes())
            texts_ = [found[name] for name in ("owner", "filename", "purpose", "text")]
            numbers = [found[name] for name in ("bytes", "created_at")]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            log.warning("%s is damaged and left out", path.name)
            return
        if all(isinstance(one, str) for one in texts_) and all(
            isinstance(one, int) for one in numbers
        ):
            self._held[path.stem] = found

    def add(self, owner: str, name: str, purpose: str, data: bytes) -> dict[str, Any]:
        """Takes a document; returns what is said of it.

        Raises:
            ApiError: it cannot be read, or there is no room.
        """
        text = text_of(name, data)
        file = f"file-{secrets.token_hex(16)}"
        kept = {
            "owner": owner,
            "filename": _plain(name),
            "purpose": purpose,
            "text": text,
            "bytes": len(data),
            "created_at": int(time.time()),
        }
        with self._lock:
            size = sum(len(one["text"]) for one in self._held.values()) + len(text)
            if size > self.limit or len(self._held) >= _MOST:
                raise ApiError(
                    413,
                    "there is no room for another file; delete some, or start with --cache-limit",
                    code="no_room",
                )
            if self.folder is not None:
                self._write(file, kept)
            self._held[file] = kept
        return _about(file, kept)

    def _write(self, file: str, kept: dict[str, Any]) -> None:
        assert self.folder is not None
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(json.dumps(kept).encode())
                out.flush()
                os.fsync(out.fileno())
            Path(name).replace(self.folder / f"{file}.json")
        except BaseException as error:
            with suppress(OSError):
                Path(name).unlink()
            if isinstance(error, OSError):
                raise LaserKVError(f"cannot keep the file: {error.strerror}") from error
            raise

    def listed(self, owner: str) -> list[dict[str, Any]]:
        with self._lock:
            return [_about(f, kept) for f, kept in self._held.items() if kept["owner"] == owner]

    def about(self, owner: str, file: str) -> dict[str, Any]:
        return _about(file, self._found(owner, file))

    def text(self, owner: str, file: str) -> str:
        return str(self._found(owner, file)["text"])

    def delete(self, owner: str, file: str) -> dict[str, Any]:
        with self._lock:
            self._found(owner, file)
            del self._held[file]
            if self.folder is not None:
                with suppress(OSError):
                    (self.folder / f"{file}.json").unlink()
        return {"id": file, "object": "file", "deleted": True}

    def _found(self, owner: str, file: str) -> dict[str, Any]:
        kept = self._held.get(file)
        if kept is None or kept["owner"] != owner:  # another's is as if there were none
            raise ApiError(404, f"there is no file {file[:64]}", code="not_found", param="file_id")
        return kept


def _about(file: str, kept: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": file,
        "object": "file",
        "bytes": kept["bytes"],
        "created_at": kept["created_at"],
        "filename": kept["filename"],
        "purpose": kept["purpose"],
        "status": "processed",
    }


def _plain(name: str) -> str:
    """A name that says nothing of folders."""
    return one_line(name.replace("\\", "/").rsplit("/", 1)[-1])[:_NAME] or "document"


def text_of(name: str, data: bytes) -> str:
    """The text of a document; what its bytes begin with decides what it is.

    Raises:
        ApiError: it cannot be read.
    """
    try:
        if len(data) > texts.limit() and not data.startswith(texts.PDF):
            raise UserError(f"{_plain(name)} has more than the {texts.limit()} bytes that are read")
        return texts.of_bytes(_plain(name), data)
    except UserError as error:
        raise refused("file", str(error), "invalid_file") from None


def decoded(given: str) -> bytes:
    """The bytes of `file_data`: base64, as it is or in a data URL.

    Raises:
        ApiError: they are not.
    """
    head, comma, rest = given.partition(",")
    if head.startswith("data:") and comma:
        if not head.endswith(";base64"):
            raise refused("file_data", "a data URL has to be base64")
        given = rest
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        raise refused("file_data", "file_data is not base64") from None
