"""The verb `lr-find`: a learning rate for a config."""

import argparse
from pathlib import Path

from jft.config import load_config
from jft.errors import ConfigError
from jft.lr_find import lr_find, override, save, table
from jft.report.progress import Progress
from jft.report.tables import Overview


def run(args: argparse.Namespace) -> None:
    """Prints the range test of one phase or all, and the flag that sets its suggestion."""
    if not str(args.steps).isdigit():
        raise ConfigError(f"--steps={args.steps}: should be a number of updates")
    config, steps = load_config(args.config, args.overrides), int(args.steps)
    progress = Progress(steps)

    def tell(done: int, rate: float, average: float) -> None:
        progress.update(done, {"train/loss": average, "train/learning_rate": rate})

    try:
        tests = lr_find(config, args.phase, steps, tell=tell)
    finally:
        progress.close()
    Overview([table(tests)]).show()
    print(override(tests) or "the loss never fell: no suggestion")
    if args.out:
        for path in save(tests, config, Path(args.out)):
            print(f"wrote {path}")
