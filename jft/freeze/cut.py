"""The frozen-prefix cache: outputs of the stages below the cut, computed once a run.

Entry `example * K + view` is what stages [0, cut) make of view `view` of an example. It is a pure
function of the data, the prefix's weights and the layout of the chunks that fill the cache, never
of a training batch: a resumed run finds or computes the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.data.fit import COVER, Fit
from jft.data.loader import EvalLoader, make_eval_loader
from jft.data.protocol import Source
from jft.freeze.entry_store import (
    DeviceStore,
    HostStore,
    Layout,
    entries_path,
    map_entries,
    open_entries,
    writing,
)
from jft.freeze.prefix import Prefix, chunk_rows
from jft.train.parallel import AXIS, Parallel
from jft.tree import Flat


@dataclass(frozen=True)
class PrefixCache:
    """Filled entries, and the batches that the suffix trains on.

    Attributes:
      key: hash of what they were computed from.
      views: K.
      tier: "device", "host" or "disk".
      replaced: int32 [N], the example whose image stands for each: itself, or of a bad image the
        next readable one.
      store: the entries.
    """

    key: str
    views: int
    tier: str
    replaced: np.ndarray
    store: DeviceStore | HostStore

    @property
    def table(self) -> jax.Array | None:
        """The entries on every device, an argument of the step; None on the other tiers."""
        return self.store.table if isinstance(self.store, DeviceStore) else None

    def entries(self) -> np.ndarray:
        """All entries on the host [N * K, ...]."""
        return self.store.read(0, self.store.layout.count)

    def batch(self, indexed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the host arrays of a step, from a batch of `make_index_loader`."""
        entry = indexed["example"] * np.int32(self.views) + indexed["view"]
        rest = {name: indexed[name] for name in ("label", "mask")}
        if isinstance(self.store, DeviceStore):
            return {"entry": entry, **rest}
        return {"features": np.take(self.store.rows, entry, axis=0), **rest}

    def batches(self, stream: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """Yields `batch` of each; where that copies much, a thread is one batch ahead."""
        if isinstance(self.store, DeviceStore):
            yield from map(self.batch, stream)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="jft-cache") as pool:
            ahead = None
            for indexed in stream:
                current, ahead = ahead, pool.submit(self.batch, indexed)
                if current is not None:
                    yield current.result()
            if ahead is not None:
                yield ahead.result()

    def batch_shape(self, label: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a global batch with such labels."""
        layout = self.store.layout
        return cached_batch_shape(self.tier, label, layout.shape, layout.dtype)


def cached_batch_shape(
    tier: str, label: jax.ShapeDtypeStruct, shape: Sequence[int], dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a global batch that a cache of that tier will give."""
    rows = label.shape[0]
    rest = {
        "label": label,
        "mask": jax.ShapeDtypeStruct((rows,), np.float32),
    }
    if tier == "device":
        return {"entry": jax.ShapeDtypeStruct((rows,), np.int32), **rest}
    return {"features": jax.ShapeDtypeStruct((rows, *shape), dtype), **rest}


def table_shape(
    prefix: Prefix, entry: jax.ShapeDtypeStruct, examples: int, parallel: Parallel
) -> jax.ShapeDtypeStruct:
    """Returns the shape of `PrefixCache.table`, known before it is filled; it ends in padding."""
    rows = chunk_rows(prefix, parallel)
    count = -(-examples // rows) * rows * prefix.views
    return jax.ShapeDtypeStruct((count, *entry.shape), entry.dtype)


def fill_cache(
    prefix: Prefix,
    params: Flat,
    stats: Flat,
    source: Source,
    *,
    parallel: Parallel,
    tier: str,
    workdir: Path,
    shallower: Sequence[PrefixCache] = (),
    entry: jax.ShapeDtypeStruct | None = None,
    workers: int = 0,
    bad_image_quota: float = 0.0,
    fit: Fit = COVER,
) -> PrefixCache:
    """Computes every entry, or finds them: in the run directory, or those of a shallower cut.

    Args:
      prefix: what is computed.
      params, stats: {path: leaf}, at least those of the prefix; arrays anywhere.
      source: the training split.
      parallel: the devices; each computes its share of a chunk.
      tier: of the entries; see `Room.tier`.
      workdir: the run directory, for the tier "disk".
      shallower: caches made before; the deepest with the right key is the input.
      entry: `prefix.entry`, where it is known already: finding it traces the model.
      workers, bad_image_quota, fit: as in `make_train_loader`.

    Raises:
      DataError: an image that cannot be read, beyond the quota; a file that cannot be written.
    """
    key, entry = prefix.key(params, stats, parallel), entry or prefix.entry(params, stats)
    layout = Layout(len(source) * prefix.views, entry.shape, np.dtype(entry.dtype))
    path = entries_path(workdir, key)
    if tier == "disk" and (found := open_entries(path, key, layout)):
        replaced = _replaced(len(source), found[1]["replaced"])
        return PrefixCache(key, prefix.views, tier, replaced, found[0])
    chunks = _Chunks(prefix, params, stats, parallel)
    images = functools.partial(
        make_eval_loader,
        source,
        batch_size=chunks.rows,
        image_shape=prefix.image_shape,
        workers=workers,
        rank=jax.process_index(),
        ranks=jax.process_count(),
        bad_image_quota=bad_image_quota,
        fit=fit,
        replace_bad=True,
    )
    blocks = chunks.blocks(len(source), images, shallower)
    if tier == "disk":
        with writing(path, layout) as file:
            bad = chunks.store(blocks, file)
            file.finish({"key": key, "replaced": list(bad.items())})
        store = HostStore(layout, map_entries(path, layout))
    else:
        store = _in_memory(tier, layout, chunks.rows * prefix.views, parallel)
        bad = chunks.store(blocks, store)
    return PrefixCache(key, prefix.views, tier, _replaced(len(source), bad.items()), store)


def _in_memory(
    tier: str, layout: Layout, block: int, parallel: Parallel
) -> DeviceStore | HostStore:
    return DeviceStore(layout, block, parallel) if tier == "device" else HostStore(layout)


def _replaced(count: int, pairs: Iterable[Sequence[int]]) -> np.ndarray:
    replaced = np.arange(count, dtype=np.int32)
    for index, other in pairs:
        replaced[index] = other
    return replaced


class _Chunks:
    """Computes chunks of `rows` examples in order: one compiled function a part of the prefix."""

    def __init__(self, prefix: Prefix, params: Flat, stats: Flat, parallel: Parallel) -> None:
        self.prefix, self.parallel = prefix, parallel
        self.rows = chunk_rows(prefix, parallel)
        self.leaves = (params, stats)
        here = parallel.replicated
        self._first = jax.jit(self._from_images, out_shardings=(here, here))
        self._next = jax.jit(self._from_entries, static_argnums=(2, 3), out_shardings=here)

    def blocks(
        self, count: int, images: Callable[[], EvalLoader], shallower: Sequence[PrefixCache]
    ) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Yields (entries [rows * K, ...], example behind each row [rows], -1 where padded)."""
        cuts = self.prefix.cuts
        part, cache = self._deepest(shallower)
        parts = [
            self.parallel.place(self.prefix.variables(*self.leaves, start, stop))
            for start, stop in zip((0, *cuts), cuts, strict=False)
        ]
        below = self._compute(parts[0], images()) if cache is None else self._read(count, cache)
        for values, examples in below:
            for at in range(part + 1, len(cuts)):
                values = self._next(parts[at], values, cuts[at - 1], cuts[at])
            yield values, examples

    def store(self, blocks: Iterable[tuple[jax.Array, np.ndarray]], store: Any) -> dict[int, int]:
        """Puts all entries into a store; returns {bad image: what stands in its place}."""
        bad: dict[int, int] = {}
        for number, (values, examples) in enumerate(blocks):
            first = number * self.rows
            store.put(first * self.prefix.views, values)
            bad |= {first + i: int(e) for i, e in enumerate(examples) if e not in (first + i, -1)}
        return bad

    def _deepest(self, shallower: Sequence[PrefixCache]) -> tuple[int, PrefixCache | None]:
        """(index of the cut it ends at, the cache that saves most), or (0, None)."""
        for part in reversed(range(len(self.prefix.cuts)) if shallower else ()):
            key = self.prefix.until(part).key(*self.leaves, self.parallel)
            for cache in shallower:
                if cache.key == key:
                    return part, cache
        return 0, None

    def _compute(self, variables: Any, images: EvalLoader) -> Iterator[tuple[jax.Array, Any]]:
        for batch in images:
            read = self.parallel.place_batch({name: batch[name] for name in ("image", "example")})
            values, examples = self._first(variables, read)
            yield values, np.asarray(examples)

    def _read(self, count: int, cache: PrefixCache) -> Iterator[tuple[jax.Array, np.ndarray]]:
        block = self.rows * self.prefix.views
        for start in range(0, count, self.rows):
            rows = cache.store.read(start * self.prefix.views, start * self.prefix.views + block)
            padded = np.zeros((block, *rows.shape[1:]), rows.dtype)
            padded[: len(rows)] = rows
            yield self.parallel.place(padded), cache.replaced[start : start + self.rows]

    def _from_images(self, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        def view(number: jax.Array) -> jax.Array:
            views = jnp.full(self.rows, number, jnp.int32)
            x = self.prefix.transform(batch["image"], batch["example"], views)
            return self.prefix.apply(variables, x, start=0, stop=self.prefix.cuts[0])

        # One view at a time: K of them side by side would take K times the memory.
        out = jax.lax.map(view, jnp.arange(self.prefix.views, dtype=jnp.int32))
        return self._joined(out), batch["example"]

    def _from_entries(self, variables: Any, values: jax.Array, start: int, stop: int) -> jax.Array:
        x = values.reshape((self.rows, self.prefix.views, *values.shape[1:]))
        split = NamedSharding(self.parallel.mesh, P(None, AXIS))
        x = jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), split)

        def run(x: jax.Array) -> jax.Array:
            return self.prefix.apply(variables, x, start=start, stop=stop)

        return self._joined(jax.lax.map(run, x))

    def _joined(self, values: jax.Array) -> jax.Array:
        """[K, rows, ...] -> [rows * K, ...], in the order of entries."""
        return jnp.swapaxes(values, 0, 1).reshape((-1, *values.shape[2:]))
