"""The verb `weights`: looks at weight files, fits them to models, writes and compares them."""

import argparse
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jft.errors import ConfigError, WeightsError, nearest
from jft.models.zoo import FAMILIES, Model, make_model
from jft.report.rundir import read_json, write_json
from jft.weights.certificate import (
    certified_model,
    certify,
    describe_certificate,
    describe_failure,
    differences,
)
from jft.weights.compare import compare
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.hub import pinned
from jft.weights.readers import read
from jft.weights.recognise import CLASSES, Match, fitting_model, recognise, recognised_model
from jft.weights.reference import MODES, compare_with_original
from jft.weights.rounding import Rounding
from jft.weights.source import Source, resolve

DIFFERENT = 1  # the exit code of `diff`, as of diff(1)


@dataclasses.dataclass(frozen=True)
class Action:
    """One action of the verb.

    Attributes:
      run: takes the parsed arguments and the sources.
      sources: how many it takes.
      flags: that it takes, and whether they must be given.
      usage: what stands behind `jft weights`.
    """

    run: Callable[..., int | None]
    sources: int
    flags: dict[str, bool]
    usage: str


def weights(args: argparse.Namespace) -> int | None:
    """Runs one action: show, check, convert or diff."""
    name, *words = args.words
    if name not in ACTIONS:
        near = nearest(name, ACTIONS)
        if near:
            action = near.split("'")[1]
            near = f"; did you mean jft weights {ACTIONS[action].usage}?"
        raise ConfigError(f"jft weights: no action {name!r}{near or '; ' + ', '.join(ACTIONS)}")
    action = ACTIONS[name]
    usage = f"; written jft weights {action.usage}"
    if len(words) != action.sources:
        raise ConfigError(f"jft weights {name}: {len(words)} sources given{usage}")
    for flag in ("model", "out", "dtype", "stats", "against", "reference"):
        given = bool(getattr(args, flag))
        if given and flag not in action.flags:
            raise ConfigError(f"jft weights {name}: takes no --{flag}{usage}")
        if not given and action.flags.get(flag):
            raise ConfigError(f"jft weights {name}: --{flag} is missing{usage}")
    return action.run(args, *(_source_text(word) for word in words))


def show(args: argparse.Namespace, text: str) -> None:
    """Lists the tensors of a source, and the models that they belong to."""
    found = resolve(text)
    arrays = read(found)
    tensors = [_tensor(name, array, args.stats) for name, array in arrays.items()]
    matches = recognise(found, arrays)
    width = max((len(name) for name in arrays), default=0)
    for tensor in tensors:
        print(_tensor_line(tensor, width))
    outline = arrays.outline().values()
    count, size = sum(a.size for a in outline), sum(a.nbytes for a in outline)
    print(f"{len(tensors)} tensors, {count:,} numbers, {size:,} bytes")
    print(f"sha256 {found.sha256()}" + (f", commit {found.revision}" if found.revision else ""))
    for match in matches:
        print(_match_line(match, len(arrays), text))
    if not matches:
        print(f"recognised by no family ({', '.join(FAMILIES)})")
    about = {"source": text, "sha256": found.sha256(), "revision": found.revision}
    about |= {"numbers": count, "bytes": size, "tensors": tensors}
    _write(args.out, about | {"recognised": [_match_dict(match) for match in matches]})


def check(args: argparse.Namespace, text: str) -> None:
    """Fits a source to its model, runs a fixed input, and writes what came of it.

    Raises:
      WeightsError: the source does not fit, the original computes something else, or a certificate
        does not hold any more; what was found is written all the same.
    """
    mode = args.reference or "auto"
    if mode not in MODES:
        raise ConfigError(f"--reference={mode}: one of {', '.join(MODES)}{nearest(mode, MODES)}")
    then = _read_certificate(args) if args.against else None
    if then is not None:
        model, source = certified_model(then, args.against), _resolve(text)
    else:
        model, text, source = _model_of("check", args.model, text)
    checked = certify(model, text, source)
    print(_model_line(model))
    print(checked.report.text())
    compared, why = compare_with_original(source, checked.activations, checked.rerun, mode)
    certificate = checked.certificate | {"compared_to": compared}
    if compared is None:
        certificate["not_compared"] = why
    print(describe_certificate(certificate))
    _write(args.out, certificate)
    problems = [] if then is None else differences(then, checked, args.against)
    if problems:
        more = f", and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise WeightsError(f"{args.against} does not hold: {'; '.join(problems[:3])}{more}")
    if then is not None:
        print(f"{args.against} holds: {_how_equal(then, certificate)}")
    if compared is not None and not compared["holds"]:
        raise WeightsError(f"source {text!r}: {describe_failure(compared)}")


def _read_certificate(args: argparse.Namespace) -> dict[str, Any]:
    if args.model:
        raise ConfigError("--against and --model: give one; a certificate names its model")
    content = read_json(Path(args.against))
    if not isinstance(content, dict):
        raise WeightsError(f"{args.against}: no such certificate")
    return content


def _how_equal(then: dict[str, Any], now: dict[str, Any]) -> str:
    same = then["source"]["sha256"] == now["source"]["sha256"]
    return "the same bytes" if same else "other files, the same numbers"


def convert(args: argparse.Namespace, text: str) -> None:
    """Writes a source as safetensors with its config, in the names that the family exports."""
    model, text, source = _model_of("convert", args.model, text)
    config = source and source.config
    variables, report = load_pretrained(model, text)
    print(_model_line(model))
    print(report.text())
    origin = {"source": text, "sha256": report.sha256, "revision": report.revision}
    out = export_weights(
        model,
        variables,
        args.out,
        label_names=_label_names(config, model.num_classes),
        preprocess=report.preprocess,
        table=report.table,
        provenance=origin,
        dtype=args.dtype,
    )
    if args.dtype:
        print(Rounding(**(read_json(out / "jft.json") or {})["rounding"]).text())
    print(f"wrote {out}")


def diff(args: argparse.Namespace, first: str, second: str) -> int:
    """Compares two sources tensor by tensor; 0 where they are equal bit for bit, else 1."""
    found = compare(read(resolve(first)), read(resolve(second)))
    print(f"A {first}\nB {second}\n{found.text()}")
    _write(args.out, {"a": first, "b": second} | found.to_dict())
    return DIFFERENT if found else 0


ACTIONS = {
    "show": Action(show, 1, {"stats": False, "out": False}, "show SOURCE [--stats] [--out=FILE]"),
    "check": Action(
        check,
        1,
        {"model": False, "out": False, "against": False, "reference": False},
        "check SOURCE [--model=NAME] [--out=FILE] [--against=FILE] [--reference=WHICH]",
    ),
    "convert": Action(
        convert,
        1,
        {"model": False, "out": True, "dtype": False},
        "convert SOURCE [--model=NAME] --out=DIR [--dtype=DTYPE]",
    ),
    "diff": Action(diff, 2, {"out": False}, "diff A B [--out=FILE]"),
}


def _source_text(word: str) -> str:
    """A word of the command line as a source; a plain path is one of kind file."""
    return word if ":" in word else f"file:{word}"


def _write(out: str | None, content: dict[str, Any]) -> None:
    if out:
        write_json(Path(out), content)


def _resolve(text: str) -> Source | None:
    return None if text.startswith("random:") else resolve(text)


def _model_of(action: str, name: str | None, text: str) -> tuple[Model, str, Source | None]:
    """(model with a source's classes, image size and channels; the source; its files).

    The model by name, or as it is recognised. A source on a hub comes back with its commit, so that
    it is asked for no second time.
    """
    # A wrong name, before anything is fetched.
    plain = make_model(name=name, num_classes=CLASSES) if name else None
    source = _resolve(text)
    if source is None:
        if plain is None:
            raise ConfigError(f"jft weights {action} {text}: --model is missing")
        return plain, text, None
    arrays = read(source)
    model = fitting_model(name, source, arrays) if name else recognised_model(source, arrays)
    return model, pinned(text, source.revision), source


def _model_line(model: Model) -> str:
    plain = make_model(name=model.variant or "", num_classes=CLASSES).module
    changed = [
        f"{name} = {getattr(model.module, name)!r}"
        for name in (field.name for field in dataclasses.fields(plain))
        if name not in ("parent", "name", "num_classes")
        and getattr(model.module, name) != getattr(plain, name)
    ]
    size, channels = model.preprocess.image_size, len(model.preprocess.mean)
    shape = f"{model.num_classes:,} classes, images [{size}, {size}, {channels}]"
    return "model     " + ", ".join([str(model.variant), shape, *changed])


def _tensor(name: str, array: np.ndarray, stats: bool) -> dict[str, Any]:
    row = {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
    row["bytes"] = array.nbytes
    if stats and array.size:
        with np.errstate(all="ignore"):
            numbers = array.astype(np.float64)
            row |= {"mean": float(numbers.mean()), "std": float(numbers.std())}
    return row


def _tensor_line(tensor: dict[str, Any], width: int) -> str:
    shape = "x".join(map(str, tensor["shape"])) or "scalar"
    line = f"{tensor['name']:<{width}}  {shape:<16} {tensor['dtype']:<9} {tensor['bytes']:>12,}"
    if "mean" in tensor:
        line += f"  mean {tensor['mean']:<11.4g} std {tensor['std']:.4g}"
    return line


def _match_line(match: Match, names: int, text: str) -> str:
    whose = f", names of {match.table.title}" if match.table.title else ""
    line = f"recognised as {match.family.name}{whose}: {match.known} of {names} names"
    if match.ignored:
        line += f", {match.ignored} more are left unread on purpose"
    if match.refusal:
        return f"{line}; {match.refusal}"
    if match.variant is None:
        return f"{line}; no model has these shapes" + (f": {match.reason}" if match.reason else "")
    args = "".join(f" {_override(name, value)}" for name, value in match.args.items())
    classes = f", {match.num_classes:,} classes" if match.num_classes else ", without a head"
    unsaid = "".join(
        f"\n  which model.args.{name} it has, nothing here says: {choices}"
        for name, choices in match.table.unsaid
        if name not in match.fields
    )
    return (
        f"{line}{classes}, {match.channels} channels\n"
        f"  --config.model.name={match.variant}{args} --config.init.source={text}{unsaid}"
    )


def _override(name: str, value: Any) -> str:
    """One argument of a model as the command line takes it."""
    key = "data.image_size" if name == "image_size" else f"model.args.{name}"
    return shlex.quote(f"--config.{key}={list(value) if isinstance(value, tuple) else value}")


def _match_dict(match: Match) -> dict[str, Any]:
    return {
        "family": match.family.name,
        "table": match.family.tables.index(match.table),
        "known": match.known,
        "model": match.variant,
        "args": dict(match.args),
        "num_classes": match.num_classes,
        "channels": match.channels,
        "refusal": match.refusal,
        "reason": match.reason,
    }


def _label_names(config: dict[str, Any] | None, num_classes: int) -> list[str] | None:
    """Names of the classes as a config.json has them, where there is one for each."""
    names = (config or {}).get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(num_classes)}:
        return None
    return [str(names[str(i)]) for i in range(num_classes)]
