"""What a run depended on: arguments, versions, devices and the state of the code."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jft.models.family_files import file_hashes


def package_versions() -> dict[str, str]:
    """Returns {package: version} of jft and of what its numbers depend on."""
    packages = {}
    for name in ("jft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return packages


def describe_run(seed: int) -> dict[str, Any]:
    """Returns what a run depended on: arguments, versions, devices, code state, seed."""
    return {
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "processes": jax.process_count(),
        "git": _git_state(),
        "families": file_hashes(),
        "seed": seed,
    }


def _git_state() -> dict[str, Any] | None:
    """Returns commit and cleanliness of the code, or None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
