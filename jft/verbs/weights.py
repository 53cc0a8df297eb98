"""The verb `weights`: looks at weight files, and fits them to a model."""

import argparse
import json
from pathlib import Path

from jft.errors import ConfigError
from jft.models.zoo import make_model
from jft.verbs.models import CLASSES
from jft.weights.convert import load_pretrained
from jft.weights.readers import read
from jft.weights.source import resolve


def weights(args: argparse.Namespace) -> None:
    """Reads a source; lists its tensors, or fits them to a model and prints the report."""
    if len(args.words) != 2 or args.words[0] != "check":
        raise ConfigError("jft weights: should be jft weights check SOURCE [--model=NAME]")
    text = args.words[1]
    if args.model:
        model = make_model(name=args.model, args={}, num_classes=CLASSES)
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
