"""The live lines of a running job on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BAR = 24  # characters
_STYLES = ("bold", "", "dim")


class Display:
    """A bar with a line of words beside it and further lines below, redrawn only when told to."""

    def __init__(self, console: Console, total_steps: int | None) -> None:
        """Shows nothing yet."""
        self._console, self._total = console, total_steps
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def show(self, step: int, lines: Sequence[str]) -> None:
        """Draws `lines`, the first beside the bar; empty ones are left out."""
        if not self._live.is_started:
            self._live.start()
        bar = ProgressBar(total=self._total, completed=step, width=_BAR)
        if self._total is None:
            bar = ProgressBar(total=1, completed=0, width=_BAR)
        head = Table.grid(padding=(0, 2))
        head.add_column(width=_BAR)
        head.add_column(no_wrap=True, overflow="ellipsis")
        head.add_row(bar, _literal(lines[0], _STYLES[0]))
        rest: list[RenderableType] = [
            _literal(line, style)
            for line, style in zip(lines[1:], _STYLES[1:], strict=False)
            if line
        ]
        self._live.update(Group(head, *rest), refresh=True)

    def message(self, text: str) -> None:
        """Prints a line above the live ones."""
        self._console.print(Text(text))

    def stop(self) -> None:
        """Leaves the lines where they are."""
        self._live.stop()


def _literal(text: str, style: str) -> Text:
    """Words taken as they are: phase names such as "block[-3:]" are not rich markup."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
