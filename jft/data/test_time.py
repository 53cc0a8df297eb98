"""Test-time augmentation: several views of an image, and the mean of what the model says of them.

Views are written like the ops of training: "flip", "flip | rot90", "ten_crop | flips". Each call
multiplies the views; equal ones count once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jft.data.images import canvas_side, make_eval_transform
from jft.data.op_text import Between, read_calls
from jft.errors import ConfigError
from jft.models.family import Preprocess

Infer = Callable[[jax.Array], jax.Array]
_CENTRE = (0.5, 0.5)
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


@dataclass(frozen=True)
class View:
    """One way to look at an image.

    Attributes:
      share: of the shorter side of the picture that is seen; None is what evaluation sees, divided
        by `zoom`.
      zoom: by which that is enlarged.
      at: (down, across) of what is seen: 0 at the top or left, 1 at the other end.
      mirrored: left to right, before the turns.
      turns: by 90 degrees, counter-clockwise.
    """

    share: float | None = None
    zoom: float = 1.0
    at: tuple[float, float] = _CENTRE
    mirrored: bool = False
    turns: int = 0

    def moved(self, mirrored: bool = False, turns: int = 0) -> View:
        """This view, mirrored and then turned once more."""
        before = -self.turns if mirrored else self.turns
        return replace(self, mirrored=self.mirrored != mirrored, turns=(before + turns) % 4)


def flip() -> list[View]:
    """As it is, and mirrored left to right."""
    return [View(), View(mirrored=True)]


def flips() -> list[View]:
    """As it is, mirrored left to right, top to bottom, and both."""
    return [View(), View(mirrored=True), View(mirrored=True, turns=2), View(turns=2)]


def rot90() -> list[View]:
    """Turned by 0, 90, 180 and 270 degrees."""
    return [View(turns=turns) for turns in range(4)]


def five_crop(share: Annotated[float, Between(0.1, 1.0)] = 0.875) -> list[View]:
    """The corners and the centre, each `share` of the picture's shorter side."""
    return [View(share=share, at=at) for at in (*_CORNERS, _CENTRE)]


def ten_crop(share: Annotated[float, Between(0.1, 1.0)] = 0.875) -> list[View]:
    """Those of five_crop, and all of them mirrored (Krizhevsky et al. 2012)."""
    return [moved for view in five_crop(share) for moved in (view, view.moved(mirrored=True))]


def scales(*zooms: Annotated[float, Between(0.1, 10.0)]) -> list[View]:
    """The centre at each enlargement; 1 is what evaluation sees, 1.1 shows less of the picture."""
    if not zooms:
        raise ConfigError("give enlargements, scales(1, 1.1)")
    return [View(zoom=float(zoom)) for zoom in zooms]


VIEWS: dict[str, Callable[..., list[View]]] = {
    "flip": flip,
    "flips": flips,
    "rot90": rot90,
    "five_crop": five_crop,
    "ten_crop": ten_crop,
    "scales": scales,
}
_CROPS = ("five_crop", "ten_crop", "scales")


def read_views(text: str, where: str = "eval.tta") -> list[View]:
    """Returns the views of a text, none twice; one, as evaluation sees it, of a blank text.

    Raises:
      ConfigError: what is wrong with the text, and where; two calls that both crop.
    """
    calls = read_calls(text, VIEWS, where)
    crops = [name for name, _ in calls if name in _CROPS]
    if len(crops) > 1:
        raise ConfigError(f"{where}: {crops[0]} and {crops[1]} both crop; give one of them")
    views = [View()]
    for name, more in calls:
        if name in _CROPS:  # the symmetries of what is there, on each crop
            views = [new.moved(old.mirrored, old.turns) for new in more for old in views]
        else:
            views = [old.moved(new.mirrored, new.turns) for new in more for old in views]
    return list(dict.fromkeys(views))


def make_views(
    text: str,
    preprocess: Preprocess,
    image_size: int | None = None,
    crop_fraction: float | None = None,
) -> Callable[[jax.Array], jax.Array] | None:
    """Makes f(images uint8 [B, H, W, C]) -> float32 [V, B, S, S, C]; None where V is 1.

    Args:
      text: of eval.tta.
      preprocess, image_size, crop_fraction: as in `make_eval_transform`.

    Raises:
      ConfigError: see `read_views`; a view that sees more than the picture.
    """
    views = read_views(text)
    if views == [View()]:
        return None
    size, fraction = image_size or preprocess.image_size, crop_fraction or preprocess.crop_fraction
    side = canvas_side(size, fraction)
    crops: dict[tuple[Any, ...], Infer] = {}
    for view in views:
        zoom = view.zoom if view.share is None else size / (view.share * side)
        if size / zoom > side + 0.5:
            raise ConfigError(
                f"eval.tta: scales({zoom:g}) sees more than the picture; this model's images"
                f" allow {size / side:.3g} and above"
            )
        crops.setdefault(
            _crop_of(view),
            make_eval_transform(preprocess, size, crop_fraction=fraction, zoom=zoom, at=view.at),
        )

    def run(images: jax.Array) -> jax.Array:
        made = {key: crop(images) for key, crop in crops.items()}
        return jnp.stack([_turned(made[_crop_of(view)], view) for view in views])

    return run


def _crop_of(view: View) -> tuple[Any, ...]:
    return (view.share, view.zoom, view.at)


def _turned(images: jax.Array, view: View) -> jax.Array:
    images = images[:, :, ::-1] if view.mirrored else images
    return jnp.rot90(images, view.turns, axes=(1, 2))


def link_of(kind: str, loss: str) -> str:
    """Returns what makes probabilities of logits: "softmax", "sigmoid"; "identity" of values."""
    if kind == "value":
        return "identity"
    return "sigmoid" if loss.startswith("sigmoid") else "softmax"


def make_test_time(
    views: Callable[[jax.Array], jax.Array] | None, link: str
) -> Callable[[Infer, jax.Array], jax.Array] | None:
    """Makes f(infer, images) -> logits [B, K] float32 of the mean over the views; None of no views.

    The mean is one of probabilities, or of values. What is returned are its logits again: log p for
    "softmax", log p - log(1 - p) for "sigmoid", so that losses and metrics of logits hold, and a
    cross-entropy of them is that of the mean probability.

    Args:
      views: from `make_views`.
      link: from `link_of`.
    """
    if views is None:
        return None

    def run(infer: Infer, images: jax.Array) -> jax.Array:
        # One view at a time: all of them side by side would take V times the memory.
        logits = jax.lax.map(infer, views(images)).astype(jnp.float32)
        return mean_logits(logits, link)

    return run


def mean_logits(logits: jax.Array, link: str) -> jax.Array:
    """Returns the logits [B, K] of the mean probability of logits [V, B, K]."""
    if link == "identity":
        return jnp.mean(logits, axis=0)
    if link == "softmax":
        return _log_mean(jax.nn.log_softmax(logits, axis=-1))
    return _log_mean(jax.nn.log_sigmoid(logits)) - _log_mean(jax.nn.log_sigmoid(-logits))


def _log_mean(logs: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logs, axis=0) - math.log(logs.shape[0])
