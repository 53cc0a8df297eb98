"""What the steps of a phase read: images, fixed views of images, or cached outputs of a prefix."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.data.order import make_index_loader
from jft.data.protocol import Source
from jft.freeze.cache_choice import CacheCosts, decide_cache, runs_in_parts
from jft.freeze.cut import PrefixCache, cached_batch_shape, fill_cache, table_shape
from jft.freeze.entry_store import measure_room
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
    text: str = ""

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
      parallel: the devices.
      workdir: the run directory.
      images: (first batch, views or None) -> the stream of image batches.
      image_shape: {name: shape and dtype} of an image batch.
      shapes: of all params and all statistics.
      flops: phase -> FLOPs an example of (a step, a step from cached entries, the prefix).
      loader: options of the image loader: workers, bad_image_quota, interpolation.
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
    flops: Callable[[Phase], tuple[float, float, float]]
    loader: Mapping[str, Any]

    def choose(
        self, phase: Phase, phases: Sequence[Phase], chosen: MutableMapping[str, str]
    ) -> Input:
        """Returns what a phase reads.

        Args:
          phase: the phase.
          phases: all of them; those before it may have left a shallower cache.
          chosen: {phase and cut: tier, "" for no cache}; what is in it stays as it is, so that a
            resumed run does as the interrupted one, and what is decided is added.
        """
        cut = first_trainable_stage(phase.mask, self.prefix.stages)
        if cut == 0 or self.mode == "off" or not runs_in_parts(self.prefix.apply):
            return self._uncached(cut)
        name = _name(phase, cut)
        before = [first_trainable_stage(p.mask, self.prefix.stages) for p in phases[: phase.index]]
        pairs = zip(phases[: phase.index], before, strict=True)
        cached = {c for p, c in pairs if chosen.get(_name(p, c)) and c < cut}
        cuts = (*sorted(cached), cut)
        if name not in chosen:
            costs = self._costs(phase, cuts)
            use, text = decide_cache(self.mode, costs, f"cache of phase {phase.index}")
            tier = costs.room.tier(costs.examples * (costs.views or 1) * costs.entry_bytes)
            chosen[name] = (tier or "") if use else ""
        else:
            text = ""
        if not chosen[name]:
            return replace(self._uncached(cut), text=text)
        return Input("cache", cuts, chosen[name], text)

    def _uncached(self, cut: int) -> Input:
        return Input("views" if cut and self.random and self.views is not None else "images")

    def _costs(self, phase: Phase, cuts: tuple[int, ...]) -> CacheCosts:
        step, _, prefix = self.flops(phase)
        entry = self._prefix(cuts).entry(*self.shapes)
        return CacheCosts(
            steps=phase.stop_step - phase.start_step,
            batch_size=self.batch_size,
            examples=len(self.source),
            views=self.views,
            prefix_flops=prefix,
            step_flops=step,
            entry_bytes=int(np.prod(entry.shape)) * np.dtype(entry.dtype).itemsize,
            room=measure_room(self.parallel, self.workdir),
        )

    def _prefix(self, cuts: tuple[int, ...]) -> Prefix:
        return replace(self.prefix, cuts=cuts, views=self.views or 1)

    def entry(self, chosen: Input) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an entry of the cache."""
        return self._prefix(chosen.cuts).entry(*self.shapes)

    def table_shape(self, chosen: Input) -> Shapes:
        """Shape of what the step takes as `Frozen.cache`."""
        if chosen.kind != "cache" or chosen.tier != "device":
            return {}
        prefix, entry = self._prefix(chosen.cuts), self.entry(chosen)
        return {"table": table_shape(prefix, entry, len(self.source), self.parallel)}

    def batch_shape(self, chosen: Input) -> Shapes:
        """Shapes of a global batch."""
        rows = self.image_shape["label"].shape[0]
        if chosen.kind == "cache":
            entry = self.entry(chosen)
            return cached_batch_shape(chosen.tier, rows, entry.shape, entry.dtype)
        if chosen.kind == "views":
            index = jax.ShapeDtypeStruct((rows,), np.int32)
            return {**self.image_shape, "example": index, "view": index}
        return self.image_shape

    def fill(
        self, chosen: Input, params: Flat, stats: Flat, caches: Sequence[PrefixCache]
    ) -> PrefixCache:
        """Computes the entries, or takes those that are there."""
        return fill_cache(
            self._prefix(chosen.cuts),
            params,
            stats,
            self.source,
            parallel=self.parallel,
            tier=chosen.tier,
            workdir=self.workdir,
            shallower=caches,
            **self.loader,
        )

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
        )
        return cache.batches(indexed)


def _name(phase: Phase, cut: int) -> str:
    return f"{phase.index}:{cut}"
