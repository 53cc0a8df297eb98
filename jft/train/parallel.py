"""Devices: one step function, run by pmap, shard_map or jit over a mesh, compiled ahead of time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jft.errors import ConfigError, nearest

AXIS = "batch"
MODES = ("pmap", "shard_map", "auto")


@dataclass(frozen=True)
class Parallel:
    """How a run uses its devices; state is replicated and never stacked, batches are split.

    Attributes:
      mode: "pmap" or "shard_map", where the step sums over devices itself, or "auto" for jit over
        the mesh with the batch sharded.
      mesh: one axis, "batch", over every device of every process.
    """

    mode: str
    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Number of devices of the run."""
        return self.mesh.size

    @property
    def axis_name(self) -> str | None:
        """The axis a step must sum over; None under "auto", where the compiler does it.

        None on one device as well: a sum of one would still wait for every gradient.
        """
        return AXIS if self.mode != "auto" and self.num_devices > 1 else None

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of state and frozen leaves."""
        return NamedSharding(self.mesh, P())

    @property
    def batched(self) -> NamedSharding:
        """Sharding of batches: the leading dimension over all devices."""
        return NamedSharding(self.mesh, P(AXIS))

    def place(self, tree: Any) -> Any:
        """Returns `tree` with every leaf on every device; leaves that are there stay."""

        def put(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == self.replicated:
                return leaf
            if (
                jax.process_count() > 1
                and isinstance(leaf, jax.Array)
                and leaf.is_fully_addressable
            ):
                leaf = np.asarray(leaf)  # of this process alone: backends do not move it to others
            # may_alias=False: the step donates this buffer, the caller may keep the array.
            return jax.device_put(leaf, self.replicated, may_alias=False)

        return jax.tree.map(put, tree)

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns a host batch of this process's rows as global arrays, sharded by rows."""
        count = jax.process_count()
        if count == 1:
            return jax.device_put(dict(batch), self.batched)
        return {
            name: jax.make_array_from_process_local_data(
                self.batched, leaf, (leaf.shape[0] * count, *leaf.shape[1:])
            )
            for name, leaf in batch.items()
        }

    def compile_train(self, step: Callable[..., Any], state: Any, frozen: Any, batch: Any) -> Any:
        """Returns the compiled step; it donates the state and nothing else.

        Args: arrays or shapes of state, frozen leaves and global batch.
        """
        state = _abstract(state, self.replicated)
        frozen = _abstract(frozen, self.replicated)
        batch = _abstract(batch, self.batched)
        if self.mode != "pmap":
            if self.mode == "shard_map":
                # Unchecked, as under pmap: `check_replicas` compares what the devices hold.
                step = jax.shard_map(
                    step,
                    mesh=self.mesh,
                    in_specs=(P(), P(), P(AXIS)),
                    out_specs=(P(), P()),
                    check_vma=False,
                )
            out = (self.replicated, self.replicated)
            jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
            return jitted.lower(state, frozen, batch).compile()
        size = self.num_devices
        mapped = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, None, 0),
            out_axes=(None, None),
            devices=list(self.mesh.devices.flat),
        )

        def flat_step(state: Any, frozen: Any, batch: Any) -> Any:
            rows = jax.tree.map(
                lambda x: x.reshape((size, x.shape[0] // size) + x.shape[1:]), batch
            )
            return mapped(state, frozen, rows)

        # A plain function around pmap: jit of a pmapped function would lower the pmap itself and
        # drop the donation without a word.
        return jax.jit(flat_step, donate_argnums=0).lower(state, frozen, batch).compile()

    def compile_eval(self, step: Callable[..., Any], params: Any, stats: Any, batch: Any) -> Any:
        """Returns the compiled evaluation step; rows are split, its results are on every device."""
        shapes = (_abstract(params, self.replicated), _abstract(stats, self.replicated))
        jitted = jax.jit(step, out_shardings=self.replicated)
        return jitted.lower(*shapes, _abstract(batch, self.batched)).compile()


def _abstract(tree: Any, sharding: NamedSharding) -> Any:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def make_parallel(*, mode: str = "pmap", devices: int | None = None) -> Parallel:
    """Returns the device layout of the run.

    Raises:
      ConfigError: an unknown mode, more devices than there are, or pmap with several processes
        (there each process would train on its own rows without an error).
    """
    if mode not in MODES:
        raise ConfigError(f"parallel.mode: no mode {mode!r}{nearest(mode, MODES)}")
    if mode == "pmap" and jax.process_count() > 1:
        raise ConfigError(
            "parallel.mode: 'pmap' is for one process; use 'shard_map' or 'auto' for several"
        )
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ConfigError(f"parallel.devices: {count} asked for, there are {len(available)}")
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=available[:count])
    return Parallel(mode, mesh)


def check_batch_size(
    batch_size: int, accum_steps: int, parallel: Parallel, together: int = 1
) -> None:
    """Raises ConfigError unless every device gets the same number of rows in each micro-batch.

    `together` rows are not to be parted: the pairs of mixup and cutmix.
    """
    if accum_steps < 1:
        raise ConfigError(f"train.accum_steps: {accum_steps} should be 1 or more")
    unit = parallel.num_devices * accum_steps * together
    if batch_size < 1 or batch_size % unit:
        near = max(unit, round(batch_size / unit) * unit)
        pairs = f" x {together} rows that augment.mixup or cutmix mixes" if together > 1 else ""
        raise ConfigError(
            f"train.batch_size: {batch_size} does not divide into {parallel.num_devices} devices x"
            f" {accum_steps} accum_steps{pairs}; the nearest that does is {near}"
        )


def check_replicas(tree: Any) -> None:
    """Raises RuntimeError if devices hold different values of a replicated leaf.

    A value that was not reduced over the devices is otherwise read from the first one silently.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(leaf.addressable_shards) < 2:
            continue
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        if any(shard.tobytes() != shards[0].tobytes() for shard in shards[1:]):
            if "model_state" in name:
                raise ConfigError(
                    f"model: its statistics differ from device to device ({name}): use"
                    " --config.parallel.mode=auto, or jft.models.layers.BatchNorm"
                )
            raise RuntimeError(f"devices disagree on {name}: it was not reduced")
