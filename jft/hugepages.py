"""Huge pages for the big buffers that XLA's CPU backend asks for, and gives back, at every step.

Each of them is new memory from the kernel, and a page fault for every 4 KiB of it costs more than
many a layer. glibc can ask for 2 MiB pages instead, but reads that wish only as a process starts.
"""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"  # glibc 2.35 and newer; older ones ignore it
# Marks the second start among the interpreter's options, which nothing between the two takes away.
_MARK = "jft_huge_pages"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this process again, once, with huge pages on; returns where that is not of use.

    To be called first of all, by what owns the process. Under a debugger or beside other threads,
    as in a notebook, it does nothing, and whoever sets the tunable in GLIBC_TUNABLES decides.
    """
    environment = with_huge_pages(os.environ, mode())
    alone = threading.active_count() == 1 and sys.gettrace() is None
    if environment is None or not alone or _MARK in sys._xoptions or not sys.executable:
        return
    try:  # the same process: its number stays
        os.execve(sys.executable, [sys.executable, "-X", _MARK, *sys.orig_argv[1:]], environment)
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
