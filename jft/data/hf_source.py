"""Hugging Face `datasets`: what was saved to disk, or a set of the hub, read by index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.encoded import EncodedSource
from jft.data.kept import key_of
from jft.data.pixels import BadImage
from jft.data.protocol import Kind
from jft.data.split_files import SPLIT_NAMES
from jft.data.targets import any_targets, class_name
from jft.errors import ConfigError, DataError, nearest

HUB = "hf:"
_NO_SCRIPTS = 4  # the version since which a data set cannot bring code along


class HfSource(EncodedSource):
    """One split; images come as encoded bytes and pass jft's own decoder.

    Args:
      records: a `datasets.Dataset` whose image column is not decoded.
      column: of the images.
      origin: for messages.
      labels, label_names, kind: as in `EncodedSource`.
    """

    def __init__(
        self,
        records: Any,
        column: str,
        origin: str,
        labels: np.ndarray,
        label_names: Sequence[str],
        kind: Kind,
    ) -> None:
        super().__init__(labels, label_names, kind)
        self.records, self.column, self.origin = records, column, origin

    def encoded(self, i: int) -> bytes | str:
        """The stored file of image i, or its path."""
        value = self.records[int(i)][self.column] or {}
        content, path = value.get("bytes"), value.get("path")
        if content is None and not path:
            raise BadImage(f"{self.id(i)}: holds no image")
        return str(path) if content is None else bytes(content)

    def id(self, i: int) -> str:
        """ "directory [split]: index 17"."""
        return f"{self.origin}: index {i}"

    def identity(self) -> str:
        """A hash by the fingerprint that `datasets` keeps of every set."""
        return key_of("hf", self.records._fingerprint, self.column, len(self))


def load_hf(
    path: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    train: str = "train",
    val: str | None = None,
    test: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> dict[str, HfSource]:
    """Reads a set of Hugging Face `datasets`; no code of a data set is ever run.

    Args:
      path: a directory that `save_to_disk` wrote, or "hf:owner/name" of the hub, which needs the
        network unless the set is in its cache.
      image_column: feature that holds the image.
      label_column: feature that holds the label: a class, a list of classes, or a number.
      train: name of the split to train on.
      val: name of the validation split; validation, valid or val by default.
      test: name of the test split; test by default.
      subset: configuration of a set of the hub that has several.
      revision: branch, tag or commit of a set of the hub.

    Raises:
      DataError: nothing there, `datasets` is not installed, no network.
      ConfigError: a split or column that the set does not have.
    """
    datasets = _datasets()
    local = Path(path.removeprefix("file:")).expanduser()
    if path.startswith(HUB):
        found = _from_hub(datasets, path.removeprefix(HUB), subset, revision)
    elif (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        try:
            found = datasets.load_from_disk(str(local))
        except Exception as error:  # pyarrow, JSON and datasets raise their own on damaged files
            raise DataError(f"{local}: cannot be read ({_line(error)})") from None
    else:
        raise DataError(
            f"{path}: no directory that datasets' save_to_disk wrote (Parquet files are read by"
            f" data.name=table, sets of the hub as {HUB}owner/name)"
        )
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    if train not in splits:
        near = nearest(train, splits)
        raise ConfigError(f"data.args.train={train!r} is not one of {list(splits)}{near}")
    chosen = {name: _split(splits, wanted, name) for name, wanted in (("val", val), ("test", test))}
    sources: dict[str, HfSource] = {}
    names: list[str] | None = None
    for split, name in {"train": train, **chosen}.items():
        if name is None:
            continue
        columns = (image_column, label_column)
        kind = sources["train"].kind if sources else None
        origin = f"{path} [{name}]"
        sources[split] = _source(datasets, splits[name], columns, origin, names, kind)
        if sources[split].kind != "value":
            names = sources[split].label_names
    return sources


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.name='hf' needs: pip install 'jft[hf-data]'") from error
    if int(datasets.__version__.split(".")[0]) < _NO_SCRIPTS:
        raise DataError(
            f"datasets {datasets.__version__} runs code of data sets: pip install 'datasets>=4'"
        )
    return datasets


def _from_hub(datasets: Any, name: str, subset: str | None, revision: str | None) -> Any:
    try:
        return datasets.load_dataset(name, subset, revision=revision)
    except Exception as error:  # of five packages, from no network to no such set
        raise DataError(f"{HUB}{name}: cannot be loaded ({_line(error)})") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _split(splits: dict[str, Any], wanted: str | None, split: str) -> str | None:
    if wanted is None:
        return next((n for n in splits if SPLIT_NAMES.get(n) == split), None)
    if wanted not in splits:
        near = nearest(wanted, splits)
        raise ConfigError(f"data.args.{split}={wanted!r} is not one of {list(splits)}{near}")
    return wanted


def _source(
    datasets: Any,
    records: Any,
    columns: tuple[str, str],
    origin: str,
    names: list[str] | None,
    kind: Kind | None,
) -> HfSource:
    image, label = columns
    for key, column in (("image_column", image), ("label_column", label)):
        if column not in records.column_names:
            near, known = nearest(column, records.column_names), ", ".join(records.column_names)
            raise ConfigError(f"data.args.{key}={column!r} is not one of {known}{near}")
    if not isinstance(records.features[image], datasets.Image):
        raise ConfigError(f"data.args.image_column: {image!r} of {origin} holds no images")
    feature = records.features[label]
    inner = getattr(feature, "feature", feature)
    stored = list(inner.names) if isinstance(inner, datasets.ClassLabel) else None
    values = records.select_columns([label]).with_format("arrow")[:][label].to_pylist()
    if stored is not None:
        values = [_named(value, stored, f"{origin}: index {i}") for i, value in enumerate(values)]
    elif str(getattr(feature, "dtype", "")).startswith("float"):
        kind = "value"  # whole numbers too: the features decide
    known = names or stored

    def name(i: int) -> str:
        return f"{origin}: index {i}"

    targets = any_targets(values, known, name, kind)
    records = records.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return HfSource(records, image, origin, targets.labels, targets.names, targets.kind)


def _named(value: Any, names: Sequence[str], where: str) -> Any:
    """A class, or a list of them, by name: -1 and None alone are no class."""
    if isinstance(value, list):
        return [class_name(part, names, where) for part in value]
    return names[value] if value is not None and 0 <= value < len(names) else None
