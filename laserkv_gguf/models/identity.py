"""Tells one model file from another: for saved files, batches, measurements and evaluations."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_SAMPLES, _SAMPLE = 64, 1 << 16  # of 5 GB, reading all takes seconds


@dataclass(frozen=True)
class Identity:
    """What a model file is known by, wherever it lies.

    Attributes:
        file: its name.
        bytes: its size.
        samples: a digest of samples of it, in hexadecimal digits.
    """

    file: str
    bytes: int
    samples: str

    def __str__(self) -> str:
        return f"{self.file} {self.bytes} {self.samples[:16]}"


def identity(path: Path) -> Identity:
    """A file's size, and a digest of samples of its beginning, its end, and what is between.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return Identity(path.name, size, digest.hexdigest())
