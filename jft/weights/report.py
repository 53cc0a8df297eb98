"""What a conversion did with every leaf and every source name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jft.models.family import Preprocess

STATUSES = ("loaded", "cast", "resized", "adapted", "fresh")


class Row(NamedTuple):
    """One leaf: where it came from.

    Attributes:
      path: in the model; parameters and statistics share the path space.
      status: "loaded" (bitwise, but for the layout), "cast" (another dtype in the source),
        "resized" (position embeddings, tables of relative positions), "adapted" (the first
        convolution, to other channels) or "fresh" (from the module's own init).
      source_name: in the source; None when it has no such tensor.
      shape: in the model.
      note: what was changed, or why the leaf is fresh.
      dtype: of the leaf; "" for a fresh one.
    """

    path: str
    status: str
    source_name: str | None
    shape: tuple[int, ...]
    note: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Report:
    """A whole conversion.

    Attributes:
      source: as written in the config.
      hashed: waits for the SHA-256 of the source's files, which may be under way still.
      rows: one a leaf.
      unread: source names that were deliberately not read.
      loaded_params: parameters (statistics apart) that come from the source.
      all_params: parameters of the model.
      notes: further remarks, one line each.
      table: index of the family's table that was used.
      preprocess: the source's own preprocessing where it has one, else the model's.
      revision: the commit that a source on a hub was resolved to, else None.
    """

    source: str
    hashed: Callable[[], str]
    rows: list[Row]
    unread: list[str]
    loaded_params: int
    all_params: int
    notes: list[str] = field(default_factory=list)
    table: int = 0
    preprocess: Preprocess | None = None
    revision: str | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the source's files.

        Raises:
          WeightsError: a file was gone before it was hashed.
        """
        return self.hashed()

    @property
    def coverage(self) -> float:
        """Share of the parameters that come from the source, 0..1."""
        return self.loaded_params / max(self.all_params, 1)

    def paths(self, status: str) -> list[str]:
        """Paths of the leaves with a status."""
        return [row.path for row in self.rows if row.status == status]

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "revision": self.revision,
            "coverage": self.coverage,
            "loaded_params": self.loaded_params,
            "all_params": self.all_params,
            "rows": [row._asdict() | {"shape": list(row.shape)} for row in self.rows],
            "unread": list(self.unread),
            "notes": list(self.notes),
            "table": self.table,
            "preprocess": self.preprocess.to_dict() if self.preprocess else None,
        }

    def text(self, every_leaf: bool = False) -> str:
        """A table to print: one line a stage, then each leaf that was not simply loaded.

        Args:
          every_leaf: also list the loaded ones.
        """
        lines = [f"weights   {self.source}", f"sha256    {self.sha256}"]
        if self.revision:
            lines.append(f"commit    {self.revision}")
        lines.append(f"{'stage':<14}" + "".join(f"{status:>9}" for status in STATUSES))
        for stage, counts in self._stages().items():
            lines.append(f"{stage:<14}" + "".join(f"{counts[s] or '-':>9}" for s in STATUSES))
        lines.append(
            f"coverage  {100 * self.coverage:.2f} %: {self.loaded_params:,} of "
            f"{self.all_params:,} parameters from the source"
        )
        counts = Counter(row.dtype for row in self.rows if row.dtype)
        if set(counts) - {"float32"}:
            held = ", ".join(f"{count} {name}" for name, count in counts.items())
            lines.append(f"dtypes    of the leaves: {held}")
        for row in self.rows:
            if row.status != "loaded" or every_leaf:
                read = row.source_name and row.status != "fresh"
                origin = f" <- {row.source_name}" if read else ""
                note = f" ({row.note})" if row.note else ""
                lines.append(f"{row.status:<9} {row.path} {row.shape}{origin}{note}")
        if self.unread:
            shown = ", ".join(self.unread[:4]) + (", ..." if len(self.unread) > 4 else "")
            lines.append(f"unread    {len(self.unread)} names: {shown}")
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join(lines)

    def _stages(self) -> dict[str, dict[str, int]]:
        stages: dict[str, dict[str, int]] = {}
        for row in self.rows:
            counts = stages.setdefault(row.path.split("/")[0], dict.fromkeys(STATUSES, 0))
            counts[row.status] += 1
        return stages
