"""Sources held in memory: arrays, npz files, tables of pixels, scikit-learn's bundled sets."""

from __future__ import annotations

import gzip
import io
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.fit import Shape
from jft.data.pixels import Pixels
from jft.data.protocol import Kind, check_labels, check_targets
from jft.errors import ConfigError, DataError, nearest

MAX_BYTES = 64 << 30  # an npz may unfold 1,000-fold: what it declares is checked before it is read
SKLEARN_SETS = ("digits",)
_PLAIN = Pixels()
_SPLITS = ("train", "val", "test")
# Spellings seen in the wild: jft's own, MedMNIST's, Keras's; {s} is the split.
_NPZ_KEYS = (("{s}_image", "{s}_label"), ("{s}_images", "{s}_labels"), ("x_{s}", "y_{s}"))
_NPZ_WHOLE = (("image", "label"), ("images", "labels"), ("x", "y"))


class ArraySource:
    """Images and labels in memory.

    Args:
      images: [N, H, W] or [N, H, W, C]; uint8 and uint16, or with a range any real type.
      labels: integers [N], or [N, K] of another kind.
      label_names: a name a class; "0", "1", ... by default.
      origin: where they came from, for messages.
      kind: see jft.data.protocol.
      pixels: bands, depth and range; the depth of the array where none is given.

    Raises:
      DataError: another shape or type, or a wrong label (named by its index).
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | Sequence[Any],
        label_names: Sequence[str] | None = None,
        origin: str = "",
        kind: Kind = "class",
        pixels: Pixels = _PLAIN,
    ) -> None:
        self.origin = origin
        self.kind: Kind = kind
        images = _check_images(np.asarray(images), origin)
        if pixels.depth is None:
            pixels = replace(pixels, depth=16 if images.dtype == np.uint16 else 8)
        self.pixels = pixels
        self.images = _converted(images, pixels, origin or "images")
        self.image_shape: Shape | None = self.images.shape[1:]
        if kind == "class":
            num_classes = None if label_names is None else len(label_names)
            self._labels = check_labels(labels, num_classes, self.id)
        else:
            labels = np.asarray(labels)
            width = labels.shape[1] if labels.ndim == 2 else 1
            label_names = label_names or [str(i) for i in range(width)]
            self._labels = check_targets(labels, kind, len(label_names), self.id)
        if len(self._labels) != len(self.images):
            counts = f"{len(self.images)} images but {len(self._labels)} labels"
            raise DataError(_at(origin, counts))
        if label_names is None:
            label_names = [str(i) for i in range(int(self._labels.max(initial=-1)) + 1)]
        self.label_names = [str(name) for name in label_names]

    @property
    def labels(self) -> np.ndarray:
        """[N] or [N, K], see `Source.labels`."""
        return self._labels

    @property
    def dtype(self) -> np.dtype:
        """Of the images."""
        return self.images.dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.images[i], "label": self._labels[i]}

    def id(self, i: int) -> str:
        """ "file: index 17"."""
        return _at(self.origin, f"index {i}")

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """[B, H, W, C]."""
        return self.images[indices]


def _converted(images: np.ndarray, pixels: Pixels, name: str) -> np.ndarray:
    """The images as canvases; in parts, since scaling takes eight bytes a value for a while."""
    if not len(images):
        return images.astype(pixels.dtype)
    parts = [pixels.convert(images[at : at + 256], name) for at in range(0, len(images), 256)]
    same = all(np.may_share_memory(part, images) for part in parts)
    return images if same and pixels.bands is None else np.concatenate(parts)


def _at(origin: str, text: str) -> str:
    return f"{origin}: {text}" if origin else text


def _check_images(images: np.ndarray, origin: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    turned = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3)
    if images.ndim != 4 or turned or 0 in images.shape[1:]:
        advice = "give [N, H, W] or [N, H, W, C]"
        if turned:
            advice += " (this looks like [N, C, H, W]: transpose it)"
        raise DataError(_at(origin, f"images have shape {list(images.shape)}: {advice}"))
    return images


def _names(count: int | None, names: Sequence[str] | None, labels: list[np.ndarray]) -> list[str]:
    """Label names for splits that share one label space."""
    if names is not None:
        return [str(name) for name in names]
    if count is None:
        joined = check_labels(np.concatenate([x.reshape(-1) for x in labels]), None, _index)
        count = int(joined.max(initial=-1)) + 1
    return [str(i) for i in range(count)]


def _index(i: int) -> str:
    return f"index {i}"


def load_npz(
    path: Path,
    pixels: Pixels = _PLAIN,
    *,
    num_classes: int | None = None,
    kind: Kind = "class",
) -> dict[str, ArraySource]:
    """Reads one npz file of image / label arrays, or of train_image / train_label, val_..., ...

    Plurals and Keras's x_train / y_train serve too; label_names (an array of text) is optional.

    Args:
      path: the file.
      pixels: bands, depth and range.
      num_classes: number of classes; inferred by default.
      kind: of the labels: integers [N], or "multi" and "value" of [N, K].

    Raises:
      DataError: no such file or keys, objects instead of numbers, wrong images or labels.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
        if declared > MAX_BYTES:
            raise DataError(f"{path}: unfolds to {declared:,} bytes, more than {MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{path}: not a readable npz ({reason})") from None
    found = _npz_pairs(arrays)
    if not found:
        keys = ", ".join(sorted(arrays))
        raise DataError(f"{path}: no image / label or train_image / train_label among: {keys}")
    names = arrays.get("label_names")
    names = None if names is None else names.astype(str).tolist()
    if kind == "class":
        names = _names(num_classes, names, [arrays[label] for _, label in found.values()])
    return {
        split: ArraySource(arrays[image], arrays[label], names, f"{path} [{image}]", kind, pixels)
        for split, (image, label) in found.items()
    }


def _npz_pairs(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Split -> (image key, label key)."""
    for image, label in _NPZ_KEYS:
        if image.format(s="train") in arrays:
            pairs = {split: (image.format(s=split), label.format(s=split)) for split in _SPLITS}
            return {s: pair for s, pair in pairs.items() if all(key in arrays for key in pair)}
    return next(({"train": p} for p in _NPZ_WHOLE if all(key in arrays for key in p)), {})


def load_csv(
    path: Path,
    pixels: Pixels = _PLAIN,
    *,
    label_column: int = -1,
    image_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> dict[str, ArraySource]:
    """Reads a table, plain or gzipped, of one image a row: pixels 0..255, row-major, and a label.

    Args:
      path: the file; a first row of column names is skipped.
      pixels: bands, depth and range.
      label_column: which column holds the label; -1 is the last.
      image_shape: (H, W) or (H, W, C); a grey or RGB square by default.
      num_classes: number of classes; inferred by default.

    Raises:
      DataError: no such file, a cell that is no integer (row and column named), pixels that fill
        no shape.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        first = content.split(b"\n", 1)[0].decode("utf-8", "replace")
        skip = int(not first.split(",")[0].strip().lstrip("+-").replace(".", "", 1).isdigit())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "input contained no data": said below
            table = np.loadtxt(io.BytesIO(content), np.int32, delimiter=",", skiprows=skip, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{path}: not a table of integers ({reason})") from None
    if table.shape[0] == 0 or table.shape[1] < 2:
        raise DataError(f"{path}: no rows of pixels and a label")
    if not -table.shape[1] <= label_column < table.shape[1]:
        raise ConfigError(f"data.args.label_column={label_column}: {table.shape[1]} columns")
    labels = table[:, label_column]
    values = np.delete(table, label_column, axis=1)
    wrong = np.argwhere((values < 0) | (values > 255))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(f"{path}: index {row}: pixel {values[row, column]} is not in 0..255")
    shape = _image_shape(values.shape[1], image_shape, path)
    images = values.astype(np.uint8).reshape(len(values), *shape)
    names = None if num_classes is None else [str(i) for i in range(num_classes)]
    return {"train": ArraySource(images, labels, names, str(path), pixels=pixels)}


def _image_shape(count: int, wanted: Sequence[int] | None, path: Path) -> tuple[int, ...]:
    if wanted is not None:
        if int(np.prod(wanted)) != count:
            raise DataError(f"{path}: {count} pixels a row do not make {tuple(wanted)}")
        return tuple(wanted)
    for channels in (1, 3):
        side = round((count / channels) ** 0.5)
        if side * side * channels == count:
            return (side, side, channels)
    raise DataError(f"{path}: {count} pixels a row make no square: give data.args.image_shape")


def load_sklearn(path: str, pixels: Pixels = _PLAIN) -> dict[str, ArraySource]:
    """Reads a set that ships inside scikit-learn: "digits", 1,797 grey images of 8 x 8.

    Args:
      path: its name.
      pixels: bands, depth and range.

    Raises:
      ConfigError: an unknown set.
      DataError: scikit-learn is not installed.
    """
    if path not in SKLEARN_SETS:
        known = ", ".join(SKLEARN_SETS)
        raise ConfigError(f"data.path={path!r} is not one of {known}{nearest(path, SKLEARN_SETS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"the set {path!r} ships in scikit-learn: pip install 'jft[demo]'"
        ) from error
    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    names = [str(name) for name in digits.target_names]
    found = ArraySource(images, digits.target, names, "sklearn digits", pixels=pixels)
    return {"train": found}
