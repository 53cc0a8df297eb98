"""The doctor verb: what is installed, what is known not to work together, where jft may write."""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jft.hugepages import mode

OK, WARN, BAD = "ok", "warn", "bad"
EXIT_UNFIT = 2


class Check(NamedTuple):
    """One line of the doctor's report: OK, WARN or BAD, what was looked at, and what was found."""

    state: str
    what: str
    found: str


@dataclass(frozen=True)
class BadPair:
    """Versions that fail together: each of `needs` is a requirement, and all hold at once."""

    needs: tuple[str, ...]
    why: str


KNOWN_BAD = (
    BadPair(
        ("flax<=0.12.8", "jax>=0.11.1"), "flax imports a symbol that jax removed; upgrade flax"
    ),
    BadPair(("flax>=0.12.12", "jax<0.11.1"), "this flax needs a newer jax; upgrade jax"),
    BadPair(("optax<0.2.8", "jax>=0.10"), "optax calls what jax 0.10 removed; upgrade optax"),
    BadPair(("chex<0.1.92", "jax>=0.10"), "chex's pmap helpers need the older jax; upgrade chex"),
    BadPair(("jax==0.7.2",), "this jax is slower than those around it; upgrade jax"),
    BadPair(("jax==0.11.0",), "this jax fails in several trainers; use 0.11.1 or newer"),
    BadPair(("sentencepiece==0.2.1",), "it crashes on some platforms; use another version"),
)

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+?)\s*(?:\[(?P<extra>[^\]]*)\])?\s*"
    r"(?P<limits>(?:[<>=!]=?[^;,\s]+,?\s*)*)(?:;(?P<marker>.*))?"
)
_COMPARE = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def run(args: argparse.Namespace) -> int:  # noqa: ARG001
    """Prints every check and returns 0, or 2 where something is known not to work."""
    versions = installed()
    checks = [
        Check(OK, "python", sys.version.split()[0]),
        *_packages(versions),
        *known_bad(versions),
        *neighbours(versions),
        *_accelerator_plugins(versions),
    ]
    checks += [*_devices(), *_folders(), *_machine()]
    width = max(len(check.what) for check in checks)
    for check in checks:
        print(f"{check.state:<4} {check.what:<{width}}  {check.found}")
    bad = sum(check.state == BAD for check in checks)
    print(f"{bad} problem{'s' * (bad != 1)}" if bad else "no problem found")
    return EXIT_UNFIT if bad else 0


def installed() -> dict[str, str]:
    """Returns {distribution, lower case with dashes: version} of this environment."""
    found = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(_normal(name), distribution.version)
    return found


def known_bad(versions: Mapping[str, str]) -> list[Check]:
    """Returns a BAD check for each pair of KNOWN_BAD that `versions` holds, or one OK."""
    found = [
        Check(BAD, " + ".join(pair.needs), pair.why)
        for pair in KNOWN_BAD
        if all(_holds(need, versions) for need in pair.needs)
    ]
    return found or [Check(OK, "known-bad pairs", "none installed")]


def neighbours(versions: Mapping[str, str]) -> list[Check]:
    """Returns a WARN check for each installed package that wants other versions of jft's own.

    Several JAX libraries cap or pin what jft needs newer, and pip may have overridden them: they
    cannot share one environment, and it is they that break.
    """
    own = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "safetensors", "numpy"}
    own |= {"ml-dtypes", "pillow", "huggingface-hub", "tensorflow-datasets", "protobuf"}
    checks = []
    for distribution in importlib.metadata.distributions():
        name = _normal(distribution.metadata["Name"] or "")
        for requirement in distribution.requires or ():
            parts = _REQUIREMENT.fullmatch(requirement.replace("(", "").replace(")", "").strip())
            if not parts or parts["marker"] or _normal(parts["name"]) not in own & versions.keys():
                continue
            wanted = f"{parts['name']}{parts['limits'].strip()}"
            if parts["limits"] and "~" not in wanted and not _holds(wanted, versions):
                have = versions[_normal(parts["name"])]
                text = f"wants {wanted}, here is {have}: give it an environment of its own"
                checks.append(Check(WARN, name, text))
    return checks


def _holds(requirement: str, versions: Mapping[str, str]) -> bool:
    """Returns whether an installed version meets "name>=1.2,<2"; False where it is missing."""
    parts = _REQUIREMENT.fullmatch(requirement)
    if not parts or _normal(parts["name"]) not in versions:
        return False
    have = _release(versions[_normal(parts["name"])])
    limits = re.findall(r"([<>=!]=?)([^,\s]+)", parts["limits"])
    return all(_COMPARE[sign](*_same_length(have, _release(limit))) for sign, limit in limits)


def _release(text: str) -> tuple[int, ...]:
    """Returns (0, 10, 2) of "0.10.2.dev3+cpu": the numbers before any suffix."""
    found = re.match(r"\d+(?:\.\d+)*", text.strip())
    return tuple(int(part) for part in found[0].split(".")) if found else (0,)


def _same_length(a: Sequence[int], b: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    size = max(len(a), len(b))
    return (*a, *(0,) * (size - len(a))), (*b, *(0,) * (size - len(b)))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages(versions: Mapping[str, str]) -> list[Check]:
    """Checks what jft requires against its own floors, and which extras are complete."""
    try:
        requirements = importlib.metadata.requires("jft") or []
    except importlib.metadata.PackageNotFoundError:
        return [Check(WARN, "jft", "not installed here, so its requirements are not checked")]
    checks, extras = [Check(OK, "jft", versions.get("jft", "?"))], {}
    for requirement in requirements:
        parts = _REQUIREMENT.fullmatch(requirement.strip())
        if not parts:
            continue
        if extra := _extra_of(parts["marker"] or ""):
            extras.setdefault(extra, []).extend(_missing(parts, versions))
        elif parts["marker"] is None:
            have, limits = versions.get(_normal(parts["name"])), parts["limits"].strip()
            fits = _holds(parts["name"] + limits, versions)
            text = f"{have} is outside {limits}" if have else f"missing, needs {limits}"
            checks.append(
                Check(OK, parts["name"], have) if have and fits else Check(BAD, parts["name"], text)
            )
    for extra, missing in sorted(extras.items()):
        text = f"pip install 'jft[{extra}]' adds {', '.join(missing)}" if missing else "present"
        checks.append(Check(OK, f"extra {extra}", text))
    return checks


def _extra_of(marker: str) -> str | None:
    """Returns "demo" of `extra == "demo"`, or None."""
    found = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
    return found[1] if found else None


def _missing(parts: re.Match[str], versions: Mapping[str, str]) -> list[str]:
    """Returns which packages of one requirement are absent, those of "jax[cuda13]" among them."""
    name, inner = parts["name"], parts["extra"]
    if _normal(name) not in versions:
        return [name]
    if not inner:
        return []
    found = map(_REQUIREMENT.fullmatch, importlib.metadata.requires(name) or [])
    wanted = [other for other in found if other and _extra_of(other["marker"] or "") == inner]
    return [other["name"] for other in wanted if _normal(other["name"]) not in versions]


def _accelerator_plugins(versions: Mapping[str, str]) -> list[Check]:
    """Checks that jaxlib and CUDA plugins are of jax's own version, which pip does not enforce."""
    checks = []
    jax_version = _release(versions.get("jax", "0"))[:3]
    for name in sorted(versions):
        if name == "jaxlib" or re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name):
            fits = _release(versions[name])[:3] == jax_version
            note = "" if fits else f"; jax is {versions.get('jax')}: install both at one version"
            checks.append(Check(OK if fits else BAD, name, versions[name] + note))
    return checks


def _devices() -> list[Check]:
    try:
        import jax  # here, so that the doctor can still speak where importing jax fails

        devices = jax.devices()
    except Exception as error:  # any failure of a backend is the finding
        return [Check(BAD, "devices", " ".join(f"{type(error).__name__}: {error}".split())[:200])]
    kinds = sorted({device.device_kind for device in devices})
    text = f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform})"
    checks = [Check(OK, "devices", text)]
    if devices[0].platform == "gpu" and importlib.util.find_spec("tensorflow"):
        hint = "it takes all GPU memory where something imports it; jft itself never does"
        checks.append(Check(WARN, "tensorflow", hint))
    if devices[0].platform == "cpu" and Path("/proc/driver/nvidia/version").exists():
        hint = "an NVIDIA driver is here, but jax uses the CPU: pip install 'jft[cuda13]'"
        checks.append(Check(WARN, "devices", hint))
    return checks


def _folders() -> list[Check]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    places = [("this folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))]
    places += [("compilation cache", Path(cache))] if cache else []
    checks = []
    for what, folder in places:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
            checks.append(Check(OK, what, f"{folder}, writable, {free / 2**30:.1f} GiB free"))
        except OSError as error:
            state = WARN if what == "this folder" else BAD
            checks.append(Check(state, what, f"{folder}: {error.strerror}"))
    return checks


def _machine() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    checks = [Check(OK, "cores", str(cores))]
    kernel = mode()
    if kernel:
        hint = "; steps on the CPU are faster with madvise or always" if kernel == "never" else ""
        checks.append(Check(WARN if hint else OK, "huge pages", kernel + hint))
    return checks
