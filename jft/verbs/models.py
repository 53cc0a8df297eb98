"""The verb `models`: lists what there is to fine-tune, and shows one of them."""

import argparse

import jax
import numpy as np

from jft.errors import ConfigError
from jft.models.zoo import Model, list_models, make_model
from jft.tree import count_bytes, count_params, flatten

CLASSES = 1000  # where no data says how many there are: ImageNet's, as in most published weights


def models(args: argparse.Namespace) -> None:
    """Lists models by shell pattern, or shows the stages and preprocessing of one."""
    words = args.words
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise ConfigError("jft models show: takes one NAME; jft models lists them")
        print(describe_model(make_model(name=words[1], args={}, num_classes=CLASSES)))
        return
    if len(words) > 1:
        raise ConfigError(f"jft models: unexpected {words[1]!r}; takes one pattern, or show NAME")
    found = list_models(words[0] if words else "*")
    if not found:
        raise ConfigError(f"jft models: no model matches {words[0]!r}; jft models lists them all")
    print("\n".join(found))


def describe_model(model: Model) -> str:
    """Returns a table of the stages with parameters and bytes, and the preprocessing."""
    size = model.preprocess.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    leaves = flatten(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    rows = []
    for stage in model.stages:
        part = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] == stage}
        rows.append((stage, len(part), count_params(part), count_bytes(part)))
    rows.append(("all", len(leaves), count_params(leaves), count_bytes(leaves)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{model.variant}, with {model.num_classes} classes"]
    lines.append(f"{'stage':<{width}} {'leaves':>7} {'parameters':>13} {'bytes':>13}")
    lines += [f"{name:<{width}} {n:>7,} {p:>13,} {b:>13,}" for name, n, p, b in rows]
    lines += [f"{name}: {value}" for name, value in model.preprocess.to_dict().items()]
    return "\n".join(lines)
