"""llama.cpp's libraries as this process has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOADED = """
from laserkv_gguf.llama import devices, library
devices.listed(), library.ggml_base(), devices.cpu()
from laserkv_gguf.llama.capture import Probe
Probe(1, 1, 1, 32).callback
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "ggml" in line}))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells")
def test_libggml_is_loaded_once() -> None:
    """A device registered with a second copy would not be seen by the one that computes."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, check=True)
    found = [Path(name).name.split(".so")[0] for name in done.stdout.decode().split()]
    assert found
    assert len(found) == len(set(found)), found
