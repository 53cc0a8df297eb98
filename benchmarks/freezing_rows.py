"""Rows of the freezing benchmark: every arm at one frozen share, its cap measured beside it."""

import contextlib
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from benchmarks.cap_parts import Forward, Update
from benchmarks.caps import cache_bound, choose_cut, cut_shares, measured_cap, prefix_bound
from benchmarks.naive import Naive
from benchmarks.timing import interleave, noise, steps_for
from benchmarks.workloads import JftLoop, Workload
from jft.costs import hlo
from jft.keys import KEYS
from jft.tree import count_params, split

CLIP_NORM = 1.0
CACHE = {"freeze.cache": "on", "freeze.views": 1}
PARTS = ("full", "forward", "update")  # arms that measure the cap
PEERS = ("naive", "torch", "lightning")


@dataclass(frozen=True)
class Measuring:
    """How the rows are measured.

    Attributes:
      window_seconds: length of a window of the slowest arm, at least `least_steps` steps.
      blocks: palindromes of windows, two samples an arm each.
      least_steps: fewest timed steps a window.
      dtype: train.dtype.
      peers: of PEERS.
      cache: whether the cached prefix is an arm.
    """

    window_seconds: float
    blocks: int
    least_steps: int = 2
    dtype: str = "float32"
    peers: Sequence[str] = PEERS
    cache: bool = True


class Rows:
    """The rows of one workload, share after share; what the cap needs is built once."""

    def __init__(self, workload: Workload, measuring: Measuring) -> None:
        """Builds and compiles the full step and the parts of the cap."""
        self.workload, self.measuring = workload, measuring
        self.shares = cut_shares(workload)
        self.left_out: dict[str, str] = {}
        typed = (*workload.args, ("dtype", measuring.dtype))
        self.model = replace(workload, args=typed).zoo_model()
        self.stages = self.model.stages
        self.batches = workload.batches()
        with contextlib.ExitStack() as opened:
            self.full = self._loop(0, opened)
            self.leaves = self.full.run.start()
            self.forward = Forward(self.model, self.leaves, self.batches)
            self.update = Update(self.leaves, CLIP_NORM)
            self._open = opened.pop_all()

    def _loop(self, cut: int, opened: contextlib.ExitStack, **more: Any) -> JftLoop:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="jft-benchmark-"))
        overrides = {"optim.grad_clip_norm": CLIP_NORM, "train.dtype": self.measuring.dtype}
        loop = JftLoop(self.workload, cut, Path(folder), overrides=overrides | more)
        opened.callback(loop.close)
        return loop

    def close(self) -> None:
        """Closes files and threads."""
        self._open.close()

    def at(self, nominal: float) -> list[dict[str, Any]]:
        """Returns the rows of one nominal share: jft, jft with a cache, and every peer."""
        cut = choose_cut(self.shares, nominal)
        with contextlib.ExitStack() as opened:
            arms = self._arms(cut, opened)
            windows = {
                "full": self.full.window,
                "forward": self.forward.window,
                "update": self.update.window,
                **{name: arm.window for name, arm in arms.items()},
            }
            wanted, least = self.measuring.window_seconds, self.measuring.least_steps
            steps = min(steps_for(window, wanted, least) for window in windows.values())
            samples, _ = interleave(windows, steps, self.measuring.blocks)
            return [self.row(nominal, cut, name, arms[name], samples) for name in arms]

    def _arms(self, cut: int, opened: contextlib.ExitStack) -> dict[str, Any]:
        """The arms of a cut; one that cannot run is noted in `left_out`."""
        # At f = 0 both names are the same loop: their difference is what the machine adds.
        arms: dict[str, Any] = {"jft": self._loop(cut, opened) if cut else self.full}
        if self.measuring.cache and cut:
            missing = [key for key in CACHE if key not in KEYS]
            if missing:
                self.left_out["jft_cache"] = f"jft has no {missing[0]} yet"
            else:
                arms["jft_cache"] = self._loop(cut, opened, **CACHE)
        if "naive" in self.measuring.peers:
            arms["naive"] = Naive(self.model, cut, self.leaves, self.batches, CLIP_NORM)
        for name in ("torch", "lightning"):
            if name in self.measuring.peers:
                try:
                    arms[name] = _torch_arm(name, self.workload, cut, self.measuring.dtype)
                except ImportError as error:
                    self.left_out[name] = f"{self.workload.model}: {error}"
                    continue
                if hasattr(arms[name], "close"):
                    opened.callback(arms[name].close)
        return arms

    def trainable_share(self, cut: int) -> float:
        """Returns the share of the parameters in stages from `cut` on."""
        trains = set(self.stages[cut:])
        mask = {path: path.split("/")[0] in trains for path in self.leaves[0]}
        live, _ = split(self.leaves[0], mask)
        return count_params(live) / count_params(self.leaves[0])

    def row(
        self, nominal: float, cut: int, name: str, arm: Any, samples: Mapping[str, Sequence[float]]
    ) -> dict[str, Any]:
        """Returns the row of one arm."""
        cached = name == "jft_cache"
        row = {
            "workload": self.workload.name,
            "model": self.workload.model,
            "peer": "jft" if cached else name,
            "cache": cached,
            "f": self.shares[cut],
            "f_nominal": nominal,
            "cut": self.stages[cut],
            "trainable_share": self.trainable_share(cut),
            "seconds": list(samples[name]),
            "part_seconds": {part: list(samples[part]) for part in PARTS},
        }
        return {**row, **derived(row), **_compiled(arm)}


def derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what follows from a row's samples; ratios are medians over neighbours in time."""
    f, own, parts = row["f"], row["seconds"], row["part_seconds"]
    full = parts["full"]
    bound = cache_bound(f) if row["cache"] else prefix_bound(f)
    if row["cache"]:  # no forward pass to pay: the cap is the share that is left
        limits = [(1 - f) * seconds for seconds in full]
    else:
        share, windows = row["trainable_share"], zip(*(parts[p] for p in PARTS), strict=True)
        limits = [
            measured_cap(f, full=whole, forward=forward, update=update, trainable=share)
            for whole, forward, update in windows
        ]
    speedup = statistics.median(a / b for a, b in zip(full, own, strict=True))
    return {
        "median_seconds": statistics.median(own),
        "full_seconds": statistics.median(full),
        "cap_seconds": statistics.median(limits),
        "cap": bound if math.isfinite(bound) else None,
        "speedup": speedup,
        "efficiency": statistics.median(a / b for a, b in zip(limits, own, strict=True)),
        "bound_efficiency": cap_share(speedup, bound),
        "noise": noise(own),
        "full_noise": noise(full),
    }


def cap_share(speedup: float, bound: float) -> float | None:
    """Returns how much of an analytic bound a speed-up reaches; None where there is no bound."""
    return speedup / bound if math.isfinite(bound) else None


def _compiled(arm: Any) -> dict[str, Any]:
    """What is known of an arm beside its time; None where it has no such thing."""
    found: dict[str, Any] = {
        "peak_bytes": None,
        "compiled_flops": None,
        "analytic_flops": getattr(arm, "flops", None),
        "compile_seconds": getattr(arm, "compile_seconds", None),
        "enter_seconds": getattr(arm, "enter_seconds", None),
        "fill_seconds": getattr(arm, "fill_seconds", None),
    }
    if hasattr(arm, "compiled"):
        cost = hlo.count(arm.compiled)
        found |= {"peak_bytes": peak_bytes(cost), "compiled_flops": cost.flops}
    return found


def peak_bytes(cost: hlo.Cost) -> int:
    """Returns the device memory that one call holds at most, with its arguments."""
    return cost.argument_bytes + cost.output_bytes - cost.alias_bytes + cost.temp_bytes


def _torch_arm(name: str, workload: Workload, cut: int, dtype: str) -> Any:
    """The torch arm.

    Raises:
      ImportError: a package is missing.
    """
    if name == "lightning":
        from benchmarks.lightning_peer import Lightning

        return Lightning(workload, cut, clip_norm=CLIP_NORM, dtype=dtype)
    from benchmarks.torch_peer import Torch

    return Torch(workload, cut, clip_norm=CLIP_NORM, dtype=dtype)


def own_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each row how much faster its arm is than the same arm at f = 0, by medians."""
    full = {(row["workload"], row["peer"]): row["median_seconds"] for row in rows if row["f"] == 0}
    for row in rows:
        base = full.get((row["workload"], row["peer"]))
        row["own_speedup"] = base / row["median_seconds"] if base else None


def installed(peers: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the peers whose first package is there."""
    needs = {"naive": "optax", "torch": "torch", "lightning": "lightning"}
    return tuple(name for name in peers if find_spec(needs[name]))


def device_kind() -> str:
    """Returns what jax computes on."""
    return jax.devices()[0].device_kind
