"""Methods whose phases follow from the clock alone."""

import math
from typing import Any

from jft.errors import ConfigError, nearest
from jft.freeze.entries import Entry
from jft.freeze.generators import freeze_from, ordered
from jft.freeze.outline import Outline
from jft.freeze.recipe import Recipe

Period = float | int | str | None
POWERS = {"linear": 1, "squared": 2, "cubic": 3}
# What the authors' rates are multiplied with: the methods bring their own curves.
CONSTANT = {"schedule": "constant", "warmup_steps": 0, "per_phase": False}
# Of a method whose phases are steps of one course, not trainings of their own.
ONE_COURSE = {"per_phase": False}


def lp_ft(
    outline: Outline, *, head_until: float | int | str = 0.3, lr_scale: float = 1.0
) -> Recipe:
    """The head on the frozen backbone, then everything (Kumar et al. 2022, arXiv:2202.10054).

    `lr_scale` multiplies the learning rate of the second phase.
    """
    outline.require("lp_ft", "head")
    return Recipe([{"train": "head", "until": head_until}, {"train": "all", "lr_scale": lr_scale}])


def gradual_unfreezing(
    outline: Outline,
    *,
    every: Period = "1ep",
    rate: float = 1 / 2.6,
    cut_frac: float = 0.1,
    ratio: float = 32.0,
) -> Recipe:
    """ULMFiT's gradual unfreezing (Howard and Ruder 2018, arXiv:1801.06146).

    The top unit trains first, and one more from the top each epoch until all train. Discriminative
    rates: each unit at 1 / 2.6 of the one above. The slanted triangle is the schedule of the whole
    run. The rule is from summaries of the paper, the factor 2.6 from fastai's course, where a slice
    of four groups spans 2.6 ** 4; the paper's text is unverified. A run too short for all units at
    that pace thaws them evenly over its length.

    Args:
      outline: of the run.
      every: period of thawing.
      rate: learning rate of a unit over that of the one above.
      cut_frac: share of the run in which the rate rises.
      ratio: the highest rate over the lowest.
    """
    thaw: Entry = {"generator": "thaw", "order": "top_down", "every": every}
    if len(outline.ticks(every, "freeze.args.every")) < len(outline.units) - 1:
        thaw["every"] = None
    for name, value, high in (("cut_frac", cut_frac, 1.0), ("ratio", ratio, math.inf)):
        _check_number(name, value, 0.0, high)
    triangle = {"cut_frac": cut_frac, "ratio": ratio}
    return Recipe(
        [{**thaw, "lr_scale": {"name": "depth_decay", "rate": rate}}],
        {"schedule": "slanted_triangle", "args": triangle, "warmup_steps": 0, **ONE_COURSE},
    )


def chain_thaw(outline: Outline, *, patience: int = 5, lr_scale: float = 0.1) -> Recipe:
    """Chain-thaw (Felbo et al. 2017, arXiv:1708.00524).

    Read in bfelbo/DeepMoji, finetuning.py: the head alone, then each other layer alone from the
    first to the last, then all; every stage has a new optimizer and lasts until the validation loss
    has not fallen `patience` times in a row; constant rates, 1e-3 for the head and 1e-4 from then
    on. DeepMoji also goes back to the best weights at the end of a stage, which is not done here,
    and clips gradients to norm 1 (optim.grad_clip_norm). A stage ends at the latest after an equal
    share of what is left of the run, so that all have their turn.

    Args:
      outline: of the run.
      patience: evaluations without a better loss that end a stage.
      lr_scale: factor on the learning rate after the first stage.
    """
    outline.require("chain_thaw", "head")
    if patience < 1:
        raise ConfigError(f"freeze.args.patience: {patience!r} should be 1 or more evaluations")
    *below, top = outline.units
    rest = [f"{top} - head"] if top != "head" else []
    stages = ["head", *below, *rest, "all"]
    if len(stages) > outline.steps:
        raise ConfigError(
            f"freeze.name: chain_thaw has {len(stages)} stages but the run {outline.steps} steps"
        )
    entries: list[Entry] = [
        {
            "train": stage,
            "until": f"plateau({patience})" if stage != "all" else None,
            "state": "reset",
            "lr_scale": lr_scale if number else 1.0,
        }
        for number, stage in enumerate(stages)
    ]
    return Recipe(entries, CONSTANT)


def freezeout(
    outline: Outline, *, t0: float = 0.8, how: str = "cubic", scaled: bool = True
) -> Recipe:
    """FreezeOut (Brock et al. 2017, arXiv:1706.04983).

    Read in ajbrock/FreezeOut, train.py and densenet.py: layer i of 0..L freezes at the share
    t_i = f(t0 + (1 - t0) * i / L) of the run, f being the first, second or third power, and until
    then its rate falls along its own half cosine, a_i / 2 * (1 + cos(pi * t / t_i)) with
    a_i = a / t_i if `scaled`. The head alone has index L and trains to the end: so in densenet.py
    and WRN.py, though a comment there gives it the index of the layer before. Defaults as there:
    cubic, t0 before the power, scaled. Layers are units here (stem, blocks, head), and t_i is
    rounded up to a whole step: at the step itself the rate is 0 anyway.

    Args:
      outline: of the run.
      t0: share of the run, before the power, at which the first unit freezes.
      how: "linear", "squared" or "cubic".
      scaled: whether a unit that freezes early learns faster, so that all go the same way.
    """
    shares = _shares(t0, how, len(outline.units))
    steps = [_ceil(share * outline.steps) for share in shares]
    curves = _curves(outline, shares, steps, scaled)
    entries = freeze_from(outline, outline.units, steps[:-1])
    return Recipe([{**entry, **curves} for entry in entries], CONSTANT)


def anneal_only(
    outline: Outline, *, t0: float = 0.8, how: str = "cubic", scaled: bool = True
) -> Recipe:
    """A control: the learning-rate curves of `freezeout` with nothing frozen.

    A unit whose curve has ended stays in the optimizer at rate 0. What differs between the two is
    the compute alone; what differs between this and `full` is the effect of the curves.
    """
    shares = _shares(t0, how, len(outline.units))
    steps = [_ceil(share * outline.steps) for share in shares]
    return Recipe([{"train": "all", **_curves(outline, shares, steps, scaled)}], CONSTANT)


def linear_bottom_up(
    outline: Outline, *, start: float = 0.5, level: float = 1.0, every: Period = "1ep"
) -> Recipe:
    """Composer's LayerFreezing: units freeze from the input side, at a constant pace.

    Read in mosaicml/composer, layer_freezing.py: at the end of each epoch, when the share s of the
    run is done, int(level * (s - start) / (1 - start) * n) of the n units below the last are
    frozen; the last one never is. Defaults as there. Layers are units here (stem, blocks, head). In
    a run of one epoch, where nothing would freeze, a tenth of the run stands for one.

    Args:
      outline: of the run.
      start: share of the run before freezing begins.
      level: share of the units that is frozen at the end.
      every: how often units freeze; None is whenever one falls due.
    """
    return _linear(outline, "linear_bottom_up", "bottom_up", start, level, every)


def reversed_order(
    outline: Outline, *, start: float = 0.5, level: float = 1.0, every: Period = "1ep"
) -> Recipe:
    """A control: the times of `linear_bottom_up`, but units freeze from the top; the head trains.

    It saves dW alone: the gradient has to reach the stem to the end.
    """
    return _linear(outline, "reversed_order", "top_down", start, level, every)


def random_order(
    outline: Outline, *, start: float = 0.5, level: float = 1.0, every: Period = "1ep"
) -> Recipe:
    """A control: the times of `linear_bottom_up`, but the seed draws the order; the head trains."""
    return _linear(outline, "random_order", "random", start, level, every)


def pipetransformer(outline: Outline, *, alpha: float = 0.5, every: Period = "1ep") -> Recipe:
    """PipeTransformer's clock (He et al. 2021, arXiv:2102.03161).

    Read in Distributed-AI/PipeTransformer, freeze/auto_freeze.py: in epoch e, counted from 0,
    ceil(L * (1 - (1 - alpha) ** e)) of the L blocks are frozen, and the embeddings with the first;
    so the released code does, its rule by gradient norms being switched off. Default 0.5 as there;
    the paper goes from 1/5 to 1/2, over 10 epochs. In a run of one epoch, where nothing would
    freeze, a tenth of the run stands for one.

    Args:
      outline: of the run.
      alpha: share of the blocks still training that freezes each time.
      every: what stands for an epoch.
    """
    outline.require("pipetransformer", blocks=True)
    _check_number("alpha", alpha, 0.0, 1.0)
    frozen = [0] * outline.blocks
    ticks = _ticks(outline, every)
    for block in range(outline.blocks):
        frozen[block] = next(
            (
                tick
                for number, tick in enumerate(ticks, 1)
                if _ceil(outline.blocks * (1.0 - (1.0 - alpha) ** number)) > block
            ),
            outline.stop,
        )
    steps = [frozen[0]] * outline.first_block + frozen
    return Recipe(freeze_from(outline, outline.units, steps), ONE_COURSE)


def _linear(
    outline: Outline, name: str, order: str, start: float, level: float, every: Period
) -> Recipe:
    if len(outline.units) < 2:
        raise ConfigError(
            f"freeze.name: {name} needs two units or more, this model has one; full fits any model"
        )
    _check_number("level", level, 0.0, 1.0)
    if start != 0:
        _check_number("start", start, 0.0, 1.0)
    ticks = range(outline.stop) if every is None else _ticks(outline, every)
    units = ordered(outline, outline.units, order, keep=1)
    steps: list[int] = []
    for number in range(1, len(units)):
        share = start + (1.0 - start) * number / (level * (len(units) - 1))
        due = _ceil(share * outline.steps)
        steps.append(next((tick for tick in ticks if tick >= due), outline.stop))
    return Recipe(freeze_from(outline, units, steps), ONE_COURSE)


def _ticks(outline: Outline, every: Period) -> list[int]:
    ticks = outline.ticks(every, "freeze.args.every")
    return ticks or outline.ticks("10%", "freeze.args.every")


def _shares(t0: float, how: str, count: int) -> list[float]:
    """The share of the run at which each unit's rate has fallen to 0."""
    if how not in POWERS:
        hint = nearest(str(how), POWERS)
        raise ConfigError(f"freeze.args.how: {how!r} should be one of {', '.join(POWERS)}{hint}")
    _check_number("t0", t0, 0.0, 1.0)
    last = max(count - 1, 1)
    return [(t0 + (1.0 - t0) * unit / last) ** POWERS[how] for unit in range(count - 1)] + [1.0]


def _curves(
    outline: Outline, shares: list[float], steps: list[int], scaled: bool
) -> dict[str, Any]:
    anneal = dict(zip(outline.units, steps, strict=True))
    if not scaled:
        return {"anneal": anneal}
    scales = {unit: 1.0 / share for unit, share in zip(outline.units, shares, strict=True)}
    return {"anneal": anneal, "scales": scales}


def _ceil(value: float) -> int:
    """The next whole number, but not one more for an error of rounding."""
    return math.ceil(value - 1e-9 * max(1.0, abs(value)))


def _check_number(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless low < value <= high."""
    if not low < value <= high:
        bound = f" and at most {high:g}" if high < math.inf else ""
        raise ConfigError(f"freeze.args.{name}: {value!r} should be above {low:g}{bound}")
