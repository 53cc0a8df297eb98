"""Two sets of named arrays side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Difference:
    """What two sets of arrays have in common, and what not.

    Attributes:
      only_a: names that only the first has.
      only_b: names that only the second has.
      shapes: name -> the two shapes, where they differ.
      dtypes: name -> the two dtypes, where they differ.
      moved: name -> max abs(a - b), where shapes agree and not every bit; NaN where a number is
        undefined in one of the two.
      equal: how many arrays are equal bit for bit.
    """

    only_a: list[str]
    only_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: dict[str, tuple[str, str]]
    moved: dict[str, float]
    equal: int

    def __bool__(self) -> bool:
        return bool(self.only_a or self.only_b or self.shapes or self.moved)

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return {
            "only_a": self.only_a,
            "only_b": self.only_b,
            "shapes": {name: [list(a), list(b)] for name, (a, b) in self.shapes.items()},
            "dtypes": {name: list(pair) for name, pair in self.dtypes.items()},
            "max_abs": {n: d if np.isfinite(d) else str(d) for n, d in self.moved.items()},
            "equal": self.equal,
        }

    def text(self, most: int = 20) -> str:
        """A table to print, of at most so many lines a kind; what moved farthest comes first."""
        lines = []
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            lines += _cut([f"only in {side}  {name}" for name in names], most)
        pairs = [f"shape      {name}: {a} and {b}" for name, (a, b) in self.shapes.items()]
        lines += _cut(pairs, most)
        far = sorted(self.moved.items(), key=lambda item: (item[1] == item[1], -item[1]))
        lines += _cut(
            [f"max abs    {value:<10.4g} {name}{self._dtypes(name)}" for name, value in far], most
        )
        total = [f"{self.equal} arrays are equal bit for bit"]
        counts = {
            "only in A": len(self.only_a),
            "only in B": len(self.only_b),
            "of other shapes": len(self.shapes),
            "with other numbers": len(self.moved),
        }
        total += [f"{count} {what}" for what, count in counts.items() if count]
        return "\n".join([*lines, ", ".join(total)])

    def _dtypes(self, name: str) -> str:
        return " ({} and {})".format(*self.dtypes[name]) if name in self.dtypes else ""


def compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Difference:
    """Compares two sets of arrays by name; numbers as float64, bits as they are."""
    shapes, dtypes, moved, equal = {}, {}, {}, 0
    for name in (name for name in a if name in b):
        x, y = a[name], b[name]
        if x.dtype != y.dtype:
            dtypes[name] = x.dtype.name, y.dtype.name
        if x.shape != y.shape:
            shapes[name] = x.shape, y.shape
        elif x.dtype == y.dtype and x.tobytes() == y.tobytes():
            equal += 1
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
            moved[name] = float(apart.max()) if apart.size else 0.0
    return Difference(
        only_a=[name for name in a if name not in b],
        only_b=[name for name in b if name not in a],
        shapes=shapes,
        dtypes=dtypes,
        moved=moved,
        equal=equal,
    )


def _cut(lines: list[str], most: int) -> list[str]:
    rest = len(lines) - most
    return lines if rest <= 0 else [*lines[:most], f"           and {rest} more"]
