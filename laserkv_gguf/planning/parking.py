"""Where parked rows go: into memory that is free, onto disk, or nowhere.

Rows in memory are a convenience, so they leave the machine usable: all of them together take at
most a quarter of the memory that would be free without them. Beyond that they go to disk, at most
half of what is free there; beyond that nothing is parked.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from laserkv_gguf import machine

MEMORY, DISK = 4, 2  # one part in so many of what is free


@dataclass(frozen=True)
class Room:
    """What there is for more parked rows, in bytes."""

    memory: int
    disk: int

    def place(self, size: int) -> str:
        """Where rows of so many bytes go: "ram", "disk" or "off"."""
        if size <= self.memory:
            return "ram"
        return "disk" if size <= self.disk else "off"


def folder() -> Path:
    """Where files of parked rows lie that nobody has named."""
    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "recall"


def room(
    limit: int | None = None, *, held: int = 0, coming: int = 0, file: str | None = None
) -> Room:
    """What there is now.

    Args:
        limit: most bytes of rows in memory (--recall-limit); None for a quarter of what is free.
        held: bytes of rows that this process has parked in memory already.
        coming: bytes that it is about to take for other things.
        file: --recall-file; None for the folder of our own.
    """
    free = max(0, (machine.free_ram() or 0) - coming)
    most = (free + held) // MEMORY if limit is None else min(limit, free + held)
    return Room(max(0, most - held), _free_disk(folder() if file is None else Path(file)) // DISK)


def _free_disk(path: Path) -> int:
    """Bytes that are free where a path is or will be; 0 where that cannot be told."""
    path = path.absolute()
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free
    except OSError:
        return 0
