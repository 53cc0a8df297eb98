"""The verbs that look at models, weights and data without a run."""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from jft.config import load_config
from jft.data.sources import describe
from jft.errors import ConfigError
from jft.models.zoo import Model, list_models, make_model
from jft.task import make_data
from jft.tree import count_bytes, count_params, flatten
from jft.weights.convert import load_pretrained
from jft.weights.readers import read
from jft.weights.source import resolve

_CLASSES = 1000  # where no data says how many there are: ImageNet's, as in most published weights


def models(args: argparse.Namespace) -> None:
    """Lists models by shell pattern, or shows the stages and preprocessing of one."""
    words = args.words
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise ConfigError("jft models show: takes one NAME; jft models lists them")
        print(describe_model(make_model(name=words[1], args={}, num_classes=_CLASSES)))
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


def weights(args: argparse.Namespace) -> None:
    """Reads a source; lists its tensors, or fits them to a model and prints the report."""
    if len(args.words) != 2 or args.words[0] != "check":
        raise ConfigError("jft weights: should be jft weights check SOURCE [--model=NAME]")
    text = args.words[1]
    if args.model:
        model = make_model(name=args.model, args={}, num_classes=_CLASSES)
        _, report = load_pretrained(model, text)
        summary, result = report.text(), report.to_dict()
    else:
        source = resolve(text)
        tensors = read(source)
        rows = [[name, list(array.shape), str(array.dtype)] for name, array in tensors.items()]
        summary = "\n".join(f"{name} {tuple(shape)} {dtype}" for name, shape, dtype in rows)
        summary += f"\n{len(rows)} tensors; --model=NAME fits them to a model"
        result = {"source": text, "sha256": source.sha256(), "tensors": rows}
    print(summary)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


def data(args: argparse.Namespace) -> None:
    """Prints the splits of a config's data: classes, sizes, and what could not be decoded."""
    if args.words != ["inspect"]:
        raise ConfigError("jft data: should be jft data inspect --config=FILE.py")
    config = load_config(args.config, args.overrides)
    print(describe(make_data(config)))
