"""Signals: how much a leaf, a block or an element still learns, as pure functions of arrays.

What a probe sums up on the devices is in `jft.train.probe`; here is what each signal means. A value
is a float that float32 holds exactly, so that it survives JSON unchanged.

Sources were read in the authors' code where it says so; "unverified" marks what was not.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.errors import ConfigError, DivergedError
from jft.tree import Flat

# Added to the variance by the authors of Auto-SNR.
_SNR_FLOOR = 1e-8
# Rows of a Gram matrix shorter than this stay as they are (torch's F.normalize).
_NORM_FLOOR = 1e-12
# Follows a path in a quantised model; no path holds it.
SCALE_MARK = "#scale"


def exact(value: Any) -> float:
    """Returns the float32 nearest to `value` as a Python float."""
    return float(np.float32(value))


def unit_snr(grad: jax.Array) -> jax.Array:
    """Signal-to-noise ratio of one gradient, over its output units -> [].

    mean(g^2 / (var(g) + 1e-8)), the variance being the unbiased one over the output axis, which is
    the last of a Flax kernel. So it is in the code of Auto-SNR (Lee et al. 2023, arXiv:2210.11466;
    anniesch/surgical-finetuning, main.py, "eb-criterion"), which averages it over 5 batches and
    trains the leaves that reach 0.95. Of an embedding that axis holds features, not rows as there.
    An axis of one entry has variance 0 here, and NaN there; both train the leaf.
    """
    if grad.ndim == 0 or grad.shape[-1] < 2:
        spread = jnp.zeros((), grad.dtype)
    else:
        spread = jnp.var(grad, axis=-1, ddof=1, keepdims=True)
    return jnp.mean(grad * grad / (spread + _SNR_FLOOR))


@jax.jit
def _rel_updates(before: Flat, after: Flat) -> Flat:
    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        old, new = old.astype(jnp.float32), new.astype(jnp.float32)
        counts = old != 0
        change = jnp.where(counts, jnp.abs((new - old) / jnp.where(counts, old, 1.0)), 0.0)
        return jnp.sum(change) / jnp.maximum(jnp.sum(counts), 1)

    return {path: one(old, after[path]) for path, old in before.items()}


def rel_update(before: Flat, after: Flat) -> dict[str, float]:
    """Returns {path: mean |dw / w|} of one update, w being the weight before it.

    The distance by which SlimFit ranks leaves (Ardakani et al. 2023, arXiv:2305.18513; read in
    arashardakani/SlimFit, ViT/CIFAR10.py). Elements that were exactly 0 are left out of the mean;
    there they make it infinite.

    Args:
      before: {path: leaf} before the update.
      after: the same leaves after it.
    """
    found = jax.device_get(_rel_updates(before, {path: after[path] for path in before}))
    return {path: exact(value) for path, value in found.items()}


def similarity_distance(now: jax.Array, reference: jax.Array, weight: jax.Array) -> jax.Array:
    """Distance of two activations of the same examples, by which of them are alike -> [].

    1 / b^2 * ||G_now - G_ref||_F^2, where G is A A^T of the activations A [B, ...] as rows, each
    row of it divided by its L2 norm (Tung and Mori 2019, arXiv:1907.09682; read in two public
    implementations, aimagelab/mammoth and JDAI-CV/FaceX-Zoo). Egeria's plasticity is this distance
    to an int8 copy of the model (Wang et al. 2023, arXiv:2201.06227; unverified beyond its
    abstract). b is the number of rows with weight 1; the others do not count.
    """
    counts = weight > 0

    def gram(x: jax.Array) -> jax.Array:
        rows = x.reshape(x.shape[0], -1).astype(jnp.float32)
        # A padded row may hold NaN: select, do not multiply.
        rows = jnp.where(counts[:, None], rows, 0.0)
        product = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
        norms = jnp.linalg.norm(product, axis=1, keepdims=True)
        return product / jnp.maximum(norms, _NORM_FLOOR)

    count = jnp.maximum(jnp.sum(counts), 1)
    return jnp.sum(jnp.square(gram(now) - gram(reference))) / (count * count)


def quantise(leaves: Flat) -> Flat:
    """Returns a flat int8 copy of a model, the reference that plasticity is measured against.

    Leaves of two and more dimensions become round(w / s) as int8 beside s = max|w| / 127 as
    float32, one a leaf ("path" and "path#scale"); vectors stay float32. Egeria quantises with its
    framework's int8 kernels, activations included (unverified); here only the weights are.
    """
    found: Flat = {}
    for path, leaf in leaves.items():
        value = np.asarray(leaf).astype(np.float32)
        if value.ndim < 2:
            found[path] = value
            continue
        scale = np.float32(np.max(np.abs(value), initial=0.0) / 127.0)
        steps = value / scale if scale > 0 else np.zeros_like(value)
        found[path] = np.clip(np.round(steps), -127, 127).astype(np.int8)
        found[path + SCALE_MARK] = np.asarray(scale, np.float32)
    return found


def dequantise(reference: Flat) -> Flat:
    """Returns the float32 leaves of `quantise`; works on the host and under jit."""
    found: Flat = {}
    for path, leaf in reference.items():
        if not path.endswith(SCALE_MARK):
            scale = reference.get(path + SCALE_MARK)
            found[path] = leaf if scale is None else leaf.astype(jnp.float32) * scale
    return found


def marchenko_pastur_edge(sigma: float, shape: tuple[int, int]) -> float:
    """Returns sigma * (1 + sqrt(shorter / longer)), the end of a random matrix's spectrum.

    For entries of standard deviation s, sigma is s * sqrt(longer side), and the edge is that of
    the singular values (Marchenko and Pastur 1967).
    """
    return float(sigma * (1.0 + math.sqrt(min(shape) / max(shape))))


def weight_snr(kernel: np.ndarray) -> float:
    """Signal-to-noise ratio of a kernel's spectrum, on the host.

    With singular values S: sigma = IQR(S) / 1.349, edge = sigma * (1 + sqrt(shorter / longer)), and
    the ratio is sum(S > edge) / sum(S <= edge) / max(S); without noise the divisor is 1. So it is
    in Spectrum's code (Hartford et al. 2024, arXiv:2406.06623; cognitivecomputations/spectrum,
    spectrum.py). The spread of the singular values stands in for sigma there, which is no estimate
    of the noise's: the ratio compares kernels of one type and size, falls as 1 / scale, and one
    strong direction added to noise lowers it, through max(S).

    Args:
      kernel: [..., O]; more than two dimensions are taken as [-1, O]. Spectrum has two only.
    """
    matrix = np.asarray(kernel).astype(np.float64).reshape(-1, kernel.shape[-1])
    values = np.linalg.svd(matrix, compute_uv=False)
    if not values.size or values[0] == 0.0:
        return 0.0
    upper, lower = np.quantile(values, [0.75, 0.25])
    rows, columns = matrix.shape
    edge = marchenko_pastur_edge((upper - lower) / 1.349, (rows, columns))
    above = values > edge
    noise = 1.0 if above.all() else float(np.sum(values[~above]))
    ratio = float(np.sum(values[above])) / max(noise, np.finfo(np.float64).tiny) / values[0]
    return exact(min(ratio, float(np.finfo(np.float32).max)))


def weight_snrs(leaves: Flat) -> dict[str, float]:
    """Returns {path: `weight_snr`} of the matrices and kernels among `leaves`; others are absent.

    A leaf of more than two dimensions takes part if it is called "kernel": tokens and position
    embeddings have such shapes too.
    """
    chosen = {
        path: leaf
        for path, leaf in leaves.items()
        if leaf.ndim == 2 or (leaf.ndim > 2 and path.split("/")[-1] == "kernel")
    }
    return {path: weight_snr(np.asarray(leaf)) for path, leaf in chosen.items()}


def top_elements(values: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """Returns {path: bool mask} of the `share` of all elements with the largest values.

    Exactly round(share * elements) are kept, by one threshold over all leaves, as in FISH Mask
    (Sung et al. 2021, arXiv:2111.09839; varunnair18/FISH, fisher.py). Of equal values the first in
    order of path, then of position, are kept. FISH takes the head out first and trains all of it,
    within the same share; leave it out of `values` for that.

    Args:
      values: {path: [...] numbers}, on the host.
      share: in (0, 1].

    Raises:
      ConfigError: a share that keeps nothing, or more than there is.
      DivergedError: a value is not a finite number.
    """
    paths = sorted(values)
    flat = [np.asarray(values[path], np.float32).reshape(-1) for path in paths]
    for path, part in zip(paths, flat, strict=True):
        if not np.isfinite(part).all():
            raise DivergedError(f"signal: {path!r} has an element that is not a finite number")
    total = sum(part.size for part in flat)
    keep = round(share * total)
    if not 1 <= keep <= total:
        raise ConfigError(f"share: {share!r} of {total} elements keeps {keep}; give one in (0, 1]")
    every = np.concatenate(flat)
    bound = np.partition(every, total - keep)[total - keep]
    ties_left = keep - int(np.count_nonzero(every > bound))
    masks: dict[str, np.ndarray] = {}
    for path, part in zip(paths, flat, strict=True):
        mask = part > bound
        ties = np.flatnonzero(part == bound)[:ties_left]
        mask[ties] = True
        ties_left -= ties.size
        masks[path] = mask.reshape(np.shape(values[path]))
    return {path: masks[path] for path in values}
