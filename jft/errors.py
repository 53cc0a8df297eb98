"""The errors that a user can cause, each with the exit code of the command line."""

import difflib
import itertools
from collections.abc import Iterable

_SEARCHED = 2_000  # choices that `nearest` looks at


class JftError(Exception):
    """Base of every expected error; the command line prints its one line, never a traceback."""

    exit_code = 1


class ConfigError(JftError, ValueError):
    """A key, value, flag or argument is wrong (exit 2)."""

    exit_code = 2


class DataError(JftError, ValueError):
    """A data set, label or image is missing or wrong (exit 3)."""

    exit_code = 3


class WeightsError(JftError, ValueError):
    """A weights file or checkpoint does not fit, or is damaged (exit 4)."""

    exit_code = 4


class DivergedError(JftError):
    """The loss or a gradient stopped being finite (exit 5)."""

    exit_code = 5


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the choice closest to `name`, or ""."""
    # The search is slow, and a file of weights may hold 100,000 names: the first few do.
    few = [str(choice) for choice in itertools.islice(choices, _SEARCHED)]
    found = difflib.get_close_matches(name, few, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
