"""Base of all models: a chain of named stages, of which any part can run by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jft.models.layers import Training
from jft.models.scan import draws_of, scan_blocks
from jft.stack_names import Range, stack_range


class Staged(nn.Module):
    """A chain of stages; a subclass names them in `stages` and runs one in `run_stage`.

    Where `scanned` is "blocks", stages "blocks_0", "blocks_1", ... may be given as stacks, see
    `jft.stack_names`, and run as a loop; `start`, `stop` and `training.cut` must not fall within
    one. Such a subclass also has `scan_block`. Where not all blocks of a stack compute alike, but
    each the same as the one `scan_period` before it, a pass of the loop runs so many.
    """

    scanned: ClassVar[str | None] = None
    scan_period: ClassVar[int] = 1

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output: the first part of every path."""
        raise NotImplementedError

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs one stage; `training` is None where it is to run as in evaluation."""
        raise NotImplementedError

    def scan_block(self, block: int) -> nn.Module:
        """The module of stage blocks_`block` without a name, and so without parameters."""
        raise NotImplementedError

    def draw_sites(self) -> tuple[str, ...]:
        """Module paths within a block that draw random numbers."""
        return ()

    def block_drop_path_rate(self, block: int) -> float:
        """Share of examples for which stage blocks_`block` is skipped in training."""
        del block
        return 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        start: int = 0,
        stop: int | None = None,
        training: Training | None = None,
    ) -> jax.Array:
        """Runs stages [start, stop) on images [B, H, W, C] or on the output of stage start - 1."""
        stacks = _stacks(self.variables.get("params", {})) if self.scanned else {}
        first, end, _ = slice(start, stop).indices(len(self.stages))
        borders = {"start": first, "stop": end, "cut": training.cut if training else 0}
        for index, name in list(enumerate(self.stages))[first:end]:
            live = training if training and index >= training.cut else None
            held = stacks.get(name)
            if held is None:
                x = self.run_stage(name, x, live)
                continue
            where = self.stages.index(held.stages[0]), self.stages.index(held.stages[-1])
            for what, border in borders.items():
                if where[0] < border <= where[1]:
                    raise ValueError(f"{what} {border} falls within the stack {held.name}")
            if index == where[0]:
                x = self._run_stack(held, x, live)
        return x

    def _run_stack(self, held: Range, x: jax.Array, training: Training | None) -> jax.Array:
        assert self.scope is not None
        draws = None
        if training:
            rates = [self.block_drop_path_rate(at) for at in range(held.first, held.last + 1)]
            draws = draws_of(self.scope, held.stages, self.draw_sites(), rates)
        # The last of those that take turns: a rate of 0, as of the first block, draws nothing.
        last = range(held.first, held.last + 1)[-self.scan_period :]
        turns = sorted(last, key=lambda block: (block - held.first) % self.scan_period)
        blocks = [self.scan_block(block) for block in turns]
        return scan_blocks(blocks, self.variables["params"][held.name], x, training, draws)


def _stacks(params: Mapping[str, Any]) -> dict[str, Range]:
    """{block: the stack among the given params that holds it}."""
    found = [stack_range(name) for name in params]
    return {stage: held for held in found if held for stage in held.stages}


def block_index(name: str) -> int:
    """3 of "blocks_3"."""
    return int(name.rpartition("_")[2])


def growing(rate: float, block: int, blocks: int) -> float:
    """The rate of a block where that of the last is `rate` and it grows linearly from 0."""
    return rate * block / max(blocks - 1, 1)
