"""A user's own Linen or NNX module, or anything with init and apply over dicts, as a model."""

import functools
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jft.errors import ConfigError
from jft.models.family import Preprocess
from jft.models.layers import Training

CENTRED = Preprocess(mean=(127.5,) * 3, std=(127.5,) * 3, image_size=224)


@dataclass(frozen=True)
class OwnModel:
    """Stands where a `jft.models.zoo.Model` does, for a module that knows nothing of jft.

    The module is called as the parameters of its `__call__` allow: `training=` (jft's Training or
    None), else `train=` (bool), else `deterministic=` (bool), else with the images alone. One that
    has `call_arguments` names them there instead, as `jft.from_nnx` does.

    Attributes:
      module: has `init(key, x)` and `apply(variables, x, ...)`, as a Linen module does.
      num_classes: width of the logits.
      preprocess: how images become its input; its image_size is that of `init`.
      names: top-level names of its params, in the order that it calls them.
    """

    module: Any
    num_classes: int
    preprocess: Preprocess = CENTRED
    names: tuple[str, ...] = ()
    family: None = None
    variant: None = None

    @cached_property
    def switch(self) -> str | None:
        """The parameter by which the module tells training from evaluation."""
        known = call_arguments(self.module)
        return next((n for n in ("training", "train", "deterministic") if n in known), None)

    @property
    def stages(self) -> tuple[str, ...]:
        """The module's own `stages`, from input to output, else `names`."""
        return tuple(getattr(self.module, "stages", self.names))

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """(name, pattern) of structural groups; none where each of `names` is one."""
        return self.module.groups if hasattr(self.module, "call_arguments") else ()

    def init(self, key: jax.Array, image: jax.Array) -> dict[str, Any]:
        """Fresh {"params", "batch_stats"} for images like `image` [1, H, W, C]."""
        init = functools.partial(self._call, "init", training=None)
        if not hasattr(self.module, "call_arguments"):
            # Else leaves that are there already would become constants of a program.
            init = jax.jit(init)
        variables = init(key, image)
        if extra := set(variables) - {"params", "batch_stats"}:
            raise ConfigError(f"model: variable collection {min(extra)!r} cannot be trained")
        return dict(variables)

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        *,
        training: Training | None = None,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
        **borders: Any,
    ) -> Any:
        """Returns the logits, and the changed collections if `mutable`."""
        if training is not None and rngs and self.switch != "training":
            # Such a module draws one mask a call: rows on other devices and micro-batches get
            # another key, since their first row has another place in the global batch.
            rngs = {n: jax.random.fold_in(key, training.index[0]) for n, key in rngs.items()}
            if training.frozen_norms and training.frozen_norms >= _norms(variables):
                training = None  # every normalisation is frozen: run as in evaluation
        how = {"rngs": rngs, "mutable": mutable, **borders}
        return self._call("apply", variables, x, training, **how)

    def _call(self, name: str, first: Any, x: Any, training: Training | None, **kwargs: Any) -> Any:
        values = {"training": training, "train": training is not None}
        values["deterministic"] = training is None
        if self.switch is not None:
            kwargs[self.switch] = values[self.switch]
        return getattr(self.module, name)(first, x, **kwargs)


class OwnStages(OwnModel):
    """An own model whose module has `stages` and runs a part of them: `start` and `stop`."""

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        *,
        start: int = 0,
        stop: int | None = None,
        training: Training | None = None,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
    ) -> Any:
        """Runs stages [start, stop); those below `training.cut` run as in evaluation."""
        if training is not None and training.cut > start:
            x = self._call("apply", variables, x, None, start=start, stop=training.cut)
            start = training.cut
        return super().apply(
            variables, x, training=training, rngs=rngs, mutable=mutable, start=start, stop=stop
        )


def call_arguments(module: Any) -> Collection[str]:
    """Names of what a module can be called with."""
    known = getattr(module, "call_arguments", None)
    return inspect.signature(type(module).__call__).parameters if known is None else known


def _norms(variables: Mapping[str, Any]) -> set[str]:
    found = jax.tree_util.tree_flatten_with_path(variables.get("batch_stats", {}))[0]
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in found}


def own_model(module: Any, num_classes: int, preprocess: Preprocess | None = None) -> OwnModel:
    """Returns a user's module as a model; its logits are checked against the classes.

    Raises:
      ConfigError: it has no `init` and `apply`, its `stages` leave parts out, or its output is not
        [batch, num_classes].
    """
    for name in ("init", "apply"):
        if not callable(getattr(module, name, None)):
            raise ConfigError(
                f"model: {type(module).__name__} has no {name}; an NNX module goes in as"
                " jft.from_nnx(module)"
            )
    preprocess = preprocess or CENTRED
    size = preprocess.image_size
    image = jax.ShapeDtypeStruct((1, size, size, len(preprocess.mean)), jnp.float32)
    if hasattr(module, "ordered"):
        module = module.ordered(image)
    in_parts = hasattr(module, "stages") and {"start", "stop"} <= set(call_arguments(module))
    model = (OwnStages if in_parts else OwnModel)(module, num_classes, preprocess)
    order: list[str] = []

    def init(key: jax.Array, x: jax.Array) -> Any:
        found = model._call("init", key, x, None)
        order.extend(found["params"])  # jax sorts what leaves the trace
        return found

    jax.eval_shape(init, jax.random.key(0), image)
    model = replace(model, names=tuple(order))
    if left := [name for name in model.names if name not in model.stages]:
        raise ConfigError(f"model: its stages {list(model.stages)} leave out the part {left[0]!r}")
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x), variables, image)
    if getattr(logits, "shape", None) != (1, num_classes):
        shape = list(getattr(logits, "shape", ()))
        raise ConfigError(f"model: gives {shape} for one image, the data needs [1, {num_classes}]")
    return model
