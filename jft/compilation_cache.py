"""Compiled steps kept between runs: jax's own cache on disk, for the process of `jft`."""

import hashlib
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

# Shorter compilations than this are as quick as reading them back.
LEAST_SECONDS = "0.3"


def use_compilation_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Names a folder to jax, unless the user did; to be called before jax is imported.

    JAX_ENABLE_COMPILATION_CACHE=false switches it off, JAX_COMPILATION_CACHE_DIR moves it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        return
    folder = cache_folder(environment)
    try:
        # What is in it is executed: nobody else may write there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a read-only home: runs compile anew
        return
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", LEAST_SECONDS)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def cache_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """Returns the folder for this kind of processor: a shared home may serve several."""
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jft" / f"compiled-{_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
        text = "\n".join(sorted(set(known)))
    except OSError:
        text = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {text}".encode()).hexdigest()[:12]
