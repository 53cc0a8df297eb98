"""Optimizers by name: jft's own, and every optimizer of `optax` and `optax.contrib`.

What a name gives is an `Optimizer`: how the transform of one cohort is made, and how it takes its
learning rate. `jft.train.optim` puts it into a phase.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jft.errors import ConfigError, nearest

# (params or updates by path) -> {path: whether it decays}
Decays = Callable[[Any], Mapping[str, bool]]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with its arguments.

    Attributes:
      make: of form "direction" and "averaged": () -> transform whose updates are the direction;
        decay and rate come after it. Else (rate, weight_decay, decays) -> transform whose updates
        are the moves at that rate, decay included.
      form: "direction": a move is minus rate times direction. "rated": it takes the rate itself,
        which may differ from leaf to leaf by a factor on the moves. "one_rate": the rate enters in
        another way, so that all leaves of a cohort must have the same. "averaged": schedule-free.
      stacks: whether leaves of equal blocks may come as one: "whole" as they are, "blocks" taken
        apart first, since the update depends on a leaf's shape or norm; "never".
      averaging: of form "averaged", the arguments of `optax.contrib.schedule_free`.
      name: as it was asked for.
    """

    make: Callable[..., optax.GradientTransformation]
    form: Literal["direction", "rated", "one_rate", "averaged"] = "direction"
    stacks: Literal["whole", "blocks", "never"] = "whole"
    averaging: Mapping[str, float] | None = None
    name: str = ""


def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam's direction; decay is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return Optimizer(lambda: optax.scale_by_adam(b1=b1, b2=b2, eps=eps))


def sgd(*, momentum: float = 0.9, nesterov: bool = False) -> Optimizer:
    """Momentum SGD; `momentum=0` keeps no state."""
    if not momentum:
        return Optimizer(optax.identity)
    return Optimizer(lambda: optax.trace(decay=momentum, nesterov=nesterov))


def schedule_free_adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_lr_power: float = 2.0
) -> Optimizer:
    """AdamW that averages instead of following a schedule (Defazio et al. 2024, arXiv:2405.15682).

    `b1` is the share of the average in the point where gradients are taken.
    """

    # Adam without a first moment, as optax has it; it keeps no empty one.
    def direction() -> optax.GradientTransformation:
        return optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)

    return _averaged(direction, b1, weight_lr_power)


def schedule_free_sgd(*, b1: float = 0.9, weight_lr_power: float = 2.0) -> Optimizer:
    """SGD that averages instead of following a schedule (Defazio et al. 2024, arXiv:2405.15682)."""
    return _averaged(optax.identity, b1, weight_lr_power)


def _averaged(
    direction: Callable[[], optax.GradientTransformation], b1: float, power: float
) -> Optimizer:
    if not 0 < b1 <= 1:
        raise ConfigError(f"optim.args.b1: {b1!r} should be above 0 and at most 1")
    return Optimizer(direction, "averaged", "whole", {"b1": b1, "weight_lr_power": power})


_OWN: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "schedule_free_adamw": schedule_free_adamw,
    "schedule_free_sgd": schedule_free_sgd,
}

# What the signatures of optax do not say. Of names in no set the leaves of stacks are taken apart,
# which is right for any.
_ELEMENTWISE = frozenset(
    """acprop adabelief adadelta adagrad adam adamax adamaxw adamw adan ademamix adopt amsgrad cocob
    lion madgrad nadam nadamw optimistic_adam_v2 optimistic_gradient_descent radam rmsprop sgd
    sign_sgd signum simplified_ademamix yogi scale_by_acprop scale_by_adadelta scale_by_adam
    scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad scale_by_belief
    scale_by_lion scale_by_optimistic_gradient scale_by_radam scale_by_rms scale_by_rss
    scale_by_sign scale_by_simplified_ademamix scale_by_stddev scale_by_yogi""".split()
)
# They sum over all leaves of a cohort: blocks in one or apart come to the same.
_SUMMING = frozenset("dadapt_adamw dog dowg prodigy".split())
_LISTS = frozenset("sm3 scale_by_sm3".split())  # a list a leaf, which no stack can be made of
_ONE_RATE = frozenset("cocob dadapt_adamw fromage madgrad prodigy".split())
# Its own decay is of its matrices alone; added after the direction, as it is there, it is the same.
_DECAY_AFTER = frozenset({"muon"})
_WRAPPER = "wraps another transformation, which a config cannot give"
_RANDOM = "keeps a random key of its own, and jft draws from (seed, step) alone"
_LOSS = "needs the loss as a function, and jft hands over its gradient"
_VALUE = "needs the value of the loss beside its gradient"
_PART = "is a part of an optimizer:"
REFUSED: dict[str, str] = {
    "lbfgs": f"{_LOSS} for its line search",
    "scale_by_lbfgs": f"{_LOSS} for its line search",
    "scale_by_backtracking_linesearch": _LOSS,
    "scale_by_zoom_linesearch": _LOSS,
    "sophia": f"{_LOSS} for its estimate of the Hessian",
    "polyak_sgd": _VALUE,
    "scale_by_polyak": _VALUE,
    "momo": _VALUE,
    "momo_adam": _VALUE,
    "reduce_on_plateau": f"{_VALUE}; freeze.phases end on a plateau, and scale the rate",
    "noisy_sgd": _RANDOM,
    "add_noise": _RANDOM,
    "dpsgd": "needs the gradient of each example",
    "differentially_private_aggregate": "needs the gradient of each example",
    "rprop": "has a learning rate for its first step only: schedules and phases would not act",
    "scale_by_rprop": "has a learning rate for its first step only",
    "optimistic_adam": "is deprecated by optax; there is optimistic_adam_v2",
    "schedule_free": f"{_WRAPPER}; there are schedule_free_adamw and schedule_free_sgd",
    "scale_by_cocob": f"{_PART} cocob",
    "scale_by_distance_over_gradients": f"{_PART} dog",
    "scale_by_madgrad": f"{_PART} madgrad",
    "scale_by_muon": f"{_PART} muon",
    "trace": f"{_PART} sgd",
    **dict.fromkeys(
        """apply_if_finite apply_every chain conditionally_mask conditionally_transform flatten
        inject_hyperparams inject_stateful_hyperparams lookahead masked mechanize multi_transform
        named_chain partition sam selective_transform split_real_and_imaginary""".split(),
        _WRAPPER,
    ),
}
# Parameters that are optim's own keys, that a config cannot hold, or that change what is printed.
_HIDDEN = re.compile(r"learning_rate|weight_decay|mask|dtype|dimension_numbers|optimizer|verbose")


class Named:
    """An optimizer of optax as a function of the arguments that a config can hold.

    `inspect.signature` shows those, with types that can be checked.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        """Takes the name without "optax." and the function."""
        self.name, self.function = name, function
        self.takes = inspect.signature(function).parameters
        parameters = _arguments(name, function)
        self.__signature__ = inspect.Signature(parameters)
        self.__annotations__ = {each.name: each.annotation for each in parameters}

    def __call__(self, **args: Any) -> Optimizer:
        """Returns the optimizer with these arguments."""
        self.__signature__.bind(**args)
        name, lists = self.name, self.name in _LISTS
        whole = name in _ELEMENTWISE or name in _SUMMING
        stacks = "never" if lists else "whole" if whole else "blocks"
        args = {key: _tuples(value) for key, value in args.items()}
        if "learning_rate" not in self.takes:
            return Optimizer(lambda: self.function(**args), "direction", stacks)
        form = "one_rate" if name in _ONE_RATE else "rated"
        return Optimizer(functools.partial(self._moves, args), form, stacks)

    def _moves(
        self, args: Mapping[str, Any], rate: Any, weight_decay: float, decays: Decays
    ) -> optax.GradientTransformation:
        """Returns the transform at a rate, which may be traced; decay is where optax has it."""
        make = functools.partial(self.function, learning_rate=rate, **args)
        if "weight_decay" not in self.takes or self.name in _DECAY_AFTER:
            tx = make()
            return _then_decay(tx, rate * weight_decay, decays) if weight_decay else tx
        if not weight_decay:
            return make(weight_decay=0.0)
        mask = next((key for key in ("mask", "weight_decay_mask") if key in self.takes), None)
        if mask is not None:
            return make(weight_decay=weight_decay, **{mask: decays})
        both = make(weight_decay=weight_decay), make(weight_decay=0.0)
        if self.name in _SUMMING:
            return _choose_decay(*both, decays)
        labels = {True: "decays", False: "rest"}
        return optax.partition(
            dict(zip(labels.values(), both, strict=True)),
            lambda tree: {path: labels[bool(found)] for path, found in decays(tree).items()},
        )


def _then_decay(
    tx: optax.GradientTransformation, amount: Any, decays: Decays
) -> optax.GradientTransformation:
    """Returns `tx` with decoupled decay: its moves less `amount` times the leaf."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        moves, state = tx.update(updates, state, params)
        found = decays(moves)
        moves = {p: move - amount * params[p] if found[p] else move for p, move in moves.items()}
        return moves, state

    return optax.GradientTransformation(tx.init, update)


def _choose_decay(
    decayed: optax.GradientTransformation, bare: optax.GradientTransformation, decays: Decays
) -> optax.GradientTransformation:
    """Returns a transform that takes each leaf's move from one of two with the same state.

    What both compute is computed once.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        moves, _ = decayed.update(updates, state, params)
        others, state = bare.update(updates, state, params)
        found = decays(moves)
        return {path: (moves if found[path] else others)[path] for path in moves}, state

    return optax.GradientTransformation(bare.init, update)


def _arguments(name: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns the parameters that a config can set, each with a plain type.

    Raises:
      ConfigError: one that it cannot set has no default.
    """
    found = []
    for key, parameter in inspect.signature(function).parameters.items():
        default, hint = parameter.default, parameter.annotation
        if default is parameter.empty and key != "learning_rate":
            raise ConfigError(f"optim.name: {name} needs {key!r}, which a config cannot give")
        parts = typing.get_args(hint) or (hint,)
        plain = isinstance(default, bool | int | float | str | list | tuple)
        if _HIDDEN.search(key) or not (plain or default is None and float in parts):
            continue
        kind: Any = float if default is None else type(default)
        if typing.get_origin(hint) is Literal:
            kind = hint
        elif type(None) in parts:
            kind = kind | None
        found.append(
            inspect.Parameter(key, parameter.KEYWORD_ONLY, default=default, annotation=kind)
        )
    return found


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


class _Optimizers(Mapping[str, Callable[..., Optimizer]]):
    """jft's own by their names, optax's by theirs; "optax." before a name skips jft's own."""

    def __getitem__(self, name: str) -> Callable[..., Optimizer]:
        if name in _OWN:
            return _OWN[name]
        plain = name.removeprefix("optax.").removeprefix("contrib.")
        if plain in REFUSED:
            raise ConfigError(f"optim.name: {plain} {REFUSED[plain]}")
        if plain not in _of_optax():
            raise KeyError(name)
        return Named(plain, _of_optax()[plain])

    def __iter__(self) -> Iterator[str]:
        return iter({**_OWN, **_of_optax()})

    def __len__(self) -> int:
        return len({**_OWN, **_of_optax()})


@functools.cache
def _of_optax() -> dict[str, Callable[..., Any]]:
    """Returns {name: function} of the optimizers of optax and optax.contrib, by name."""
    # What is deprecated there comes by a module's __getattr__, and is not among these.
    known = {**vars(optax.contrib), **vars(optax)}
    return {name: known[name] for name in sorted(known) if _is_optimizer(name, known[name])}


def _is_optimizer(name: str, found: Any) -> bool:
    if name in REFUSED or not name[:1].islower() or not callable(found):
        return False
    if name in ("scale_by_learning_rate", "scale_by_schedule"):
        return False
    return name.startswith("scale_by_") or "learning_rate" in inspect.signature(found).parameters


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = _Optimizers()


def make_optimizer(*, name: str = "adamw", args: Mapping[str, Any] | None = None) -> Optimizer:
    """Returns the optimizer `name` of OPTIMIZERS with its arguments, tried on two small leaves.

    Raises:
      ConfigError: no such optimizer, or one that cannot work here, or wrong arguments.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name: no optimizer {name!r}{nearest(name, OPTIMIZERS)}")
    choice = OPTIMIZERS[name]
    try:
        found = replace(choice(**(args or {})), name=name)
    except TypeError as error:
        raise ConfigError(f"optim.args: {name}: {error}") from error
    leaves = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}

    def try_out(leaves: Any) -> Any:
        given = () if found.form in ("direction", "averaged") else (1.0, 0.0, lambda tree: tree)
        tx = found.make(*given)
        return tx.update(leaves, tx.init(leaves), leaves)

    try:
        jax.eval_shape(try_out, leaves)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"optim.args: {name}: {str(error).splitlines()[0]}") from error
    return found
