"""FLOPs of a training step by analysis of its jaxpr: nothing is compiled, nothing is allocated.

A product (dot, convolution, shifted depthwise product) of forward cost F costs F once more in the
backward pass for each operand that depends on a trainable leaf, if the loss depends on the product.
That is exact for any set of trainable leaves: a cut, scattered leaves, biases, adapters.
Elementwise work, reductions and the optimizer are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jft.costs.products import DEPTHWISE, Axis, convolution_flops, dot_flops

Flags = tuple[bool, ...]

# No gradient flows through these although they may return floating-point numbers. A while loop of
# unknown length has none in reverse; its body is counted once.
_BARRIERS = frozenset(
    "stop_gradient floor ceil round sign is_finite argmax argmin nextafter while".split()
)
# The gradient of these needs none of their operands' values, so rematerialisation skips them.
_LINEAR = frozenset(
    "add sub neg add_any reshape transpose broadcast_in_dim convert_element_type reduce_sum slice "
    "concatenate pad squeeze expand_dims rev copy psum reduce_precision".split()
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step, 2 a multiply-add, of the loss and of its gradient by the trainables."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        """The cost of both."""
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: int) -> Flops:
        """The cost of `factor` runs."""
        return Flops(self.forward * factor, self.backward * factor)


def analytic_flops(loss_fn: Callable[..., Any], trainable: Any, frozen: Any, *data: Any) -> Flops:
    """Returns the FLOPs of `jax.value_and_grad(loss_fn)(trainable, frozen, *data)`.

    Args:
      loss_fn: returns the scalar loss, alone or first in a tuple.
      trainable: tree of arrays or shapes that the loss is differentiated by.
      frozen: tree of arrays or shapes that stay.
      *data: whatever else the loss takes: statistics, batch, keys.

    Raises:
      ValueError: the first result is no scalar.
    """
    closed = jax.make_jaxpr(loss_fn)(trainable, frozen, *data)
    outputs = closed.jaxpr.outvars
    if not outputs or _shape(outputs[0]) != ():
        raise ValueError("the first result of loss_fn must be the scalar loss")
    count = len(jax.tree.leaves(trainable))
    live = tuple(at < count and _inexact(var) for at, var in enumerate(closed.jaxpr.invars))
    used = (True,) * len(outputs)
    grad = (True,) + (False,) * (len(outputs) - 1)
    return _Walker().cost(closed.jaxpr, live, used, grad).flops


def forward_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the FLOPs of the products in `function(*args)`, arrays or shapes; of no gradient."""
    closed = jax.make_jaxpr(function)(*args)
    none = (False,) * len(closed.jaxpr.invars)
    outputs = len(closed.jaxpr.outvars)
    cost = _Walker().cost(closed.jaxpr, none, (True,) * outputs, (False,) * outputs)
    return cost.flops.forward


def _convolution_flops(eqn: JaxprEqn) -> int:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    lhs, rhs, out = (_shape(var) for var in (*eqn.invars, eqn.outvars[0]))
    axes = [
        Axis(
            size=lhs[numbers.lhs_spec[at + 2]],
            window=rhs[numbers.rhs_spec[at + 2]],
            output=out[numbers.out_spec[at + 2]],
            stride=params["window_strides"][at],
            low=params["padding"][at][0],
            lhs_dilation=params["lhs_dilation"][at],
            rhs_dilation=params["rhs_dilation"][at],
        )
        for at in range(len(lhs) - 2)
    ]
    batch, features = (out[at] for at in numbers.out_spec[:2])
    return convolution_flops(batch, features, rhs[numbers.rhs_spec[1]], axes)


def _product_flops(eqn: JaxprEqn, scope: str) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return dot_flops(_shape(eqn.invars[0]), contracted, _shape(eqn.outvars[0]))
    if name == "conv_general_dilated":
        return _convolution_flops(eqn)
    if name == "mul" and DEPTHWISE.search(scope) and _inexact(eqn.outvars[0]):
        return 2 * math.prod(_shape(eqn.outvars[0]))
    return 0


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _inexact(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _either(first: Iterable[bool], second: Iterable[bool]) -> Flags:
    return tuple(a or b for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class _Cost:
    flops: Flops
    used: Flags  # inputs that some used output depends on
    grad: Flags  # inputs that the loss depends on differentiably


@dataclass(frozen=True)
class _Call:
    """One inner jaxpr of an equation.

    Attributes:
      jaxpr: the inner jaxpr.
      first: its inputs are the equation's from here on.
      times: how often it runs.
      carry: (start, stop) of a loop's carry among its inputs; it comes first in its outputs.
      replay: it is rematerialised: part of its forward pass runs again in the backward pass.
    """

    jaxpr: Jaxpr
    first: int = 0
    times: int = 1
    carry: tuple[int, int] = (0, 0)
    replay: bool = False


def _calls(eqn: JaxprEqn) -> list[_Call]:
    """The inner jaxprs of an equation whose gradient is taken through them."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return [_Call(params["jaxpr"].jaxpr, times=params["length"], carry=_scan_carry(params))]
    if name == "while":
        return [_Call(params["body_jaxpr"].jaxpr, first=params["cond_nconsts"])]
    if name == "cond":
        branches = [_Call(branch.jaxpr, first=1) for branch in params["branches"]]
        return _of_this_platform(branches, params.get("branches_platforms"))
    for key in ("jaxpr", "call_jaxpr"):
        inner = params.get(key)
        inner = getattr(inner, "jaxpr", inner)  # a closed one
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(eqn.invars):
            return [_Call(inner, replay=name in ("remat2", "checkpoint"))]
    return []


def _scan_carry(params: dict[str, Any]) -> tuple[int, int]:
    """(start, stop) of the carry among the inputs of a scan: constants, carry, slices."""
    if "num_consts" in params:  # jax before 0.12
        consts, carried = params["num_consts"], params["num_carry"]
    else:
        consts, carried, _ = (len(list(part)) for part in params["ft_in"].unpack())
    return consts, consts + carried


def _of_this_platform(branches: list[_Call], platforms: Any) -> list[_Call]:
    """The branch of `lax.platform_dependent` that runs here; all of any other condition."""
    if platforms is None:
        return branches
    backend = jax.default_backend()
    names = {backend, "cuda", "rocm"} if backend == "gpu" else {backend}
    exact = [b for b, p in zip(branches, platforms, strict=True) if p and names & set(p)]
    return exact or [b for b, p in zip(branches, platforms, strict=True) if p is None]


def _among(variables: Iterable[Any], known: set[Var] | frozenset[Var]) -> Flags:
    return tuple(not isinstance(var, Literal) and var in known for var in variables)


def _chosen(variables: Iterable[Any], flags: Iterable[bool]) -> set[Var]:
    pairs = zip(variables, flags, strict=True)
    return {var for var, flag in pairs if flag and not isinstance(var, Literal)}


class _Walker:
    """Two passes a jaxpr: liveness from the inputs on, need and cost from the outputs back."""

    def __init__(self) -> None:
        # By identity, so the jaxpr is kept beside the answer: an id is reused once it is freed.
        self._known: dict[tuple[int, Flags], tuple[Jaxpr, frozenset[Var]]] = {}

    def live(self, jaxpr: Jaxpr, live_in: Flags) -> frozenset[Var]:
        """The variables that depend on a live input differentiably."""
        key = (id(jaxpr), live_in)
        if key not in self._known:
            alive = _chosen(jaxpr.invars, live_in)
            for eqn in jaxpr.eqns:
                alive |= _chosen(eqn.outvars, self._live_out(eqn, _among(eqn.invars, alive)))
            self._known[key] = (jaxpr, frozenset(alive))
        return self._known[key][1]

    def _live_out(self, eqn: JaxprEqn, live: Flags) -> Flags:
        none = (False,) * len(eqn.outvars)
        if not any(live) or eqn.primitive.name in _BARRIERS:
            return none
        calls = _calls(eqn)
        out = none if calls else (True,) * len(eqn.outvars)
        for call in calls:
            out = _either(out, self._inner_live(call, live[call.first :])[1])
        return tuple(flag and _inexact(var) for flag, var in zip(out, eqn.outvars, strict=True))

    def _inner_live(self, call: _Call, live: Flags) -> tuple[Flags, Flags]:
        """(inputs, outputs) that are live once the loop's carry has settled."""
        start, stop = call.carry
        while True:
            out = _among(call.jaxpr.outvars, self.live(call.jaxpr, live))
            settled = live[:start] + _either(live[start:stop], out[: stop - start]) + live[stop:]
            if settled == live:
                return live, out
            live = settled

    def cost(
        self, jaxpr: Jaxpr, live_in: Flags, used_out: Flags, grad_out: Flags, scope: str = ""
    ) -> _Cost:
        """Cost of what the used outputs need, and of the gradient of those that the loss needs."""
        alive = self.live(jaxpr, live_in)
        used = _chosen(jaxpr.outvars, used_out)
        grad = _chosen(jaxpr.outvars, grad_out) & alive
        flops = Flops(0, 0)
        for eqn in reversed(jaxpr.eqns):
            out_used = _among(eqn.outvars, used)
            if not any(out_used):
                continue
            out_grad = _among(eqn.outvars, grad)
            inner = f"{scope}/{eqn.source_info.name_stack}"
            result = self._eqn_cost(eqn, _among(eqn.invars, alive), out_used, out_grad, inner)
            flops += result.flops
            used |= _chosen(eqn.invars, result.used)
            grad |= _chosen(eqn.invars, result.grad) & alive
        return _Cost(flops, _among(jaxpr.invars, used), _among(jaxpr.invars, grad))

    def _eqn_cost(self, eqn: JaxprEqn, live: Flags, used: Flags, grad: Flags, scope: str) -> _Cost:
        count = len(eqn.invars)
        if eqn.primitive.name in _BARRIERS:
            live, grad, used = (False,) * count, (False,) * len(grad), (True,) * len(used)
        calls = _calls(eqn)
        if not calls:
            forward = _product_flops(eqn, scope)
            flows = live if any(grad) else (False,) * count
            return _Cost(Flops(forward, forward * sum(flows)), (True,) * count, flows)
        flops, used_in, grad_in = Flops(0, 0), (False,) * count, (False,) * count
        for call in calls:
            result = self._call_cost(eqn, call, live[call.first :], used, grad, scope)
            # Of the branches of a condition one runs: the plan states the most expensive.
            flops = max(flops, result.flops, key=lambda each: each.total)
            head = (False,) * call.first
            used_in = _either(used_in, head + result.used)
            grad_in = _either(grad_in, head + result.grad)
        # A branch index or what only a loop's condition reads comes first.
        skipped = calls[0].first
        return _Cost(flops, (True,) * skipped + used_in[skipped:], grad_in)

    def _call_cost(
        self, eqn: JaxprEqn, call: _Call, live: Flags, used: Flags, grad: Flags, scope: str
    ) -> _Cost:
        start, stop = call.carry
        size = stop - start
        live = self._inner_live(call, live)[0]
        while True:
            result = self.cost(call.jaxpr, live, used, grad, scope)
            settled = (
                _either(used[:size], result.used[start:stop]) + used[size:],
                _either(grad[:size], result.grad[start:stop]) + grad[size:],
            )
            if settled == (used, grad):
                break
            used, grad = settled
        flops = result.flops
        if call.replay and any(grad):
            again = self._replay(call.jaxpr, live, grad, eqn.params.get("policy"), scope)
            flops += Flops(0, again)
        return _Cost(flops.times(call.times), result.used, result.grad)

    def _replay(
        self, jaxpr: Jaxpr, live_in: Flags, grad_out: Flags, policy: Any, scope: str
    ) -> int:
        """Forward FLOPs that a rematerialised jaxpr runs again for its gradient's operands."""
        alive = self.live(jaxpr, live_in)
        grad = _chosen(jaxpr.outvars, grad_out) & alive
        needed: set[Var] = set()
        total = 0
        for eqn in reversed(jaxpr.eqns):
            inner = f"{scope}/{eqn.source_info.name_stack}"
            live = _among(eqn.invars, alive)
            out_grad = _among(eqn.outvars, grad)
            if any(out_grad):
                grad |= _chosen(eqn.invars, live)
                needed |= _chosen(eqn.invars, _residuals(eqn, live, inner))
            out_needed = _among(eqn.outvars, needed)
            if any(out_needed) and not _saved(eqn, policy):
                none = (False,) * len(out_needed)
                result = self._eqn_cost(eqn, live, out_needed, none, inner)
                total += result.flops.forward
                needed |= _chosen(eqn.invars, result.used)
        return total


def _residuals(eqn: JaxprEqn, live: Flags, scope: str) -> Flags:
    """The operands whose values the gradient of a live equation needs."""
    if eqn.primitive.name in _LINEAR:
        return (False,) * len(live)
    if eqn.primitive.name == "mul" or _product_flops(eqn, scope):
        return tuple(any(live[:at] + live[at + 1 :]) for at in range(len(live)))
    return (True,) * len(live)


def _saved(eqn: JaxprEqn, policy: Any) -> bool:
    if policy is None:
        return False
    kept = policy(eqn.primitive, *(var.aval for var in eqn.invars), **eqn.params)
    # JAX's own answers are objects that are all true; only those for recomputing say so by name.
    return bool(kept) and "Recompute" not in f"{kept!r} {type(kept).__name__}"
