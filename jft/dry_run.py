"""The dry run: everything that a run does, once and in a temporary folder, in a minute."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jft.errors import DivergedError, WeightsError
from jft.freeze.phases import Phase
from jft.prepare import setup
from jft.report.progress import format_bytes, format_seconds
from jft.train import hardware
from jft.train.checkpoint import Checkpoints
from jft.train.frozen_store import host_copies
from jft.train.loop import fit
from jft.train.run import Run, from_checkpoint, phase_of
from jft.train.trial import Trial
from jft.tree import Flat

MOST_SETS = 4  # trainable sets that are compiled and stepped, those that cost most
TIMED_STEPS = 3


class _Kept(Checkpoints):
    """Checkpoints that remember what they were given to save."""

    leaves: Flat | None = None

    def save(self, step: int, state: Flat, frozen: Flat, *rest: Any, **named: Any) -> None:
        self.leaves = host_copies({**_named("state", state), **_named("frozen", frozen)})
        super().save(step, state, frozen, *rest, **named)


def dry_run(config: ConfigDict, model: Any = None, say: Callable[[str], Any] = print) -> int:
    """Checks that a config would run; returns the exit code. No run directory is touched.

    Data, weights and conversion are read; a real run of one update evaluates a few batches of each
    split, saves and ends; what it saved is read back and compared bit for bit; then the trainable
    sets that cost most are compiled and stepped from the start weights.

    Args:
      config: from `jft.load_config`.
      model: the user's own module instead of `config.model`.
      say: is given the overview and one line for each check.

    Raises:
      ConfigError, DataError, WeightsError, DivergedError: as the run itself would.
    """
    began = time.monotonic()
    # Never in the real run directory: the real run would resume from the trial's step.
    with tempfile.TemporaryDirectory(prefix="jft-dry-run-") as folder:
        run = setup(config, Path(folder), model=model, dry_run=True)
        run.summary.show()
        kept = _Kept(folder, keep=1)
        run = dataclasses.replace(run, checkpoints=kept)
        outcome = fit(run)
        if outcome.exit_code:
            return outcome.exit_code
        say("\ndry run")
        splits = ", ".join(f"{split} {run.examples.get(split, 0):,}" for split in run.splits)
        say(f"  evaluated  {splits or 'nothing'} examples")
        say(f"  saved      {_restored(run, kept.leaves or {})}")
        seconds = {phase.key: _stepped(run, phase, say) for phase in _costliest(run)}
    devices = list(run.parallel.mesh.devices.flat)
    say(f"  memory     {_memory(devices)}")
    took = format_seconds(time.monotonic() - began)
    say(f"all good in {took}; {_estimate(run, seconds)}")
    return 0


def _restored(run: Run, leaves: Flat) -> str:
    """Reads the checkpoint back by another reader and compares it with what was to be saved."""
    restored = Checkpoints(run.workdir).restore()
    if restored is None:
        raise WeightsError("dry run: no checkpoint was saved")
    found = {**_named("state", restored.state), **_named("frozen", restored.frozen)}
    off = [name for name in leaves.keys() | found.keys() if not _same(name, leaves, found)]
    if off:
        raise WeightsError(f"dry run: {min(off)!r} was restored as something else than it was")
    from_checkpoint(run, phase_of(run, restored), restored)
    size = sum(leaf.nbytes for leaf in found.values())
    return f"{format_bytes(size)} in {len(found):,} leaves; restored equal, bit for bit"


def _named(kind: str, leaves: Flat) -> Flat:
    return {f"{kind}/{name}": leaf for name, leaf in leaves.items()}


def _same(name: str, leaves: Flat, found: Flat) -> bool:
    if name not in leaves or name not in found:
        return False
    one, other = np.asarray(leaves[name]), np.asarray(found[name])
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def _costliest(run: Run) -> list[Phase]:
    """The first phase of each trainable set, of the sets that cost most, in order."""
    distinct: dict[Any, Phase] = {}
    for phase in run.phases:
        distinct.setdefault(phase.key, phase)
    by_cost = sorted(distinct.values(), key=lambda phase: -run.flops.get(phase.key, 0))
    return sorted(by_cost[:MOST_SETS], key=lambda phase: phase.index)


def _stepped(run: Run, phase: Phase, say: Callable[[str], Any]) -> float:
    """Compiles and steps a phase; returns the seconds of a step."""
    trial = Trial(run, phase)
    try:
        first = jax.device_get(trial.step())
        began = time.monotonic()
        for _ in range(TIMED_STEPS):
            last = trial.step()
        last = jax.device_get(last)
        seconds = (time.monotonic() - began) / TIMED_STEPS
    finally:
        trial.close()
    if first["halted"] or last["halted"]:
        raise DivergedError(f"dry run: phase {phase.index} ({phase.name}): loss is not finite")
    loss = float(first["loss_sum"]) / max(float(first["weight_sum"]), 1.0)
    say(
        f"  stepped    phase {phase.index} ({phase.name}): compiled in"
        f" {format_seconds(trial.compile_seconds)}, {1000 * seconds:.4g} ms a step, loss {loss:.4g}"
    )
    return seconds


def _memory(devices: Sequence[Any]) -> str:
    used = hardware.peak_bytes(devices)
    most, kind = hardware.limit_bytes(devices)
    parts = []
    if "device_peak_bytes" in used:
        parts.append(f"{format_bytes(used['device_peak_bytes'])} of a device at the most")
    parts.append(f"{format_bytes(used['host_peak_bytes'])} of the host at the most")
    return f"{', '.join(parts)}; the {kind} has {format_bytes(most)} for each"


def _estimate(run: Run, seconds: dict[Any, float]) -> str:
    """What the steps of the run would take; sets that were not timed by their FLOPs."""
    rates = [(run.flops.get(key, 0), taken) for key, taken in seconds.items()]
    flops, taken = max(rates)
    total = 0.0
    for phase in run.phases:
        each = seconds.get(phase.key)
        if each is None:
            each = taken * run.flops.get(phase.key, flops) / max(flops, 1)
        total += each * (phase.stop_step - phase.start_step)
    steps = run.phases[-1].stop_step
    return f"the {steps:,} steps of the run would take about {format_seconds(total)}"
