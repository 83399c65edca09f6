"""Read documents on disk, found again by the tokens they begin with.

A file's name says all that is needed to find it: whose it is, how many tokens were read, and their
digest. So there is no index that could disagree with the files, and nothing to mend after a kill.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.saving import document
from laserkv_gguf.saving.file import tokens_of
from laserkv_gguf.saving.identity import made_with

log = logging.getLogger(__name__)

Marks = list[bytes]

_NAME = re.compile(r"([0-9a-f]{16})-(\d{1,12})-([0-9a-f]{32})\.laserkv")


@dataclass(frozen=True)
class Kept:
    """A file: whose document it holds, of how many tokens, and how large it is."""

    path: Path
    salt: str
    tokens: int
    digest: str


class DiskCache:
    """Documents in a folder, those used longest ago beyond a limit deleted.

    Args:
        folder: of all models; each has one of its own in it.
        limit: bytes of this model's.

    Raises:
        LaserKVError: the folder cannot be made.
    """

    def __init__(self, engine: LaserKV, folder: Path, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self._known: dict[str, Marks] = {}  # of files, by name, what they begin as
        made = {name: value for name, value in made_with(engine).items() if name != "version"}
        about = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode())
        self.folder = folder / "documents" / about.hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LaserKVError(f"cannot keep documents in {folder}: {error.strerror}") from error

    def files(self) -> Iterator[Kept]:
        for path in self.folder.iterdir():
            if found := _NAME.fullmatch(path.name):
                yield Kept(path, found[1], int(found[2]), found[3])

    @property
    def bytes(self) -> int:
        return sum(_size(one.path) for one in self.files())

    def find(self, tokens: Tokens, salt: str) -> Kept | None:
        """The longest document that a request begins with; something must be left to ask."""
        mine = [one for one in self.files() if one.salt == salt and one.tokens < len(tokens)]
        digest, done, found = hashlib.sha256(), 0, None
        for one in sorted(mine, key=lambda one: one.tokens):
            digest.update(tokens[done : one.tokens].tobytes())
            done = one.tokens
            if digest.hexdigest()[:32] == one.digest:
                found = one
        return found

    def begins_as(self, tokens: Tokens, salt: str) -> tuple[Kept | None, int]:
        """The document that a request begins as, and for how many tokens: whole blocks."""
        wanted = _marks(tokens, self.engine.settings.block_size)
        best, most = None, 0
        for one in self.files():
            if one.salt != salt or not wanted:
                continue
            if one.path.name not in self._known:
                self._known[one.path.name] = self._marks_of(one)
            same = 0
            for mine, its in zip(wanted, self._known[one.path.name], strict=False):
                if mine != its:
                    break
                same += 1
            if same > most:
                best, most = one, same
        return best, most * self.engine.settings.block_size

    def _marks_of(self, kept: Kept) -> Marks:
        try:
            tokens = tokens_of(kept.path)[: kept.tokens]
        except LaserKVError:
            return []  # loading it will say so
        same = _digest(tokens) == kept.digest
        return _marks(tokens, self.engine.settings.block_size) if same else []

    def load(self, kept: Kept) -> Conversation | None:
        """A document as it was read; None where its file is damaged, which then goes."""
        try:
            conversation = self.engine.load(kept.path)
        except (Cancelled, Closed):
            raise
        except LaserKVError as error:
            log.warning("%s is left out: %s", kept.path.name, error)
            with suppress(OSError):
                kept.path.unlink()
            return None
        with suppress(OSError):
            os.utime(kept.path)
        return conversation

    def save(self, conversation: Conversation, tokens: Tokens, salt: str) -> int:
        """Writes what was read; returns its bytes, 0 where it cannot be kept.

        Of several documents that were read after one another the turns between them, too.
        """
        path = self._path(tokens, salt)
        try:
            if len(conversation.documents) > 1:
                size = self.engine.save(conversation, path)
            else:
                size = document.save(conversation, path)
        except (Cancelled, Closed):
            raise
        except LaserKVError as error:
            log.warning("a document of %d tokens stays in memory alone: %s", len(tokens), error)
            return 0
        self._trim()
        return size if path.exists() else 0

    def used(self, tokens: Tokens, salt: str) -> None:
        """A document was asked something, also where it still was in memory."""
        with suppress(OSError):
            os.utime(self._path(tokens, salt))

    def _path(self, tokens: Tokens, salt: str) -> Path:
        return self.folder / f"{salt}-{len(tokens)}-{_digest(tokens)}.laserkv"

    def _trim(self) -> None:
        files = []
        for one in self.files():
            with suppress(OSError):
                about = one.path.stat()
                files.append((about.st_mtime_ns, about.st_size, one.path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= self.limit:
                return
            with suppress(OSError):
                path.unlink()
            self._known.pop(path.name, None)
            held -= size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:32]


def _marks(tokens: Tokens, step: int) -> Marks:
    """Digests of the first tokens, of the first two times as many, …"""
    digest, found = hashlib.sha256(), []
    for end in range(step, len(tokens) + 1, step):
        digest.update(tokens[end - step : end].tobytes())
        found.append(digest.digest()[:16])
    return found
