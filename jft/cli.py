"""The command line: verbs, flags, messages and exit codes; the only place that reads argv.

A verb's module is imported when it is called, so that help and a usage error answer without jax.
"""

import argparse
import importlib
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from shutil import get_terminal_size
from typing import NoReturn

from jft.errors import ConfigError, JftError, nearest
from jft.keys import KEYS, nearest_key
from jft.verbs.table import FLAGS, VERBS

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is without the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _dispatch(argv)
    except JftError as error:
        return _fail(error, error.exit_code, debug)
    except KeyboardInterrupt:
        print("jft: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `jft models | head`: nobody reads on, nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            return _bug()
        return _fail(ConfigError(f"{error.filename}: {error.strerror}"), EXIT_USAGE, debug)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(ConfigError(_out_of_memory(error)), EXIT_USAGE, debug)
        return _bug()


def _out_of_memory(error: Exception) -> str:
    """Returns one line with what the device was asked for, where it says so, and what helps."""
    asked = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B)(?:ytes)?|(\d[\d,]*) bytes", str(error))
    size = f" ({asked[0]})" if asked else ""
    return (
        f"the device is out of memory{size}: lower train.batch_size, raise train.accum_steps, set"
        " train.dtype=bfloat16, or train less at a time (freeze.phases); jft plan shows the bytes"
    )


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"jft: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _bug() -> int:
    traceback.print_exc()
    print("jft: this is a bug in jft, not in your input; please report it", file=sys.stderr)
    return EXIT_BUG


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"jft {_version()}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb!r}{nearest(verb, VERBS) or '; see jft --help'}")
    takes_config = any(flag.startswith("--config") for flag in VERBS[verb].flags)
    if "-h" in rest or "--help" in rest:
        print(_parser(verb).format_help() + ("\n" + keys_help() if takes_config else ""), end="")
        return 0
    overrides, rest = _take_overrides(rest)
    args = _parser(verb).parse_args(_checked_flags(verb, rest))
    if overrides and not takes_config:
        raise ConfigError(f"jft {verb}: takes no config keys, but got --config.{overrides[0]}")
    args.overrides = overrides
    module, _, function = VERBS[verb].run.partition(":")
    return getattr(importlib.import_module(module), function)(args) or 0


def _version() -> str:
    try:
        return version("jft")
    except PackageNotFoundError:
        return "from source, not installed"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser(name: str) -> _Parser:
    verb = VERBS[name]
    parser = _Parser(prog=f"jft {name}", description=verb.about, allow_abbrev=False, add_help=False)
    if verb.words:
        metavar, nargs, about = verb.words
        parser.add_argument("words", metavar=metavar, nargs=nargs, help=about)
    for flag in (*verb.flags, "--debug"):
        name = flag.rstrip("!")
        options = FLAGS[name].copy()
        if flag != name:
            options["required"] = True
        parser.add_argument(name, **options)
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (["optim.learning_rate=1e-3", ...], the other arguments)."""
    overrides, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override:
            value = next(arguments, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{argument} needs a value: {argument}=VALUE")
            override += f"={value}"
        overrides.append(override)
    return overrides, rest


def _checked_flags(verb: str, argv: Sequence[str]) -> list[str]:
    """Returns argv with flags spelt with underscores; stray flags and words are named."""
    words = VERBS[verb].words
    known = (*(flag.rstrip("!") for flag in VERBS[verb].flags), "--debug")
    result: list[str] = []
    expects_value = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            if name not in known:
                raise ConfigError(f"jft {verb}: unknown flag {argument}{_flag_hint(name, known)}")
            takes = FLAGS[name].get("action") != "store_true"
            expects_value = takes and not equals
            result.append(name + equals + value)
            continue
        if not words and not expects_value:
            raise ConfigError(f"jft {verb}: unexpected {argument!r}{_word_hint(name, equals)}")
        expects_value = False
        result.append(argument)
    return result


def _flag_hint(name: str, known: Sequence[str]) -> str:
    dotted = name.removeprefix("--")
    if any(key == dotted or key.endswith(f".{dotted}") for key in KEYS):
        return nearest_key(dotted, KEYS).replace("mean config", "mean --config")
    return nearest(name, known)


def _word_hint(name: str, equals: str) -> str:
    if not equals:
        return "; flags are written --workdir=DIR"
    return f"; config keys are written --config.{name}=VALUE{nearest_key(name, KEYS)}"


def _overview() -> str:
    rows = [f"  {name:<9} {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: jft VERB [flags]",
            "",
            "Fine-tune a pre-trained model on your own data, and know what freezing saves.",
            "",
            *rows,
            "",
            "  jft train --config=quickstart --workdir=runs/quickstart",
            "  jft VERB --help shows the flags of a verb and the config keys.",
        ]
    )


def keys_help() -> str:
    """Returns every config key with type, default and meaning, wrapped to the terminal."""
    width = max(60, min(get_terminal_size().columns, 120))
    lines = ["config keys (--config.KEY=VALUE):"]
    for name, key in KEYS.items():
        head = f"{name}: {key.expects()}; default {key.default!r}"
        for text, indent in ((head, "  "), (key.doc, " " * 6)):
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=indent,
                subsequent_indent=" " * 6,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines)
