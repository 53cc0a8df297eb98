"""The verb `data`: what kinds of data there are, and a look at those of a config."""

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from jft.config import arg_keys, load_config
from jft.data.inspection import inspect_splits, to_dict
from jft.data.inspection_page import inspection_page
from jft.data.inspection_text import inspection_text
from jft.data.sources import BUNDLED, SOURCES
from jft.errors import ConfigError, nearest
from jft.report.rundir import write_atomic, write_json
from jft.samples import make_samples
from jft.task import make_data, make_task


def data(args: argparse.Namespace) -> None:
    """Runs `list`, `inspect` or `prepare`.

    Raises:
      ConfigError: another word, or flags that the action needs.
    """
    action, *rest = args.words
    if action not in ACTIONS:
        known = ", ".join(ACTIONS)
        raise ConfigError(f"jft data: no action {action!r}{nearest(action, ACTIONS)}; {known}")
    ACTIONS[action](args, rest)


def list_kinds(args: argparse.Namespace, words: list[str]) -> None:
    """Prints each kind of data with its options, and the sets that ship in packages."""
    del args
    shown = [name for name in SOURCES if not words or name in words]
    unknown = next((word for word in words if word not in SOURCES), None)
    if unknown is not None:
        raise ConfigError(f"jft data list: no kind {unknown!r}{nearest(unknown, SOURCES)}")
    for name in shown:
        about, meanings = _documented(SOURCES[name])
        print(f"{name}: {about}")
        print(f"  data.path: {meanings.get('path', 'name of the set')}")
        for option, key in arg_keys("data", name).items():
            print(f"  data.args.{option}: {meanings.get(option, '')}")
            print(f"      {key.expects()}; default {key.default!r}")
    if not words:
        print("\nat hand without a download:")
        for command, about in BUNDLED.items():
            print(f"  {command}\n      {about}")


def _documented(function: Callable[..., object]) -> tuple[str, dict[str, str]]:
    """(first line, {argument: meaning}) of a Google docstring."""
    lines = (inspect.getdoc(function) or "").splitlines()
    meanings: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else ():
        if not line.startswith("  "):
            break
        found = re.match(r"  (\w+): (.*)", line)
        if found:
            name, meanings[found[1]] = found[1], found[2]
        elif name:
            meanings[name] += " " + line.strip()
    return lines[0], meanings


def inspect_data(args: argparse.Namespace, words: list[str]) -> None:
    """Decodes every image of a config's data, prints what was found, and writes it to --out."""
    _no_words("inspect", words)
    config = _config(args, "inspect")
    splits = make_data(config)
    native, kind = splits.train.image_shape, splits.kind
    task = make_task(config, splits.label_names, native, kind=kind, pixels=splits.pixels)
    found = inspect_splits(splits, task.image_shape, task.preprocess.interpolation)
    print(inspection_text(found, task.preprocess))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        title = Path(config.data.path or config.data.name).name
        page = inspection_page(title, found, make_samples(task, splits))
        write_json(out / "inspection.json", to_dict(found))
        write_atomic(out / "inspection.html", page.encode("utf-8", "xmlcharrefreplace"))
        print(f"wrote {out / 'inspection.html'} and inspection.json")


def _config(args: argparse.Namespace, action: str):
    if not args.config:
        raise ConfigError(f"jft data {action}: --config=FILE.py is missing")
    return load_config(args.config, args.overrides)


def _no_words(action: str, words: list[str]) -> None:
    if words:
        raise ConfigError(f"jft data {action}: unexpected {words[0]!r}")


ACTIONS: dict[str, Callable[[argparse.Namespace, list[str]], None]] = {
    "list": list_kinds,
    "inspect": inspect_data,
}
