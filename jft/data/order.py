"""The order of training examples, and batches of it that hold no images.

The order is a pure function of (seed, number of examples, global batch size), and of the classes
where rare ones are drawn more often, so any batch of it can be asked for; the view of an example is
how often it was seen before, modulo K.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jft.data.protocol import Source, label_layout, strata
from jft.data.sampling import SAMPLINGS, ClassOrder, across_epochs
from jft.errors import ConfigError, DataError, nearest

Batch = dict[str, np.ndarray]

# Threads that meet a new epoch together would each compute its order.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Order:
    """Indices of the examples of each global batch [batch_size], without end; random access.

    Every epoch is another permutation, and batches cross the edges of epochs. grain's own shuffle
    takes half a millisecond an index where the set is small.
    """

    length: int
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, batch: int) -> np.ndarray:
        return self.visits(batch)[0]

    def visits(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """(index, how often the example was seen before), int64 [batch_size] each."""
        return across_epochs(batch, self.batch_size, self.length, self._epoch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        with _ONE_AT_A_TIME:
            return _permutation(self.length, self.seed, epoch), epoch


@dataclass(frozen=True)
class Views:
    """An order with the view of each example: int64 [2, batch_size], index and view."""

    order: Order | ClassOrder
    views: int

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, batch: int) -> np.ndarray:
        indices, seen = self.order.visits(batch)
        return np.stack([indices, seen % self.views])


def make_order(
    source: Source, batch_size: int, seed: int, sampling: str = "shuffle"
) -> Order | ClassOrder:
    """Returns the order of a split's examples; see jft.data.sampling for the other samplings.

    Raises:
      ConfigError: no such sampling.
    """
    if sampling not in SAMPLINGS:
        known = ", ".join(SAMPLINGS)
        near = nearest(sampling, SAMPLINGS)
        raise ConfigError(f"data.sampling={sampling!r} is not one of {known}{near}")
    if sampling == "shuffle":
        return Order(len(source), batch_size, seed)
    return ClassOrder(strata(source.labels, source.kind), batch_size, seed, sampling)


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    # Raw bits, whose stream numpy keeps for good: that of `Generator.permutation` may change.
    order = np.argsort(np.random.Philox([seed, epoch]).random_raw(length), kind="stable")
    return order.astype(np.uint32 if length <= 1 << 32 else np.uint64)


def check_sizes(source: Source, batch_size: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows [start, stop) of each global batch that this rank reads."""
    if not len(source):
        raise DataError("the split has no examples")
    if batch_size < 1 or batch_size % ranks:
        raise ConfigError(f"batch_size={batch_size}: give a multiple of the {ranks} processes")
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} is not below {ranks} processes")
    local = batch_size // ranks
    return rank * local, (rank + 1) * local


class IndexLoader:
    """Training batches without their images; see `make_index_loader`.

    Attributes:
      position: batches consumed since the beginning of the run, resumed ones included.
    """

    def __init__(
        self, order: Views, rows: slice, labels: np.ndarray, replaced: np.ndarray | None, start: int
    ) -> None:
        self.position = start
        self._order, self._rows = order, rows
        self._labels, self._replaced = labels, replaced

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __getitem__(self, position: int) -> Batch:
        """The batch at any position, whatever was read before."""
        examples, views = self._order[position][:, self._rows]
        if self._replaced is not None:
            examples = self._replaced[examples]
        return {
            "example": examples.astype(np.int32),
            "view": views.astype(np.int32),
            "label": self._labels[examples],
            "mask": np.ones(len(examples), np.float32),
        }

    def __next__(self) -> Batch:
        batch = self[self.position]
        self.position += 1
        return batch

    def close(self) -> None:
        """Nothing is open."""


def make_index_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    views: int = 1,
    start_batch: int = 0,
    rank: int = 0,
    ranks: int = 1,
    replaced: np.ndarray | None = None,
    sampling: str = "shuffle",
) -> IndexLoader:
    """Makes the stream of `make_train_loader` without images: nothing is read or decoded.

    Args:
      source, batch_size, seed, start_batch, rank, ranks, sampling: as in `make_train_loader`.
      views: K; an example takes view v modulo K at its v-th visit.
      replaced: int [N], the index that stands for each example: of a bad image, the next readable
        one; None if all can be read.

    Returns:
      An iterator of {"example": int32 [b], "view": int32 [b], "label": int32 [b] or float32 [b, K],
      "mask": float32 [b]}, also with random access by position.

    Raises:
      DataError: an empty split.
      ConfigError: sizes that do not divide.
    """
    start, stop = check_sizes(source, batch_size, rank, ranks)
    order = Views(make_order(source, batch_size, seed, sampling), views)
    labels = np.asarray(source.labels, label_layout(source.kind, len(source.label_names))[1])
    return IndexLoader(order, slice(start, stop), labels, replaced, start_batch)
