"""A user's own Linen module, or anything with init and apply over dicts, as a model."""

import inspect
from collections.abc import Mapping
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
    None), else `train=` (bool), else `deterministic=` (bool), else with the images alone.

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
        known = inspect.signature(type(self.module).__call__).parameters
        return next((n for n in ("training", "train", "deterministic") if n in known), None)

    @property
    def stages(self) -> tuple[str, ...]:
        """The module's own `stages`, from input to output, else `names`."""
        return tuple(getattr(self.module, "stages", self.names))

    def init(self, key: jax.Array, image: jax.Array) -> dict[str, Any]:
        """Fresh {"params", "batch_stats"} for images like `image` [1, H, W, C]."""
        variables = jax.jit(lambda key, x: self._call("init", key, x, None))(key, image)
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
    ) -> Any:
        """Returns the logits, and the changed collections if `mutable`."""
        if training is not None and rngs and self.switch != "training":
            # Such a module draws one mask a call: rows on other devices and micro-batches get
            # another key, since their first row has another place in the global batch.
            rngs = {n: jax.random.fold_in(key, training.index[0]) for n, key in rngs.items()}
            if training.frozen_norms and training.frozen_norms >= _norms(variables):
                training = None  # every normalisation is frozen: run as in evaluation
        out = self._call("apply", variables, x, training, rngs=rngs, mutable=mutable)
        return out

    def _call(self, name: str, first: Any, x: Any, training: Training | None, **kwargs: Any) -> Any:
        values = {"training": training, "train": training is not None}
        values["deterministic"] = training is None
        if self.switch is not None:
            kwargs[self.switch] = values[self.switch]
        return getattr(self.module, name)(first, x, **kwargs)


def _norms(variables: Mapping[str, Any]) -> set[str]:
    found = jax.tree_util.tree_flatten_with_path(variables.get("batch_stats", {}))[0]
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in found}


def own_model(module: Any, num_classes: int, preprocess: Preprocess | None = None) -> OwnModel:
    """Returns a user's module as a model; its logits are checked against the classes.

    Raises:
      ConfigError: the module's output is not [batch, num_classes].
    """
    model = OwnModel(module, num_classes, preprocess or CENTRED)
    size = model.preprocess.image_size
    image = jax.ShapeDtypeStruct((1, size, size, len(model.preprocess.mean)), jnp.float32)
    order: list[str] = []

    def init(key: jax.Array, x: jax.Array) -> Any:
        found = model._call("init", key, x, None)
        order.extend(found["params"])  # jax sorts what leaves the trace
        return found

    jax.eval_shape(init, jax.random.key(0), image)
    model = replace(model, names=tuple(order))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x), variables, image)
    if getattr(logits, "shape", None) != (1, num_classes):
        shape = list(getattr(logits, "shape", ()))
        raise ConfigError(f"model: gives {shape} for one image, the data needs [1, {num_classes}]")
    return model
