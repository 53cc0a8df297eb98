"""Methods whose phases follow from the clock alone."""

from jft.freeze.outline import Outline
from jft.freeze.recipe import Recipe


def lp_ft(
    outline: Outline, *, head_until: float | int | str = 0.3, lr_scale: float = 1.0
) -> Recipe:
    """The head on the frozen backbone, then everything (Kumar et al. 2022, arXiv:2202.10054).

    `lr_scale` multiplies the learning rate of the second phase.
    """
    del outline
    return Recipe([{"train": "head", "until": head_until}, {"train": "all", "lr_scale": lr_scale}])
