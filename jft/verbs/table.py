"""The verbs of the command line and their flags, as data: help needs no other module."""

from dataclasses import dataclass
from typing import Any

# Flag -> what argparse needs to know. A verb takes the ones that VERBS names.
FLAGS: dict[str, dict[str, Any]] = {
    "--config": {"metavar": "FILE.py[:arg]", "help": "config file, or the name of a built-in one"},
    "--workdir": {
        "metavar": "DIR",
        "help": "run directory; the same command resumes what is in it",
    },
    "--out": {"metavar": "PATH", "help": "where the result goes"},
    "--split": {"metavar": "NAME", "default": "test", "help": "train, val or test (default: test)"},
    "--step": {
        "metavar": "STEP",
        "default": "newest",
        "help": "checkpoint to use: newest, best or a number of updates (default: newest)",
    },
    "--model": {"metavar": "NAME", "help": "model to check the weights against"},
    "--dry_run": {
        "action": "store_true",
        "help": "one step, one evaluation and one save in a temporary folder",
    },
    "--leaves": {
        "action": "store_true",
        "help": "one line a leaf: the pattern that matched, rate, decay, bytes",
    },
    "--resume": {
        "choices": ("auto", "force"),
        "default": "auto",
        "help": "force: resume although config keys have changed",
    },
    "--debug": {"action": "store_true", "help": "show the traceback of any error"},
}


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
      run: "module:function"; the function takes the parsed arguments and may return an exit code.
      about: one line for help.
      flags: the FLAGS it takes; those with "!" must be given.
      words: its positional arguments as (metavar, nargs, help), or None.
    """

    run: str
    about: str
    flags: tuple[str, ...] = ()
    words: tuple[str, str, str] | None = None


VERBS: dict[str, Verb] = {
    "train": Verb(
        "jft.verbs.runs:train",
        "fine-tune; the same command again resumes",
        ("--config!", "--workdir", "--resume", "--dry_run"),
    ),
    "eval": Verb(
        "jft.verbs.runs:evaluate",
        "metrics of a trained model on one split",
        ("--workdir!", "--split", "--step", "--out"),
    ),
    "predict": Verb(
        "jft.verbs.runs:predict",
        "class and probability of image files, one JSON object a line",
        ("--workdir!", "--step", "--out"),
        ("FILE", "+", "image files"),
    ),
    "export": Verb(
        "jft.verbs.runs:export",
        "write safetensors and config.json in the source's names",
        ("--workdir!", "--step", "--out!"),
    ),
    "plan": Verb(
        "jft.verbs.runs:plan",
        "groups, phases, FLOPs and bytes before a run",
        ("--config!", "--leaves"),
    ),
    "report": Verb("jft.verbs.runs:report", "write report.html of a run again", ("--workdir!",)),
    "models": Verb(
        "jft.verbs.models:models",
        "list models, or `show NAME`",
        (),
        ("PATTERN", "*", "shell pattern of names, or: show NAME"),
    ),
    "weights": Verb(
        "jft.verbs.weights:weights",
        "`check SOURCE`: read weights, and fit them to a model",
        ("--model", "--out"),
        ("check SOURCE", "+", "pkg:DISTRIBUTION/path or file:PATH"),
    ),
    "data": Verb(
        "jft.verbs.data:data",
        "`list` kinds of data, `inspect` every image of a config's, `prepare` them ahead",
        ("--config", "--out"),
        ("list | inspect | prepare", "+", "list [KIND]; inspect; prepare [SOURCE]"),
    ),
    "doctor": Verb("jft.doctor:run", "check Python, packages, devices and folders"),
}
