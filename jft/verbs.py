"""The verbs that make or use a run directory; each takes the parsed arguments."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from jft import setup
from jft.config import load_config
from jft.errors import ConfigError
from jft.report.html import write_report
from jft.train.loop import fit


def train(args: argparse.Namespace) -> int:
    """Trains or resumes, and returns the run's exit code."""
    if not (args.workdir or args.dry_run):
        raise ConfigError("jft train: --workdir=DIR is missing")
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        # Never in the real run directory: the real run would resume from the trial's step.
        with tempfile.TemporaryDirectory(prefix="jft-dry-run-") as folder:
            return fit(setup.setup(config, Path(folder), dry_run=True)).exit_code
    return fit(setup.setup(config, Path(args.workdir), resume=args.resume)).exit_code


def evaluate(args: argparse.Namespace) -> None:
    """Prints the metrics of a split, and writes them as JSON where --out says so."""
    workdir = _run_directory(args)
    metrics = setup.evaluate(workdir, args.split)
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    if args.out:
        Path(args.out).write_text(json.dumps(metrics, indent=2) + "\n")


def predict(args: argparse.Namespace) -> None:
    """Writes one JSON object a file, to --out or the standard output."""
    workdir = _run_directory(args)
    rows = setup.predict(workdir, [Path(word) for word in args.words])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if args.out:
        Path(args.out).write_text(text)
    else:
        sys.stdout.write(text)


def export(args: argparse.Namespace) -> None:
    """Writes the trained weights as safetensors with their config."""
    workdir = _run_directory(args)
    print(f"exported to {setup.export(workdir, Path(args.out))}")


def plan(args: argparse.Namespace) -> None:
    """Prints groups, phases, FLOPs and bytes of a config; allocates nothing."""
    config = load_config(args.config, args.overrides)
    print(setup.plan_text(config))


def report(args: argparse.Namespace) -> None:
    """Writes report.html of a run from the files of its directory."""
    print(f"wrote {write_report(_run_directory(args))}")


def _run_directory(args: argparse.Namespace) -> Path:
    workdir = Path(args.workdir)
    if not (workdir / "config.json").is_file():
        raise ConfigError(f"--workdir={args.workdir}: no run there; it has no config.json")
    return workdir
