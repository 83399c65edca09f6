"""Saved files, changed in every way that a forger who knows their form can think of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from forged import CHANGES
from hypothesis import strategies as st
from test_saved_hostile import Scene

from fuzz import budget


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    one = Scene(tmp_path_factory.mktemp("fuzz"))
    yield one
    one.close()


def test_saved_files(scene: Scene, tmp_path: Path) -> None:
    """Several changes at once, of several kinds, with a right digest."""
    path, counts = tmp_path / "forged", Counter[str]()
    cases = st.tuples(
        st.sampled_from(sorted(scene.files)),
        st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3),
        st.randoms(use_true_random=False, note_method_calls=False),
    )

    def saved_files(case: tuple[str, list[str], Random]) -> None:
        name, modes, random = case
        file = scene.files[name].copy()
        data = b""
        modes = [mode for mode in modes if mode not in ("tensor", "flip")] + [
            mode for mode in modes if mode in ("tensor", "flip")
        ][:1]  # what is changed in the bytes comes after what is changed in the parts
        for mode in modes:
            if mode == "state" and "state" not in file.arrays:
                mode = "data"
            try:
                data = CHANGES[mode](file, random)
            except (IndexError, KeyError, TypeError, ValueError):
                continue  # the change before left nothing to change
        path.write_bytes(data or file.bytes())
        counts[f"{'+'.join(sorted(set(modes)))} {scene.meets(path, name)}"] += 1

    budget.run(saved_files, cases, 150, counts)
    scene.stays()
