"""The ops of augment.ops by name, and the function of a batch that a text of them makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jft.data import colour, erase, geometry, policy
from jft.data.op_text import read_calls
from jft.data.ops import PixelOp, Warp
from jft.errors import ConfigError

Op = PixelOp | Warp
# Folded into the key of a row; crop and flip take the two halves of its split.
OPS_FOLD = 0x0B5

OPS: dict[str, Callable[..., Op]] = {
    "flip": geometry.flip,
    "flip_vertical": geometry.flip_vertical,
    "flips": geometry.flips,
    "rot90": geometry.rot90,
    "rotate": geometry.rotate,
    "translate": geometry.translate,
    "shear": geometry.shear,
    "scale": geometry.scale,
    "colour": colour.colour,
    "grey": colour.grey,
    "invert": colour.invert,
    "autocontrast": colour.autocontrast,
    "equalize": colour.equalize,
    "posterize": colour.posterize,
    "solarize": colour.solarize,
    "sharpness": colour.sharpness,
    "blur": colour.blur,
    "erase": erase.erase,
    "rand_augment": policy.rand_augment,
    "trivial_augment": policy.trivial_augment,
}

# Words that stand for a text of ops, alone or among others.
PRESETS = {
    # What has no up or down: satellite and aerial images, microscopy.
    "overhead": "flips | rot90 | rotate(45)",
    # timm's usual recipe: rand-m9-mstd0.5-inc1, reprob 0.25, remode pixel.
    "strong": "rand_augment(2, 9, noise=0.5) | erase(0.25, mode=pixel)",
}


def _preset(text: str) -> Callable[[], list[tuple[str, Op]]]:
    def expand() -> list[tuple[str, Op]]:
        return read_ops(text)

    return expand


def read_ops(text: str, where: str = "augment.ops") -> list[tuple[str, Op]]:
    """Returns (name, op) of a text like "rotate(30) | erase(0.25)"; [] of a blank one.

    Raises:
      ConfigError: what is wrong with the text, and where; see `jft.data.op_text`.
    """
    table = {**OPS, **{name: _preset(content) for name, content in PRESETS.items()}}
    found: list[tuple[str, Op]] = []
    for name, made in read_calls(text, table, where):
        found += made if isinstance(made, list) else [(name, made)]
    return found


def make_ops(
    text: str, mean: Sequence[float]
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Makes f(images float32 [B, S, S, C], keys [B]) -> images, values 0..255; None of no ops.

    Each row is drawn from its own key alone, so neither its place in a batch nor the number of
    devices changes it. Affine maps with one border that follow each other are sampled once.

    Args:
      text: ops in the written order.
      mean: of the model's preprocessing, a channel; what "constant" borders and erased boxes show.

    Raises:
      ConfigError: see `read_ops`; an op that needs colours, for a model without three channels.
    """
    named = read_ops(text)
    for name, op in named:
        if op.colour and len(mean) != 3:
            what = name if op.colour == name else f"{name}'s {op.colour}"
            raise ConfigError(
                f"augment.ops: {what} needs images of 3 channels, the model takes {len(mean)}"
            )
    if not named:
        return None
    groups = _groups([op for _, op in named])

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        fill = jnp.asarray(_fill(mean, image.shape[-1]))
        for group in groups:
            image = _run(group, image, key, fill)
        return image

    def run(images: jax.Array, keys: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, OPS_FOLD)
        return jax.vmap(one)(images, keys)

    return run


def _groups(ops: Sequence[Op]) -> list[list[tuple[int, Op]]]:
    """(number, op) in order; ops that are one map of the plane, with one border, in one group."""
    groups: list[list[tuple[int, Op]]] = []
    for number, op in enumerate(ops):
        last = [other for _, other in groups[-1]] if groups else []
        borders = {other.border for other in (*last, op) if isinstance(other, Warp)}
        if last and last[-1].matrix and op.matrix and len(borders) < 2:
            groups[-1].append((number, op))
        else:
            groups.append([(number, op)])
    return groups


def _run(
    group: Sequence[tuple[int, Op]], image: jax.Array, key: jax.Array, fill: jax.Array
) -> jax.Array:
    borders = [op.border for _, op in group if isinstance(op, Warp)]
    matrix = geometry.identity()
    for number, op in group:
        own = jax.random.fold_in(key, number)
        if borders and op.matrix is not None:
            matrix = geometry.compose(matrix, op.matrix(own, image.shape[0]))
        elif isinstance(op, PixelOp):
            image = op.run(image, own, fill)
    return geometry.sample(image, matrix, borders[0], fill) if borders else image


def _fill(mean: Sequence[float], channels: int) -> np.ndarray:
    """The colour of what lies outside; a grey picture is repeated to the model's channels later."""
    colours = np.asarray(mean, np.float32)
    return colours if channels == len(colours) else np.full(channels, colours.mean(), np.float32)
