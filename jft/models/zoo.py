"""Every model that jft knows, by name."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.errors import ConfigError, nearest
from jft.models import (
    clip,
    convnext,
    dinov2,
    efficientnet,
    efficientnet_lite,
    resnet,
    siglip,
    swin,
    vit,
)
from jft.models.family import Family, Preprocess
from jft.models.family_files import read_families
from jft.models.layers import Training

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        efficientnet_lite.FAMILY,
        efficientnet.FAMILY,
        vit.FAMILY,
        dinov2.FAMILY,
        convnext.FAMILY,
        clip.FAMILY,
        siglip.FAMILY,
        swin.FAMILY,
        resnet.FAMILY,
    )
}

_BUILT_IN = frozenset(FAMILIES)


def add_family(family: Family) -> None:
    """Makes a family of one's own known by the names of its variants, in this process.

    A family that was added before under the same name is replaced, so that a notebook's cell can
    run again. For the command line see `jft.models.family_files`.

    Raises:
      ConfigError: it is none, or a name is another family's.
    """
    if not isinstance(family, Family):
        raise ConfigError(f"add_family: takes a Family, not {type(family).__name__}")
    where = f"family {family.name!r}"
    if family.name in _BUILT_IN:
        raise ConfigError(f"{where}: jft has one of that name; choose another")
    if not (family.variants and family.tables):
        raise ConfigError(f"{where}: needs at least one variant and one table")
    others = {n: f.name for n, f in _variants().items() if f.name != family.name}
    known = {field.name for field in fields(family.module)}
    for variant, values in family.variants.items():
        if variant in others:
            raise ConfigError(f"{where}: model {variant!r} is one of {others[variant]!r} already")
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{where}: {variant} sets {name!r}, which {family.module.__name__} does not"
                    f" have{nearest(name, known)}"
                )
    FAMILIES[family.name] = family


@dataclass(frozen=True)
class Model:
    """A module with what belongs to it; `init` and `apply` work on plain nested dicts.

    Attributes:
      module: the Linen module.
      family: None for a user's own module.
      variant: name in the family; None for a user's own module.
      num_classes: width of the logits.
      preprocess: how images become its input.
    """

    module: nn.Module
    family: Family | None
    variant: str | None
    num_classes: int
    preprocess: Preprocess

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output; the first component of every params path."""
        return tuple(self.module.stages)

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """Ordered structural groups (name, pattern)."""
        return self.family.groups if self.family else ()

    def init(self, key: jax.Array, image: jax.Array) -> dict[str, Any]:
        """Fresh {"params", "batch_stats"} (statistics only where the model has some).

        Args:
          key: a jax.random.key.
          image: [1, H, W, C], for its shape alone.
        """
        # Under jit the forward pass is dead code: only the leaves are computed, in one executable.
        return dict(jax.jit(self.module.init)(key, jnp.zeros(image.shape, jnp.float32)))

    def abstract(self, image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Shapes and dtypes of what `init` makes for images [H, W, C]; traced once a process."""
        try:
            found = _abstract(self.module, image_shape)
        except TypeError:  # a field that cannot be hashed
            found = _abstract.__wrapped__(self.module, image_shape)
        return jax.tree.map(lambda leaf: leaf, found)  # dicts of its own

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        *,
        start: int = 0,
        stop: int | None = None,
        training: Training | None = None,
        rngs: dict[str, jax.Array] | None = None,
        mutable: Any = False,
    ) -> Any:
        """Runs stages [start, stop); returns the output, and changed collections if `mutable`."""
        return self.module.apply(
            variables, x, start=start, stop=stop, training=training, rngs=rngs, mutable=mutable
        )


@functools.lru_cache(maxsize=16)
def _abstract(module: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(module.init, jax.random.key(0), image))


def _variants() -> dict[str, Family]:
    return {name: family for family in FAMILIES.values() for name in family.variants}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_variants(), pattern))


def make_model(*, name: str, args: Mapping[str, Any] | None = None, num_classes: int) -> Model:
    """Builds a model by variant name.

    Args:
      name: one of `list_models()`.
      args: module fields to change, and "image_size" for the side of the input in pixels.
      num_classes: width of the logits.

    Raises:
      ConfigError: unknown name or argument, or a value of the wrong type or range.
    """
    variants = _variants()
    if name not in variants:
        hint = nearest(name, variants) or f"; known: {', '.join(sorted(variants))}"
        raise ConfigError(f"model.name: unknown model {name!r}{hint}")
    family = variants[name]
    preprocess = family.preprocess(name)
    defaults = model_args(name)
    changed = {}
    for key, value in dict(args or {}).items():
        if key not in defaults:
            raise ConfigError(
                f"model.args.{key}: {name} has no such argument{nearest(key, defaults)}"
            )
        changed[key] = _checked(f"model.args.{key}", value, defaults[key])
    image_size = changed.pop("image_size", preprocess.image_size)
    if num_classes < 1:
        raise ConfigError(f"model: num_classes must be at least 1, not {num_classes}")
    if image_size < 1:
        raise ConfigError(f"model.args.image_size: must be above 0, not {image_size}")
    module = family.module(**{**family.variants[name], **changed, "num_classes": num_classes})
    for argument, fault in _faults(family, module, image_size).items():
        raise ConfigError(f"model.args.{argument}: {fault}")
    values = preprocess.to_dict() | {"image_size": image_size}
    return Model(module, family, name, num_classes, Preprocess.from_dict(values))


def _faults(family: Family, module: nn.Module, image_size: int) -> Mapping[str, str]:
    try:
        return dict(family.faults(module, image_size))
    except Exception as error:
        if family.name in _BUILT_IN:
            raise
        text = " ".join(str(error).split())
        raise ConfigError(
            f"family {family.name!r}: its faults fail: {type(error).__name__}: {text}"
        ) from error


def model_args(name: str) -> dict[str, Any]:
    """The arguments of a variant with their defaults, "image_size" among them."""
    family = _variants()[name]
    known = {
        field.name: field.default
        for field in fields(family.module)
        if field.init and field.name not in ("num_classes", "parent", "name")
    }
    return known | dict(family.variants[name]) | {"image_size": family.preprocess(name).image_size}


def _checked(key: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`; dtypes may be given by name."""
    if key.endswith(".dtype"):
        return _dtype(key, value)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: must be a list, not {value!r}")
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not type(default):
        raise ConfigError(f"{key}: must be a {type(default).__name__}, not {value!r}")
    return value


def _dtype(key: str, value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise ConfigError(f"{key}: {value!r} is no dtype; use 'float32' or 'bfloat16'") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"{key}: must be a floating dtype, not {dtype.name}")
    return dtype


for _family in read_families():
    add_family(_family)
