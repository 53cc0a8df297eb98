"""A small network with every layer whose behaviour depends on rows, devices or freezing."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jft.losses import softmax
from jft.models.layers import BatchNorm, Dropout, Training
from jft.train.step import StepParts
from jft.tree import flatten

CLASSES = 5


class TinyNet(nn.Module):
    """Three stages: convolution and BatchNorm, a dense block with dropout, and a head."""

    norm: bool = True
    dropout: float = 0.0
    stages: tuple[str, ...] = ("stem", "blocks_0", "head")

    @nn.compact
    def __call__(self, x, start=0, stop=None, training: Training | None = None):
        stop = len(self.stages) if stop is None else stop
        for index in range(start, stop):
            live = training if training is not None and index >= training.cut else None
            x = self.stage(index, x, live)
        return x

    @nn.nowrap
    def stage(self, index, x, training):
        if index == 0:
            return Stem(self.norm, name="stem")(x, training)
        if index == 1:
            return Block(self.norm, self.dropout, name="blocks_0")(x, training)
        return nn.Dense(CLASSES, name="head")(x)


class Stem(nn.Module):
    norm: bool

    @nn.compact
    def __call__(self, x, training):
        # No bias below a BatchNorm: its true gradient is zero, so all that moves it is rounding.
        x = nn.Conv(8, (3, 3), (2, 2), use_bias=not self.norm, name="conv")(x)
        if self.norm:
            x = BatchNorm(name="bn")(x, training)
        return jax.nn.relu(x)


class Block(nn.Module):
    norm: bool
    dropout: float

    @nn.compact
    def __call__(self, x, training):
        x = nn.Conv(16, (3, 3), use_bias=not self.norm, name="conv")(x)
        if self.norm:
            x = BatchNorm(name="bn")(x, training)
        x = jnp.mean(jax.nn.relu(x), axis=(1, 2))
        return Dropout(self.dropout)(x, training)


def make_parts(norm=True, dropout=0.0, augment=False, **kw):
    """StepParts of a TinyNet on 8x8 images, and its initial (params, model_state), flat."""
    net = TinyNet(norm=norm, dropout=dropout)
    variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def transform(images, key, row):
        x = images.astype(jnp.float32) / 255 - 0.5
        if augment:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
            flip = jax.vmap(jax.random.bernoulli)(keys)
            x = jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
        return x

    parts = StepParts(
        apply=net.apply,
        loss=softmax(label_smoothing=0.1),
        transform=transform,
        eval_transform=lambda images: images.astype(jnp.float32) / 255 - 0.5,
        **kw,
    )
    return parts, flatten(variables["params"]), flatten(variables.get("batch_stats", {}))


def make_batch(rows=16, padding=0, seed=0):
    """A batch with `padding` rows that do not count; they hold extreme values on purpose."""
    rng = np.random.default_rng(seed)
    mask = np.ones(rows, np.float32)
    mask[rows - padding :] = 0
    image = rng.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, CLASSES, rows).astype(np.int32), "mask": mask}
