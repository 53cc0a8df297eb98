"""Orders that draw rare classes more often, as reproducible as a plain shuffle.

An epoch has as many visits as there are examples. How many of them go to each class follows by
systematic sampling (Madow, 1949): on a line of length N each class owns an interval, as long as its
share, and the points offset, offset + 1, ... are the visits. So an epoch gives each class its share
to within one visit; the offset of the first epoch is random and moves on by the golden ratio, so
that what is rounded down now is rounded up soon. Within a class the visits pass through
permutations, one after the other: no example is visited twice more often than another.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

SAMPLINGS = ("shuffle", "balanced", "sqrt")
_TAG = 0xBA1A  # keeps these draws apart from those of the plain shuffle
_PARTS = 1 << 32  # shares are counted in so many parts: exact integers, the same everywhere
_GOLDEN = 0x9E3779B9  # of these parts, the golden ratio


def across_epochs(
    batch: int,
    batch_size: int,
    length: int,
    epoch_of: Callable[[int], tuple[np.ndarray, np.ndarray | int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (index, how often seen before) of a batch that may cross the edges of epochs.

    Args:
      batch: its number, from 0.
      batch_size: B.
      length: visits of an epoch, N.
      epoch_of: epoch -> (indices [N], how often seen before [N], or one number for all).

    Returns:
      int64 [B] each.
    """
    epochs, places = np.divmod(np.arange(batch * batch_size, (batch + 1) * batch_size), length)
    found = np.empty((2, batch_size), np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices, seen = epoch_of(epoch)
        found[0, here] = indices[places[here]]
        found[1, here] = np.broadcast_to(seen, (length,))[places[here]]
    return found[0], found[1]


class ClassOrder:
    """Indices of the examples of each global batch [batch_size], without end; random access.

    A pure function of its arguments, as `jft.data.order.Order` is.

    Args:
      classes: int [N], from 0.
      batch_size: global.
      seed: of the run.
      sampling: "balanced" visits every class equally often, "sqrt" in proportion to the square root
        of how many examples it has.
    """

    def __init__(self, classes: np.ndarray, batch_size: int, seed: int, sampling: str) -> None:
        self.batch_size, self.seed, self.length = batch_size, seed, len(classes)
        order = np.argsort(classes, kind="stable")
        found, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
        self._members = [order[s : s + n] for s, n in zip(starts, counts, strict=True)]
        self._names = found.tolist()
        weights = np.ones(len(counts)) if sampling == "balanced" else np.sqrt(counts)
        ends = np.rint(np.cumsum(weights) / weights.sum() * _PARTS).astype(np.int64)
        self._ends = np.concatenate([[0], ends[:-1], [_PARTS]])
        self._offset = int(np.random.SeedSequence([seed, _TAG]).generate_state(1, np.uint32)[0])
        self._reset()

    def _reset(self) -> None:
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._before = (0, np.zeros(len(self._members), np.int64))
        # Threads that meet a new epoch together would each compute its order.
        self._one_at_a_time = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self)}
        del state["_epochs"], state["_before"], state["_one_at_a_time"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, batch: int) -> np.ndarray:
        return self.visits(batch)[0]

    def visits(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """(index, how often the example was seen before), int64 [batch_size] each."""
        return across_epochs(batch, self.batch_size, self.length, self._epoch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        with self._one_at_a_time:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._draw(epoch)
                if len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(index, how often seen before) of the N visits of an epoch."""
        before = self._visited(epoch)
        after = before + self._quotas(epoch)
        parts = [
            self._class_visits(at, int(start), int(stop))
            for at, (start, stop) in enumerate(zip(before, after, strict=True))
        ]
        drawn = np.concatenate([part[0] for part in parts])
        seen = np.concatenate([part[1] for part in parts])
        bits = np.random.Philox([self.seed, _TAG, epoch, 1]).random_raw(self.length)
        indices = drawn[np.argsort(bits, kind="stable")]
        # Of several visits of one example in an epoch the first in the order counts as the first.
        ranked = np.empty_like(seen)
        ranked[np.argsort(indices, kind="stable")] = seen[np.lexsort((seen, drawn))]
        return indices, ranked

    def _quotas(self, epoch: int) -> np.ndarray:
        """How many visits of an epoch each class has; together N."""
        offset = (self._offset + epoch * _GOLDEN) % _PARTS
        return np.diff(-((offset - self.length * self._ends) // _PARTS))

    def _visited(self, epoch: int) -> np.ndarray:
        """How many visits each class has had before an epoch; adds up from the last one asked."""
        known, counts = self._before if self._before[0] <= epoch else (0, 0 * self._before[1])
        for earlier in range(known, epoch):
            counts = counts + self._quotas(earlier)
        self._before = (epoch, counts)
        return counts

    def _class_visits(self, at: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Visits [start, stop) of a class: pass p goes through its permutation number p."""
        members = self._members[at]
        size = len(members)
        first, last = start // size, -(-stop // size)
        if stop <= start:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        # Philox makes four words a count: each pass has counts of its own, so any can be asked for.
        counts = -(-size // 4)
        entropy = np.random.SeedSequence([self.seed, _TAG, self._names[at]])
        key = entropy.generate_state(2, np.uint64)
        generator = np.random.Philox(key=key, counter=first * counts)
        bits = generator.random_raw((last - first) * counts * 4).reshape(last - first, -1)
        passes = np.argsort(bits[:, :size], axis=1, kind="stable")
        places = np.arange(start, stop)
        return members[passes.ravel()[start - first * size : stop - first * size]], places // size
