"""What the plan says of one phase of a run."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run, counted.

    Attributes:
      index: position in the run, from 0.
      name: the train expression.
      start_step: first step, from 0.
      stop_step: the step at which the next phase starts.
      trainable_params: scalars that train.
      trainable_bytes: their bytes.
      frozen_params: scalars that stay.
      frozen_bytes: their bytes.
      kind: "full", "cut" (a prefix of stages is frozen), "set" (scattered leaves are) or "mask"
        (elements are: it saves no compute beyond the leaves that are frozen whole).
      cut: name of the first stage that trains, if a prefix is frozen.
      forward_flops: products of the forward pass of one step.
      flops: products of one step, forward and backward.
      full_flops: the same if every leaf trained.
      optimizer_flops: products of the update, in neither of them.
      optimizer_bytes: of the optimizer's state.
      average_bytes: of moving averages.
      all_reduce_bytes: of the gradients and the metric sums that devices add up in a step.
      argument_bytes: trainable and frozen leaves, optimizer state, averages, and the loss's other
        inputs.
      spoilers: the few trainable leaves low in the network that force the gradient through a
        prefix which would be frozen without them.
      spoiler_flops: what they add to each step.
      compiled: number of the compiled step, from 0; phases with the same number share it.
      event: what may end the phase before `stop_step`, or "".
    """

    index: int
    name: str
    start_step: int
    stop_step: int
    trainable_params: int
    trainable_bytes: int
    frozen_params: int
    frozen_bytes: int
    kind: str
    cut: str | None
    forward_flops: int
    flops: int
    full_flops: int
    optimizer_bytes: int
    all_reduce_bytes: int
    argument_bytes: int
    spoilers: tuple[str, ...] = ()
    spoiler_flops: int = 0
    compiled: int = 0
    event: str = ""
    optimizer_flops: int = 0
    average_bytes: int = 0

    @property
    def bound(self) -> float:
        """The most that the phase can be faster than full training, by FLOPs."""
        return self.full_flops / self.flops if self.flops else 1.0

    @property
    def steps(self) -> int:
        """How many steps the phase lasts."""
        return self.stop_step - self.start_step

    def to_dict(self) -> dict[str, Any]:
        """The phase as it stands in plan.json."""
        fields = {
            key: value for key, value in vars(self).items() if key not in ("kind", "spoilers")
        }
        extra = {"train": self.name, "class": self.kind, "bound": round(self.bound, 4)}
        return fields | extra | {"spoilers": list(self.spoilers)}
