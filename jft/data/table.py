"""A table that names images and their labels: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.encoded import EncodedSource, FileSource
from jft.data.extents import ExtentSource, unpacked
from jft.data.kept import file_facts, key_of
from jft.data.masks import mask_shares, mask_targets, share_notes
from jft.data.split_files import find_files, split_of
from jft.data.table_files import EXTENSIONS, Table, read_table
from jft.data.targets import Name, Targets, class_name, class_targets, column_targets, list_targets
from jft.errors import ConfigError, DataError

_IMAGE_COLUMNS = ("image", "file_name", "filename", "file", "path", "image_path", "img")
_LABEL_COLUMNS = ("label", "class", "target", "category", "labels")


@dataclass(frozen=True)
class Columns:
    """The options that say what the columns of a table are; see `load_table`."""

    image: str
    label: str | None
    labels: tuple[str, ...]
    values: tuple[str, ...]
    separator: str | None
    classes: tuple[str, ...] | None
    one_hot: bool
    split: str | None
    root: str | None
    suffix: str
    mask: str | None
    mask_names: tuple[str, ...] | None
    min_share: float


def load_table(
    path: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    label_columns: Sequence[str] = (),
    value_columns: Sequence[str] = (),
    separator: str | None = None,
    classes: Sequence[str] | None = None,
    one_hot: bool = False,
    split_column: str | None = None,
    root: str | None = None,
    suffix: str = "",
    mask_column: str | None = None,
    mask_names: Sequence[str] | None = None,
    min_share: float = 0.0,
) -> dict[str, EncodedSource]:
    """Reads a table with one row an image.

    Args:
      path: a .csv, .tsv, .jsonl (also .gz) or .parquet file, a pattern of several, or a folder of
        them: train*, val* and test*, or sub-folders of these names.
      image_column: paths, or in Parquet encoded images; image, file_name, path, ... by default.
      label_column: one class a row, by name or number; label, class, target, ... by default. In
        JSON lines and Parquet a list holds several classes.
      label_columns: one column of 0 and 1 a class instead; an empty cell is not known.
      value_columns: one column of numbers a value to predict instead.
      separator: what parts several classes in a cell of `label_column`, such as "|".
      classes: the classes in order; by default those that occur in train.
      one_hot: exactly one of `label_columns` is 1, and is the class.
      split_column: train, val or test, a row.
      root: folder that paths are relative to; the table's by default.
      suffix: what the paths lack, such as ".jpg".
      mask_column: path of a mask beside each image. Without labels it gives them: "positive" where
        more than `min_share` of its pixels are above 0.
      mask_names: classes of the mask's values 1, 2, ...: an image has those that cover more than
        `min_share` of it.
      min_share: from 0 to 1.

    Raises:
      DataError: no such table, a row that does not fit, a label that is none.
      ConfigError: a column that is not there, options that do not go together.
    """
    columns = Columns(
        image_column or "", label_column, tuple(label_columns), tuple(value_columns), separator,
        _texts(classes), one_hot, split_column, root, suffix, mask_column, _texts(mask_names),
        min_share,
    )  # fmt: skip
    files = find_files(path, EXTENSIONS)
    tables = {split: [read_table(file) for file in found] for split, found in files.items()}
    return _sources(tables, _completed(columns, tables["train"][0]))


def _texts(names: Sequence[Any] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(str(name) for name in names)


def _completed(columns: Columns, table: Table) -> Columns:
    """The columns with those that go by their usual names."""
    image = columns.image or next((n for n in _IMAGE_COLUMNS if n in table.columns), "")
    if not image:
        raise ConfigError(
            f"data.args.image_column is not set, and {table.path} has no column"
            f" {', '.join(_IMAGE_COLUMNS)}: {', '.join(table.columns)}"
        )
    label = columns.label
    chosen = sum(map(bool, (label, columns.labels, columns.values)))
    if not chosen and columns.mask is None:
        label = next((n for n in _LABEL_COLUMNS if n in table.columns), None)
    if chosen > 1 or not (chosen or label or columns.mask):
        raise ConfigError(
            "data.args: give one of label_column, label_columns, value_columns, mask_column;"
            f" {table.path} has {', '.join(table.columns)}"
        )
    if columns.one_hot and not columns.labels:
        raise ConfigError("data.args.one_hot: needs label_columns")
    if not 0 <= columns.min_share < 1:
        raise ConfigError(f"data.args.min_share={columns.min_share:g}: give 0 <= min_share < 1")
    if columns.mask is None and (columns.mask_names or columns.min_share):
        raise ConfigError("data.args.mask_names, min_share: need mask_column")
    return replace(columns, image=image, label=label)


def _sources(tables: Mapping[str, list[Table]], columns: Columns) -> dict[str, EncodedSource]:
    sources: dict[str, EncodedSource] = {}
    names = columns.classes
    for split in sorted(tables, key=("train", "val", "test").index):
        found = [table for table in tables[split] if table.rows]
        if not found:
            raise DataError(f"{tables[split][0].path}: no rows")
        source = _source(found, columns, names)
        if source.kind != "value":
            names = tuple(source.label_names)  # those of train hold for all
        sources[split] = source
        if columns.split is not None:
            cells = (table.column(columns.split, "split_column") for table in found)
            return _parted(source, list(chain.from_iterable(cells)))
    return sources


def _source(
    tables: Sequence[Table], columns: Columns, names: Sequence[str] | None
) -> EncodedSource:
    rows = [(table, i) for table in tables for i in range(table.rows)]

    def name(i: int) -> str:
        return rows[i][0].row_name(rows[i][1])

    def cells(column: str, key: str) -> list[Any]:
        return list(chain.from_iterable(table.column(column, key) for table in tables))

    targets, notes = None, ()
    if columns.mask is not None:
        texts = cells(columns.mask, "mask_column")
        shares = mask_shares(_paths(tables, texts, columns, ""), _mask_values(columns))
        notes = share_notes(shares, columns.mask_names)
        targets = mask_targets(shares, columns.mask_names, columns.min_share)
    if columns.labels or columns.values:
        key = "label_columns" if columns.labels else "value_columns"
        kind = "value" if columns.values else "class" if columns.one_hot else "multi"
        asked = {column: cells(column, key) for column in columns.labels or columns.values}
        targets = column_targets(asked, kind, name)
    elif columns.label is not None:
        targets = _label_targets(tables, cells(columns.label, "label_column"), columns, names, name)
    assert targets is not None
    source = _images(tables, columns, targets)
    source.notes = notes
    return source


def _mask_values(columns: Columns) -> int | None:
    return None if columns.mask_names is None else len(columns.mask_names)


def _label_targets(
    tables: Sequence[Table],
    values: Sequence[Any],
    columns: Columns,
    names: Sequence[str] | None,
    name: Name,
) -> Targets:
    assert columns.label is not None
    stored = tables[0].class_names.get(columns.label)
    names = names or stored
    first = next((value for value in values if value is not None), None)
    if isinstance(first, list) and stored:
        values = [
            [class_name(c, stored, name(i)) if isinstance(c, int) else c for c in v or ()]
            for i, v in enumerate(values)
        ]
    if columns.separator is not None or isinstance(first, list):
        return list_targets(values, names, name, columns.separator)
    return class_targets(values, names, name, indices=names is not None)


def _images(tables: Sequence[Table], columns: Columns, targets: Targets) -> EncodedSource:
    labels = (targets.labels, targets.names, targets.kind)
    if not all(table.holds_images(columns.image) for table in _having(tables, columns.image)):
        texts = [c for table in tables for c in table.column(columns.image, "image_column")]
        return FileSource(_paths(tables, texts, columns, columns.suffix), *labels)
    files = [table.path for table in tables]
    root = files[0].parent if columns.root is None else Path(columns.root).expanduser()
    read = list(chain.from_iterable(table.images(columns.image) for table in tables))
    # Rows may name a file instead of holding it: then that file decides what is unpacked.
    named = [str(root / (path + columns.suffix)) for content, path in read if not content and path]
    contents = (_content(root, columns.suffix, *pair) for pair in read)
    there = file_facts([path for path in named if os.path.isfile(path)])
    key = f"table-{key_of(file_facts(files), columns.image, there, named)}"
    extents = unpacked(key, contents, len(targets.labels), str(files[0]))
    ids = [f"{table.path}, row {i}" for table in tables for i in range(table.rows)]
    return ExtentSource(extents, ids, *labels)


def _having(tables: Sequence[Table], column: str) -> Sequence[Table]:
    for table in tables:
        if column not in table.columns:
            table.column(column, "image_column")  # raises, naming the nearest
    return tables


def _content(folder: Path, suffix: str, content: bytes | None, path: str | None) -> bytes | None:
    """Some rows hold a path instead of the image; only files below the folder are taken."""
    if content is not None or not path:
        return content
    file = (folder / (path + suffix)).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        return None
    return file.read_bytes()


def _paths(
    tables: Sequence[Table], texts: Sequence[Any], columns: Columns, suffix: str
) -> list[str]:
    """Files by the cells of a column.

    Raises:
      DataError: an empty cell, or a root below which none of the first files is.
    """
    roots = [table.path.parent for table in tables for _ in range(table.rows)]
    if columns.root is not None:
        roots = [Path(columns.root).expanduser()] * len(roots)
    found = []
    for root, text in zip(roots, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            row = len(found)
            raise DataError(f"{tables[0].path}: row {row} names no file, but {reprlib.repr(text)}")
        found.append(os.path.join(root, text.strip() + suffix))
    if not any(os.path.exists(path) for path in found[:100]):
        raise DataError(
            f"{found[0]}: no such file, nor any of the first {len(found[:100])} that"
            f" {tables[0].path} names: set data.args.root or data.args.suffix"
        )
    return found


def _parted(source: EncodedSource, cells: Sequence[Any]) -> dict[str, EncodedSource]:
    """Splits a source by a column of train, val and test."""
    splits = [split_of(str(cell)) for cell in cells]
    unknown = next((str(c) for c, split in zip(cells, splits, strict=True) if split is None), None)
    if unknown is not None:
        raise DataError(f"data.args.split_column: {unknown!r} is none of train, val, test")
    places = {s: np.flatnonzero([s == split for split in splits]) for s in ("train", "val", "test")}
    if not len(places["train"]):
        raise DataError("data.args.split_column: no row is of train")
    return {split: source.take(rows) for split, rows in places.items() if len(rows)}
