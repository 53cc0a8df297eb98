"""What the devices are and hold: published peaks, memory in use, and the limit of it."""

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

# FLOP/s of dense bfloat16 products with float32 sums that a device is sold with, without sparsity.
# The longest name that `device_kind` begins with counts. Sources: NVIDIA's data sheets of A100
# (2021), A10, L4, L40S (2023), H100 (2023), H200 (2024), and the pages "TPU v4", "v5e", "v5p",
# "v6e" of Google's Cloud TPU documentation (2024). What is not listed here has no MFU.
PEAK_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the published bfloat16 FLOP/s of one device, or None where it is not known."""
    known = [
        name
        for name in PEAK_FLOPS
        # "NVIDIA A10" is neither an A100 nor an A10G.
        if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))
    ]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def peak_bytes(devices: Sequence[Any]) -> dict[str, int]:
    """Returns the most memory used so far, by the name under time/.

    "device_peak_bytes" is that of the fullest of this process's `devices`, where the backend
    counts it; "host_peak_bytes" is the resident size of this process.
    """
    found = {"host_peak_bytes": _resident_peak()}
    used = [stats["peak_bytes_in_use"] for stats in _stats(devices) if "peak_bytes_in_use" in stats]
    if used:
        found["device_peak_bytes"] = max(used)
    return found


def limit_bytes(devices: Sequence[Any]) -> tuple[int, str]:
    """Returns (memory that one device may use, what that is), the least of this process's own.

    Devices of the CPU share the host's memory, and each holds a copy of what a step takes.
    """
    limits = [stats["bytes_limit"] for stats in _stats(devices) if "bytes_limit" in stats]
    if limits:
        return min(limits), "device"
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # a container's limit may lie below the machine's
        host = min(host, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return host // max(1, len(_local(devices))), "host"


def _stats(devices: Sequence[Any]) -> list[dict[str, int]]:
    return [stats for device in _local(devices) if (stats := device.memory_stats())]


def _local(devices: Sequence[Any]) -> list[Any]:
    return [device for device in devices if device.process_index == jax.process_index()]


def _resident_peak() -> int:
    """`ru_maxrss` in bytes: Linux counts kibibytes, macOS bytes (getrusage(2) of each)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
