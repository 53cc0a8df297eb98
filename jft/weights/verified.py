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
    """Compares files with their checksums and hashes them in threads, while leaves are converted.

    It ends when all that can be wrong with the files is known, and says that in place of what does
    not fit because of it. The hash of files that nothing states a hash of may come later still:
    SHA-256 is slower than reading and casting.
    """

    def __init__(self, source: Source, arrays: Arrays, sha256: str | None = None) -> None:
        """Takes open files, and their hash where it is known."""
        self.source, self.arrays, self.known = source, arrays, sha256

    def __enter__(self) -> Verified:
        pool = ThreadPoolExecutor(2, thread_name_prefix="jft-weights")
        self.checked = pool.submit(self.arrays.verify)
        self.hashed: Future[str] = pool.submit(lambda: self.known or self.source.sha256())
        pool.shutdown(wait=False)
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if error is None or isinstance(error, WeightsError):
            self.checked.result()
            if self.source.card is not None:
                check_card(self.source, self.sha256())

    @property
    def sha256(self) -> Callable[[], str]:
        """What waits for the hash of the source; it raises a WeightsError if a file is gone."""
        hashed, text = self.hashed, self.source.text

        def wait() -> str:
            try:
                return hashed.result()
            except OSError as error:
                raise WeightsError(f"source {text!r}: {error.strerror or error}") from error

        return wait
