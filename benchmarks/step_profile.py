"""Where the time of a compiled step, and of PyTorch's, goes: shares by kind of operation.

Both profilers count the time of operations, of all threads; shares compare where milliseconds would
not. Needs a CPU: events of other devices have no names of the program's operations.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.timing import Window

STEPS = 4
# Elsewhere the model has norms, activations, reductions and moves.
PRODUCTS, OPTIMIZER, REST = "convolutions and products", "optimizer", "rest of the model"
_PRODUCTS = re.compile(r"conv_general_dilated|dot_general|depthwise|/conv/cond")
# A line of a program: name, result, operation; loops and calls hold operations of their own.
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OUTER = ("while", "call", "conditional")
_TORCH_PRODUCTS = re.compile(r"aten::(\w*conv\w*|\w*mm|\w*matmul|linear|\w*attention\w*)$")
_TORCH_OPTIMIZER = "Optimizer.step#"


def shares_of_jax(window: Window, compiled: Any) -> dict[str, float]:
    """{kind: share of the time of a step's operations}.

    Args:
      window: runs steps.
      compiled: the step, as `jax.stages.Compiled`.
    """
    window(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            window(STEPS)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    kinds = {}
    for text in compiled.as_text().splitlines():
        if (found := _LINE.match(text)) and found[2] not in _OUTER:
            about = _OP_NAME.search(text)
            kinds[found[1]] = _kind(about[1] if about else "")
    spent: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in kinds:
                    spent[kinds[event.name]] += event.duration_ns
    return _shares(spent)


def _kind(op_name: str) -> str:
    if "jvp(" not in op_name:  # no part of the loss or its gradient: updates, and copies
        return OPTIMIZER
    return PRODUCTS if _PRODUCTS.search(op_name) else REST


def shares_of_torch(window: Window) -> dict[str, float]:
    """{kind: share of the time of a step's operations} of a loop of PyTorch's."""
    import torch

    window(1)
    with torch.profiler.profile() as profile:
        window(STEPS)
    events = profile.key_averages()
    optimizer = sum(e.cpu_time_total for e in events if e.key.startswith(_TORCH_OPTIMIZER))
    products = sum(e.self_cpu_time_total for e in events if _TORCH_PRODUCTS.match(e.key))
    total = sum(e.self_cpu_time_total for e in events)
    return _shares({PRODUCTS: products, OPTIMIZER: optimizer, REST: total - products - optimizer})


def _shares(spent: Mapping[str, float]) -> dict[str, float]:
    total = sum(spent.values())
    if total <= 0:
        raise RuntimeError("the profiler saw no operation of the step")
    return {kind: round(value / total, 4) for kind, value in spent.items()}
