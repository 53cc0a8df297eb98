"""The freezing schedule of a run: its phases as a pure function of the decision log.

Without rules and events the log stays empty and the phases are known before the first step. A rule
decides at stated steps from signals, an event ends a phase when an evaluation shows it; the log
holds what was seen and decided, travels in every checkpoint, and makes a resumed run repeat it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jft.errors import ConfigError
from jft.freeze.bounds import bound_sets, menu_note, menu_text
from jft.freeze.deciders import View
from jft.freeze.entries import HANDED_ON, Entry, parse_entries
from jft.freeze.generators import GENERATORS
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask
from jft.freeze.outline import Outline
from jft.freeze.phases import Phase, Stretch, number
from jft.freeze.rules import Rule, make_rule
from jft.freeze.spans import Log, Spans
from jft.freeze.stretches import Stretches

_KINDS: dict[str, Callable[..., Any]] = {**GENERATORS, "rule": Rule}


@dataclass(frozen=True)
class Due:
    """A decision that falls due before the update after `step`.

    Attributes:
      step: updates done.
      entry: index of the rule's entry.
      rule: what to measure and how to decide.
      phase: the phase that ends, or goes on, with the decision.
      base: mask of the leaves that the rule chooses from.
      previous: the record of the rule's decision before, or None.
    """

    step: int
    entry: int
    rule: Rule
    phase: Phase
    base: Mask
    previous: Mapping[str, Any] | None


class FreezeSchedule:
    """Phases of a run; see `make_freeze`.

    Attributes:
      approximation: what `max_sets` made of the method, with its menu of sets; "" for the method.
      spans: where the entries, the phases as written, begin and end.
      watched: metrics that events wait for.
    """

    def __init__(
        self,
        groups: Groups,
        outline: Outline,
        entries: Sequence[Entry],
        *,
        recipe_schedule: Mapping[str, Any] | None = None,
        adjust: Callable[[Mask], Mask] | None = None,
    ):
        """Expands the entries once, so that a mistake is found before anything runs.

        Args:
          groups: of the model.
          outline: of the whole run.
          entries: from `parse_phases`.
          recipe_schedule: what the method prescribes for the learning rate; see `Recipe`.
          adjust: last word on each mask; None leaves them.
        """
        self.groups, self.outline, self.entries = groups, outline, list(entries)
        self.recipe_schedule = dict(recipe_schedule or {})
        self.spans = Spans(self.entries, outline)
        self._stretches = Stretches(groups, outline, adjust)
        self._known: tuple[int, tuple[Phase, ...]] | None = None
        self.watched = sorted({e.metric for e in map(self.spans.event, range(len(entries))) if e})
        self.approximation = ""
        self.phases()
        for index, entry in enumerate(self.entries):
            if entry.get("generator") == "rule":
                self._check_rule(index)

    @property
    def triggered(self) -> bool:
        """Whether the phases depend on what the run will measure."""
        return bool(self.watched) or any(e.get("generator") == "rule" for e in self.entries)

    def phases(self, log: Log = ()) -> tuple[Phase, ...]:
        """Returns all phases; those not begun yet as they follow if nothing more is decided."""
        if self._known is not None and self._known[0] == len(log):
            return self._known[1]
        stretches: list[Stretch] = []
        start = 0
        for index in range(len(self.entries)):
            for stretch in self._expand(index, start, log):
                follows = stretches and stretches[-1].same(stretch) and stretch.state != "reset"
                events = stretch.event or (stretches and stretches[-1].event)
                # Phases as written stay apart, unless coarser cuts have made them equal.
                written = "generator" not in self.entries[index] and self.outline.cut_quantum <= 1
                if follows and not events and not written:
                    stretches[-1] = replace(stretches[-1], stop=stretch.stop)
                else:
                    stretches.append(stretch)
            start = stretches[-1].stop
        limit = self.outline.max_sets
        if limit is not None:
            stretches, bound = bound_sets(stretches, limit, grows=self.triggered)
            bound = bound or menu_note(self.outline, self.entries)
            if not bound and self.triggered and not log:
                bound = f"at most {limit} trainable sets, the first ones met (freeze.max_sets)"
            self.approximation = f"{bound}: {menu_text(stretches)}" if bound else ""
        phases = number(stretches, atoms=self._atoms(stretches))
        self._known = (len(log), phases)
        return phases

    def _atoms(self, stretches: Sequence[Stretch]) -> dict[str, str] | None:
        """{path: a name shared by the leaves that train in the same sets}, for `number`.

        Sets that decisions may still add are not known, so that there each leaf has its own.
        """
        if self.outline.max_sets is None or all(e.get("state") == "reset" for e in self.entries):
            return None  # nothing is bounded, or nothing has a history
        if self.triggered:
            return {path: path for path in self.groups.paths}
        masks = list({id(stretch.mask): stretch.mask for stretch in stretches}.values())
        return {
            path: "".join("1" if mask[path] else "0" for mask in masks)
            for path in self.groups.paths
        }

    def at(self, step: int, log: Log = ()) -> Phase:
        """Returns the phase of the update after `step`; the last one at the end of the run."""
        phases = self.phases(log)
        return next((p for p in phases if p.stop_step > step), phases[-1])

    def due(self, step: int, log: Log = ()) -> Due | None:
        """Returns the rule's decision that falls due after `step` updates, if it is not made."""
        for index, (start, stop) in enumerate(self.spans.all(log)):
            entry = self.entries[index]
            if entry.get("generator") != "rule" or not start <= step < stop:
                continue
            rule = make_rule(entry)
            records = _records(log, index)
            if step in rule.points(start, stop, self.outline) and not any(
                record["step"] == step for record in records
            ):
                phase = self.at(max(step - 1, start), log)
                base = self._stretches.mask(rule.train, f"freeze.phases[{index}]")
                return Due(step, index, rule, phase, base, records[-1] if records else None)
        return None

    def next_due(self, step: int, log: Log = ()) -> tuple[int, Rule] | None:
        """Returns (step, rule) of the first decision that falls due after more than `step`."""
        found: list[tuple[int, Rule]] = []
        for entry, span in zip(self.entries, self.spans.all(log), strict=True):
            if entry.get("generator") == "rule":
                rule = make_rule(entry)
                points = rule.points(*span, self.outline)
                found += [(point, rule) for point in points if point > step]
        return min(found, key=lambda pair: pair[0], default=None)

    def likely(self, log: Log, step: int) -> tuple[Phase, ...]:
        """Returns phases that may follow the one of `step`, the likeliest first: to compile ahead.

        Of a static plan that is the next phase. A rule names the sets that it may choose.
        """
        now = self.at(step, log)
        phases = self.phases(log)
        following = list(phases[now.index + 1 : now.index + 2])
        for index, (start, stop) in enumerate(self.spans.all(log)):
            entry = self.entries[index]
            if entry.get("generator") == "rule" and start <= step < stop:
                rule = make_rule(entry)
                at = next((p for p in rule.points(start, stop, self.outline) if p > step), None)
                for outcome in rule.likely(self._view(index, now, log)) if at is not None else ():
                    after = self._fresh().phases([*log, {"step": at, "entry": index, **outcome}])
                    following.append(after[min(now.index + 1, len(after) - 1)])
        return tuple(following)

    def foreseen(self, log: Log = ()) -> tuple[Phase, ...]:
        """Returns all phases with the decisions that are certain before anything is measured."""
        known = list(log)
        for index, (start, stop) in enumerate(self.spans.all(log)):
            entry = self.entries[index]
            if entry.get("generator") != "rule" or not make_rule(entry).certain:
                continue
            rule, made = make_rule(entry), _records(log, index)
            for at in rule.points(start, stop, self.outline):
                if made and at <= made[-1]["step"]:
                    continue
                now = self._fresh().at(max(at - 1, start), known)
                outcome = next(iter(rule.likely(self._view(index, now, known))), None)
                if outcome is None:
                    break
                known.append({"step": at, "entry": index, **outcome})
        return self._fresh().phases(known) if len(known) > len(log) else self.phases(log)

    def _check_rule(self, index: int) -> None:
        """Raises ConfigError where a rule names no group, or can already be seen to go wrong."""
        rule, where = make_rule(self.entries[index]), f"freeze.phases[{index}]"
        for text in rule.expressions:
            make_mask(text, self.groups, f"{where}.args")
        view = self._view(index, self.phases()[0], ())
        for outcome in rule.likely(view) if rule.certain else ():
            self._stretches.mask(outcome["train"], where)
        limit, points = self.outline.max_sets, rule.points(*self.spans.all()[index], self.outline)
        visits = min(rule.least_sets(view), len(points))
        if limit is not None and visits > 1:
            # What trains before its first decision takes places on the menu too.
            sets = {id(phase.mask) for phase in self.phases() if phase.start_step < points[0]}
            if visits + len(sets) > limit:
                raise ConfigError(
                    f"freeze.max_sets: {rule.decide} needs {visits + len(sets)} trainable sets or"
                    " more to visit every leaf"
                )

    def _view(self, index: int, now: Phase, log: Log) -> View:
        """What a rule sees before its next decision, without values."""
        base = self._stretches.mask(make_rule(self.entries[index]).train, f"freeze.phases[{index}]")
        leaves = frozenset(path for path, yes in base.items() if yes)
        return View({}, self.groups, self.outline, now.mask, leaves, _records(log, index))

    def _fresh(self) -> "FreezeSchedule":
        """A copy that does not remember this one's log: another of its length has other phases."""
        other = copy.copy(self)
        other._known = None
        return other

    def _expand(self, index: int, start: int, log: Log) -> list[Stretch]:
        """The stretches of one entry."""
        entry, where = self.entries[index], f"freeze.phases[{index}]"
        stop = self.spans.stop(index, start, log)
        kind = entry.get("generator")
        if kind is None:
            event = self.spans.event(index)
            found = self._stretches.make(entry, where, start, stop)
            return [replace(found, event=event.text if event else "")]
        if kind == "rule":
            return self._ruled(index, start, stop, log)
        given = {k: v for k, v in entry.items() if k not in (*HANDED_ON, "generator")}
        # Over what it has at the latest, cut off where its event was seen: an event must not change
        # the phases before it.
        outline = replace(self.outline, start=start, stop=self.spans.stop(index, start, ()))
        shared = {k: entry[k] for k in HANDED_ON if k in entry and k != "until"}
        event = self.spans.event(index)
        stretches: list[Stretch] = []
        for part in GENERATORS[kind](outline, **given):
            begin = stretches[-1].stop if stretches else start
            if begin < stop:
                found = self._stretches.make(
                    {**shared, **part}, where, begin, min(part["until"], stop)
                )
                stretches.append(replace(found, event=event.text if event else ""))
        return stretches

    def _ruled(self, index: int, start: int, stop: int, log: Log) -> list[Stretch]:
        """A stretch from each decision of a rule to the next that chooses something else.

        With state="reset" each choice begins a stretch, so that it resets even where it agrees.
        """
        entry, where = self.entries[index], f"freeze.phases[{index}]"
        shared = {k: entry[k] for k in HANDED_ON if k in entry and k != "until"}
        rule, event = make_rule(entry), self.spans.event(index)
        events = [rule.signal] if rule.every is not None else []
        events += [event.text] if event else []
        first: Entry = {**shared, "train": rule.train, "state": "keep", "elements": rule.elements}
        records = [{"step": start}, *_records(log, index)]
        stretches: list[Stretch] = []
        current = first
        for at, record in enumerate(records):
            if at:
                chosen = {k: record[k] for k in ("train", "scales", "elements") if k in record}
                if "train" in chosen:
                    chosen["train"] = self._within(chosen["train"], rule.train, where)
                current = {**current, **chosen, "state": shared.get("state", "keep")}
                if "name" in record:
                    current["name"] = record["name"]
            end = records[at + 1]["step"] if at + 1 < len(records) else stop
            if end > record["step"]:
                found = self._stretches.make(current, where, record["step"], end)
                found = replace(found, event=" or ".join(events))
                # Other elements of the same leaves are a new choice too.
                resets = found.state == "reset" and "train" in record or "elements" in record
                if stretches and stretches[-1].same(found) and not resets:
                    stretches[-1] = replace(stretches[-1], stop=end)
                else:
                    stretches.append(found)
        return stretches

    def _within(self, chosen: Any, base: str, where: str) -> Any:
        """What a rule chose, without the leaves that it must not choose; `base` if none is left."""
        if base == "all" or not isinstance(chosen, str):
            return chosen
        known, mask = self._stretches.mask(base, where), self._stretches.mask(chosen, where)
        leaves = [path for path, trains in mask.items() if trains and known[path]]
        return {"leaves": leaves} if leaves else base


def _records(log: Log, entry: int) -> list[Any]:
    return [record for record in log if record.get("entry") == entry]


def parse_phases(phases: str | Sequence[Any]) -> list[Entry]:
    """Returns entries from the one-string form or from a list, with their keys checked."""
    entries = parse_entries(phases, _KINDS)
    for index, entry in enumerate(entries):
        if entry.get("generator") == "rule":
            make_rule({k: v for k, v in entry.items()}, f"freeze.phases[{index}]")
    return entries
