"""The verb `data`: what kinds of data there are, and a look at those of a config."""

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from jft.config import arg_keys, load_config
from jft.data.canvas_cache import CanvasSource, cached_splits
from jft.data.inspection import inspect_splits, to_dict
from jft.data.inspection_page import inspection_page
from jft.data.inspection_text import inspection_text
from jft.data.protocol import root_of
from jft.data.sources import BUNDLED, SOURCES
from jft.data.tfds_prepare import prepare_tfds
from jft.data.tfds_source import version_directory
from jft.data.tfrecord import convert
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
    found = inspect_splits(splits, task.image_shape, task.fit)
    print(inspection_text(found, task.preprocess))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        title = Path(config.data.path or config.data.name).name
        page = inspection_page(title, found, make_samples(task, splits))
        write_json(out / "inspection.json", to_dict(found))
        write_atomic(out / "inspection.html", page.encode("utf-8", "xmlcharrefreplace"))
        print(f"wrote {out / 'inspection.html'} and inspection.json")


def prepare(args: argparse.Namespace, words: list[str]) -> None:
    """Makes ready what a run would wait for.

    `prepare --config=...` decodes the images into data.cache; `prepare DIR --out=DIR` converts a
    TFDS set from TFRecord; `prepare tfds:NAME --out=DIR` downloads one.
    """
    if len(words) > 1:
        raise ConfigError(f"jft data prepare: takes one SOURCE, not {len(words)}")
    if not words:
        _prepare_canvases(args)
        return
    if not args.out:
        raise ConfigError("jft data prepare: --out=DIR is missing")
    if words[0].startswith("tfds:"):
        found = prepare_tfds(words[0].removeprefix("tfds:"), Path(args.out))
        print(f"prepared: --config.data.name=tfds --config.data.path={found}")
        return
    counts = convert(version_directory(Path(words[0])), Path(args.out))
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"converted {sizes}: --config.data.name=tfds --config.data.path={args.out}")


def _prepare_canvases(args: argparse.Namespace) -> None:
    config = _config(args, "prepare")
    splits = make_data(config)
    native, kind = splits.train.image_shape, splits.kind
    task = make_task(config, splits.label_names, native, kind=kind, pixels=splits.pixels)
    how = (task.image_shape, task.fit, "disk")
    roots = {id(root): root for s in cached_splits(splits, *how).values() if (root := root_of(s))}
    files = [root.canvases for root in roots.values() if isinstance(root, CanvasSource)]
    if not files:
        raise ConfigError(
            "jft data prepare: nothing was kept; images in memory need no cache, and where there is"
            " no room a warning says so"
        )
    for canvases in files:
        size = canvases.path.stat().st_size if canvases.path else 0
        print(f"{canvases.path}: {canvases.shape[0]:,} canvases, {size:,} bytes")
        for index, text in sorted(canvases.bad.items()):
            print(f"  cannot be read: {text}" if text else f"  cannot be read: {index}")
    print("train with --config.data.cache=disk")


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
    "prepare": prepare,
}
