"""Families that a user's own Python files define, named by the environment variable JFT_FAMILIES.

The environment and not the config, since config.json of a run directory, which may come from
anywhere, must never say what is executed.
"""

import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from jft.errors import ConfigError, JftError
from jft.models.family import Family

VARIABLE = "JFT_FAMILIES"


def family_files() -> list[Path]:
    """The files that JFT_FAMILIES names, separated as in PATH."""
    names = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [Path(name).expanduser() for name in names if name.strip()]


def read_families() -> list[Family]:
    """The families of all files that JFT_FAMILIES names.

    Raises:
      ConfigError: a file cannot be read, or two define a family of one name.
    """
    found: dict[str, tuple[Path, Family]] = {}
    for path in family_files():
        family = read_family(path)
        other = found.get(family.name, (path,))[0]
        if other.resolve() != path.resolve():
            raise ConfigError(f"{VARIABLE}: {other} and {path} both define {family.name!r}")
        found[family.name] = path, family
    return [family for _, family in found.values()]


def read_family(path: Path) -> Family:
    """Executes a Python file and returns its FAMILY.

    Raises:
      ConfigError: no such file, an error in it, with its line, or no FAMILY.
    """
    if not path.is_file():
        raise ConfigError(f"{VARIABLE}: no such file {str(path)!r}")
    # Under its path: two files may have one name, and a class is looked up in its module.
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"jft_family_{path.stem}_{mark}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{VARIABLE}: {str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except JftError:
        raise
    except SystemExit as error:
        raise ConfigError(f"{path}: ends the program ({error.code!r})") from error
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        text = " ".join(str(error).split())
        raise ConfigError(f"{where}: {type(error).__name__}: {text}") from error
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        raise ConfigError(f"{path}: defines no FAMILY, a jft.models.family.Family")
    return family


def file_hashes() -> dict[str, str]:
    """{file: SHA-256} of the families in use, for what a run depended on."""
    return {
        str(path.resolve()): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in family_files()
        if path.is_file()
    }
