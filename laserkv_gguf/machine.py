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


def free_ram() -> int | None:
    """What this process may still take: free memory, or what its limits leave, if that is less.

    Its limits are those of its control group, and of its address space and data (`ulimit -v -d`).

    None where that cannot be told (not Linux).
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" is none
        used = int((group / "memory.current").read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # cached files, which make room when asked to
                used -= int(line.split()[1])
        found.append(max(0, limit - used))
    except (OSError, ValueError):
        pass
    return min([*found, *_left_of_limits()], default=None)


def _left_of_limits() -> list[int]:
    """What the process's own limits leave of address space and data, where it has any."""
    import resource

    left = []
    lines = Path("/proc/self/status").read_text().splitlines()
    taken = {line.split(":")[0]: line.split() for line in lines if line.endswith(" kB")}
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and name in taken:
            left.append(max(0, most - int(taken[name][1]) * 1024))
    return left


def human(size: int) -> str:
    """Bytes, with GiB or MiB where that is shorter."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name} ({size} bytes)"
    return f"{size} bytes"


def size(number: float) -> str:
    """Bytes as people read them, without their exact number."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
