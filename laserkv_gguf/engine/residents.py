"""Which conversations stand in the cache, and where the others are.

Several can stand in one context, each in a sequence of its own. One whose cells others want is put
aside: llama.cpp's own state of its sequence goes to host memory, beyond a limit of bytes to a file
without a name, and comes back bit for bit when it is asked next.
"""

from __future__ import annotations

import logging
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama.context import SEQUENCES
from laserkv_gguf.llama.sequence import MAIN

if TYPE_CHECKING:
    from laserkv_gguf.reading.reader import Reader

log = logging.getLogger(__name__)

State = NDArray[np.uint8]


class Resident(Protocol):
    """A conversation, as the engine sees it.

    Attributes:
        one_turn: whether it needs no cells for turns after the first.
    """

    one_turn: bool

    def take_out(self) -> State:
        """Its cells as llama.cpp saves them."""

    def put_back(self, saved: State, reader: Reader) -> None:
        """Goes on in a reader's sequence, which then holds what was taken out."""

    def lose_cells(self) -> None:
        """Others have its cells, and nothing is put aside."""

    @property
    def parked_tokens(self) -> int:
        """Tokens whose rows are parked."""


def sequence_count(residents: int) -> int:
    """Sequences that so many conversations take, with those that reading needs beside theirs."""
    return SEQUENCES + 2 * (residents - 1)


@dataclass(frozen=True)
class Place:
    """Where a conversation stands: the number of its sequence, and the cells set aside for it.

    `compact` says whether its positions are moved together, which decides who reads for it.
    """

    sequence: int
    cells: int
    compact: bool


class Aside:
    """States outside the cache: in memory up to a limit, the oldest beyond it in files.

    Args:
        limit: bytes in memory.
        folder: where files go; they have no names, so that a killed process leaves none.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self._states: OrderedDict[int, State | BinaryIO] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._states

    @property
    def bytes(self) -> int:
        """In memory."""
        held = (state.nbytes for state in self._states.values() if isinstance(state, np.ndarray))
        return sum(held)

    def on_disk(self, key: int) -> bool:
        return not isinstance(self._states[key], np.ndarray)

    def put(self, key: int, state: State) -> None:
        """Takes a state; what is too much for the memory goes to disk, the oldest first.

        Raises:
            LaserKVError: the disk is full; the state is not kept.
        """
        self._states[key] = state
        for old in [old for old in self._states if not self.on_disk(old)]:
            if self.bytes <= self.limit:
                return
            held = self._states[old]
            assert isinstance(held, np.ndarray)
            try:
                self._states[old] = self._written(held)
            except OSError as error:
                self.drop(key)
                raise LaserKVError(
                    f"cannot put a conversation aside in {self.folder}: {error.strerror}"
                ) from error

    def _written(self, state: State) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        try:
            file.write(state.data)
            file.flush()
        except BaseException:
            file.close()
            raise
        return file

    def get(self, key: int) -> State:
        """A state; it stays until it is dropped.

        Raises:
            LaserKVError: its file cannot be read.
        """
        state = self._states[key]
        if isinstance(state, np.ndarray):
            return state
        try:
            state.seek(0)
            return np.frombuffer(state.read(), np.uint8)
        except OSError as error:
            raise LaserKVError(
                f"cannot read a conversation from {self.folder}: {error.strerror}"
            ) from error

    def drop(self, key: int) -> None:
        state = self._states.pop(key, None)
        if state is not None and not isinstance(state, np.ndarray):
            state.close()

    def clear(self) -> None:
        for key in list(self._states):
            self.drop(key)


class Residents:
    """Conversations by where they are; the engine has to be held for every call.

    Args:
        most: how many may stand in the cache at a time.
        aside: takes those that must leave; None where they lose their cells.

    Attributes:
        inside: those in the cache with their places, the one asked last at the end.
    """

    def __init__(self, most: int, aside: Aside | None) -> None:
        self.most, self.aside = most, aside
        # sequences for answers of several calls, beside those of the conversations
        self._numbers = list(range(sequence_count(most), sequence_count(most) + most))
        self.inside: OrderedDict[Resident, Place] = OrderedDict()
        # of those aside: who it is, and the place it had
        self._outside: dict[int, tuple[ref[Resident], Place]] = {}

    # asked about one

    def holds(self, resident: Resident) -> bool:
        """Whether it stands in the cache."""
        return resident in self.inside

    def can_come_back(self, resident: Resident) -> bool:
        """Whether it stands in the cache, or aside."""
        return self.holds(resident) or self.is_aside(resident)

    def is_aside(self, resident: Resident) -> bool:
        known = self._outside.get(id(resident))
        return known is not None and known[0]() is resident

    def where(self, resident: Resident) -> str:
        """In words: "cache", "memory", "disk", or "lost"."""
        if self.holds(resident):
            return "cache"
        if not self.is_aside(resident) or self.aside is None:
            return "lost"
        return "disk" if self.aside.on_disk(id(resident)) else "memory"

    # coming and going

    def enter(self, resident: Resident, place: Place) -> None:
        """It stands in the cache from now on."""
        self.inside[resident] = place

    def touch(self, resident: Resident) -> None:
        """It was asked last."""
        self.inside.move_to_end(resident)

    def leave(self, resident: Resident) -> Place | None:
        """It has nothing in the cache any more, nor aside; returns the place it had there."""
        known = self._outside.pop(id(resident), None)
        if known is not None and self.aside is not None:
            self.aside.drop(id(resident))
        return self.inside.pop(resident, None)

    def displace(self, resident: Resident) -> Place:
        """Takes one out of the cache, to be put aside or to lose what it has."""
        place = self.inside[resident]
        saved = resident.take_out() if self.aside is not None else None
        del self.inside[resident]
        key, known = id(resident), ref(resident)
        if self.aside is None or saved is None:
            resident.lose_cells()
            return place
        self._forget_dead()
        try:
            self.aside.put(key, saved)
        except LaserKVError as error:
            log.warning("%s; that conversation has to be read again", error)
            resident.lose_cells()
            return place
        self._outside[key] = (known, place)
        return place

    def saved(self, resident: Resident) -> tuple[State, Place]:
        """What was put aside of one, and the place it had.

        Raises:
            UserError: it has lost its cells.
            LaserKVError: its file cannot be read.
        """
        if not self.is_aside(resident) or self.aside is None:
            raise UserError(
                "this conversation's cache is gone, because the engine was asked something else; "
                "read() starts it again"
            )
        return self.aside.get(id(resident)), self._outside[id(resident)][1]

    def _forget_dead(self) -> None:
        """Conversations that nobody knows any more are not kept aside."""
        for key, (known, _) in list(self._outside.items()):
            if known() is None:
                del self._outside[key]
                if self.aside is not None:
                    self.aside.drop(key)

    def free_sequence(self) -> int:
        """A number that no conversation has."""
        taken = {place.sequence for place in self.inside.values()}
        numbers = [
            int(MAIN),
            *range(SEQUENCES, sequence_count(self.most), 2),
        ]  # each with a scratch
        found: int = next(number for number in numbers if number not in taken)
        return found

    def take_numbers(self, most: int) -> list[int]:
        """Sequences for answers that share a conversation's cells, as far as there are free ones.

        One is left for whoever comes next, as long as somebody has some.
        """
        count = min(most, max(1, len(self._numbers) - 1) if self.most > 1 else most)
        taken, self._numbers = self._numbers[:count], self._numbers[count:]
        return taken

    def give_numbers(self, numbers: list[int]) -> None:
        self._numbers += numbers

    def all_leave(self) -> None:
        """Everybody loses what they have, in the cache and aside."""
        self._forget_dead()
        known = [resident() for resident, _ in self._outside.values()]
        for resident in [*self.inside, *known]:
            if resident is not None:
                resident.lose_cells()
        self.inside.clear()
        self._outside.clear()
        if self.aside is not None:
            self.aside.clear()
