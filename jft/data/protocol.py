"""What every source of examples offers, a view of part of one, and the check of its labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jft.data.fit import Shape
from jft.data.pixels import Pixels
from jft.errors import DataError

Kind = Literal["class", "multi", "value"]
"""What a label is: one class of an image; any number of classes; or numbers to predict."""

KINDS: tuple[Kind, ...] = ("class", "multi", "value")


class Source(Protocol):
    """Random access to labelled images; picklable, so that worker processes can hold it."""

    kind: Kind
    label_names: list[str]
    """K names: of the classes, or of the values."""
    image_shape: Shape | None
    """(H, W, C) that all images share, or None where they differ or are not known."""
    pixels: Pixels
    """How its images became canvases: bands, depth, range."""

    @property
    def dtype(self) -> np.dtype:
        """Of its images: uint8 or uint16."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Of kind "class" int32 [N], without decoding any image.

        Of "multi" float32 [N, K] of 0, 1 and NaN where it is not known; of "value" float32 [N, K].
        """
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"image": `dtype` [H, W, C], "label": a row of `labels`}; raises BadImage."""
        ...

    def id(self, i: int) -> str:
        """How messages name example i: a path, or "index 17"."""
        ...

    def gather(self, indices: np.ndarray) -> np.ndarray | None:
        """`dtype` [B, H, W, C] where images lie in memory, else None."""
        ...


class Subset:
    """The examples `indices` of another source, with their ids."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.kind: Kind = source.kind
        self.label_names = source.label_names
        self.image_shape = source.image_shape
        self.pixels = source.pixels

    @property
    def dtype(self) -> np.dtype:
        """Of its images."""
        return self.source.dtype

    @property
    def labels(self) -> np.ndarray:
        """[N] or [N, K], see `Source.labels`."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[int(self.indices[i])]

    def id(self, i: int) -> str:
        """The id in the source that this is a view of."""
        return self.source.id(int(self.indices[i]))

    def gather(self, indices: np.ndarray) -> np.ndarray | None:
        """[B, H, W, C] where images lie in memory, else None."""
        return self.source.gather(self.indices[indices])


def root_of(source: Any) -> Any:
    """The source that a view, or a view of a view, is of."""
    while isinstance(source, Subset):
        source = source.source
    return source


def label_layout(kind: Kind, num_labels: int) -> tuple[tuple[int, ...], type[np.generic]]:
    """Returns shape and dtype of the label of one example; `num_labels` is K."""
    return ((), np.int32) if kind == "class" else ((num_labels,), np.float32)


def check_targets(
    labels: Sequence[Any] | np.ndarray, kind: Kind, num_labels: int, name: Callable[[int], str]
) -> np.ndarray:
    """Labels of kind "multi" or "value" as float32 [N, K], or an error that names the first wrong.

    Args:
      labels: whatever the file held.
      kind: "multi" takes 0, 1 and NaN (not known); "value" takes finite numbers.
      num_labels: K.
      name: index -> how the message names that example.

    Raises:
      DataError: another shape than [N, K], text, or a value that the kind does not have.
    """
    try:
        array = np.asarray(labels, np.float32)
    except (TypeError, ValueError):
        raise DataError(f"labels of kind {kind!r} should be numbers, {num_labels} a row") from None
    if array.ndim == 1 and num_labels == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != num_labels:
        raise DataError(f"labels have shape {array.shape}, not [N, {num_labels}]")
    if kind == "multi":
        good, wanted = np.isnan(array) | (array == 0) | (array == 1), "0, 1 or nothing (not known)"
    else:
        good, wanted = np.isfinite(array), "a finite number"
    if not good.all():
        row, column = (int(at) for at in np.argwhere(~good)[0])
        value = array[row, column].item()
        raise DataError(f"{name(row)}: label {value!r} in place {column} is wrong: give {wanted}")
    return array


def strata(labels: np.ndarray, kind: Kind) -> np.ndarray:
    """Returns int32 [N]: the class that splits and balanced orders keep in proportion.

    Of kind "multi" it is the rarest class that an example has (one more for those without any),
    so that rare ones are in every part; of "value", tenths of the first value's range of ranks.
    """
    if kind == "class":
        return labels
    if kind == "value":
        rank = np.argsort(np.argsort(labels[:, 0], kind="stable"), kind="stable")
        return (rank * 10 // max(len(labels), 1)).astype(np.int32)
    has = labels == 1
    counts = has.sum(axis=0)
    rarest = np.where(has, counts, len(labels) + 1).argmin(axis=1)
    return np.where(has.any(axis=1), rarest, labels.shape[1]).astype(np.int32)


def check_labels(
    labels: Sequence[Any] | np.ndarray, num_classes: int | None, name: Callable[[int], str]
) -> np.ndarray:
    """Labels as int32 [N], or an error that names the first wrong one.

    Args:
      labels: whatever the file held.
      num_classes: labels must be below it; None infers it and demands that every class occurs,
        since a stray 255 would otherwise make 256 classes.
      name: index -> how the message names that example.

    Raises:
      DataError: text, floats (NaN too), negative or out-of-range labels, another shape than [N].
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"labels have shape {array.shape}, not [N]: one integer an image")
    if array.dtype == bool:
        array = array.astype(np.int32)
    top = np.iinfo(np.int32).max if num_classes is None else num_classes - 1
    wanted = "integers from 0" if num_classes is None else f"integers 0..{top}"
    if array.dtype.kind not in "iu":
        wrong = 0
        if array.dtype.kind == "f":  # prefer the telling one: NaN, then a fraction
            odd = np.flatnonzero(~np.isfinite(array) | (array != np.round(array)))
            wrong = int(odd[0]) if len(odd) else 0
        if len(array):
            value = array[wrong].item() if array.dtype.kind != "O" else array[wrong]
            kind = "text" if isinstance(value, str | bytes) else array.dtype.name
            raise DataError(f"{name(wrong)}: label {value!r} ({kind}) is wrong: give {wanted}")
    bad = np.flatnonzero((array < 0) | (array > top))
    if len(bad):
        value = array[bad[0]].item()
        raise DataError(f"{name(int(bad[0]))}: label {value} is wrong: give {wanted}")
    array = array.astype(np.int32)
    if num_classes is None and len(array):
        largest = int(array.argmax())
        classes = np.unique(array)
        if len(classes) != classes[-1] + 1:
            missing = int(np.flatnonzero(np.arange(len(classes)) != classes)[0])
            raise DataError(
                f"{name(largest)}: label {array[largest]} is the largest, but no example has label "
                f"{missing}: give data.args.num_classes if that is right"
            )
    return array
