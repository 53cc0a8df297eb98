"""Tables as columns: CSV, TSV, JSON lines and Parquet, plain or gzipped where they are text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jft.errors import ConfigError, DataError, nearest

TEXT_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
EXTENSIONS = (*TEXT_EXTENSIONS, ".parquet")
_MOST_UNFOLDED_BYTES = 8 << 30  # of a gzipped table


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one file.

    Attributes:
      path: the file.
      columns: names, in order.
      cells: {column: cells}, of the text formats; Parquet is read by column when asked for.
      lines: line of each row in a text file, from 1.
      class_names: {column: names of its classes}, where the file says so.
    """

    path: Path
    columns: tuple[str, ...]
    cells: Mapping[str, list[Any]] = field(default_factory=dict)
    lines: Sequence[int] = ()
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    rows: int = 0

    def column(self, name: str, key: str) -> list[Any]:
        """The cells of a column; `key` is the option that names it.

        Raises:
          ConfigError: there is none.
        """
        if name not in self.columns:
            known = ", ".join(self.columns)
            hint = nearest(name, self.columns)
            raise ConfigError(f"data.args.{key}: {self.path} has no column {name!r}{hint}: {known}")
        if not self.is_parquet:
            return self.cells[name]
        read = _parquet(self.path).read(columns=[name])
        return read.column(0).to_pylist()

    def row_name(self, i: int) -> str:
        """ "photos.csv, line 3"."""
        return f"{self.path}, line {self.lines[i]}" if self.lines else f"{self.path}, row {i}"

    @property
    def is_parquet(self) -> bool:
        """Whether cells are read by column."""
        return self.path.name.lower().endswith(".parquet")

    def holds_images(self, column: str) -> bool:
        """Whether a column holds encoded images rather than paths."""
        if not self.is_parquet:
            return False
        import pyarrow as pa

        kind = _parquet(self.path).schema_arrow.field(column).type
        binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
        return any(test(kind) for test in binary) or pa.types.is_struct(kind)

    def images(self, column: str) -> Iterator[tuple[bytes | None, str | None]]:
        """(content, path) of each row of such a column, of which one may be missing."""
        for batch in _parquet(self.path).iter_batches(batch_size=16, columns=[column]):
            for value in batch.column(0):
                value = value.as_py()
                if isinstance(value, Mapping):
                    yield value.get("bytes"), value.get("path")
                else:
                    yield value, None


def read_table(path: Path) -> Table:
    """Reads a table by its extension.

    Raises:
      DataError: missing, empty, another kind of file, or a row that does not fit.
    """
    name = path.name.lower()
    if not name.endswith(EXTENSIONS):
        raise DataError(f"{path}: no table; these are read: {' '.join(EXTENSIONS)}")
    if name.endswith(".parquet"):
        return _read_parquet(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_MOST_UNFOLDED_BYTES + 1)
        if len(content) > _MOST_UNFOLDED_BYTES:
            raise DataError(f"{path}: unfolds to more than {_MOST_UNFOLDED_BYTES:,} bytes")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{path}: cannot be read ({reason})") from None
    if ".jsonl" in name:
        return _read_jsonl(path, text)
    return _read_csv(path, text, "\t" if ".tsv" in name else ",")


def _read_csv(path: Path, text: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip() for name in next(reader, [])]
        if not any(columns):
            raise DataError(f"{path}: is empty: its first line should name the columns")
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise DataError(f"{path}: two columns are named {twice!r}")
        rows, lines = [], []
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                cells = f"{len(row)} cells, the first line {len(columns)}"
                raise DataError(f"{path}, line {reader.line_num}: has {cells}")
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    cells = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    return Table(path, tuple(columns), cells, lines, rows=len(rows))


def _read_jsonl(path: Path, text: str) -> Table:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 within a text ends no line
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: math.nan)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: is no JSON object")
        rows.append(row)
        lines.append(number)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = {name: [row.get(name) for row in rows] for name in columns}
    return Table(path, columns, cells, lines, rows=len(rows))


def _read_parquet(path: Path) -> Table:
    file = _parquet(path)
    names, features = file.schema_arrow.names, _features(file.schema_arrow.metadata)
    classes = {name: found for name in names if (found := _class_names(features.get(name)))}
    return Table(path, tuple(names), class_names=classes, rows=file.metadata.num_rows)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("Parquet files need: pip install 'jft[parquet]'") from error
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        text = str(error).splitlines()[0]
        reason = "no such file" if isinstance(error, FileNotFoundError) else text
        raise DataError(f"{path}: not a readable Parquet file ({reason})") from None


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """What Hugging Face's datasets wrote about the columns; {} where nothing sensible stands."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return found if isinstance(found, dict) else {}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _class_names(feature: Any) -> list[str] | None:
    """Names of a ClassLabel, or of a list of them."""
    for _ in range(2):
        if not isinstance(feature, dict):
            return None
        names = feature.get("names")
        if feature.get("_type") == "ClassLabel" and isinstance(names, list):
            return [str(name) for name in names]
        feature = feature.get("feature")
    return None
