"""The verbs `recipes` and `config`: the built-in configs, and what a config comes to."""

import argparse
import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jft.config import CHOICES, arg_keys, load_config
from jft.config_file import built_in, locate, read_text
from jft.errors import ConfigError, nearest
from jft.keys import KEYS
from jft.report.rundir import write_atomic
from jft.values import Key, plain

_ACTIONS = ("list", "show", "copy")


def recipes(args: argparse.Namespace) -> None:
    """Lists the built-in configs, shows the text of one, or copies it to change it."""
    action, *names = args.words or ["list"]
    if action not in _ACTIONS:
        raise ConfigError(f"jft recipes: no action {action!r}{nearest(action, _ACTIONS)}")
    if action == "list":
        if names:
            raise ConfigError(f"jft recipes list: unexpected {names[0]!r}")
        print(listing(built_in()))
        return
    if len(names) != 1:
        raise ConfigError(f"jft recipes {action}: takes one NAME; jft recipes list shows them")
    path, _ = locate(names[0])
    text = read_text(path)
    if action == "show":
        print(text, end="")
        return
    out = Path(args.out or path.name)
    if out.is_dir():
        out = out / path.name
    if out.exists():
        raise ConfigError(f"{out}: is there already; give another --out")
    write_atomic(out, text)
    print(f"wrote {out}; jft train --config={out} --workdir=runs/{out.stem}")


def listing(files: Mapping[str, Path]) -> str:
    """Returns a line a recipe: its name and the first line of its docstring."""
    width = max(len(name) for name in files)
    return "\n".join(f"{name:<{width}}  {headline(path)}" for name, path in files.items())


def headline(path: Path) -> str:
    """Returns the first line of a config file's docstring; the file is not executed."""
    return (ast.get_docstring(ast.parse(read_text(path))) or "").partition("\n")[0]


def config(args: argparse.Namespace) -> None:
    """Prints every key of a config with its value; what differs from the default is marked."""
    if args.words != ["show"]:
        raise ConfigError("jft config: should be jft config show --config=FILE.py")
    print(table(load_config(args.config, args.overrides)))


def table(config: ConfigDict) -> str:
    """Returns one line a key: a mark, the key, its value, what it takes, and what it means."""
    rows = []
    for name, key, value in _leaves(config):
        mark = " " if value == plain(key.default) else "*"
        rows.append((mark, name, _short(value), key.expects(), key.doc))
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    lines = [
        f"{mark} {name:<{widths[1]}}  {value:<{widths[2]}}  {expects}{doc and ': '}{doc}"
        for mark, name, value, expects, doc in rows
    ]
    return "\n".join([*lines, "* differs from the default"])


def _leaves(config: ConfigDict) -> Iterator[tuple[str, Key, Any]]:
    """Yields (dotted key, Key, value); of a section with a choice each argument by itself."""
    for name, key in KEYS.items():
        section, _, last = name.rpartition(".")
        value = (config[section] if section else config)[last]
        value = plain(value.to_dict()) if isinstance(value, ConfigDict) else plain(value)
        if last != "args" or section not in CHOICES:
            yield name, key, value
            continue
        own = arg_keys(section, config[section].name)
        yield from ((f"{name}.{arg}", own[arg], item) for arg, item in value.items())


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."
