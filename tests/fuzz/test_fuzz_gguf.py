"""GGUF headers: a sound file's parts changed one by one, then planned with, loaded and asked."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import strategies as st
from mutated_gguf import Server, damaged, parse, reads
from test_cli import SMALL
from tiny import make

from fuzz import budget


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_headers(arch: str, tmp_path: Path) -> None:
    """An answer or one line, whatever the header says."""
    raw = make(tmp_path, "sound.gguf", spec=SMALL, arch=arch).path.read_bytes()
    sound, path, counts = parse(raw), tmp_path / "damaged.gguf", Counter[str]()

    def gguf_headers(dice: Random) -> None:
        file, said = damaged(sound, dice)
        path.write_bytes(file)
        reads(path)
        found = server.ask(file)
        counts[found.how] += 1
        if not found.sound:  # at once: to make the case smaller takes minutes
            print(f"{said}: {found}", file=sys.stderr, flush=True)
        assert found.sound, (said, found)

    with Server(tmp_path) as server:
        budget.run(gguf_headers, st.randoms(use_true_random=False), 40, counts)


@pytest.mark.parametrize("whole", [True, False])
def test_any_bytes(whole: bool, tmp_path: Path) -> None:
    """Bytes over a sound header, or nothing but bytes behind the magic number."""
    raw = make(tmp_path, "sound.gguf", spec=SMALL).path.read_bytes()
    path, counts = tmp_path / "damaged.gguf", Counter[str]()
    header = len(raw) - len(parse(raw).data)

    def any_bytes(case: tuple[int, bytes]) -> None:
        at, data = case
        start = raw[:at] if whole else b"GGUF\3\0\0\0"
        path.write_bytes(start + data + (raw[at + len(data) :] if whole else b""))
        counts["read" if reads(path) else "refused"] += 1

    cases = st.tuples(st.integers(4, header - 1), st.binary(min_size=1, max_size=64))
    budget.run(any_bytes, cases, 300, counts)
