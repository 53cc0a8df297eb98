"""Methods that train a few units at a time, drawn or in turn."""

from jft.freeze.entries import Entry
from jft.freeze.outline import Outline
from jft.freeze.recipe import Recipe


def lisa(
    outline: Outline, *, count: int = 2, every: float | int | str = 20, always: str | None = None
) -> Recipe:
    """LISA (Pan et al. 2024, arXiv:2403.17919).

    Read in OptimalScale/LMFlow (args.py, pipeline/utils/lisa_trainer.py): at step 0 and every 20
    steps, `count` distinct blocks, 2 by default, are drawn uniformly; embeddings, final norm and
    head train throughout. There the optimizer keeps the state of blocks at rest, here they lose it:
    that is what saves memory. The stem that always trains keeps the gradient running through all
    blocks: always="final + head" frees it.

    Args:
      outline: of the run.
      count: blocks at a time.
      every: period.
      always: set expression that trains throughout; None is all that is in no block.
    """
    outline.require("lisa", blocks=True)
    entry: Entry = {"generator": "sample", "count": count, "every": every, "always": always}
    return Recipe([entry])


def badam(
    outline: Outline,
    *,
    order: str = "top_down",
    every: float | int | str = 50,
    always: str = "head",
) -> Recipe:
    """BAdam (Luo et al. 2024, arXiv:2404.02827): block coordinate descent with Adam.

    Read in Ledzy/BAdam, block_optim.py: one block trains for `every` steps with a state that
    begins anew, then the next one. "descending" (top_down) and 50 steps are the defaults there;
    "random" goes through a fresh permutation each sweep. There the first block has one step less.
    Embeddings, final norm and head are off there unless asked for; the head is on here, with its
    state reset too, for a fresh one has to train (always="" is the published rule).

    Args:
      outline: of the run.
      order: "top_down", "bottom_up" or "random".
      every: steps a block.
      always: set expression that trains throughout; "" is nothing.
    """
    outline.require("badam", *(["head"] if always == "head" else []), blocks=True)
    entry: Entry = {"every": every, "always": always, "state": "reset"}
    if order == "random":
        return Recipe([{"generator": "sample", "count": 1, "replace": False, **entry}])
    return Recipe([{"generator": "cycle", "order": order, "parts": "blocks", **entry}])


def hift(
    outline: Outline,
    *,
    order: str = "bottom_up",
    size: int = 1,
    every: float | int | str = 1,
) -> Recipe:
    """HiFT (Liu et al. 2024, arXiv:2401.15207): hierarchical full-parameter fine-tuning.

    Read in misonsky/HiFT, hift/trainer.py and registerCallBack.py: embeddings, each block and the
    head are groups; each step trains the next `size` of them, from the bottom ("down2up") by
    default, in the same order each sweep; the learning rate moves on after a full sweep only; state
    of the groups at rest waits on the host. The final norm goes with the head here.

    Args:
      outline: of the run.
      order: "bottom_up", "top_down", or "random", drawn once.
      size: consecutive units at a time.
      every: steps each.
    """
    parts = -(-len(outline.units) // size) if size > 0 else 1
    entry: Entry = {"generator": "cycle", "order": order, "size": size, "every": every}
    hold = outline.period(every, "freeze.args.every", parts)
    return Recipe([{**entry, "state": "park"}], {"hold_steps": hold, "per_phase": False})
