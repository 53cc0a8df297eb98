"""What a step takes of a device's memory, estimated before it is compiled."""

from __future__ import annotations

from collections.abc import Sequence

from jft.costs.phase_plan import PhasePlan
from jft.costs.plan import Costs, Mask
from jft.report.progress import format_bytes


def memory_text(
    plans: Sequence[PhasePlan],
    masks: Sequence[Mask],
    costs: Costs,
    *,
    rows: int,
    accum_steps: int,
    devices: int,
    limit: tuple[int, str],
) -> str:
    """Returns a line on the memory of the costliest phase, and advice where it may not fit.

    Args:
      plans: of all phases, on one device.
      masks: of all phases.
      costs: that the plans were made with.
      rows: examples a device takes of each update.
      accum_steps: micro-batches of an update.
      devices: of the run.
      limit: (bytes of one device, what they are of).
    """
    at = max(range(len(plans)), key=lambda index: plans[index].flops)
    plan, (most, kind) = plans[at], limit
    # As if nothing were fused: compiled steps of ViT and EfficientNet held 70 to 80 % of it.
    activations = costs.residual_bytes(masks[at])
    gradients = plan.trainable_bytes if accum_steps > 1 else 0
    need = plan.argument_bytes + gradients + activations // accum_steps
    text = (
        f"memory    at most about {format_bytes(need)} a device in phase {plan.index}"
        f" ({plan.name}): {format_bytes(plan.argument_bytes)} of leaves, optimizer state and batch,"
        f" {format_bytes(need - plan.argument_bytes)} of activations"
        f"{' and gradients' if gradients else ''};"
        f" the {kind} has {format_bytes(most)}"
    )
    if need <= most:
        return text
    fixed = plan.argument_bytes
    return f"{text}\nwarning: {advice(fixed, plan, activations, rows, accum_steps, devices, most)}"


def advice(
    fixed: int,
    plan: PhasePlan,
    activations: int,
    rows: int,
    accum_steps: int,
    devices: int,
    limit: int,
) -> str:
    """Returns what would make a step fit.

    Args:
      fixed: bytes that stay whatever the micro-batch is.
      plan: of the phase.
      activations: bytes of those of all `rows`.
      rows: examples a device takes of each update.
      accum_steps: micro-batches of an update now.
      devices: of the run.
      limit: bytes.
    """
    room = limit - fixed
    found = []
    for more in range(accum_steps + 1, rows + 1):
        if rows % more == 0 and plan.trainable_bytes + activations // more <= room:
            found.append(f"train.accum_steps={more} gives the same updates in less")
            break
    held = plan.trainable_bytes if accum_steps > 1 else 0
    fits = int((room - held) * accum_steps * rows / max(activations, 1)) if room > held else 0
    fits = min(fits, rows - 1) // accum_steps * accum_steps
    if fits > 0:
        found.append(f"train.batch_size={fits * devices} is the largest that fits")
    if not found:
        return "it may not fit at any batch size; train fewer groups, or use optim.name=sgd"
    return f"it may not fit; {', '.join(found)}"
