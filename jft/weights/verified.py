"""What looks at the whole of a source's files while their leaves are converted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jft.errors import WeightsError
from jft.weights.agreement import check_card
from jft.weights.arrays import Arrays
from jft.weights.source import Source


class Verified:
    """Compares files with their checksums in a thread while leaves are converted, and hashes them.

    It ends when all that can be wrong with the files is known, and says that in place of what does
    not fit because of it. Files that nothing states a hash of are hashed after that: SHA-256 takes
    longer than the leaves, and would take a core from them.
    """

    def __init__(self, source: Source, arrays: Arrays, sha256: str | None = None) -> None:
        """Takes open files, and their hash where it is known."""
        self.source, self.arrays, self.known = source, arrays, sha256

    def __enter__(self) -> Verified:
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="jft-weights")
        self.checked = self.pool.submit(self.arrays.verify)
        self.hashed: Future[str] | None = None
        if self.source.card is not None:
            self.hashed = self._hash()
        return self

    def _hash(self) -> Future[str]:
        return self.pool.submit(lambda: self.known or self.source.sha256())

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        try:
            if error is None or isinstance(error, WeightsError):
                self.checked.result()
                if self.hashed is not None:
                    check_card(self.source, self.sha256())
            if error is None:
                self.hashed = self.hashed or self._hash()
        finally:
            self.pool.shutdown(wait=False)

    @property
    def sha256(self) -> Callable[[], str]:
        """What waits for the hash of the source; it raises a WeightsError if a file is gone."""
        text = self.source.text

        def wait() -> str:
            assert self.hashed is not None, "the leaves are not there yet"
            try:
                return self.hashed.result()
            except OSError as error:
                raise WeightsError(f"source {text!r}: {error.strerror or error}") from error

        return wait
