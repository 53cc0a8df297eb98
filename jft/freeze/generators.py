"""Generators: rules that write a run of phases, from which the published methods are made.

Each takes the outline of its stretch and returns entries whose `until` is a step of the run. In a
config they stand where a phase does: "head@20% | thaw(every=1ep)", or
{"generator": "sample", "count": 2, "every": 20}.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jft.errors import ConfigError, nearest
from jft.freeze.entries import Entry
from jft.freeze.outline import Outline

ORDERS = ("top_down", "bottom_up", "random")


def thaw(
    outline: Outline, *, order: str = "top_down", every: float | int | str | None = None
) -> list[Entry]:
    """Trains one more unit each period, until all train.

    Args:
      outline: of the stretch.
      order: "top_down" begins at the head, "bottom_up" at the input, "random" draws by the seed.
      every: period, 20, "1ep" or "5%"; None spreads the units evenly over the stretch.
    """
    units = ordered(outline, outline.units, order)
    count = len(units)
    ticks = outline.ticks(every, "freeze.phases: every") if every is not None else []
    entries: list[Entry] = []
    for number in range(1, count + 1):
        if every is None:
            stop = outline.step_of(number / count)
        else:
            stop = ticks[number - 1] if number <= len(ticks) else outline.stop
        train = "all" if number == count else _union(outline, units[:number])
        entries.append({"train": train, "until": outline.stop if number == count else stop})
        if stop >= outline.stop:
            break
    kept = _clipped(entries, outline)
    if every is None:
        kept[-1]["train"] = "all"  # also where there are fewer steps than units
    return kept


def freeze(
    outline: Outline,
    *,
    order: str = "bottom_up",
    begin: float = 0.0,
    end: float = 1.0,
    power: float = 1.0,
    keep: int = 1,
) -> list[Entry]:
    """Freezes one more unit at each of its times; the last `keep` units train to the end.

    Unit i of n (in `order`) freezes at the share (begin + (end - begin) * i / n) ** power of the
    stretch, with n units in all, those kept among them.
    """
    if keep < 1:
        raise ConfigError(f"freeze.phases: keep={keep} would freeze everything; give 1 or more")
    units = ordered(outline, outline.units, order, keep)
    count = len(units)
    times = [(begin + (end - begin) * i / count) ** power for i in range(count - keep)]
    return freeze_at(outline, units, times)


def freeze_at(outline: Outline, units: Sequence[str], shares: Sequence[float]) -> list[Entry]:
    """Returns phases in which units[i] freezes at shares[i] of the stretch, in that order."""
    return freeze_from(outline, units, [outline.step_of(share) for share in shares])


def freeze_from(outline: Outline, units: Sequence[str], steps: Sequence[int]) -> list[Entry]:
    """Returns phases in which units[i] is frozen from steps[i] on; `steps` do not fall."""
    stops: dict[int, int] = {}
    for number, step in enumerate(steps):
        stops[step] = number + 1  # units frozen from that step on
    entries: list[Entry] = []
    frozen = 0
    for step in sorted(stops):
        if step >= outline.stop:
            break
        entries.append({"train": _union(outline, units[frozen:]), "until": step})
        frozen = max(frozen, stops[step])
    entries.append({"train": _union(outline, units[frozen:]), "until": outline.stop})
    return _clipped(entries, outline)


def sample(
    outline: Outline,
    *,
    count: int = 2,
    every: float | int | str = 20,
    replace: bool = True,
    always: str | None = None,
) -> list[Entry]:
    """Trains `count` blocks drawn uniformly in each period, with what always trains.

    Args:
      outline: of the stretch.
      count: blocks at a time.
      every: period.
      replace: False draws every block once a sweep, in a new order each time.
      always: set expression that trains throughout; None is all that is in no block, "" nothing.
    """
    blocks, spans = outline.block_units, outline.spans(every, "freeze.phases: every")
    if not isinstance(always, str | None):
        raise ConfigError(f"freeze.phases: always={always!r} should be a set expression")
    if not 1 <= count <= len(blocks):
        raise ConfigError(f"freeze.phases: count={count}: give 1 to {len(blocks)} blocks")
    random = np.random.Generator(np.random.PCG64([outline.seed, outline.start]))
    menu = _menu(random, len(blocks), count, outline.max_sets)
    base = outline.always if always is None else always
    entries: list[Entry] = []
    bag: list[int] = []
    for stop in spans:
        if menu is not None:
            chosen = menu[int(random.integers(len(menu)))]
        elif replace:
            chosen = sorted(random.choice(len(blocks), count, replace=False).tolist())
        else:
            if len(bag) < count:
                sweep = random.permutation(len(blocks)).tolist()
                # What is left of the last sweep comes first, and late in its own new one.
                bag += sorted(sweep, key=bag.__contains__)
            chosen, bag = sorted(bag[:count]), bag[count:]
        train = " + ".join([blocks[b] for b in chosen] + ([base] if base else []))
        entries.append({"train": train, "until": stop})
    return entries


def _menu(
    random: np.random.Generator, blocks: int, count: int, max_sets: int | None
) -> list[list[int]] | None:
    """The sets to draw from where their number is bounded: each block is in one of them."""
    if max_sets is None or math.comb(blocks, count) <= max_sets:
        return None
    if max_sets * count < blocks:
        least = math.ceil(blocks / count)
        raise ConfigError(f"freeze.max_sets: {blocks} blocks by {count} need {least} sets or more")
    menu: list[list[int]] = []
    while len(menu) < max_sets:
        order = random.permutation(blocks).tolist()
        order += order[: -len(order) % count]
        for at in range(0, len(order), count):
            chosen = sorted(order[at : at + count])
            if chosen not in menu and len(menu) < max_sets:
                menu.append(chosen)
    return menu


def cycle(
    outline: Outline,
    *,
    order: str = "bottom_up",
    every: float | int | str | None = None,
    size: int = 1,
    parts: str = "units",
    always: str = "",
) -> list[Entry]:
    """Trains each part alone in turn, again and again until the stretch ends.

    Args:
      outline: of the stretch.
      order: in which the parts come.
      every: steps a part; None gives each an equal share of one sweep over the stretch.
      size: consecutive units a part.
      parts: "units" (stem, blocks, head) or "blocks".
      always: set expression that trains throughout.
    """
    if parts not in ("units", "blocks"):
        raise ConfigError(f"freeze.phases: parts={parts!r} should be 'units' or 'blocks'")
    units = outline.units if parts == "units" else outline.block_units
    if size < 1:
        raise ConfigError(f"freeze.phases: size={size} should be 1 or more")
    chunks = [units[at : at + size] for at in range(0, len(units), size)]
    chunks = [chunks[i] for i in order_of(outline, len(chunks), order)]
    trains = [" + ".join([*chunk, *([always] if always else [])]) for chunk in chunks]
    count = len(trains)
    if every is None:
        stops = [outline.step_of((i + 1) / count) for i in range(count)]
        entries: list[Entry] = [
            {"train": train, "until": stop} for train, stop in zip(trains, stops, strict=True)
        ]
        return _clipped(entries, outline)
    spans = outline.spans(every, "freeze.phases: every")
    return [{"train": trains[i % count], "until": stop} for i, stop in enumerate(spans)]


GENERATORS: dict[str, Callable[..., list[Entry]]] = {
    "thaw": thaw,
    "freeze": freeze,
    "sample": sample,
    "cycle": cycle,
}


def order_of(outline: Outline, count: int, order: str) -> list[int]:
    """Returns the positions 0 (input side) .. count - 1 in the order asked for."""
    if order not in ORDERS:
        raise ConfigError(
            f"freeze.phases: order={order!r}{nearest(order, ORDERS)}; {', '.join(ORDERS)}"
        )
    positions = list(range(count))
    if order == "random":
        return np.random.Generator(np.random.PCG64([outline.seed, 1])).permutation(count).tolist()
    return positions if order == "bottom_up" else positions[::-1]


def ordered(outline: Outline, units: Sequence[str], order: str, keep: int = 0) -> list[str]:
    """Returns the units in order; the last `keep` stay at the end whatever the order."""
    if not 0 <= keep < len(units):
        raise ConfigError(f"freeze.phases: keep={keep}: the model has {len(units)} units")
    free = units[: len(units) - keep]
    moved = [free[i] for i in order_of(outline, len(free), order)]
    return moved + list(units[len(units) - keep :])


def _union(outline: Outline, units: Sequence[str]) -> str:
    """One expression of the units, short where they are all above a cut."""
    positions = sorted(outline.units.index(unit) for unit in units)
    if positions == list(range(positions[0], len(outline.units))):
        return outline.above(positions[0])
    return " + ".join(outline.units[at] for at in positions)


def _clipped(entries: list[Entry], outline: Outline) -> list[Entry]:
    """Drops phases without a step: several units that come at one step come together."""
    kept: list[Entry] = []
    begin = outline.start
    for entry in entries:
        stop: Any = min(entry["until"], outline.stop)
        if stop > begin:
            kept.append({**entry, "until": stop})
            begin = stop
    return kept
