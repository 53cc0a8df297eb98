"""Methods whose trainable set never changes."""

from jft.errors import ConfigError
from jft.freeze.outline import Outline
from jft.freeze.recipe import Recipe


def full(outline: Outline) -> Recipe:
    """Everything trains for the whole run."""
    del outline
    return Recipe([{"train": "all"}])


def linear_probe(outline: Outline) -> Recipe:
    """Only the head trains."""
    del outline
    return Recipe([{"train": "head"}])


def last_k(outline: Outline, *, k: int = 1) -> Recipe:
    """The last `k` blocks, whatever follows them, and the head train."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"freeze.args.k: {k!r} should be a whole number of blocks, 1 or more")
    if not outline.blocks:
        raise ConfigError("freeze.name: last_k needs a model with numbered blocks")
    return Recipe([{"train": f"above - block + block[-{k}:]"}])
