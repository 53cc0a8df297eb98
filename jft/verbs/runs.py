"""The verbs that make or use a run directory; each takes the parsed arguments."""

import argparse
import json
import sys
from pathlib import Path

from jft import trained
from jft.config import load_config
from jft.dry_run import dry_run
from jft.errors import ConfigError
from jft.prepare import plan_overview, setup
from jft.report.rundir import write_atomic
from jft.train.loop import fit


def train(args: argparse.Namespace) -> int:
    """Trains or resumes, writes the report, and returns the run's exit code."""
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return dry_run(config)
    if not args.workdir:
        raise ConfigError("jft train: --workdir=DIR is missing")
    run = setup(config, Path(args.workdir), resume=args.resume)
    run.summary.show()
    outcome = fit(run)
    if outcome.exit_code == 0:
        print(f"wrote {trained.report(args.workdir)}")
    return outcome.exit_code


def evaluate(args: argparse.Namespace) -> None:
    """Prints the metrics of a split, and writes them as JSON where --out says so."""
    metrics = trained.evaluate(args.workdir, args.split, step=args.step)
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    if args.out:
        write_atomic(Path(args.out), json.dumps(metrics, indent=2) + "\n")


def predict(args: argparse.Namespace) -> None:
    """Writes one JSON object a file, to --out or the standard output."""
    rows = trained.predict(args.workdir, args.words, step=args.step)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if args.out:
        write_atomic(Path(args.out), text)
    else:
        sys.stdout.write(text)


def export(args: argparse.Namespace) -> None:
    """Writes the trained weights as safetensors with their config."""
    print(f"exported to {trained.export(args.workdir, args.out, step=args.step)}")


def plan(args: argparse.Namespace) -> None:
    """Prints groups, phases, FLOPs and bytes of a config; allocates nothing."""
    config = load_config(args.config, args.overrides)
    plan_overview(config, every_leaf=args.leaves).show()


def report(args: argparse.Namespace) -> None:
    """Writes report.html of a run from the files of its directory."""
    print(f"wrote {trained.report(args.workdir)}")
