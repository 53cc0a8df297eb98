"""Tables of words: aligned text anywhere, and drawn by rich on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, RenderableType
from rich.table import Table as Drawn
from rich.text import Text

# Words that are a state of their own, on a terminal.
_STYLES = {"train": "green", "-": "dim", "frozen": "dim", "full": "green"}


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of them the head; `str` gives aligned text.

    Attributes:
      rows: of equally many cells each.
      left: columns that align left, the others align right.
      sums: whether the last row is the sum of those above it.
      notes: lines below the table.
    """

    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})
    sums: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The table as plain text."""
        return "\n".join([align(self.rows, set(self.left)), *self.notes])

    def drawn(self) -> Drawn:
        """The table as rich draws it, without its notes; cells are taken literally."""
        head, *rows = self.rows
        table = Drawn(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
        for at, name in enumerate(head):
            justify = "left" if at in self.left else "right"
            table.add_column(Text(name), justify=justify, overflow="fold")
        for order, row in enumerate(rows):
            last = self.sums and order == len(rows) - 1
            cells = [Text(cell, style=_STYLES.get(cell, "")) for cell in row]
            table.add_row(*cells, style="bold" if last else None)
        return table


@dataclass(frozen=True)
class Overview:
    """Text and tables to show one below the other; `str` gives plain text.

    Attributes:
      parts: in order; a function is called when the overview is shown, and "" is left out.
    """

    parts: Sequence[str | Table | Callable[[], str]]

    def __str__(self) -> str:
        """Everything as plain text."""
        return "\n\n".join(filter(None, map(str, self._parts())))

    def show(self, stream: TextIO | None = None) -> None:
        """Draws the overview on a terminal, and prints it anywhere else; standard output is None's.

        Raises:
          OSError: the stream cannot be written to.
        """
        stream = stream or sys.stdout
        console = Console(file=stream)
        if not console.is_terminal or console.is_dumb_terminal:
            print(self, file=stream, flush=True)
            return
        for part in filter(None, self._parts()):
            below: list[RenderableType] = []
            if isinstance(part, Table):
                console.print(part.drawn())
                below = [Text(note) for note in part.notes]
            else:
                below = [Text(part)]
            console.print(*below, "", sep="\n")

    def _parts(self) -> list[str | Table]:
        return [part() if callable(part) else part for part in self.parts]


def align(rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Returns rows of cells as text; the columns in `left` align left, the others right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
