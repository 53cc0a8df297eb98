"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), pre-norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.family import Family
from jft.models.layers import INIT, Dense, Dropout, Dtype, LayerNorm, Training
from jft.models.transformer import GROUPS, SETS, PatchEmbed, Tower, tower_faults
from jft.models.vit_files import TABLES, source_config, variant_from_config
from jft.models.vit_variants import FACTS, VARIANTS, preprocess_of


class Embed(nn.Module):
    """Patches, prefix tokens and position embeddings: images [B, H, W, C] -> tokens [B, N, D].

    The prefix tokens stand before the patches: class token, distillation token, registers.
    """

    features: int
    patch: int
    class_token: bool
    dropout_rate: float
    dtype: Dtype
    distillation_token: bool = False
    registers: int = 0
    class_position: bool = True
    patch_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images to tokens."""
        x = PatchEmbed(self.features, self.patch, self.dtype, self.patch_bias, name="patch")(x)
        prefix = self._prefix(x.shape[0])
        if self.class_position:
            x = jnp.concatenate([*prefix, x], axis=1)
        position = self.param("pos_embedding", INIT, (1, *x.shape[1:]), jnp.float32)
        x = x + position.astype(self.dtype)
        if not self.class_position:
            x = jnp.concatenate([*prefix, x], axis=1)
        return Dropout(self.dropout_rate, name="dropout")(x, training)

    def _prefix(self, batch: int) -> list[jax.Array]:
        """The learnt tokens [B, count, D] of each kind."""
        kinds = (
            ("cls_token", int(self.class_token)),
            ("dist_token", int(self.distillation_token)),
            ("registers", self.registers),
        )
        tokens = []
        for name, count in kinds:
            if count:
                token = self.param(name, INIT, (1, count, self.features), jnp.float32)
                shape = (batch, count, self.features)
                tokens.append(jnp.broadcast_to(token.astype(self.dtype), shape))
        return tokens


class TwoHeads(nn.Module):
    """The mean of two classifiers, of the class token and of the distillation token.

    As DeiT predicts (Touvron et al. 2021, https://arxiv.org/abs/2012.12877, section 4).
    """

    num_classes: int
    dtype: Dtype

    def setup(self) -> None:
        """Makes both; the first has the names that the only head of other models has."""
        self.first = Dense(self.num_classes, True, self.dtype)
        nn.share_scope(self, self.first)
        self.distillation = Dense(self.num_classes, True, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the two tokens [B, 2, D] to float32 logits [B, num_classes]."""
        logits = self.first(x[:, 0]).astype(jnp.float32)
        return (logits + self.distillation(x[:, 1]).astype(jnp.float32)) / 2


class VisionTransformer(Tower):
    """Vision Transformer classifier; the fields of `Tower`, and:

    Attributes:
      class_token: whether a learnt token stands before the patches.
      pooling: "cls" reads the class token, "mean" averages the patch tokens.
      epsilon: of every LayerNorm; Hugging Face trains with 1e-12, most others with 1e-6.
      distillation_token: whether DeiT's second token follows the class token.
      distillation_head: whether that token has a classifier of its own; logits are the mean of two.
      registers: number of learnt tokens that follow (Darcet et al. 2024,
        https://arxiv.org/abs/2309.16588).
      class_position: whether all these tokens have position embeddings, as the patches do; DeiT III
        and big_vision give them none.
      layer_scale: whether each branch of a block has a learnt factor a channel.
      norm_pooled: whether the last norm follows the mean, as in MAE's fine-tuning; otherwise it
        comes before.
    """

    class_token: bool = True
    pooling: str = "cls"
    epsilon: float = 1e-12
    distillation_token: bool = False
    distillation_head: bool = False
    registers: int = 0
    class_position: bool = True
    layer_scale: bool = False
    norm_pooled: bool = False

    def block_options(self) -> dict[str, Any]:
        """Further arguments of every Block."""
        return {"layer_scale": self.layer_scale}

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; "norm" normalises and pools, [B, N, D] -> [B, D].

        With a distillation head it takes two tokens, [B, N, D] -> [B, 2, D].
        """
        if name == "embed":
            form = (self.features, self.patch, self.class_token, self.dropout_rate, self.dtype)
            further = (self.distillation_token, self.registers, self.class_position)
            return Embed(*form, *further, name=name)(x, training)
        if name == "norm":
            return self._pool(LayerNorm(self.epsilon, self.dtype, name=name), x)
        if name == "head" and self.distillation_head:
            return TwoHeads(self.num_classes, self.dtype, name=name)(x)
        return super().run_stage(name, x, training)

    def _pool(self, norm: LayerNorm, x: jax.Array) -> jax.Array:
        if self.distillation_head:
            return norm(x[:, :2])
        if self.pooling == "cls":
            return norm(x[:, 0])
        x = x[:, int(self.class_token) + int(self.distillation_token) + self.registers :]
        if self.norm_pooled:
            return norm(jnp.mean(x, axis=1))
        return jnp.mean(norm(x), axis=1)


def _faults(module: VisionTransformer, image_size: int) -> dict[str, str]:
    wrong = tower_faults(module, image_size)
    if module.pooling not in ("cls", "mean"):
        wrong["pooling"] = f"must be one of cls, mean, not {module.pooling!r}"
    if module.pooling == "cls" and not module.class_token:
        wrong["pooling"] = "'cls' needs class_token"
    if module.registers < 0:
        wrong["registers"] = f"must be at least 0, not {module.registers}"
    if module.distillation_token and not module.class_token:
        wrong["distillation_token"] = "needs class_token"
    if module.distillation_head and not module.distillation_token:
        wrong["distillation_head"] = "needs distillation_token"
    if module.distillation_head and module.pooling != "cls":
        wrong["pooling"] = f"must be 'cls' with distillation_head, not {module.pooling!r}"
    return wrong


FAMILY = Family(
    name="vit",
    module=VisionTransformer,
    variants=VARIANTS,
    tables=TABLES,
    groups=GROUPS,
    sets=SETS,
    preprocess=preprocess_of,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
    facts=FACTS,
)
