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
    "--to": {"metavar": "hf:OWNER/NAME", "help": "repository to upload to"},
    "--private": {"action": "store_true", "help": "a repository that is made is private"},
    "--yes": {"action": "store_true", "help": "really upload"},
    "--model": {"metavar": "NAME", "help": "model to fit the weights to"},
    "--against": {
        "metavar": "FILE",
        "help": "certificate of an earlier check that must hold still",
    },
    "--reference": {
        "metavar": "WHICH",
        "help": "what to compare with: auto (transformers where it can), transformers, none",
    },
    "--stats": {"action": "store_true", "help": "mean and standard deviation of each tensor"},
    "--dry_run": {
        "action": "store_true",
        "help": "do everything once in a temporary folder, compare what is saved, and stop",
    },
    "--steps": {
        "metavar": "N",
        "default": "100",
        "help": "updates of a learning-rate range test (default: 100)",
    },
    "--phase": {
        "metavar": "N",
        "default": "0",
        "help": "phase to test the learning rate of, by its number, or all (default: 0)",
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
    "--verbose": {"action": "store_true", "help": "also one line a class or value"},
    "--format": {
        "choices": ("jsonl", "csv"),
        "help": "jsonl: one JSON object a line; csv, the default where --out ends in .csv",
    },
    "--threshold": {
        "type": float,
        "default": 0.5,
        "metavar": "P",
        "help": "several classes an image: those whose probability exceeds it (default: 0.5)",
    },
    "--dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "help": "round the weights that are written to it (default: as they are)",
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
        ("--workdir!", "--split", "--step", "--verbose", "--out"),
    ),
    "predict": Verb(
        "jft.verbs.runs:predict",
        "what a trained model says of image files, one row a file",
        ("--workdir!", "--step", "--threshold", "--format", "--out"),
        ("FILE", "+", "image files, directories of them, or quoted patterns"),
    ),
    "export": Verb(
        "jft.verbs.runs:export",
        "write safetensors and config.json in the source's names",
        ("--workdir!", "--step", "--out!", "--dtype"),
    ),
    "push": Verb(
        "jft.verbs.push:push",
        "upload an export to the Hugging Face hub; lists the files unless --yes",
        ("--workdir!", "--to!", "--step", "--private", "--yes"),
    ),
    "plan": Verb(
        "jft.verbs.runs:plan",
        "groups, phases, FLOPs and bytes before a run",
        ("--config!", "--leaves"),
    ),
    "lr-find": Verb(
        "jft.verbs.lr_find:run",
        "find a learning rate: the loss while the rate rises",
        ("--config!", "--phase", "--steps", "--out"),
    ),
    "compare": Verb(
        "jft.verbs.compare:run",
        "runs beside each other: config, metrics, curves, cost",
        ("--out",),
        ("DIR", "+", "run directories, two or more"),
    ),
    "report": Verb("jft.verbs.runs:report", "write report.html of a run again", ("--workdir!",)),
    "recipes": Verb(
        "jft.verbs.recipes:recipes",
        "`list` the built-in configs, `show` one, or `copy` it to change it",
        ("--out",),
        ("list | show NAME | copy NAME", "*", "what to do; list by default"),
    ),
    "config": Verb(
        "jft.verbs.recipes:config",
        "`show`: every key of a config with its value, type and meaning",
        ("--config!",),
        ("show", "+", "the only action"),
    ),
    "models": Verb(
        "jft.verbs.models:models",
        "names by pattern; `list PATTERN`: sizes and published weights; `show NAME`: stages",
        (),
        ("PATTERN", "*", "shell pattern of names, or: list PATTERN, or: show NAME"),
    ),
    "weights": Verb(
        "jft.verbs.weights:weights",
        "`show`, `check`, `convert` or `diff` weights of a source",
        ("--model", "--out", "--dtype", "--stats", "--against", "--reference"),
        (
            "ACTION SOURCE",
            "+",
            "show SOURCE (tensors, and the model they belong to), check SOURCE (fit them to their"
            " model, run it, and certify what it computes), convert SOURCE (write them as --model's"
            " safetensors to --out), diff A B (exit 1 where they differ); a SOURCE is"
            " pkg:DISTRIBUTION/path, file:PATH or hf:OWNER/NAME[@REVISION][/PATH]",
        ),
    ),
    "data": Verb(
        "jft.verbs.data:data",
        "`list` kinds of data, `inspect` every image of a config's, `prepare` them ahead",
        ("--config", "--out"),
        ("list | inspect | prepare", "+", "list [KIND]; inspect; prepare [SOURCE]"),
    ),
    "doctor": Verb("jft.doctor:run", "check Python, packages, devices and folders"),
}
