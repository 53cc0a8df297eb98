"""The config of a run: load a file, override from the command line, check, save as plain JSON.

A config file is Python, executed, and defines `get_config(arg)`; only a path the user names is
executed. What it returns is checked against `jft.keys.KEYS`, so an unknown key or a wrong type
fails here, and the result is locked. A run directory keeps the config as JSON, never executed.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jft.config_file import Where, locate, place, read_file, read_json, read_text
from jft.errors import ConfigError, nearest
from jft.evaluation.measures import AUTO, check_metric
from jft.keys import KEYS, nearest_key
from jft.report.trackers import TRACKERS
from jft.values import Key, key_of, plain

__all__ = ["base", "load_config", "read_file", "to_json", "from_json", "diff", "arg_keys"]

# Sections {name, args}: the table that `name` chooses from; a key like optim.schedule chooses by
# itself, and has its args beside it. Resolved late, so that `--help` and a misspelt key need not
# import jax.
CHOICES = {
    "model": "jft.models.zoo:FAMILIES",
    "data": "jft.data.sources:SOURCES",
    "freeze": "jft.freeze.methods:METHODS",
    "optim": "jft.train.optimizers:OPTIMIZERS",
    "optim.schedule": "jft.train.schedules:SCHEDULES",
    "loss": "jft.losses:LOSSES",
}
# What jft itself gives to the chosen function, hence no config key.
_GIVEN = ("num_classes", "dtype", "parent", "name", "seed", "path", "image_size")


_SPLITS = ("train", "val", "test")


def base() -> ConfigDict:
    """Returns every key with its default, for a config file to change."""
    config = ConfigDict(type_safe=False)  # types are checked once, with full paths, on loading
    for name, key in KEYS.items():
        section, _, last = name.rpartition(".")
        target = config.get(section) if section else config
        if target is None:
            config[section] = target = ConfigDict(type_safe=False)
        target[last] = plain(key.default)
    return config


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the checked, locked config of a file and the command line's overrides.

    Args:
      spec: "FILE.py[:arg]", "FILE.json" (the config.json of a run), or the name of a built-in
        config, "quickstart:tiny".
      overrides: "--config.optim.learning_rate=3e-4", with or without the dashes and "config.".

    Raises:
      ConfigError: the file, a key or a value is wrong; the message names it and the nearest one.
    """
    path, arg = locate(spec)
    texts = _parse_overrides(overrides)
    if path.suffix == ".json":
        raw = read_json(read_text(path), str(path))
        where = _json_where(str(path))
    else:
        raw = read_file(path, arg)
        where = functools.partial(place, path)
    return _resolve(_leaves(raw, where), texts, where)


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON text, keys sorted; the same config gives the same text."""
    return json.dumps(plain(config.to_dict()), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the locked config of `to_json`'s text, checked like a file's.

    Raises:
      ConfigError: not JSON, or keys and values that this version does not know.
    """
    where = _json_where("config.json")
    return _resolve(_leaves(read_json(text, "config.json"), where), {}, where)


def diff(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns the dotted keys, sorted, whose change changes the run; `free` keys are left out."""
    before, after = _flat(old), _flat(new)
    names = sorted(before.keys() | after.keys())
    missing = object()  # unlike None, equal to no value
    return [
        name
        for name in names
        if before.get(name, missing) != after.get(name, missing)
        and not (name in KEYS and KEYS[name].free)
    ]


def arg_keys(section: str, name: str, where: str = "") -> dict[str, Key]:
    """Returns the Key of each argument of what `name` chooses in a section, "k" -> Key(1, int).

    Raises:
      ConfigError: the section has no such name; `where` begins the message.
    """
    choices = _choices(section)
    if name not in choices:
        known = ", ".join(sorted(choices))
        hint = nearest(name, choices) or f"; known: {known}"
        if section == "model":
            hint += "; JFT_FAMILIES=FILE.py adds a family of your own"
        raise ConfigError(f"{where or f'config.{_keys(section)[0]}'}: no {section} {name!r}{hint}")
    target, fixed = choices[name] if section == "model" else (choices[name], {})
    parameters = inspect.signature(target).parameters.values()
    given = {*_GIVEN, *(key.rpartition(".")[2] for key in KEYS if key.startswith(f"{section}."))}
    if section == "data":
        given.discard("num_classes")  # of data only the user can say it
    # Of a dataclass, so that inherited fields are read where they were written.
    own = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = typing.get_type_hints(target.__init__ if own else target)
    keys: dict[str, Key] = {}
    for parameter in parameters:
        default = fixed.get(parameter.name, parameter.default)
        if parameter.name in given or default is parameter.empty:
            continue
        key = key_of(hints.get(parameter.name, parameter.annotation), default)
        if key is not None:
            keys[parameter.name] = key
    return keys


def _choices(section: str) -> Mapping[str, Any]:
    """Returns {name: function whose signature gives the args}; of models (class, defaults)."""
    module, _, table = CHOICES[section].partition(":")
    found = getattr(importlib.import_module(module), table)
    if section != "model":
        return found
    return {
        variant: (family.module, fields)
        for family in found.values()
        for variant, fields in family.variants.items()
    }


def _keys(section: str) -> tuple[str, str]:
    """Returns the keys of the name that is chosen and of its args."""
    if section in KEYS:
        return section, f"{section}_args"
    return f"{section}.name", f"{section}.args"


def _resolve(raw: Mapping[str, Any], texts: Mapping[str, str], where: Where) -> ConfigDict:
    """Returns the locked config of defaults, the file's leaves and the command line's texts."""
    known = {**KEYS}
    values: dict[str, Any] = {}
    for name, key in KEYS.items():
        if name in texts:
            values[name] = key.parse(texts[name], f"--config.{name}")
        elif name in raw:
            values[name] = key.cast(raw[name], where(name))
        else:
            values[name] = plain(key.default)
    if "freeze.name" in texts:
        if "freeze.phases" not in texts:  # a method on the command line, not the file's own phases
            values["freeze.phases"] = None
        elif values["freeze.phases"] is not None:
            raise ConfigError("--config.freeze.name and --config.freeze.phases: give one of them")
    for section in CHOICES:
        chosen, options = _keys(section)
        here = f"--config.{chosen}" if chosen in texts else where(chosen)
        keys = arg_keys(section, values[chosen], here)
        known |= {f"{options}.{name}": key for name, key in keys.items()}
        given = values[options]
        if chosen in texts and options not in texts and texts[chosen] != raw.get(chosen):
            # Another name on the command line: options that only the file's choice had fall away.
            given = {name: value for name, value in given.items() if name in keys}
        values[options] = _resolve_args(options, values[chosen], keys, given, texts, where)
    for name in texts:
        if name not in known:
            raise ConfigError(f"--config.{name}: no such key{nearest_key(name, known)}")
    _check_together(values)
    config = base()
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        (config[section] if section else config)[last] = value
    return config.lock()


def _resolve_args(
    options: str,
    chosen: str,
    keys: Mapping[str, Key],
    given: Mapping[str, Any],
    texts: Mapping[str, str],
    where: Where,
) -> dict[str, Any]:
    args: dict[str, Any] = {}
    start = f"{options}."
    written = {where(start + name): name for name in given}
    written |= {f"--config.{n}": n.removeprefix(start) for n in texts if n.startswith(start)}
    for spot, name in written.items():
        if name not in keys:
            hint = nearest(name, keys) or f"; {chosen} takes {', '.join(keys) or 'none'}"
            raise ConfigError(f"{spot}: no such key{hint}")
    for name, key in keys.items():
        dotted = f"{options}.{name}"
        if dotted in texts:
            args[name] = key.parse(texts[dotted], f"--config.{dotted}")
        elif name in given:
            args[name] = key.cast(given[name], where(dotted))
        else:
            args[name] = plain(key.default)
    return args


def _check_together(values: Mapping[str, Any]) -> None:
    """Raises ConfigError where keys that are right alone do not fit each other."""
    steps, epochs = values["train.steps"], values["train.epochs"]
    if (steps is None) == (epochs is None):
        what = "neither is set" if steps is None else "both are set"
        raise ConfigError(f"config.train.steps or config.train.epochs gives the length; {what}")
    if values["train.batch_size"] % values["train.accum_steps"]:
        raise ConfigError(
            f"config.train.batch_size={values['train.batch_size']} does not divide into"
            f" config.train.accum_steps={values['train.accum_steps']} micro-batches"
        )
    if values["data.val_fraction"] + values["data.test_fraction"] >= 1:
        raise ConfigError(
            "config.data.val_fraction + config.data.test_fraction leave no training data"
        )
    for split in values["eval.splits"]:
        if split not in _SPLITS:
            raise ConfigError(
                f"config.eval.splits: no split {split!r}{nearest(str(split), _SPLITS)};"
                f" there are {', '.join(_SPLITS)}"
            )
    for tracker in values["log.trackers"]:
        if tracker not in TRACKERS:
            raise ConfigError(
                f"config.log.trackers: no tracker {tracker!r}{nearest(str(tracker), TRACKERS)};"
                f" there are {', '.join(TRACKERS)}"
            )
    best = values["checkpoint.best"]
    if best not in (None, AUTO):
        check_metric(best, "config.checkpoint.best")
    for name in ("augment.scale", "augment.ratio"):
        pair = values[name]
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair)
        if len(pair) != 2 or not numbers or not 0 < pair[0] <= pair[1]:
            raise ConfigError(f"config.{name} should be two numbers, smallest first, not {pair}")
    if values["augment.ops"]:  # only then, since it needs jax
        from jft.data.augment import read_ops

        read_ops(values["augment.ops"], "config.augment.ops")
    if values["eval.tta"]:
        from jft.data.test_time import read_views

        read_views(values["eval.tta"], "config.eval.tta")


def _parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Returns {dotted key: text}; the last one wins."""
    texts: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.removeprefix("--").removeprefix("config.").partition("=")
        if not equals:
            raise ConfigError(f"{override}: needs a value, --config.{name}=VALUE")
        texts[name] = text
    return texts


def _leaves(raw: Any, where: Where) -> dict[str, Any]:
    """Returns {dotted key: value} of what a file gave.

    Raises:
      ConfigError: it is no mapping, a section is no mapping, or a key is unknown.
    """
    raw = raw.to_dict() if isinstance(raw, ConfigDict) else raw
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where('')}: get_config should return a ConfigDict or a dict")
    sections = {name.partition(".")[0] for name in KEYS if "." in name}
    leaves: dict[str, Any] = {}
    for section, content in raw.items():
        if section in sections and not isinstance(content, Mapping):
            raise ConfigError(
                f"{where(str(section))} is a section; set a key of it, config.{section}.x"
            )
        items = content.items() if section in sections else ()
        leaves |= {f"{section}.{name}": value for name, value in items}
        if section not in sections:
            leaves[str(section)] = content
    for name in leaves:
        if name not in KEYS:
            raise ConfigError(f"{where(name)}: no such key{nearest_key(name, KEYS)}")
    return leaves


def _json_where(name: str) -> Where:
    return lambda dotted: f"{name}: config.{dotted}"


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Returns {dotted key: value}, the members of each args dict among them."""
    flat: dict[str, Any] = {}
    for name in KEYS:
        section, _, last = name.rpartition(".")
        value = (config[section] if section else config)[last]
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        if any(name == _keys(choice)[1] for choice in CHOICES):
            flat |= {f"{name}.{arg}": item for arg, item in plain(value).items()}
        else:
            flat[name] = plain(value)
    return flat
