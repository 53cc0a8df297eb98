"""Where the entries of a schedule begin and end: as they say, or where their event was seen."""

from collections.abc import Mapping, Sequence
from typing import Any

from jft.errors import ConfigError
from jft.freeze.entries import Entry
from jft.freeze.outline import Outline
from jft.freeze.until import Event, observed_values, parse_until, until_step

Log = Sequence[Mapping[str, Any]]


class Spans:
    """The steps of each entry of a schedule, as a pure function of the decision log."""

    def __init__(self, entries: Sequence[Entry], outline: Outline):
        """Takes the entries in order, and the outline of the whole run."""
        self.entries, self.outline = entries, outline

    def event(self, index: int) -> Event | None:
        """What may end an entry early, or None."""
        return self._until(index)[0]

    def all(self, log: Log = ()) -> list[tuple[int, int]]:
        """(start, stop) of each entry."""
        spans: list[tuple[int, int]] = []
        for index in range(len(self.entries)):
            start = spans[-1][1] if spans else 0
            spans.append((start, self.stop(index, start, log)))
        return spans

    def stop(self, index: int, start: int, log: Log) -> int:
        """The step at which an entry ends that begins at `start`.

        Raises:
          ConfigError: it would end before it begins, or not with the run where it is the last.
        """
        where, last = f"freeze.phases[{index}]", index == len(self.entries) - 1
        total, until = self.outline.total_steps, self.entries[index].get("until")
        event, static = self._until(index)
        if event and static is None:
            stop = total if last else self._share(index, start)
        elif until is None:
            if not last:
                raise ConfigError(
                    f"{where}: 'until' is missing; only the last phase may leave it out"
                )
            stop = total
        else:
            stop = self._static(index, static, start)
        if last and event is not None:
            raise ConfigError(f"{where}: the last phase lasts to the run's end; until={until!r}")
        if last and stop < total:
            raise ConfigError(f"{where}: ends at step {stop} but the run has {total} steps")
        stop = min(stop, total) if last else stop
        if stop <= start or stop > total:
            raise ConfigError(
                f"{where}: until={until!r} is step {stop}; it must be after step {start}"
                f" and at most {total}"
            )
        if event is not None:
            values = observed_values(log, event.metric, start, stop)
            for at in range(1, len(values) + 1):
                if event.seen([value for _, value in values[:at]]):
                    return values[at - 1][0]
        return total if last else stop

    def _until(self, index: int) -> tuple[Event | None, Any]:
        return parse_until(self.entries[index].get("until"), f"freeze.phases[{index}]")

    def _static(self, index: int, static: Any, start: int) -> int:
        outline, where = self.outline, f"freeze.phases[{index}]"
        return until_step(static, outline.total_steps, outline.steps_per_epoch, where, start)

    def _share(self, index: int, start: int) -> int:
        """Where an event without a latest end is waited for no longer.

        At an equal share of the steps to the next end that is stated, so that all have their turn.
        """
        end = self.outline.total_steps
        at = index + 1
        while at < len(self.entries) - 1:
            static = self._until(at)[1]
            if static is not None and not str(static).strip().startswith("+"):
                end = self._static(at, static, start)
                break
            at += 1
        return start + max(1, (end - start) // (at - index + 1))
