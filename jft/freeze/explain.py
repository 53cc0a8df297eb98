"""The explain table: what trains, when, why, at which rate and at what size."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from jft.freeze.groups import Groups
from jft.freeze.phases import Phase
from jft.report.tables import Table
from jft.tree import Flat, count_bytes, count_params

MOST_COLUMNS = 8


def explain(
    groups: Groups,
    phases: Sequence[Phase],
    shapes: Flat,
    rates: Mapping[str, Collection[float]],
    decays: Mapping[str, float],
    *,
    every_leaf: bool = False,
) -> Table:
    """Returns a table with one line a structural group, or a leaf.

    Args:
      groups: of the model.
      phases: of the run; one column each: "train", "2 of 6" leaves of the group, or "-" frozen;
        of more than MOST_COLUMNS only in how many of them the group trains.
      shapes: {path: shape and dtype}.
      rates: {path: peak learning rates where it trains}, before the phase's own factor.
      decays: {path: weight decay}.
      every_leaf: a line a leaf, with the pattern that put it in its group.
    """
    head = ["leaf" if every_leaf else "group", "pattern" if every_leaf else "leaves"]
    few = len(phases) <= MOST_COLUMNS
    named = [f"phase {p.index}" for p in phases] if few else ["trains in phases"]
    head += ["parameters", "bytes", "rate", "decay", *named]
    rows = [head]
    if every_leaf:
        members = [(path, groups.patterns[path][1], [path]) for path in groups.paths]
    else:
        members = []
        for name in groups.order:
            paths = [path for path in groups.paths if path in groups.members[name]]
            members.append((name, f"{len(paths):,}", paths))
    for name, second, paths in members:
        leaves = {path: shapes[path] for path in paths}
        row = [name, second, f"{count_params(leaves):,}", f"{count_bytes(leaves):,}"]
        row += [_span(r for p in paths for r in rates[p]), _span(decays[p] for p in paths)]
        if few:
            row += [_trains(phase, paths) for phase in phases]
        else:
            count = sum(any(phase.mask[path] for path in paths) for phase in phases)
            row.append(f"{count} of {len(phases)}")
        rows.append(row)
    everything = {path: shapes[path] for path in groups.paths}
    total = ["all", f"{len(everything):,}" if not every_leaf else ""]
    total += [f"{count_params(everything):,}", f"{count_bytes(everything):,}", "", ""]
    for phase in phases if few else ():
        part = {path: leaf for path, leaf in everything.items() if phase.mask[path]}
        total.append(f"{count_params(part):,}")
    total += [] if few else [""]
    rows.append(total)
    return Table(rows, frozenset({0, 1} if every_leaf else {0}), sums=True)


def _span(values: Iterable[float]) -> str:
    found = set(values)
    low, high = min(found), max(found)
    return f"{high:.3g}" if low == high else f"{low:.3g}-{high:.3g}"


def _trains(phase: Phase, paths: Sequence[str]) -> str:
    count = sum(phase.mask[path] for path in paths)
    return "train" if count == len(paths) else f"{count} of {len(paths)}" if count else "-"
