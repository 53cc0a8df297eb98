"""A data set that TFDS prepared as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jft.data.decode import decode_image
from jft.data.encoded import EncodedSource
from jft.data.kept import file_facts, key_of
from jft.data.protocol import check_labels
from jft.errors import ConfigError, DataError, nearest


class TfdsSource(EncodedSource):
    """One split of a prepared set; images come as encoded bytes and pass jft's own decoder.

    Args:
      records: TFDS data source of {image_key: bytes, label_key: int}.
      label_names: a name a class.
      origin: directory and split, for messages.
      image_key: feature that holds the image.
      label_key: feature that holds the label.
    """

    def __init__(
        self, records: Any, label_names: list[str], origin: str, image_key: str, label_key: str
    ) -> None:
        super().__init__(np.zeros(0, np.int32), label_names)
        self.records = records
        self.origin = origin
        self.image_key = image_key
        self.label_key = label_key
        self._read: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]; the first use reads every record, so only splitting by class asks for it."""
        if self._read is None:
            labels = [self.records[i][self.label_key] for i in range(len(self))]
            self._read = check_labels(labels, len(self.label_names), self.id)
        return self._read

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.records[int(i)]
        image = decode_image(bytes(record[self.image_key]), self.id(i), self.pixels)
        return {"image": image, "label": int(record[self.label_key])}

    def identity(self) -> str:
        """A hash of the files of the set, the split and the feature."""
        folder = Path(self.origin.rpartition(" [")[0])
        files = sorted(str(file) for file in folder.iterdir() if file.is_file())
        return key_of(file_facts(files), self.origin, self.image_key)

    def encoded(self, i: int) -> bytes:
        """The stored file of image i."""
        return bytes(self.records[int(i)][self.image_key])

    def id(self, i: int) -> str:
        """ "directory [split]: index 17"."""
        return f"{self.origin}: index {i}"


def version_directory(path: Path) -> Path:
    """`path`, or the one prepared version below it."""
    if (path / "dataset_info.json").is_file():
        return path
    below = sorted([*path.glob("*/dataset_info.json"), *path.glob("*/*/dataset_info.json")])
    if len(below) == 1:
        return below[0].parent
    if not below:
        raise DataError(f"{path}: no data set prepared by TFDS (no dataset_info.json)")
    raise DataError(f"{path}: several sets: give one, such as {below[0].parent}")


def load_tfds(
    path: Path,
    *,
    train: str = "train",
    val: str = "validation",
    test: str = "test",
    image_key: str = "image",
    label_key: str = "label",
) -> dict[str, TfdsSource]:
    """Reads a directory that TFDS prepared with file_format="array_record".

    Args:
      path: the version's directory, which holds dataset_info.json, or one above it.
      train: name of the split to train on.
      val: name of the validation split; left out where the set has none.
      test: name of the test split; left out where the set has none.
      image_key: feature that holds the image.
      label_key: feature that holds the label.

    Raises:
      DataError: nothing prepared there, another file format (it says what to run), TFDS is not
        installed.
      ConfigError: a split or feature that the set does not have.
    """
    try:
        import tensorflow_datasets as tfds  # half a second, for this source alone
    except ImportError as error:
        raise DataError("data.name='tfds' needs: pip install tensorflow-datasets") from error
    directory = version_directory(path)
    builder: Any = tfds.builder_from_directory(str(directory))
    info = builder.info
    features: dict[str, Any] = dict(info.features)
    file_format = getattr(info.file_format, "value", str(info.file_format))
    if file_format != "array_record":
        raise DataError(_prepare_again(directory, file_format))
    for key, value in (("image_key", image_key), ("label_key", label_key)):
        if value not in features:
            near, known = nearest(value, features), ", ".join(features)
            raise ConfigError(f"data.args.{key}={value!r} is not one of {known}{near}")
    names = getattr(features[label_key], "names", None)
    if not names:
        raise DataError(f"{directory}: feature {label_key!r} is not a ClassLabel")
    if train not in info.splits:
        near = nearest(train, info.splits)
        raise ConfigError(f"data.args.train={train!r} is not one of {list(info.splits)}{near}")
    decode: Any = tfds.decode
    skip = decode.SkipDecoding()
    return {
        split: TfdsSource(
            builder.as_data_source(name, decoders={image_key: skip}),
            list(names),
            f"{directory} [{name}]",
            image_key,
            label_key,
        )
        for split, name in (("train", train), ("val", val), ("test", test))
        if name in info.splits
    }


def _prepare_again(directory: Path, file_format: str) -> str:
    text = f"{directory}: prepared as {file_format}, which only TensorFlow reads: "
    if file_format == "tfrecord":
        return text + f"convert it once by jft data prepare {directory} --out=DIR"
    return text + "prepare it again by tfds build --file_format=array_record"
