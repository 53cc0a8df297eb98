"""What the steps of a phase read: images, fixed views of images, or cached outputs of a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.data.order import make_index_loader
from jft.data.protocol import Source
from jft.errors import ConfigError
from jft.freeze.cache_choice import CacheCosts, decide_cache, runs_in_parts
from jft.freeze.cut import PrefixCache, cached_batch_shape, fill_cache, table_shape
from jft.freeze.entry_store import discard_entries, measure_room
from jft.freeze.phases import Phase
from jft.freeze.prefix import Prefix
from jft.train.parallel import Parallel
from jft.train.state import first_trainable_stage
from jft.tree import Flat

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Input:
    """What one phase reads.

    Attributes:
      kind: "images", "views" (of images, the same at every visit) or "cache".
      cuts: where the prefix of a cache is divided; the last is the phase's cut.
      tier: of the cache's entries.
      text: why, in one line; "" where there was nothing to decide.
    """

    kind: str = "images"
    cuts: tuple[int, ...] = ()
    tier: str = ""
    text: str = field(default="", compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What of it decides the compiled step."""
        return (self.kind, self.cuts[-1:], self.tier)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run's phases, and how they are chosen.

    Attributes:
      mode: freeze.cache.
      views: K of phases with a cut; None draws a new augmentation at every visit.
      random: whether the augmentation draws anything.
      prefix: of the model with `cuts` (); completed by phase.
      source: the training split.
      batch_size: global.
      seed: of the run.
      sampling: of the training examples.
      parallel: the devices.
      workdir: the run directory.
      images: (first batch, views or None) -> the stream of image batches.
      image_shape: {name: shape and dtype} of an image batch.
      shapes: of all params and all statistics.
      step_flops: phase -> FLOPs of a step an example, prefix included.
      prefix_flops: cut -> FLOPs of the stages below it, forward, an example.
      step_bytes: phase -> what a step takes of a device: leaves, batch, activations.
      loader: options of the image loader: workers, bad_image_quota, fit.
      mixed: whether steps mix the pixels of pairs of images.
    """

    mode: str
    views: int | None
    random: bool
    prefix: Prefix
    source: Source
    batch_size: int
    seed: int
    parallel: Parallel
    workdir: Path
    images: Callable[[int, int | None], Iterator[Mapping[str, np.ndarray]]]
    image_shape: Shapes
    shapes: tuple[Flat, Flat]
    step_flops: Callable[[Phase], float]
    prefix_flops: Callable[[int], float]
    step_bytes: Callable[[Phase], int]
    loader: Mapping[str, Any]
    mixed: bool = False
    sampling: str = "shuffle"
    _memo: _Memo = field(default_factory=lambda: _Memo(), repr=False, compare=False)

    def choose(
        self,
        phase: Phase,
        phases: Sequence[Phase],
        chosen: MutableMapping[str, str],
        *,
        settled: bool = True,
    ) -> Input:
        """Returns what a phase reads.

        Args:
          phase: the phase.
          phases: all of them; those before it may have left a shallower cache.
          chosen: {phase and cut: tier, "" for no cache}; what is in it stays as it is, so that a
            resumed run does as the interrupted one, and what is decided is added.
          settled: False for a phase that is only likely to come: nothing about it is kept, told or
            refused, for when it begins it may be another.

        Raises:
          ConfigError: freeze.cache=on where a settled phase can have no cache.
        """
        cut = self._cut(phase)
        if cut == 0 or self.mode == "off" or not runs_in_parts(self.prefix.apply):
            return self.uncached(phase)
        self._memo.follow(phases)
        name = _name(phase, cut)
        key = (name, phase.start_step, phase.stop_step, settled)
        if key not in self._memo.inputs:
            if not settled:
                chosen = {other: tier for other, tier in chosen.items() if other != name}
            cuts = (*sorted(c for c in self._before(phase, phases, chosen) if c < cut), cut)
            text = ""
            if name not in chosen:
                try:
                    text = self._decide(phase, phases, cuts, chosen)
                except ConfigError:
                    if settled or self.views is None or self.mixed:  # no phase can have one then
                        raise
                    chosen[name] = ""
            made = Input("cache", cuts, chosen[name]) if chosen[name] else self.uncached(phase)
            self._memo.inputs[key] = made
            return replace(made, text=self._told(cut, made.kind, text) if settled else "")
        return self._memo.inputs[key]

    def _told(self, cut: int, kind: str, text: str) -> str:
        """The reason for a choice, but only once for all phases with one cut and one outcome."""
        fresh = (cut, kind) not in self._memo.told
        if text:
            self._memo.told.add((cut, kind))
        return text if fresh else ""

    def drop(self, phase: Phase, chosen: MutableMapping[str, str]) -> Input:
        """Gives up the cache of a phase, whose entries could not be made; returns what it reads."""
        chosen[_name(phase, self._cut(phase))] = ""
        self._memo.follow(())  # later phases cannot take its entries as their input
        return self.uncached(phase)

    def uncached(self, phase: Phase) -> Input:
        """Returns what a phase reads without a cache."""
        fixed = self._cut(phase) and self.random and self.views is not None
        return Input("views" if fixed else "images")

    def _cut(self, phase: Phase) -> int:
        """The first stage that trains; phases of one set share their mask."""
        known = self._memo.cuts.get(id(phase.mask))
        if known is None:
            # The mask is kept with its cut, so that no other object gets its id.
            known = phase.mask, first_trainable_stage(phase.mask, self.prefix.stages)
            self._memo.cuts[id(phase.mask)] = known
        return known[1]

    def _before(
        self, phase: Phase, phases: Sequence[Phase], chosen: Mapping[str, str]
    ) -> frozenset[int]:
        """The cuts of the caches of all phases before one."""
        known = self._memo.before
        start = next((at for at in range(phase.index, 0, -1) if at in known), 0)
        found, sure = known.get(start, frozenset()), True
        for earlier in phases[start : phase.index]:
            cut = self._cut(earlier)
            name = _name(earlier, cut)
            found = found | {cut} if chosen.get(name) else found
            sure = sure and (cut == 0 or name in chosen)
            if sure:
                known[earlier.index + 1] = found
        return found

    def _decide(
        self,
        phase: Phase,
        phases: Sequence[Phase],
        cuts: tuple[int, ...],
        chosen: MutableMapping[str, str],
    ) -> str:
        """Decides about the cache of a phase; returns why."""
        cut, name = cuts[-1], _name(phase, cuts[-1])
        last = phases[phase.index - 1] if 0 < phase.index <= len(phases) else None
        if last is not None and self._cut(last) == cut and _name(last, cut) in chosen:
            chosen[name] = chosen[_name(last, cut)]  # its entries are there already
            return ""
        steps = phase.stop_step - phase.start_step
        if is_planned(phase, phases):
            for later in phases[phase.index + 1 :]:
                if self._cut(later) != cut:
                    break
                steps += later.stop_step - later.start_step
        costs = self._costs(phase, cuts, steps, chosen)
        use, text = decide_cache(self.mode, costs, f"cache below {self.prefix.stages[cut]}")
        tier = costs.room.tier(costs.examples * (costs.views or 1) * costs.entry_bytes)
        chosen[name] = (tier or "") if use else ""
        return text

    def _costs(
        self, phase: Phase, cuts: tuple[int, ...], steps: int, chosen: Mapping[str, str]
    ) -> CacheCosts:
        prefix = self.prefix_flops(cuts[-1])
        room = measure_room(self.parallel, self.workdir, step_bytes=lambda: self.step_bytes(phase))
        fill = prefix
        if cuts[:-1]:  # the shallower entries are its input, and lie beside it while it is filled
            fill -= self.prefix_flops(cuts[-2])
            tiers = {tier for name, tier in chosen.items() if name.endswith(f":{cuts[-2]}")}
            size = self._entry_bytes(cuts[:-1]) * len(self.source) * (self.views or 1)
            for tier in tiers - {""} if cuts[-2] not in self._memo.filled else ():
                room = replace(room, **{tier: max(0, getattr(room, tier) - size)})
        return CacheCosts(
            steps=steps,
            batch_size=self.batch_size,
            examples=len(self.source),
            views=self.views,
            prefix_flops=prefix,
            step_flops=self.step_flops(phase),
            entry_bytes=self._entry_bytes(cuts),
            room=room,
            fill_flops=fill,
            mixed=self.mixed,
        )

    def _entry_bytes(self, cuts: tuple[int, ...]) -> int:
        entry = self.entry(cuts)
        return int(np.prod(entry.shape)) * np.dtype(entry.dtype).itemsize

    def entry(self, cuts: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an entry of the cache whose prefix is divided at `cuts`."""
        known = self._memo.entries
        if cuts[-1] not in known:
            known[cuts[-1]] = self._prefix(cuts).entry(*self.shapes)
        return known[cuts[-1]]

    def _prefix(self, cuts: tuple[int, ...]) -> Prefix:
        return replace(self.prefix, cuts=cuts, views=self.views or 1)

    def table_shape(self, chosen: Input) -> Shapes:
        """Shape of what the step takes as `Frozen.cache`."""
        if chosen.kind != "cache" or chosen.tier != "device":
            return {}
        prefix, entry = self._prefix(chosen.cuts), self.entry(chosen.cuts)
        return {"table": table_shape(prefix, entry, len(self.source), self.parallel)}

    def batch_shape(self, chosen: Input) -> Shapes:
        """Shapes of a global batch."""
        rows = self.image_shape["label"].shape[0]
        if chosen.kind == "cache":
            entry = self.entry(chosen.cuts)
            label = self.image_shape["label"]
            return cached_batch_shape(chosen.tier, label, entry.shape, entry.dtype)
        if chosen.kind == "views":
            index = jax.ShapeDtypeStruct((rows,), np.int32)
            return {**self.image_shape, "example": index, "view": index}
        return self.image_shape

    def fill(
        self, chosen: Input, params: Flat, stats: Flat, caches: Sequence[PrefixCache]
    ) -> PrefixCache:
        """Computes the entries, or takes those that are there."""
        self._memo.filled.add(chosen.cuts[-1])
        return fill_cache(
            self._prefix(chosen.cuts),
            params,
            stats,
            self.source,
            parallel=self.parallel,
            tier=chosen.tier,
            workdir=self.workdir,
            shallower=caches,
            entry=self.entry(chosen.cuts),
            **self.loader,
        )

    def discard(self, cache: PrefixCache) -> None:
        """Removes what a cache left in the run directory; it can be computed again."""
        if cache.tier == "disk":
            discard_entries(self.workdir, cache.key)

    def stream(
        self, chosen: Input, step: int, cache: PrefixCache | None
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """Returns the batches of a phase from a step of the run on."""
        if chosen.kind != "cache" or cache is None:
            return self.images(step, self.views if chosen.kind == "views" else None)
        indexed = make_index_loader(
            self.source,
            batch_size=self.batch_size,
            seed=self.seed,
            views=cache.views,
            start_batch=step,
            rank=jax.process_index(),
            ranks=jax.process_count(),
            replaced=cache.replaced,
            sampling=self.sampling,
        )
        return cache.batches(indexed)


def is_planned(phase: Phase, phases: Sequence[Phase]) -> bool:
    """Whether a phase is one of `phases`, not one that a decision may bring."""
    return tuple(phases[phase.index : phase.index + 1]) == (phase,)


@dataclass
class _Memo:
    """What is asked for at every step, found once.

    Attributes:
      phases: of the run, as `inputs` and `before` know them; a decision makes others.
      inputs: {phase and cut, first and last step, whether settled: what the phase reads}.
      before: {index of a phase: cuts of the caches before it}.
      cuts: {id of a mask: (mask, cut)}.
      entries: {cut: shape and dtype of an entry}.
      filled: cuts whose entries have taken their room already.
      told: (cut, kind) of the lines that were shown.
    """

    phases: Sequence[Phase] = ()
    inputs: dict[tuple[str, int, int, bool], Input] = field(default_factory=dict)
    before: dict[int, frozenset[int]] = field(default_factory=dict)
    cuts: dict[int, tuple[Mapping[str, bool], int]] = field(default_factory=dict)
    entries: dict[int, jax.ShapeDtypeStruct] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)
    told: set[tuple[int, str]] = field(default_factory=set)

    def follow(self, phases: Sequence[Phase]) -> None:
        """Forgets what held for other phases."""
        if phases is not self.phases:
            self.phases, self.inputs, self.before = phases, {}, {}


def _name(phase: Phase, cut: int) -> str:
    return f"{phase.index}:{cut}"
