"""The verbs that make or use a run directory; each takes the parsed arguments."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jft import trained
from jft.config import load_config
from jft.data.decode import BadImage
from jft.dry_run import dry_run
from jft.errors import ConfigError
from jft.evaluation.prediction import check_threshold, to_text
from jft.prepare import plan_overview, setup
from jft.report.rundir import read_json, write_atomic, write_json
from jft.train.loop import fit
from jft.weights.rounding import Rounding


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
    if args.verbose:
        found = read_json(Path(args.workdir) / "eval" / f"{args.split}.json")
        print("\n" + columns(found.get("per_class") or found.get("per_value")))
    if args.out:
        write_json(Path(args.out), metrics)


def predict(args: argparse.Namespace) -> int:
    """Writes a row a file, to --out or the standard output; 3 if a file could not be read."""
    form = args.format or ("csv" if str(args.out).endswith(".csv") else "jsonl")
    broken: list[BadImage] = []

    def tell(error: BadImage) -> None:
        broken.append(error)
        print(f"jft: error: {error}", file=sys.stderr)

    threshold = check_threshold(args.threshold)
    rows = trained.predict(
        args.workdir, args.words, step=args.step, threshold=threshold, on_error=tell
    )
    text = to_text(rows, form)
    if args.out:
        write_atomic(Path(args.out), text)
    else:
        sys.stdout.write(text)
    return BadImage.exit_code if broken else 0


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of equal keys, the first a name, as a table of text."""
    keys = list(rows[0])
    cells = [[_cell(row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells, strict=True)]
    lines = []
    for line in ([key.replace("_", " ") for key in keys], *cells):
        first = line[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join((first, *rest)).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def export(args: argparse.Namespace) -> None:
    """Writes the trained weights as safetensors with their config."""
    out = trained.export(args.workdir, args.out, step=args.step, dtype=args.dtype)
    rounding = (read_json(out / "jft.json") or {}).get("rounding")
    if rounding:
        print(Rounding(**rounding).text())
    print(f"exported to {out}")


def plan(args: argparse.Namespace) -> None:
    """Prints groups, phases, FLOPs and bytes of a config; allocates nothing."""
    config = load_config(args.config, args.overrides)
    plan_overview(config, every_leaf=args.leaves).show()


def report(args: argparse.Namespace) -> None:
    """Writes report.html of a run from the files of its directory."""
    print(f"wrote {trained.report(args.workdir)}")
