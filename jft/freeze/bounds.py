"""Bounds on compilation: a menu of trainable sets to choose from, and cuts in coarser steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask
from jft.freeze.outline import Outline
from jft.freeze.phases import Stretch

_NAMED = 12


def bound_sets(
    stretches: Sequence[Stretch], max_sets: int, *, grows: bool
) -> tuple[list[Stretch], str]:
    """Returns stretches with at most `max_sets` trainable sets, and what was given up, or "".

    The menu is taken evenly from the sets in order of appearance, first and last among them; where
    decisions add sets as the run goes (`grows`) it is the first ones. A set that is not on the
    menu becomes the one that differs in the fewest leaves, the earlier of equals.
    """
    sets = list(dict.fromkeys(_leaves(stretch.mask) for stretch in stretches))
    if len(sets) <= max_sets:
        return list(stretches), ""
    if grows or max_sets == 1:
        menu = sets[:max_sets]
    else:
        menu = [sets[round(i * (len(sets) - 1) / (max_sets - 1))] for i in range(max_sets)]
    masks = {_leaves(stretch.mask): stretch for stretch in reversed(stretches)}
    bounded: list[Stretch] = []
    for stretch in stretches:
        wanted = _leaves(stretch.mask)
        nearest = min(menu, key=lambda leaves: (len(leaves ^ wanted), menu.index(leaves)))
        chosen = masks[nearest]
        new = stretch
        if nearest != wanted:
            new = replace(stretch, mask=chosen.mask, name=chosen.name)
        if bounded and bounded[-1].same(new) and new.state != "reset":
            bounded[-1] = replace(bounded[-1], stop=new.stop)
        else:
            bounded.append(new)
    return bounded, f"{max_sets} of {len(sets)} trainable sets (freeze.max_sets)"


def menu_note(outline: Outline, entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns what `max_sets` changes in what the generator "sample" draws from, or ""."""
    limit = outline.max_sets
    for entry in entries:
        if limit is not None and entry.get("generator") == "sample":
            count = entry.get("count", 2)
            sets = math.comb(len(outline.block_units), count)
            if sets > limit:
                return f"{limit} of {sets:,} sets of {count} blocks (freeze.max_sets)"
    return ""


def menu_text(stretches: Sequence[Stretch]) -> str:
    """Returns the names of the trainable sets, of many the first ones."""
    menu = list(dict.fromkeys(stretch.name for stretch in stretches))
    return " | ".join(menu[:_NAMED]) + (" | ..." if len(menu) > _NAMED else "")


def _leaves(mask: Mask) -> frozenset[str]:
    return frozenset(path for path, trains in mask.items() if trains)


def quantise_cut(mask: Mask, groups: Groups, outline: Outline) -> Mask:
    """Returns the mask with its cut lowered to a multiple of `outline.cut_quantum` blocks.

    Only a pure cut moves, with all trained above it and nothing below.
    """
    quantum = outline.cut_quantum
    if quantum <= 1 or not outline.blocks:
        return mask
    for block in range(outline.blocks):
        unit = outline.first_block + block
        if mask == make_mask(outline.above(unit), groups):
            return make_mask(
                outline.above(outline.first_block + block // quantum * quantum), groups
            )
    return mask
