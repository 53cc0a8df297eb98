"""What a product of arrays costs: formulas that the jaxpr and the compiled program share.

2 FLOPs a multiply-add. Multiplying padding, or the zeros between dilated elements, is no work: so a
convolution and the two that make its gradients cost the same.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# The scope of a depthwise convolution written as multiply-adds (models.layers), as a whole part of
# a name, alone or wrapped by a transformation: "jvp(depthwise)/mul".
DEPTHWISE = re.compile(r"(?:^|[/(])depthwise(?:[/)]|$)")


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Attributes:
      size: input length before dilation.
      window: number of taps.
      output: output length.
      stride: input step per output.
      low: padding before the input; negative crops.
      lhs_dilation: spacing of input elements.
      rhs_dilation: spacing of taps.
    """

    size: int
    window: int
    output: int
    stride: int = 1
    low: int = 0
    lhs_dilation: int = 1
    rhs_dilation: int = 1

    @functools.cached_property
    def pairs(self) -> int:
        """How many (output position, tap) pairs read a real input element."""
        starts = np.arange(self.output, dtype=np.int64) * self.stride - self.low
        end = (self.size - 1) * self.lhs_dilation
        total = 0
        for tap in range(self.window):
            at = starts + tap * self.rhs_dilation
            total += int(np.count_nonzero((at >= 0) & (at <= end) & (at % self.lhs_dilation == 0)))
        return total


def dot_flops(lhs: Sequence[int], contracted: Iterable[int], out: Sequence[int]) -> int:
    """FLOPs of a dot of `lhs` over its axes `contracted` into `out`."""
    return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def convolution_flops(batch: int, features: int, inputs: int, axes: Iterable[Axis]) -> int:
    """FLOPs of a convolution, grouped or not.

    Args:
      batch: of the output.
      features: of the output.
      inputs: the kernel's input features, which are per group already; batch groups only choose
        which rows meet.
      axes: the spatial ones.
    """
    return 2 * batch * features * inputs * math.prod(axis.pairs for axis in axes)
