"""What looks at the whole of a source's files while their leaves are converted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jft.errors import WeightsError
from jft.weights.agreement import check_card
from jft.weights.arrays import Arrays
from jft.weights.source import Source


class Verified:
    """Hashes files and compares their checksums in a thread, while leaves are converted.

    What is wrong with a file is said in place of what does not fit because of it.
    """

    def __init__(self, source: Source, arrays: Arrays, sha256: str | None = None) -> None:
        """Takes open files, and their hash where it is known."""
        self.source, self.arrays, self.known = source, arrays, sha256

    def __enter__(self) -> Verified:
        self.pool = ThreadPoolExecutor(1)
        self.found = self.pool.submit(self._look)
        return self

    def _look(self) -> str:
        self.arrays.verify()
        return self.known or self.source.sha256()

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        self.pool.shutdown(wait=False)
        if error is None or isinstance(error, WeightsError):
            self.sha256()

    def sha256(self) -> str:
        """Waits for the hash of the source.

        Raises:
          WeightsError: a file is damaged, or is not the one that its jft.json was written for.
        """
        sha256 = self.found.result()
        check_card(self.source, sha256)
        return sha256
