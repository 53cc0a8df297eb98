"""The tensors of a source by name: views on mapped files, and what is read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np


class Later(NamedTuple):
    """A tensor that is not in memory.

    Attributes:
      shape: of it.
      dtype: of it.
      read: returns it, as a new array each time; a WeightsError where the file is damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Arrays(Mapping[str, np.ndarray]):
    """Tensors by name, in the order of their files.

    Whoever goes through them one by one holds one of them at a time.
    """

    def __init__(
        self,
        held: Mapping[str, np.ndarray | Later],
        checks: Iterable[Callable[[], None]] = (),
    ) -> None:
        """Takes the tensors, and what compares the files with the checksums in them."""
        self._held = dict(held)
        self.checks = tuple(checks)

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._held[name]
        return found.read() if isinstance(found, Later) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def verify(self) -> Arrays:
        """Compares the files with their own checksums, and returns these arrays.

        What is read later is compared then.

        Raises:
          WeightsError: a file is damaged.
        """
        for check in self.checks:
            check()
        return self

    def renamed(self, change: Callable[[str], str]) -> Arrays:
        """The same tensors under other names."""
        return Arrays({change(name): held for name, held in self._held.items()}, self.checks)

    def joined(self, other: Arrays) -> Arrays:
        """These tensors and others, whose names come first where both have one."""
        return Arrays(self._held | other._held, (*self.checks, *other.checks))

    def outline(self) -> dict[str, np.ndarray]:
        """Arrays of the same shapes and dtypes, whose numbers are not read."""
        return {
            name: np.broadcast_to(np.zeros((), held.dtype), held.shape)
            for name, held in self._held.items()
        }
