"""The guarantee of a run: what is frozen costs nothing and stays as it is, and what trains moves.

Every compiled step is compared with its plan, frozen leaves are hashed when they freeze, at every
save and at the end, and a part of the model that was to train but never moved is named.
"""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jft.costs import hlo
from jft.costs.phase_plan import PhasePlan
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask
from jft.tree import Flat

# A compiled step may differ from its plan by so much.
FLOPS_BAR = 0.05
BYTES_BAR = 0.01
_MOST_NAMES = 3
_WRAPPED = re.compile(r"^.*\(|\)+$")  # "transpose(jvp(blocks_0))" is of blocks_0


def check_cost(
    cost: hlo.Cost, plan: PhasePlan, mask: Mask, stages: Sequence[str], devices: int = 1
) -> str:
    """Returns one line that compares a compiled step with its plan.

    It begins with "warning" if the step costs more than planned, and then names the modules whose
    frozen leaves, or whose inputs below the cut, something asked a gradient of. Temporaries are
    told, not compared: how many a compiler keeps no plan can say. All-reduces are told too: beside
    the gradients they sum the moments of batch normalisation.

    Args:
      cost: of the compiled step.
      plan: of its phase, on one of the devices.
      mask: {path: True where trainable}.
      stages: of the model, from input to output.
      devices: of the run; one alone reduces nothing.
    """
    planned_flops = plan.flops + plan.optimizer_flops
    off = cost.flops / planned_flops - 1 if planned_flops else 0.0
    text = (
        f"{cost.flops / 1e9:.4g} GFLOP a step compiled, {planned_flops / 1e9:.4g} planned"
        f" ({off:+.1%}), temporaries {cost.temp_bytes / 1e6:.4g} MB,"
        f" arguments {cost.argument_bytes / 1e6:.4g} MB"
    )
    if devices > 1:
        reduced, planned = (each.all_reduce_bytes / 1e6 for each in (cost, plan))
        text += f", all-reduces {reduced:.4g} MB for {planned:.4g} of gradients"
    if cost.uncounted:  # what is counted is then too little, never too much
        text += f"; not counted: {', '.join(cost.uncounted)}"
    if off <= FLOPS_BAR:
        if cost.argument_bytes <= (1 + BYTES_BAR) * plan.argument_bytes:
            return text
        more = f"{plan.argument_bytes / 1e6:.4g} MB of arguments are planned"
        return f"warning: the step holds more than its phase: {text}; {more}"
    names = consumers(cost.scopes, mask, stages)
    found = f": gradients of what is frozen are computed in {', '.join(names)}" if names else ""
    return f"warning: the step costs more than its phase: {text}{found}"


def consumers(scopes: Mapping[str, int], mask: Mask, stages: Sequence[str]) -> list[str]:
    """Returns the modules in which gradients of frozen values are computed, costliest first.

    Args:
      scopes: {op_name of the HLO: FLOPs of its products}.
      mask: {path: True where trainable}.
      stages: of the model, from input to output.

    A module below the first trainable stage needs no backward product at all; one above whose
    leaves are all frozen needs one for each forward product, its input's.
    """
    order = {stage: at for at, stage in enumerate(stages)}
    live = [order[path.split("/")[0]] for path, trains in mask.items() if trains]
    cut = min(live, default=len(stages))
    modules = {path.rpartition("/")[0] for path in mask}
    forward, backward = Counter[str](), Counter[str]()
    for name, flops in scopes.items():
        parts = [_WRAPPED.sub("", part) for part in name.split("/")]
        at = next((i for i, part in enumerate(parts) if part in order), len(parts))
        prefixes = ("/".join(parts[at:end]) for end in range(len(parts), at, -1))
        module = next((prefix for prefix in prefixes if prefix in modules), None)
        if module is not None:
            (backward if "transpose(" in name else forward)[module] += flops
    wrong = Counter[str]()
    for module, flops in backward.items():
        trains = any(mask[path] for path in mask if path.startswith(f"{module}/"))
        below = order[module.split("/")[0]] < cut
        allowed = 0 if below else forward[module]
        if not trains and flops > (1 + FLOPS_BAR) * allowed:
            wrong[module] = flops - allowed
    return [f"{name} ({flops / 1e9:.3g} GFLOP)" for name, flops in wrong.most_common(_MOST_NAMES)]


class Guard:
    """Hashes of leaves in a background thread; says which frozen leaf moved, and what did not."""

    def __init__(self, message: Callable[[str], None]):
        """Knows no leaf yet."""
        self.message = message
        threads = min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jft-guard")
        self._known: dict[str, tuple[Any, Future]] = {}
        self._checks: deque[tuple[str, Future]] = deque()
        self._first: dict[str, Future] = {}
        self._scheduled: set[str] = set()

    def begin(self, params: Flat) -> None:
        """Hashes the leaves that the process starts from; `freeze` waits for that."""
        self._first = {path: self._pool.submit(digest, leaf) for path, leaf in params.items()}

    def freeze(self, frozen: Flat, trains: Sequence[str]) -> None:
        """Notes the leaves that a phase freezes, by hash, and those that it trains.

        A leaf that was frozen before keeps its hash, and one that was copied to another place is
        compared with it. Waits for the hashes of leaves that thaw, and of those that the process
        starts from: the next step donates them.
        """
        for job in self._first.values():
            job.result()
        self._scheduled |= set(trains)
        thawed = self._known.keys() - frozen.keys()
        if thawed:
            for path in thawed:
                self._known[path][1].result()
            self.poll(wait=True)
        kept = {}
        for path, leaf in frozen.items():
            known = self._known.get(path)
            if known is None:
                kept[path] = leaf, self._pool.submit(digest, leaf)
            else:
                kept[path] = leaf, known[1]
                if known[0] is not leaf:
                    self._checks.append((path, self._pool.submit(_same, leaf, known[1])))
        self._known = kept

    def check(self, frozen: Flat) -> None:
        """Starts hashing the frozen leaves again; `poll` or `end` tells of one that moved."""
        self.poll()
        for path, leaf in frozen.items():
            if path in self._known:
                job = self._pool.submit(_same, leaf, self._known[path][1])
                self._checks.append((path, job))

    def poll(self, wait: bool = False) -> None:
        """Raises RuntimeError if a frozen leaf was found changed."""
        while self._checks and (wait or self._checks[0][1].done()):
            path, job = self._checks.popleft()
            if not job.result():
                raise RuntimeError(f"frozen leaf {path!r} changed")

    def end(self, params: Flat, frozen: Flat, groups: Groups, units: Sequence[str]) -> None:
        """Checks all frozen leaves, and names the units that were to train and did not move."""
        self.check(frozen)
        self.poll(wait=True)
        still = {
            path
            for path in self._scheduled & self._first.keys()
            if digest(params[path]) == self._first[path].result()
        }
        for unit in units:
            leaves = make_mask(unit, groups)
            due = {path for path in self._scheduled if leaves.get(path)}
            if due and due <= still:
                self.message(f"warning: {unit} was to train, but not one of its leaves changed")

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def digest(leaf: Any) -> str:
    """Returns the hash of a leaf's bytes."""
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def _same(leaf: Any, known: Future) -> bool:
    return digest(leaf) == known.result()
