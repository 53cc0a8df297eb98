"""Random weights in a source's own format, for trials that need no download."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jft.models.own_config import config_of
from jft.weights import naming as namings
from jft.weights.dtypes import leaf_dtypes


def write_random(
    model: Any,
    path: str | Path,
    seed: int,
    *,
    image_shape: tuple[int, int, int] | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes random weights of a model under the source's own names, as `load_pretrained` reads.

    Every leaf differs from every other, biases and statistics too, so that no swap goes unseen;
    kernels are scaled as by LeCun et al. 1998, to keep activations near 1.

    Args:
      model: a Model, or an object with `init`.
      path: the folder; made when missing, its model.safetensors and config.json are replaced.
      seed: of the numbers, the same on every machine.
      image_shape: (height, width, channels); by default a square of the model's image size.
      dtype: of floating leaves, to which the numbers are rounded.

    Returns:
      The folder.
    """
    leaves = namings.abstract_leaves(model, image_shape)
    rng = np.random.default_rng(seed)
    choose = leaf_dtypes(None if dtype == "float32" else dtype)
    flat = {
        name: _random_leaf(rng, name, leaf).astype(choose(leaf.dtype, leaf.dtype))
        for name, (_, leaf) in leaves.items()
    }
    naming = namings.naming_of(model, leaves, namings.exported_table(model, 0))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = namings.to_source_arrays(naming, flat, model)
    # By a name of its own and a rename: several processes may write the same folder.
    temporary = folder / f".{os.getpid()}.tmp"
    save_file(arrays, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    if getattr(model, "family", None) is not None:
        temporary.write_text(json.dumps(config_of(model, naming.table), indent=2))
        os.replace(temporary, folder / "config.json")
    return folder


def _random_leaf(rng: np.random.Generator, path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    noise = rng.standard_normal(leaf.shape, np.float32)
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
        noise = noise / math.sqrt(max(math.prod(leaf.shape[:-1]), 1))
    elif name == "scale":
        noise = 1 + 0.1 * noise
    elif name == "var":
        noise = np.exp(0.1 * noise)
    else:
        noise = 0.02 * noise
    return noise.astype(leaf.dtype)
