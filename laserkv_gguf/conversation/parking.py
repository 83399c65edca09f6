"""Parking the blocks of a reading, which may have to do without in the middle."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from laserkv_gguf.budget import Block
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.recall.recaller import Recaller

log = logging.getLogger(__name__)


@dataclass
class Parking:
    """What `Reader.read` hands every block to.

    Attributes:
        recaller: parks; None where nothing is parked, or not any more.
        reader: that decodes the blocks.
        may_end: whether reading goes on where a block cannot be parked (a full disk).
    """

    recaller: Recaller | None
    reader: Reader | None = None
    may_end: bool = False

    def __call__(self, block: Block, position: int) -> None:
        """Parks a block that was just decoded; see `Recaller.park`.

        Raises:
            LaserKVError: the disk is full, and reading must not go on without.
        """
        if self.recaller is None:
            return
        try:
            self.recaller.park(block, position, self.reader)
        except (Cancelled, Closed):
            raise
        except (LaserKVError, MemoryError) as error:
            if not self.may_end:
                raise
            self.close()
            log.warning(
                "recall is off from here on (%s): what reading evicts stays away from every "
                "question; /read QUESTION reads with one in mind",
                str(error) or "the memory is full",
            )

    def close(self) -> None:
        """Gives back what was parked."""
        if self.recaller is not None:
            self.recaller.close()
            self.recaller = None
