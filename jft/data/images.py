"""From the uint8 canvas that the host made to the model's input, inside the compiled step.

The host decodes, turns the picture upright and, for files, makes a square canvas of side
`canvas_side` = image_size / crop_fraction. The device does the rest, so that only uint8 crosses to
it: resize (where the canvas has another size, as 28 x 28 arrays do: upsampling on the device moves
1/50 of the bytes), crop, flip, the ops of `augment.ops`, normalise. One geometry holds for both:
"the picture with its shorter side at canvas_side (or, by `Preprocess.resize`, both sides), of which
evaluation sees the centre and training random crops".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.data.augment import make_ops, read_ops
from jft.data.boxes import random_box
from jft.data.fit import Fit, Shape, crop_start, resized_shape
from jft.data.resample import ON_DEVICE, resize_as_pillow, scale_and_translate
from jft.errors import ConfigError, nearest
from jft.models.family import CHOICES, Preprocess

CROPS = ("none", "random_resized")
# Folded into the run's seed for views; steps and initial weights fold in other numbers.
VIEW_FOLD = 0x71E3
_OVERSHOOTS = ("bicubic", "lanczos")


def canvas_side(image_size: int, crop_fraction: float) -> int:
    """Shorter side, in pixels, of the picture of which evaluation sees the central `image_size`."""
    return round(image_size / crop_fraction)


def canvas_shape(
    native_shape: Shape | None,
    preprocess: Preprocess,
    image_size: int | None = None,
    crop_fraction: float | None = None,
) -> Shape:
    """The `image_shape` that a loader should make for this source and model.

    Pictures of one small size go to the device as they are, grey ones as one channel, and are
    resized there. Larger ones, and files (`native_shape` None), become a square canvas of
    `canvas_side`.

    Raises:
      ConfigError: pictures in memory whose channels do not become those of the model.
    """
    size, fraction = image_size or preprocess.image_size, crop_fraction or preprocess.crop_fraction
    side, channels = canvas_side(size, fraction), len(preprocess.mean)
    if native_shape is None:
        return (side, side, channels)
    have = native_shape[2]
    if have != channels and (have, channels) not in ((1, 3), (3, 1)):
        raise ConfigError(
            f"images have {have} channels, the model takes {channels}: set data.channels={have},"
            " or choose with data.bands"
        )
    channels = min(have, channels)
    if min(native_shape[:2]) <= side and max(native_shape[:2]) <= 2 * side:
        return (native_shape[0], native_shape[1], channels)
    return (side, side, channels)


def canvas_fit(preprocess: Preprocess, image_shape: Shape) -> Fit:
    """How the host makes pictures into canvases of `image_shape`, see `canvas_shape`.

    Those of another size than `canvas_side` the device takes for pictures, and counts whole pixels
    itself.
    """
    side = canvas_side(preprocess.image_size, preprocess.crop_fraction)
    crop = preprocess.image_size if image_shape[:2] == (side, side) else None
    return Fit(preprocess.interpolation, preprocess.resize, preprocess.rounding, crop)


def _virtual_size(height: int, width: int, side: int, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) once the shorter side, or both, are `side`."""
    if preprocess.resize == "square":
        return side, side
    return resized_shape(height, width, side, side, preprocess.rounding)


def _levels(images: jax.Array) -> jax.Array:
    """On the scale 0..255, as mean and std are: 65535 of uint16 is 255. uint8 stays as it is."""
    return images.astype(jnp.float32) / 257.0 if images.dtype == jnp.uint16 else images


def _make_finish(preprocess: Preprocess) -> Callable[[jax.Array], jax.Array]:
    """Clips (cubic overshoots), repeats grey and normalises: float32 [B, S, S, C]."""
    mean = np.asarray(preprocess.mean, np.float32)
    std = np.asarray(preprocess.std, np.float32)
    shape = (1, 1, 1, len(mean))

    def finish(images: jax.Array) -> jax.Array:
        if preprocess.interpolation in _OVERSHOOTS:
            images = jnp.clip(images, 0.0, 255.0)
        if images.shape[-1] not in (1, len(mean)):
            raise ConfigError(f"images have {images.shape[-1]} channels, the model {len(mean)}")
        images = jnp.broadcast_to(images, (*images.shape[:-1], len(mean)))
        return (images - mean.reshape(shape)) / std.reshape(shape)

    return finish


def _make_centre(
    preprocess: Preprocess,
    image_size: int,
    side: int,
    zoom: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
) -> Callable[[jax.Array], jax.Array]:
    """uint8 [B, H, W, C] -> float32 [B, S, S, C], 0..255: the centre; a plain slice on a canvas.

    `zoom` enlarges; `at` is the place of what is seen: 0 at the top or left, 1 at the other end.
    """
    seen = image_size / zoom

    def centre(images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        tall, wide = _virtual_size(height, width, side, preprocess)
        top, left = (
            crop_start(extent, seen, preprocess.rounding, place)
            for extent, place in zip((tall, wide), at, strict=True)
        )
        if (tall, wide) == (height, width) and zoom == 1:
            images = images[:, top : top + image_size, left : left + image_size]
            return images.astype(jnp.float32)
        if preprocess.interpolation not in ON_DEVICE and preprocess.antialias and zoom == 1:
            floats, name = images.astype(jnp.float32), preprocess.interpolation
            return resize_as_pillow(floats, (tall, wide), (top, left), image_size, name)
        return scale_and_translate(
            images.astype(jnp.float32),
            (batch, image_size, image_size, channels),
            (1, 2),
            jnp.array([tall / height * zoom, wide / width * zoom], jnp.float32),
            jnp.array([-top * zoom, -left * zoom], jnp.float32),
            preprocess.interpolation,
            antialias=preprocess.antialias,
        )

    return centre


def _make_random_crop(
    preprocess: Preprocess,
    image_size: int,
    side: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(uint8 [B, H, W, C], keys [B]) -> float32 [B, S, S, C], 0..255.

    Boxes are whole pixels of the virtual canvas, so an 8 x 8 digit is cropped as finely as the same
    digit upsampled first. The filter may read a pixel or two beside the box, where torchvision,
    which crops before it resizes, cannot.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        height, width, channels = image.shape
        tall, wide = _virtual_size(height, width, side, preprocess)
        box = random_box(key, tall, wide, scale, ratio).astype(jnp.float32)
        zoom = image_size / box[2:]
        native = jnp.array([tall / height, wide / width], jnp.float32)
        return scale_and_translate(
            image.astype(jnp.float32),
            (image_size, image_size, channels),
            (0, 1),
            zoom * native,
            -box[:2] * zoom,
            preprocess.interpolation,
            antialias=preprocess.antialias,
        )

    return jax.vmap(one)


def _check_range(name: str, pair: tuple[float, float], most: float) -> tuple[float, float]:
    low, high = (float(value) for value in pair)
    if not 0 < low <= high <= most:
        raise ConfigError(f"{name}={pair}: give 0 < low <= high <= {most:g}")
    return low, high


def _check_preprocess(preprocess: Preprocess, crop_fraction: float) -> None:
    for name, known in CHOICES.items():
        value = getattr(preprocess, name)
        if value not in known:
            raise ConfigError(f"{name}={value!r} is not known{nearest(value, known)}")
    if not 0 < crop_fraction <= 1:
        raise ConfigError(f"crop_fraction={crop_fraction}: give 0 < crop_fraction <= 1")


def make_eval_transform(
    preprocess: Preprocess,
    image_size: int | None = None,
    *,
    crop_fraction: float | None = None,
    zoom: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
) -> Callable[[jax.Array], jax.Array]:
    """Makes f(images uint8 [B, H, W, C]) -> float32 [B, S, S, C]: centre crop and normalise.

    Pure and jit-able. On a canvas of side `canvas_side` the crop is an exact slice; another size is
    resized in the same product (shorter side to `canvas_side`). C = 1 repeats to the model's
    channels.

    Args:
      preprocess: mean, std, interpolation and the defaults of the two below.
      image_size: S, in pixels.
      crop_fraction: S over the shorter side of the picture; 1 keeps all of it.
      zoom: by which what is seen is enlarged once more.
      at: (down, across), where what is seen lies: 0 at the top or left, 1 at the other end.

    Raises:
      ConfigError: an unknown interpolation, a fraction out of range, channels that do not fit.
    """
    size, fraction = image_size or preprocess.image_size, crop_fraction or preprocess.crop_fraction
    _check_preprocess(preprocess, fraction)
    centre, finish = (
        _make_centre(preprocess, size, canvas_side(size, fraction), zoom, at),
        _make_finish(preprocess),
    )
    return lambda images: finish(centre(_levels(images)))


def make_keyed_pixels(
    preprocess: Preprocess,
    *,
    image_size: int | None = None,
    flip: bool = True,
    crop: str = "none",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    crop_fraction: float | None = None,
    ops: str = "",
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes f(images uint8 [B, H, W, C], keys [B]) -> float32 [B, S, S, C], 0..255.

    Every draw of a row comes from its own key. A cubic filter overshoots where no op follows.

    Args:
      preprocess: as in `make_eval_transform`.
      image_size: S, in pixels.
      flip: mirror left-right with probability 1/2.
      crop: "none" (the centre, as evaluation) or "random_resized" (see `random_box`).
      scale: smallest and largest area of a crop, as a fraction of the picture.
      ratio: smallest and largest width / height of a crop.
      crop_fraction: as in `make_eval_transform`; also sets the canvas that random crops come from.
      ops: what follows crop and flip, see `jft.data.augment`.

    Raises:
      ConfigError: an unknown crop, interpolation or op, a range out of order, channels that do not
        fit.
    """
    size, fraction = image_size or preprocess.image_size, crop_fraction or preprocess.crop_fraction
    _check_preprocess(preprocess, fraction)
    if crop not in CROPS:
        raise ConfigError(f"crop={crop!r} is not one of {', '.join(CROPS)}{nearest(crop, CROPS)}")
    scale = _check_range("scale", scale, 1.0)
    ratio = _check_range("ratio", ratio, 100.0)
    side = canvas_side(size, fraction)
    centre = _make_centre(preprocess, size, side)
    random_crop = _make_random_crop(preprocess, size, side, scale, ratio)
    run_ops = make_ops(ops, preprocess.mean)

    def pixels(images: jax.Array, keys: jax.Array) -> jax.Array:
        halves, images = jax.vmap(jax.random.split)(keys), _levels(images)
        images = random_crop(images, halves[:, 0]) if crop == "random_resized" else centre(images)
        if flip:
            mirrored = jax.vmap(jax.random.bernoulli)(halves[:, 1]).reshape(-1, 1, 1, 1)
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        return images if run_ops is None else run_ops(jnp.clip(images, 0.0, 255.0), keys)

    return pixels


def make_keyed_transform(
    preprocess: Preprocess, **augment: Any
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes f(images uint8 [B, H, W, C], keys [B]) -> float32 [B, S, S, C], the model's input.

    Arguments and errors as in `make_keyed_pixels`.
    """
    pixels, finish = make_keyed_pixels(preprocess, **augment), _make_finish(preprocess)
    return lambda images, keys: finish(pixels(images, keys))


def make_train_transform(
    preprocess: Preprocess, **augment: Any
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Makes f(images uint8 [B, H, W, C], key, index int32 [B]) -> float32 [B, S, S, C].

    Every draw comes from fold_in(key, index), index being the row in the global batch: the pixels
    do not depend on how many devices share it. Arguments and errors as in `make_keyed_pixels`.
    """
    keyed = make_keyed_transform(preprocess, **augment)

    def transform(images: jax.Array, key: jax.Array, index: jax.Array) -> jax.Array:
        return keyed(images, jax.vmap(jax.random.fold_in, (None, 0))(key, index))

    return transform


def make_view_transform(
    preprocess: Preprocess, *, seed: int, **augment: Any
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Makes f(images uint8 [B, H, W, C], example int32 [B], view int32 [B]) -> [B, S, S, C].

    View v of an example always has the same pixels, in whatever step, batch or process. A run whose
    examples take K views in turn can therefore keep what is computed from them. Arguments and
    errors as in `make_keyed_pixels`.
    """
    keyed = make_keyed_transform(preprocess, **augment)

    def transform(images: jax.Array, example: jax.Array, view: jax.Array) -> jax.Array:
        base = jax.random.fold_in(jax.random.key(seed), VIEW_FOLD)

        def key(example: jax.Array, view: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(base, example), view)

        return keyed(images, jax.vmap(key)(example, view))

    return transform


def augmented_pixels(
    preprocess: Preprocess, images: np.ndarray, *, seed: int, **augment: Any
) -> np.ndarray:
    """Returns uint8 [B, S, S, C]: images [B, H, W, C] as training may see them, to look at.

    Row r is drawn from (seed, r). Other arguments and errors as in `make_keyed_pixels`.
    """
    pixels = jax.jit(make_keyed_pixels(preprocess, **augment))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(images)))
    found = np.asarray(pixels(jnp.asarray(images), keys))
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def is_random(*, flip: bool, crop: str, ops: str = "") -> bool:
    """Whether such an augmentation draws anything: else one view of an example is all there is."""
    return flip or crop != "none" or any(op.random for _, op in read_ops(ops))
