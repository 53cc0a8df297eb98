"""Elementary decisions on signals: pure functions of numbers, so that a log can be replayed."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jft.errors import ConfigError, nearest

COMBINE: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "norm": lambda values: math.sqrt(math.fsum(value * value for value in values)),
    "max": max,
    "mean": lambda values: math.fsum(values) / len(values),
}


def block_values(
    values: Mapping[str, float], members: Mapping[str, frozenset[str]], combine: str
) -> dict[str, float]:
    """Returns {block: value} from {path: value}.

    Args:
      values: a signal by leaf; leaves without one do not take part, nor blocks without any.
      members: {block: its leaves}, in the order of the result.
      combine: "sum" (of the L1 norms of grad_change), "norm" (of norms, as one vector's), "max"
        or "mean".

    Raises:
      ConfigError: another way to combine.
    """
    if combine not in COMBINE:
        raise ConfigError(f"combine: no way {combine!r}{nearest(combine, COMBINE)}")
    found: dict[str, float] = {}
    for block, paths in members.items():
        own = [values[path] for path in sorted(paths) if path in values]
        if own:
            found[block] = float(COMBINE[combine](own))
    return found


def threshold(values: Mapping[str, float], at_least: float) -> set[str]:
    """Returns the names whose value is `at_least` or more.

    Auto-SNR trains those that reach 0.95 (anniesch/surgical-finetuning, main.py).
    """
    return {name for name, value in values.items() if value >= at_least}


def percentile(values: Mapping[str, float], q: float) -> float:
    """Returns the `q`-th percentile (0 to 100) of the values, interpolated linearly."""
    if not values or not 0 <= q <= 100:
        raise ConfigError(f"percentile: {q!r} of {len(values)} values; q is 0 to 100 of some")
    return float(np.percentile(list(values.values()), q))


def top_share(values: Mapping[str, float], share: float) -> set[str]:
    """Returns the round(share * n) names with the largest values; of equal ones the first given.

    Spectrum keeps int(share * n) a module type (cognitivecomputations/spectrum, spectrum.py).
    """
    ranked = sorted(values, key=lambda name: -values[name])
    return set(ranked[: _count(share, len(values))])


def lowest_share(values: Mapping[str, float], share: float) -> set[str]:
    """Returns the round(share * n) names with the smallest values; of equal ones the first given.

    SlimFit freezes int(0.9 n) of its leaves (arashardakani/SlimFit, ViT/CIFAR10.py).
    """
    ranked = sorted(values, key=lambda name: values[name])
    return set(ranked[: _count(share, len(values))])


def _count(share: float, among: int) -> int:
    if not 0 <= share <= 1:
        raise ConfigError(f"share: {share!r} should be from 0 to 1")
    return round(share * among)


def change_ratio(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Returns eta = |before - now| / before of each name in both; 0 where `now` is 0.

    AutoFreeze's (Liu et al. 2021, arXiv:2102.01386; read in YuhanLiu11/AutoFreeze,
    freeze_intermediate_e2e_lr.py), of the L1 norm of each block's summed gradients. There a
    `before` of 0 divides by zero; here it counts as no change.
    """
    return {
        name: abs(before[name] - value) / before[name] if before[name] and value else 0.0
        for name, value in now.items()
        if name in before
    }


def percentile_cut(eta: Sequence[float], q: float = 50.0) -> int:
    """Returns how many of the active blocks freeze: those before the first that reaches the bound.

    AutoFreeze's rule, same source: the bound is the q-th percentile of eta over the active blocks,
    and the cut moves to the first with eta >= bound. The largest always reaches it, so one stays.

    Args:
      eta: of the active blocks, from the input side.
      q: 0 to 100; the authors take 50.
    """
    if not eta:
        return 0
    bound = np.percentile(np.asarray(eta, np.float64), q)
    return next(at for at, value in enumerate(eta) if value >= bound)


def flat(history: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether a series has become flat.

    Smoothed by the moving average over `window` values, each of its last `window` changes is at
    most `tolerance` times the first smoothed value in size; 2 * window values are needed. Egeria
    freezes a front block whose plasticity is flat (Wang et al. 2023, arXiv:2201.06227); the exact
    form is unverified.
    """
    if window < 1 or tolerance < 0:
        raise ConfigError(f"flat: window {window} should be 1 or more, {tolerance!r} 0 or more")
    if len(history) < 2 * window:
        return False
    smooth = np.convolve(np.asarray(history, np.float64), np.ones(window) / window, "valid")
    changes = np.abs(np.diff(smooth))[-window:]
    return bool(np.all(changes <= tolerance * abs(smooth[0])))
