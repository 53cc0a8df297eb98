"""How much memory this process may still take."""

import os
from pathlib import Path


def host_free_bytes() -> int:
    """Returns the memory that this process may still take without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # not Linux: a quarter of all memory
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    try:  # a container's limit may lie below the machine's
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return max(0, min(free, limit - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        return free
