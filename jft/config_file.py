"""Config files: find one by path or name, execute it, and say where in it an error stands."""

import inspect
import json
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jft.errors import ConfigError, JftError, nearest
from jft.keys import KEYS, nearest_key

# Words for the place of a dotted key, to begin a message with.
Where = Callable[[str], str]

# In an installed package the built-in configs lie inside it, in a checkout beside it.
BUILTIN = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")

_SPEC = re.compile(r"(?P<path>.+?\.(?:py|json)|[\w-]+)(?::(?P<arg>.*))?")
_CHAIN = re.compile(r"\b[A-Za-z_]\w*((?:\.[A-Za-z_]\w*)+)")


def locate(spec: str) -> tuple[Path, str]:
    """Returns (file, arg) of "FILE.py[:arg]", "FILE.json" or a built-in "NAME[:arg]".

    Raises:
      ConfigError: no such file or name.
    """
    found = _SPEC.fullmatch(spec)
    if not found:
        raise ConfigError(f"--config={spec}: should be FILE.py[:arg], FILE.json or a built-in name")
    name, arg = found["path"], found["arg"] or ""
    if name.endswith(".json") and arg:
        raise ConfigError(f"--config={spec}: a JSON config takes no argument")
    if name.endswith((".py", ".json")):
        path = Path(name)
        if not path.is_file():
            beside = path.parent.glob("*" + path.suffix) if path.parent.is_dir() else ()
            raise ConfigError(f"--config={spec}: no such file{nearest(name, map(str, beside))}")
        return path, arg
    known = built_in()
    if name not in known:
        hint = nearest(name, known) or f"; built in are {', '.join(known)}"
        raise ConfigError(f"--config={spec}: no built-in config {name!r}{hint}")
    return known[name], arg


def built_in() -> dict[str, Path]:
    """Returns {name: file} of the configs that come with jft."""
    return {path.stem: path for folder in BUILTIN for path in sorted(folder.glob("[!_]*.py"))}


def read_file(path: str | Path, arg: str = "") -> Any:
    """Returns what `get_config(arg)` of a config file gives, so that a file can start from another.

    Raises:
      ConfigError: no such file, or an error in it, with file and line.
    """
    path = Path(path)
    source = read_text(path)
    with _errors_of(path):
        namespace: dict[str, Any] = {"__name__": "jft_config", "__file__": str(path)}
        exec(compile(source, str(path), "exec"), namespace)
        get_config = namespace.get("get_config")
        if not callable(get_config):
            raise ConfigError(f"{path}: a config file defines get_config(arg)")
        if inspect.signature(get_config).parameters:
            return get_config(arg)
        if arg:
            raise ConfigError(f"{path}: get_config() takes no argument, but ':{arg}' was given")
        return get_config()


def read_text(path: Path) -> str:
    """Returns the text of a config file; ConfigError names it where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text") from error


def read_json(text: str, name: str) -> Any:
    """Returns the parsed JSON; ConfigError names the file `name` where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is not JSON: {error}") from error


def place(path: Path, dotted: str) -> str:
    """Returns "FILE:LINE: config.a.b", by the line that sets the key where there is just one."""
    last = re.escape(dotted.rpartition(".")[2])
    setting = re.compile(rf"""[.\s(,]{last}\s*=(?!=)|["']{last}["']\s*[:\]]""")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if dotted else []
    except (OSError, UnicodeDecodeError):
        lines = []
    found = [number for number, line in enumerate(lines, 1) if setting.search(f" {line}")]
    where = f"{path}:{found[0]}" if len(found) == 1 else str(path)
    return f"{where}: config.{dotted}" if dotted else where


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns an exception inside the config file into a ConfigError with its line."""
    try:
        yield
    except JftError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or path}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename == str(path)]
        where = f"{path}:{inside[-1].lineno}" if inside else str(path)
        text = " ".join(str(error).split()) or "stopped"
        if isinstance(error, AttributeError) and inside:
            text = _unknown_in(inside[-1].line or "") or text
        elif not isinstance(error, ValueError):
            text = f"{type(error).__name__}: {text}"
        raise ConfigError(f"{where}: {text}") from error


def _unknown_in(line: str) -> str:
    """Returns the message for the first dotted chain of a source line that is no config key."""
    sections = {name.partition(".")[0] for name in KEYS}
    for chain in _CHAIN.findall(line):
        dotted = chain[1:]
        if dotted not in KEYS and dotted.partition(".")[0] not in sections:
            return f"config.{dotted}: no such key{nearest_key(dotted, KEYS)}"
    return ""
