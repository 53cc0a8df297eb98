"""The verb `models`: lists what there is to fine-tune, and shows one of them."""

import argparse
import functools
import re
from typing import Any

import jax
import numpy as np

from jft.costs.flops import analytic_flops
from jft.errors import ConfigError, nearest
from jft.models.family import Facts
from jft.models.staged import block_index
from jft.models.zoo import Model, list_models, make_model
from jft.tree import count_bytes, count_params, flatten

CLASSES = 1000  # where no data says how many there are: ImageNet's, as in most published weights
_USAGE = "takes a pattern, list PATTERN, or show NAME"


def models(args: argparse.Namespace) -> None:
    """Names models by shell pattern, lists them as a table, or shows one of them."""
    words = list(args.words)
    action = words.pop(0) if words[:1] in (["list"], ["show"]) else "names"
    if action == "show" and (len(words) != 1 or any(sign in words[0] for sign in "*?[")):
        raise ConfigError("jft models show: takes one NAME; jft models list PATTERN lists them")
    if len(words) > 1:
        raise ConfigError(f"jft models: unexpected {words[1]!r}; {_USAGE}")
    if action == "show":
        print(describe_model(make_model(name=words[0], args={}, num_classes=CLASSES)))
        return
    names = _matching(words[0] if words else "*")
    print("\n".join(names) if action == "names" else table(names))


def _matching(pattern: str) -> list[str]:
    """The models that match a shell pattern.

    Raises:
      ConfigError: none does; it names the nearest model or family.
    """
    names = list_models(pattern) or list_models(pattern.lower())
    if not names:
        stems = (re.sub(r"v?\d+$", "", name.split("_")[0]) for name in list_models())
        families = [f"{stem}*" for stem in dict.fromkeys(stems)]
        hint = nearest(re.sub(r"[*?!\[\]]", "", pattern), [*list_models(), *families])
        hint = hint or f"; known: {', '.join(families)}"
        raise ConfigError(f"jft models: no model matches {pattern!r}{hint}")
    return names


def table(names: list[str]) -> str:
    """Returns a line a model: size, input, and what is known of its published weights."""
    titles = ("model", "params", "pixels", "stages", "top-1", "licence", "weights (init.source)")
    rows: list[tuple[str, ...]] = [titles]
    cites: list[str] = []
    for name in names:
        model = make_model(name=name, args={}, num_classes=CLASSES)
        facts = _facts(model)
        if facts.cite and facts.cite not in cites:
            cites.append(facts.cite)
        top1 = "" if facts.top1 is None else f"{facts.top1:.1f}"
        rows.append(
            (
                name,
                f"{_count(model) / 1e6:.2f} M",
                str(model.preprocess.image_size),
                str(len(model.stages)),
                top1 + (f" [{cites.index(facts.cite) + 1}]" if facts.cite else ""),
                facts.licence or "",
                facts.source or "",
            )
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    aligned = (str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust, str.ljust)
    lines = [
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        )
        for row in rows
    ]
    notes = [f"[{at}] {cite}" for at, cite in enumerate(cites, 1)]
    if cites:
        notes.insert(0, f"params with {CLASSES} classes; top-1 on ImageNet in percent, stated by:")
    return "\n".join(line.rstrip() for line in lines + notes)


def describe_model(model: Model) -> str:
    """Returns the stages with output shapes, parameters and bytes, the cost, and preprocessing."""
    variables = _variables(model)
    leaves, shapes = _leaves(variables), _shapes(model, variables)
    rows = [("stage", "leaves", "parameters", "bytes", "output")]
    for stage in (*model.stages, "all"):
        part = {p: leaf for p, leaf in leaves.items() if stage in ("all", p.split("/")[0])}
        counts = (len(part), count_params(part), count_bytes(part))
        leaf_count, params, size = (f"{count:,}" for count in counts)
        rows.append((stage, leaf_count, params, size, shapes[stage]))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [f"{model.variant}, with {model.num_classes} classes"]
    for name, *counts, shape in rows:
        cells = [f"{count:>{width}}" for count, width in zip(counts, widths[1:-1], strict=True)]
        lines.append("  ".join((name.ljust(widths[0]), *cells, shape)))
    lines.append(f"{_forward_flops(model, variables) / 1e9:.3g} GFLOP an image, 2 a multiply-add")
    lines += [f"{name}: {value}" for name, value in model.preprocess.to_dict().items()]
    facts = _facts(model)
    if facts.source:
        lines.append(f"weights: {facts.source}" + (f" ({facts.licence})" if facts.licence else ""))
    if facts.top1 is not None:
        lines.append(f"top-1 on ImageNet: {facts.top1:.1f} % ({facts.cite})")
    return "\n".join(lines)


def _facts(model: Model) -> Facts:
    known = model.family.facts if model.family else {}
    return known.get(model.variant or "", Facts())


def _image(model: Model) -> jax.ShapeDtypeStruct:
    size, channels = model.preprocess.image_size, len(model.preprocess.mean)
    return jax.ShapeDtypeStruct((1, size, size, channels), np.float32)


def _variables(model: Model) -> dict[str, Any]:
    """Shapes of {"params", "batch_stats"}; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), _image(model))


def _count(model: Model) -> int:
    """Parameters of a model; of blocks that are alike one alone is traced."""
    x, total, known = _image(model), 0, {}
    for at, stage in enumerate(model.stages):
        alike = None
        if getattr(model.module, "scanned", None) == stage.rpartition("_")[0]:
            alike = (model.module.scan_block(block_index(stage)), x.shape)
        if alike not in known:
            make = functools.partial(model.module.init_with_output, start=at, stop=at + 1)
            after, variables = jax.eval_shape(make, jax.random.key(0), x)
            known[alike] = count_params(flatten(variables.get("params", {}))), after
        size, x = known[alike]
        total += size
        known.pop(None, None)
    return total


def _leaves(variables: dict[str, Any]) -> dict[str, Any]:
    return flatten(variables["params"])


def _shapes(model: Model, variables: dict[str, Any]) -> dict[str, str]:
    """{stage: shape of its output for one image}, and under "all" that of the last."""
    x, found = _image(model), {}
    for at, stage in enumerate(model.stages):
        own = {kind: {stage: tree[stage]} for kind, tree in variables.items() if stage in tree}
        x = jax.eval_shape(lambda v, x, at=at: model.apply(v, x, start=at, stop=at + 1), own, x)
        found[stage] = found["all"] = "x".join(str(side) for side in x.shape[1:])
    return found


def _forward_flops(model: Model, variables: dict[str, Any]) -> int:
    """Products of one forward pass, in evaluation."""

    def total(_: Any, variables: Any, image: Any) -> jax.Array:
        return model.apply(variables, image).sum()

    return analytic_flops(total, {}, variables, _image(model)).forward
