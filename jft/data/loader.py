"""Batches in a reproducible order, resumed exactly from one integer.

The order is a pure function of (seed, number of examples, global batch size); the position is the
number of batches consumed. Threads, worker processes and the number of ranks change neither.
"""

from __future__ import annotations

import logging
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from jft.data.check import allowed_bad
from jft.data.decode import BadImage
from jft.data.fit import COVER, Fit, Shape, fit_image
from jft.data.order import Batch, Views, check_sizes, make_order
from jft.data.protocol import Source, label_layout, root_of
from jft.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fetch:
    """Reads the rows [start, stop) of a global batch; picklable, runs in threads and workers.

    What goes wrong travels inside the batch, so that the consumer meets it in order and as the same
    exception whether a thread or another process found it.
    """

    source: Source
    image_shape: Shape
    fit: Fit
    start: int
    stop: int
    training: bool

    def __call__(self, indices: np.ndarray) -> dict[str, Any]:
        indices = np.asarray(indices)[..., self.start : self.stop]
        indices, views = indices if indices.ndim == 2 else (indices, None)
        count = self.stop - self.start
        shape, dtype = label_layout(self.source.kind, len(self.source.label_names))
        batch = {
            "image": np.zeros((count, *self.image_shape), self.source.dtype),
            "label": np.zeros((count, *shape), dtype),
            "mask": np.zeros(count, np.float32),
            "example": np.full(count, -1, np.int32),
        }
        if views is not None:
            batch["view"] = views.astype(np.int32)
        bad: list[tuple[int, str]] = []
        error = self._fill(batch, indices, bad)
        return {"batch": batch, "bad": tuple(bad), "error": error}

    def _fill(self, batch: Batch, indices: np.ndarray, bad: list[tuple[int, str]]) -> str:
        """Fills the batch in place; returns what ends the run, or ""."""
        if self.source.image_shape == self.image_shape:
            images = self.source.gather(indices)
            if images is not None:
                batch["image"][: len(indices)] = images
                batch["label"][: len(indices)] = self.source.labels[indices]
                batch["mask"][: len(indices)] = 1
                batch["example"][: len(indices)] = indices
                return ""
        for row, index in enumerate(indices):
            found = self._read(int(index), bad)
            if found is None:
                if self.training:
                    return "no image after it could be read either"
                continue
            index, example = found
            top = len(self.source.label_names) - 1
            if self.source.kind == "class" and not 0 <= example["label"] <= top:
                return f"{self.source.id(index)}: label {example['label']}: give integers 0..{top}"
            batch["image"][row] = example["image"]
            batch["label"][row] = example["label"]
            batch["mask"][row] = 1
            batch["example"][row] = index
        return ""

    def _read(self, index: int, bad: list[tuple[int, str]]) -> tuple[int, dict[str, Any]] | None:
        """Example `index` on a canvas; in training, in place of a bad one, the next readable."""
        tries = min(len(self.source), 100) if self.training else 1
        for step in range(tries):
            candidate = (index + step) % len(self.source)
            try:
                example = self.source[candidate]
                name = self.source.id(candidate)
                image = fit_image(example["image"], self.image_shape, self.fit, name)
                return candidate, {**example, "image": image}
            except BadImage as error:
                bad.append((candidate, str(error)))
        return None


class _Quota:
    """Counts distinct bad images against the share that may be skipped."""

    def __init__(self, source: Source, quota: float) -> None:
        if not 0 <= quota < 1:
            raise ConfigError(f"data.bad_image_quota={quota}: give 0 <= bad_image_quota < 1")
        self.quota = quota
        self.length = len(source)
        self.allowed = allowed_bad(quota, len(source))
        self.seen: dict[int, str] = {}

    def take(self, fetched: dict[str, Any]) -> Batch:
        """The batch, once what went wrong in it has been counted, logged or raised."""
        for index, message in fetched["bad"]:
            if int(index) in self.seen:
                continue
            self.seen[int(index)] = str(message)
            if len(self.seen) > self.allowed:
                if not self.quota:
                    raise DataError(str(message))
                raise DataError(
                    f"{len(self.seen)} of {self.length} images are bad, more than "
                    f"data.bad_image_quota={self.quota} allows; the last: {message}"
                )
            LOG.warning(
                "skipped bad image %d of %d allowed: %s", len(self.seen), self.allowed, message
            )
        if fetched["error"]:
            raise DataError(str(fetched["error"]))
        # Workers hand over shared memory, unmapped with its owner while jax may still read it.
        return {key: np.array(value) for key, value in fetched["batch"].items()}


def _stream(dataset: Any, place: str, threads: int | None, workers: int) -> Any:
    """An iterator over a random-access dataset, read ahead by threads or worker processes.

    `place` says where the images lie: "memory", "canvases" (decoded, on disk) or "files".
    """
    if place == "canvases":  # a copy each, but one that may wait for the disk
        threads, workers = min(4, os.cpu_count() or 1) if threads is None else threads, 0
    if place == "memory":  # a gather costs microseconds: threads and processes would only copy
        return iter(dataset.to_iter_dataset(_read_options(0)))
    if not workers:
        threads = min(8, os.cpu_count() or 1) if threads is None else threads
        return iter(dataset.to_iter_dataset(_read_options(threads)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers copy absl's flags, which must be parsed
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    stream = dataset.to_iter_dataset(_read_options(1))
    return iter(stream.mp_prefetch(options, worker_init_fn=_leave_signals_to_parent))


def _leave_signals_to_parent(*_: int) -> None:
    """A terminal's Ctrl-C reaches every process; the parent still needs batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_options(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


class TrainLoader:
    """Endless training batches; see `make_train_loader`.

    Attributes:
      position: batches consumed since the beginning of the run, resumed ones included.
      bad_images: index -> message of the images skipped so far by this process.
    """

    def __init__(self, stream: Any, quota: _Quota, position: int) -> None:
        self.position = position
        self.bad_images = quota.seen
        self._stream = stream
        self._quota = quota
        # At exit, modules that the reading threads need vanish first: close before that.
        self._finalizer = weakref.finalize(self, stream.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._quota.take(next(self._stream))
        self.position += 1
        return batch

    def close(self) -> None:
        """Stops threads and worker processes; called again, does nothing."""
        self._finalizer()


def make_train_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    image_shape: Shape,
    start_batch: int = 0,
    workers: int = 0,
    threads: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    bad_image_quota: float = 0.0,
    fit: Fit = COVER,
    views: int | None = None,
    sampling: str = "shuffle",
) -> TrainLoader:
    """Makes the endless stream of training batches.

    Every epoch has another order and, shuffled, sees each example once; batches cross the edges of
    epochs.
    Rank r of R gets rows [r * b, (r + 1) * b) of each global batch, b = batch_size / R, so the
    global batch is the same for every R.

    A bad image is replaced by the next readable one of the source, whatever the order, and counts
    against the quota once; the count starts afresh on resume.

    Args:
      source: the split; see jft.data.protocol.Source.
      batch_size: global, in examples.
      seed: decides the order.
      image_shape: (H, W, C) of the batch; see jft.data.images.canvas_shape.
      start_batch: batches already consumed: the stream goes on exactly there.
      workers: processes that decode; 0 uses threads. Ignored for images in memory.
      threads: decoding threads where there are no workers; None = one a core, 8 at most.
      rank: this process.
      ranks: number of processes.
      bad_image_quota: share of the split's images that may be unreadable; 0 stops at the first.
      fit: how the host makes a canvas; see jft.data.images.canvas_fit.
      views: K adds "view": int32 [b], how often the example was seen before modulo K.
      sampling: "shuffle", or "balanced" and "sqrt", which draw rare classes more often.

    Returns:
      An iterator of {"image": `source.dtype` [b, H, W, C], "label": int32 [b] or float32 [b, K],
      "mask": float32 [b], all 1, "example": int32 [b], index in the split}, with `position`,
      `bad_images` and `close()`.

    Raises:
      DataError: an empty split; while iterating, a bad image or label.
      ConfigError: sizes that do not divide, a quota out of range.
    """
    image_shape = (image_shape[0], image_shape[1], image_shape[2])  # configs give lists
    start, stop = check_sizes(source, batch_size, rank, ranks)
    quota = _Quota(source, bad_image_quota)
    fetch = _Fetch(source, image_shape, fit, start, stop, training=True)
    visits = make_order(source, batch_size, seed, sampling)
    order = grain.MapDataset.source(visits if views is None else Views(visits, views))
    stream = _stream(order[start_batch:].map(fetch), _place(fetch), threads, workers)
    return TrainLoader(stream, quota, start_batch)


def _place(fetch: _Fetch) -> str:
    root = root_of(fetch.source)
    if getattr(root, "on_disk", False):
        return "canvases"
    if fetch.source.image_shape != fetch.image_shape:
        return "files"
    # Of decoded canvases a first one that is unreadable is no reason to read ahead.
    decoded = hasattr(root, "canvases") or root.gather(np.zeros(1, np.int64)) is not None
    return "memory" if decoded else "files"


class EvalLoader:
    """One pass over a split, as often as it is iterated; see `make_eval_loader`.

    Attributes:
      bad_images: index -> message of the images left out so far by this process.
    """

    def __init__(self, dataset: Any, quota: _Quota, options: tuple[str, int | None, int]) -> None:
        self.bad_images = quota.seen
        self._dataset = dataset
        self._quota = quota
        self._options = options

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        stream = _stream(self._dataset, *self._options)
        closing = weakref.finalize(self, stream.close)
        try:
            for fetched in stream:
                yield self._quota.take(fetched)
        finally:
            closing()


def make_eval_loader(
    source: Source,
    *,
    batch_size: int,
    image_shape: Shape,
    workers: int = 0,
    threads: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    bad_image_quota: float = 0.0,
    fit: Fit = COVER,
    replace_bad: bool = False,
) -> EvalLoader:
    """Makes one pass over a split in order, each example once, iterable again and again.

    The last batch is padded to the full size: padding has mask 0, label 0 and example -1, and so
    has a bad image within the quota, unless `replace_bad`: then the next readable one stands in its
    place, as in training. All ranks see equally many batches. Arguments, batches and errors as in
    `make_train_loader`; `len` is the number of batches.
    """
    image_shape = (image_shape[0], image_shape[1], image_shape[2])  # configs give lists
    start, stop = check_sizes(source, batch_size, rank, ranks)
    quota = _Quota(source, bad_image_quota)
    fetch = _Fetch(source, image_shape, fit, start, stop, training=replace_bad)
    order = grain.MapDataset.range(len(source)).batch(batch_size, drop_remainder=False)
    return EvalLoader(order.map(fetch), quota, (_place(fetch), threads, workers))
