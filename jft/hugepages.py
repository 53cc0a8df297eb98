"""Huge pages for the big buffers that XLA's CPU backend asks for, and gives back, at every step.

Each of them is new memory from the kernel, and a page fault for every 4 KiB of it costs more than
many a layer. glibc can ask for 2 MiB pages instead, but reads that wish only as a process starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"  # glibc 2.35 and newer; older ones ignore it
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this process again, once, with huge pages on; returns where that is not of use.

    To be called first of all. Whoever sets the tunable in GLIBC_TUNABLES, to 0 as well, decides.
    """
    environment = with_huge_pages(os.environ, mode())
    if environment is not None and sys.executable:
        _start_again([sys.executable, *sys.orig_argv[1:]], environment)


def _start_again(command: list[str], environment: Mapping[str, str]) -> None:
    try:
        os.execve(command[0], command, environment)  # the same process: its number stays
    except OSError:
        return


def mode() -> str:
    """Returns what the kernel does: "always", "madvise" (who asks gets them), "never", or ""."""
    try:
        return _KERNEL.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def with_huge_pages(environment: Mapping[str, str], kernel: str) -> dict[str, str] | None:
    """Returns the environment that asks for them, or None if that is decided or changes nothing."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if kernel != "madvise" or TUNABLE in tunables:
        return None
    joined = f"{tunables}:{TUNABLE}=1" if tunables else f"{TUNABLE}=1"
    return {**environment, "GLIBC_TUNABLES": joined}
