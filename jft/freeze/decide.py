"""Elementary decisions on signals: pure functions of numbers, so that a log can be replayed."""

from collections.abc import Mapping, Sequence

import numpy as np

from jft.errors import ConfigError


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
