"""The learning rate of a config, found by a range test of its phases."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jft.config import to_json
from jft.errors import ConfigError
from jft.freeze.phases import Phase
from jft.prepare import setup
from jft.report.lr_page import render
from jft.report.rundir import write_atomic, write_json
from jft.report.tables import Table
from jft.train.range_test import RangeTest, range_test

DEFAULT = "valley"  # the suggestion that the override line takes, as fastai's does
MOST_SETS = 12  # more phases than that are chosen one by one
FEWEST_STEPS = 10


def lr_find(
    config: ConfigDict,
    phase: str = "0",
    steps: int = 100,
    model: Any = None,
    tell: Callable[[int, float, float], None] = lambda *_: None,
) -> list[RangeTest]:
    """Returns the range test of one phase of a config, or of each; touches no run directory.

    Args:
      config: from `jft.load_config`; its rate, schedule and warm-up are left aside.
      phase: the number of a phase, or "all": one test a trainable set and factor on the rate.
      steps: updates of each test.
      model: the user's own module instead of `config.model`.
      tell: called with (updates done, rate, average loss).

    Raises:
      ConfigError: there is no such phase, there are too many, or too few steps.
    """
    if steps < FEWEST_STEPS:
        raise ConfigError(f"--steps={steps}: a range test needs at least {FEWEST_STEPS}")
    with tempfile.TemporaryDirectory(prefix="jft-lr-find-") as folder:
        run = setup(config, Path(folder), model=model)
        return [range_test(run, each, steps, tell) for each in chosen(run.phases, phase)]


def chosen(phases: Sequence[Phase], which: str) -> list[Phase]:
    """Returns the phases to test; `which` is a number, or "all": one of each set and factor.

    Raises:
      ConfigError: there is no such phase, or too many.
    """
    if which == "all":
        # From the start weights it does not matter which leaves trained before.
        distinct = {(frozenset(each.entered), each.lr_scale): each for each in reversed(phases)}
        found = sorted(distinct.values(), key=lambda each: each.index)
        if len(found) > MOST_SETS:
            raise ConfigError(
                f"--phase=all: the run has {len(found)} trainable sets; name one, --phase=0"
            )
        return found
    if not which.isdigit() or int(which) >= len(phases):
        known = "0" if len(phases) == 1 else f"0 to {len(phases) - 1}"
        raise ConfigError(f"--phase={which}: should be all, or a number: {known}")
    return [phases[int(which)]]


def best(tests: Sequence[RangeTest]) -> float | None:
    """Returns the rate that no tested phase finds too high, or None without a suggestion."""
    found = [test.suggestions[DEFAULT] for test in tests if test.suggestions]
    return min(found, default=None)


def override(tests: Sequence[RangeTest]) -> str:
    """Returns the command line's flag that sets `best`, or ""."""
    rate = best(tests)
    return f"--config.optim.learning_rate={short(rate)}" if rate else ""


def short(rate: float) -> str:
    """Returns a rate with two digits, as people write it: "3.2e-4"."""
    mantissa, _, exponent = f"{rate:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def table(tests: Sequence[RangeTest]) -> Table:
    """Returns the tests as a table; of several phases with their factors on `best`."""
    base = best(tests)
    names = list(dict.fromkeys(name for test in tests for name in test.suggestions))
    several = len(tests) > 1
    rows = [["phase", "train", "updates", "lowest loss", *names]]
    rows[0] += ["times the lowest"] if several else []
    for test in tests:
        shown = [short(test.suggestions[name]) if test.suggestions else "-" for name in names]
        ended = f" ({test.stopped})" if test.stopped else ""
        lowest = f"{min(test.averages):.4g}" if test.averages else "-"
        rows.append([str(test.phase), test.name, f"{len(test.rates)}{ended}", lowest, *shown])
        if several:
            own = test.suggestions.get(DEFAULT)
            rows[-1].append(f"{own / base:.3g}" if own and base else "-")
    return Table(rows, frozenset({1}))


def save(tests: Sequence[RangeTest], config: ConfigDict, out: Path) -> list[Path]:
    """Writes lr.json and lr.html into the folder `out`, or one of them where that is its name.

    Raises:
      OSError: a file cannot be written.
    """
    single = out.suffix in (".json", ".html")
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    wanted = [out] if single else [out / "lr.json", out / "lr.html"]
    found = [test.to_dict() for test in tests]
    for path in wanted:
        if path.suffix == ".json":
            kept = {"override": override(tests), "tests": found}
            write_json(path, {**kept, "config": json.loads(to_json(config))})
        else:
            write_atomic(path, render(found, override(tests), _about(config)))
    return wanted


def _about(config: ConfigDict) -> str:
    return (
        f"{config.model.name} with {config.optim.name}, batches of {config.train.batch_size},"
        f" seed {config.seed}."
    )
