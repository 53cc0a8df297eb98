"""The guarantee of a run: what is frozen costs nothing and stays as it is, and what trains moves.

Every compiled step is compared with its plan, frozen leaves are hashed when they freeze, at every
save and at the end, and a part of the model that was to train but never moved is named.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jft import hlo
from jft.freeze.masks import Mask
from jft.plan import PhasePlan
from jft.tree import Flat

# A compiled step may differ from its plan by so much.
FLOPS_BAR = 0.05
_MOST_NAMES = 3
_WRAPPED = re.compile(r"^.*\(|\)+$")  # "transpose(jvp(blocks_0))" is of blocks_0


def check_cost(cost: hlo.Cost, plan: PhasePlan, mask: Mask, stages: Sequence[str]) -> str:
    """Returns one line that compares a compiled step with its plan.

    It begins with "warning" if the step costs more than planned, and then names the modules whose
    frozen leaves, or whose inputs below the cut, something asked a gradient of.
    """
    off = cost.flops / plan.flops - 1 if plan.flops else 0.0
    text = (
        f"{cost.flops / 1e9:.4g} GFLOP a step compiled, {plan.flops / 1e9:.4g} planned"
        f" ({off:+.1%}), temporaries {cost.temp_bytes / 1e6:.4g} MB,"
        f" arguments {cost.argument_bytes / 1e6:.4g} MB"
    )
    if cost.argument_bytes > plan.argument_bytes:
        text += f" where {plan.argument_bytes / 1e6:.4g} are planned"
    if cost.uncounted:
        return f"{text}; not counted: {', '.join(cost.uncounted)}"
    if off <= FLOPS_BAR:
        return text
    names = consumers(cost.scopes, mask, stages)
    if not names and cost.flops - plan.flops <= _strided(cost.scopes):
        return f"{text}: on this backend gradients of strided convolutions multiply zeros"
    found = f": gradients of what is frozen are computed in {', '.join(names)}" if names else ""
    return f"warning: the step costs more than its phase: {text}{found}"


def _strided(scopes: Mapping[str, int]) -> int:
    """FLOPs of the gradients of convolutions in jft's own form, which may multiply zeros."""
    own = ("/depthwise/", "/conv/")
    return sum(
        flops
        for name, flops in scopes.items()
        if "transpose(" in name and any(part in name for part in own)
    )


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
        allowed = 0 if order[module.split("/")[0]] < cut else forward[module]
        if not trains and flops > (1 + FLOPS_BAR) * allowed:
            wrong[module] = flops - allowed
    return [f"{name} ({flops / 1e9:.3g} GFLOP)" for name, flops in wrong.most_common(_MOST_NAMES)]


class Guard:
    """Hashes of leaves in a background thread; says which frozen leaf moved, and what did not."""

    def __init__(self, message: Callable[[str], None]):
        """Knows no leaf yet."""
        self.message = message
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jft-guard")
        self._known: dict[str, tuple[Any, Future]] = {}
        self._checks: list[Future] = []
        self._first: dict[str, Future] = {}
        self._scheduled: set[str] = set()

    def begin(self, params: Flat) -> None:
        """Hashes the leaves that the process starts from."""
        # The step donates its state: on the device a leaf may be gone before the thread reads it.
        copies = {path: np.array(leaf) for path, leaf in params.items()}
        self._first = {p: self._pool.submit(digest, leaf) for p, leaf in copies.items()}

    def freeze(self, frozen: Flat, trains: Sequence[str]) -> None:
        """Notes the leaves that a phase freezes, by hash, and those that it trains."""
        self._scheduled |= set(trains)
        kept = {}
        for path, leaf in frozen.items():
            known = self._known.get(path)
            same = known is not None and known[0] is leaf
            kept[path] = known if same else (leaf, self._pool.submit(digest, leaf))
        self._known = kept

    def check(self, frozen: Flat) -> None:
        """Starts hashing the frozen leaves again; `poll` or `close` tells of one that moved."""
        self.poll()
        known = self._known
        pairs = [(path, leaf, known[path][1]) for path, leaf in frozen.items() if path in known]
        self._checks.append(self._pool.submit(_compare, pairs))

    def poll(self, wait: bool = False) -> None:
        """Raises RuntimeError if a frozen leaf was found changed."""
        while self._checks and (wait or self._checks[0].done()):
            moved = self._checks.pop(0).result()
            if moved:
                raise RuntimeError(f"frozen leaf {moved[0]!r} changed ({len(moved)} in all)")

    def end(self, params: Flat, frozen: Flat, units: Mapping[str, frozenset[str]]) -> None:
        """Checks all frozen leaves, and names the units that were to train and did not move."""
        self.check(frozen)
        self.poll(wait=True)
        still = {
            path
            for path in self._scheduled & self._first.keys()
            if digest(params[path]) == self._first[path].result()
        }
        for unit, leaves in units.items():
            due = leaves & self._scheduled
            if due and due <= still:
                self.message(f"warning: {unit} was to train, but not one of its leaves changed")

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def digest(leaf: Any) -> str:
    """Returns the hash of a leaf's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(leaf).tobytes(), digest_size=16).hexdigest()


def _compare(pairs: Sequence[tuple[str, Any, Future]]) -> list[str]:
    return [path for path, leaf, was in pairs if digest(leaf) != was.result()]
