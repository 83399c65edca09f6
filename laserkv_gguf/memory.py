"""Resident memory of this process, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path


def reset_peak_rss() -> bool:
    """Starts the peak anew (Linux); False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int | None:
    """The highest resident memory since the last reset or, elsewhere, since the start."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available() -> int | None:
    """Memory this process can still get, or None where that cannot be told (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = None
    for line in lines:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:  # a container may be allowed less
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # cached files, which make room when asked to
                used -= int(line.split()[1])
        left = max(0, limit - used)
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return left if free is None else min(free, left)
