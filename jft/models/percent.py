"""Crops as a share of the picture, as ConvNeXt's processor and timm state them."""

from __future__ import annotations

_DIGITS = 12


def percent_side(size: int, percent: float) -> int:
    """Side of the picture of which `size` pixels are seen: size / percent, rounded down."""
    return max(size, int(size / percent))


def percent_fraction(size: int, percent: float) -> float:
    """`Preprocess.crop_fraction` of it."""
    return size / percent_side(size, percent)


def crop_percent(size: int, side: int) -> float | None:
    """A short number p with int(size / p) == side; None where none is.

    It is size / side itself where that has few digits, so that other sizes are cropped alike.
    """
    exact = size / side
    short = [round(exact, digits) for digits in range(1, 5)]
    near = [percent for percent in short if abs(percent - exact) < 1e-9]
    below = [(int(exact * 10**n) - less) / 10**n for n in range(1, _DIGITS) for less in (0, 1)]
    fitting = (p for p in (*near, *short, *below) if 0 < p <= 1 and int(size / p) == side)
    return next(fitting, None)
