"""Documents and conversations that were asked before: in the cache, aside, or on disk.

A request is matched by the tokens it begins with, as they were sent, never by what was kept of
them. Whoever shares nothing with a document gets cells of their own.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.ageing import Compressing
from laserkv_gguf.conversation.beginning import begin_as, whole_blocks
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.ledger import DOCUMENT, TURN
from laserkv_gguf.errors import Cancelled, Closed, UserError
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.server.disk import DiskCache, Kept
from laserkv_gguf.server.prompt import Request

log = logging.getLogger(__name__)

_SMALL = 4  # what has fewer tokens than a block by that is not written to disk
PATIENCE = 0.25  # seconds between looks at whether somebody who waits is still wanted
NEW, CACHE, MEMORY, DISK = "new", "cache", "memory", "disk"


@dataclass(eq=False)
class Entry:
    """A conversation that may be asked again.

    Attributes:
        read: (n,) int32, all up to the end of its last document.
        salt: what a request must come with to find it.
        conversation: None until it is made.
        said: (m,) int32 of the turns since, as of the last time it was asked.
        inner: tokens of turns among those that were read: between two documents.
        lock: held by the request that uses it.
        owner: whose it is, if keys are asked for.
        dead: whether it cannot be used any more.
        on_disk: whether it has been written.
    """

    read: Tokens
    salt: str
    conversation: Conversation | None = None
    said: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = 0.0
    owner: str = ""
    inner: int = 0
    dead: bool = False
    on_disk: bool = False
    id: str = field(default_factory=lambda: f"doc-{secrets.token_hex(12)}")

    def common(self, tokens: Tokens) -> int:
        """How many tokens of a request stand here; 0 where not all that was read is among them."""
        count = len(self.read)
        if count >= len(tokens) or not np.array_equal(tokens[:count], self.read):
            return 0
        most = min(len(self.said), len(tokens) - count)
        return count + _shared(self.said[:most], tokens[count:])

    def has_read(self, tokens: Tokens) -> None:
        """From now on these were read, up to the end of its last document."""
        assert self.conversation is not None
        ledger = self.conversation.ledger
        last = max(ledger.numbers(DOCUMENT), default=-1)
        turns = [ledger.segments[n].tokens for n in ledger.numbers(TURN) if n < last]
        self.read, self.inner = tokens.copy(), sum(map(len, turns))
        self.said = self.conversation.said[self.inner :]
        self.on_disk = False


@dataclass(frozen=True)
class Place:
    """Where a request is answered.

    Attributes:
        there: how many of its tokens need not be decoded again.
        found: "new", "cache", "memory" or "disk".
    """

    entry: Entry
    there: int
    found: str


class Store:
    """All that is known of earlier requests.

    Args:
        most: conversations in the cache and aside.
        memory: bytes that parked rows of all of them may take in memory.
        disk: where documents of more than a block go as well; None for nowhere.
    """

    def __init__(
        self, engine: LaserKV, *, most: int, memory: int, disk: DiskCache | None = None
    ) -> None:
        self.engine, self.most, self.memory, self.disk = engine, most, memory, disk
        self._entries: list[Entry] = []
        self._mutex = threading.Lock()

    @property
    def block(self) -> int:
        return self.engine.settings.block_size

    def entries(self) -> list[Entry]:
        with self._mutex:
            return list(self._entries)

    def where(self, entry: Entry) -> str:
        if entry.conversation is None:
            return NEW
        return self.engine.residents.where(entry.conversation)

    # a request comes

    @contextmanager
    def place(
        self,
        request: Request,
        salt: str,
        owner: str,
        wanted: Callable[[], bool],
        *,
        anew: bool = False,
        apart: bool = False,
    ) -> Iterator[Place]:
        """Finds what a request goes on from, for itself alone; or a new, empty place.

        Args:
            salt: only what came with the same one is looked at.
            owner: whose request it is.
            wanted: whether somebody still waits for the answer.
            anew: look for nothing, and leave nothing.
            apart: look for nothing.

        Raises:
            Cancelled: nobody waits any more.
        """
        entry, found = self._take(request, salt, wanted, anew or apart)
        entry.owner = owner
        try:
            there = 0
            if entry.conversation is not None:
                # the question is asked as a whole, so that its tokens are recalled for it
                there = min(entry.common(request.tokens), max(request.asked, len(entry.read)))
            yield Place(entry, there, found)
        except BaseException:
            conversation = entry.conversation
            if conversation is None or conversation.reading is None or self._lost(conversation):
                entry.dead = True
            raise
        finally:
            conversation = entry.conversation
            if anew or conversation is None or entry.dead:
                self._remove(entry)
            else:
                entry.said = conversation.said[entry.inner :]
                entry.used = time.monotonic()
            entry.lock.release()

    def _lost(self, conversation: Conversation) -> bool:
        return not self.engine.residents.can_come_back(conversation)

    def _take(
        self, request: Request, salt: str, wanted: Callable[[], bool], anew: bool
    ) -> tuple[Entry, str]:
        while True:
            if not wanted():
                raise Cancelled("cancelled")
            with self._mutex:
                entry = None if anew else self._best(request, salt)
                if entry is None:
                    made = Entry(request.before.copy(), salt)
                    made.lock.acquire()
                    self._entries.append(made)
            if entry is None:
                try:
                    found = NEW if anew else self._begun(made, request, wanted)
                    self.trim()
                except BaseException:
                    self._remove(made)
                    made.lock.release()
                    raise
                return made, found
            if not entry.lock.acquire(timeout=PATIENCE):
                continue
            if not entry.dead:
                with self._mutex:
                    still = self._best(request, salt) is entry
                if still and entry.conversation is not None:
                    if not self._lost(entry.conversation):
                        return entry, self.where(entry)
                    entry.dead = True
            if entry.dead:
                self._remove(entry)
            entry.lock.release()

    def _best(self, request: Request, salt: str) -> Entry | None:
        """What shares most with a request, where going on from it is worth what it loses.

        What is behind it by more than a block is read as one more document.
        """
        best, most = None, 0
        for entry in self._entries:
            if entry.salt != salt or entry.dead:
                continue
            common = entry.common(request.tokens)
            document = len(entry.read) > self.block
            if common <= most:
                continue
            lost = len(entry.read) + len(entry.said) - common
            # a short conversation that has outgrown a block is read anew, as a document; and no
            # small request takes the turns of a long conversation
            if not document and (len(request) > self.block or lost > common):
                continue
            best, most = entry, common
        return best

    def _from_disk(self, entry: Entry, request: Request, kept: Kept | None) -> str:
        if self.disk is None or kept is None:
            return NEW
        if len(request) > self.block >= kept.tokens:  # it is read as a document
            return NEW
        conversation = self.disk.load(kept)
        if conversation is None:
            return NEW
        conversation.ageing = Compressing()
        entry.conversation = conversation
        entry.has_read(request.tokens[: kept.tokens])
        entry.on_disk = True
        return DISK

    def _begun(self, entry: Entry, request: Request, wanted: Callable[[], bool]) -> str:
        """Has a new place begin with what was read before; returns where that was found.

        Raises:
            Cancelled: nobody waits any more.
        """
        whole, kept, on_disk = None, None, 0
        if self.disk is not None:
            whole = self.disk.find(request.tokens, entry.salt)
            kept, on_disk = self.disk.begins_as(request.before, entry.salt)
        least = max(whole.tokens if whole else 0, self.block)
        source, shared = self._begins_as(entry, request)
        if self.disk is not None and kept is not None and on_disk > max(least, shared):
            if (read := self.disk.load(kept)) is not None:
                try:
                    if self._copied(entry, read, request, on_disk, least):
                        return DISK
                finally:
                    self._let_go(read)
        elif source is not None and shared > least:
            while not source.lock.acquire(timeout=PATIENCE):
                if not wanted():
                    raise Cancelled("cancelled")
            try:
                read = None if source.dead else source.conversation
                if read is not None and self._copied(entry, read, request, shared, least):
                    return MEMORY
            finally:
                source.lock.release()
        return self._from_disk(entry, request, whole)

    def _copied(
        self, entry: Entry, source: Conversation, request: Request, shared: int, least: int
    ) -> bool:
        """Has a place begin as a document that was read did, if that is more than so much."""
        tokens = whole_blocks(source, shared)
        if tokens <= least:
            return False
        system = "system" if request.system else None
        made = Conversation(self.engine, system=system, ageing=Compressing())
        try:
            begin_as(made, source, tokens, min(request.system or 1, tokens))
        except Closed:
            raise
        except UserError as error:
            log.info("a document is read from its beginning: %s", error)
            return False
        entry.conversation = made
        entry.has_read(request.tokens[:tokens])
        entry.on_disk = True  # what it was copied from is
        return True

    def _let_go(self, conversation: Conversation) -> None:
        with self.engine.access.inside(conversation):
            self.engine.leave(conversation)
            conversation.lose_cells()

    def _begins_as(self, entry: Entry, request: Request) -> tuple[Entry | None, int]:
        """The document that a request begins as, and for how many tokens."""
        best, most = None, 0
        for one in self.entries():
            if one.salt == entry.salt and not one.dead and one.conversation is not None:
                same = _shared(one.read, request.before)
                if same > most:
                    best, most = one, same
        return best, most

    # what is kept

    def keep(self, entry: Entry) -> int:
        """Writes a document to disk, once; returns its bytes.

        What is much shorter than a block is not written: it is read again in a moment.
        """
        if self.disk is None or entry.conversation is None:
            return 0
        if entry.on_disk:
            self.disk.used(entry.read, entry.salt)
            return 0
        # of so few tokens reading takes no longer
        if len(entry.read) < self.block / _SMALL:
            return 0
        reading = entry.conversation.reading
        if reading is None or (
            not entry.conversation.parked_tokens and len(reading.kept) < reading.budget.kept
        ):
            return 0  # it was thinned
        size = self.disk.save(entry.conversation, entry.read, entry.salt)
        entry.on_disk = size > 0
        return size

    @property
    def parked_bytes(self) -> int:
        """What rows of evicted tokens take, of all documents."""
        known = [one.conversation for one in self.entries()]
        return sum(one.parked_bytes for one in known if one is not None)

    def trim(self) -> None:
        """Lets those go that were asked longest ago, where there are too many."""
        while True:
            entries = self.entries()
            if len(entries) <= self.most and self.parked_bytes <= self.memory:
                return
            for entry in sorted(entries, key=lambda one: one.used):
                if entry.conversation is not None and entry.lock.acquire(blocking=False):
                    try:
                        self._forget(entry)
                    finally:
                        entry.lock.release()
                    break
            else:
                return

    def _forget(self, entry: Entry) -> None:
        entry.dead = True
        conversation = entry.conversation
        if conversation is not None:
            self._let_go(conversation)
        self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        entry.dead = True
        with self._mutex:
            if entry in self._entries:
                self._entries.remove(entry)


def _shared(one: Tokens, other: Tokens) -> int:
    """How many first tokens two have in common."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def salt_of(owner: str, salt: str) -> str:
    """What keeps one client's documents from another's."""
    return hashlib.sha256(f"{owner}\0{salt}".encode("utf-8", "replace")).hexdigest()[:16]
