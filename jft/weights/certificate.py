"""A certificate: what a source's weights are and what they compute, in numbers to check later.

No table of names can see two tensors of equal shape that changed places, nor a wrong epsilon in a
source that states none. Their outputs show it: stage by stage, on a fixed input.
"""

import dataclasses
import functools
import hashlib
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jft.errors import JftError, WeightsError
from jft.models.family import adapt_preprocess
from jft.models.zoo import Model, make_model
from jft.provenance import package_versions
from jft.weights import naming as namings
from jft.weights.activations import (
    MADE,
    SEED,
    Activations,
    activate,
    describe,
    fixed_images,
    grid_hash,
    make_grid,
    rounding,
)
from jft.weights.convert import load_pretrained
from jft.weights.export import args_of
from jft.weights.hashes import file_sha256
from jft.weights.readers import read
from jft.weights.report import STATUSES, Report
from jft.weights.source import Source

FORMAT = 1
# Of the largest number of a stage. float32 on another device or of another version moves outputs
# by some 1e-6; what is wrong with weights moves them by 1e-3 and more.
TOLERANCE = 1e-4
_LEAF_DIGITS = 16
_FIRST = 8


@dataclass(frozen=True)
class Checked:
    """A source as it was converted and run.

    Attributes:
      model: that it was fitted to.
      report: of the conversion.
      activations: on the fixed input.
      certificate: all of it, as JSON.
      rerun: stage -> the activations up to and with it.
    """

    model: Model
    report: Report
    activations: Activations
    certificate: dict[str, Any]
    rerun: Callable[[str], Activations]


def certify(model: Model, text: str, source: Source | None) -> Checked:
    """Converts a source, runs the fixed input, and says what came of it.

    Args:
      model: from the zoo.
      text: the source, as in a config.
      source: its files; None for random weights.

    Raises:
      WeightsError: the source does not fit the model, or overflows.
    """
    variables, report = load_pretrained(model, text, fresh=_missing_head(model, source))
    preprocess = report.preprocess or model.preprocess
    size, channels = model.preprocess.image_size, len(model.preprocess.mean)
    images = fixed_images(size, channels)
    rerun = functools.partial(activate, model, variables, images, preprocess)
    found = rerun(_last_stage(model, report))
    for name, value in found.stages.items():
        if not np.isfinite(value).all():
            raise WeightsError(f"source {text!r}: {name} gives infinite or undefined numbers")
    output = found.stages[found.last]
    grid = make_grid(output)
    leaves = namings.join(variables)
    certificate = {
        "format": FORMAT,
        "source": {
            "text": text,
            "sha256": report.sha256,
            "revision": report.revision,
            "files": {file.name: file_sha256(file) for file in source.files} if source else {},
        },
        "model": {
            "name": model.variant,
            "args": args_of(model),
            "num_classes": model.num_classes,
            "channels": channels,
        },
        "made_with": _versions(),
        "conversion": _conversion(report, {path: leaf for path, (_, leaf) in leaves.items()}),
        "preprocess": preprocess.to_dict(),
        "input": {
            "made": MADE,
            "seed": SEED,
            "shape": list(images.shape),
            "sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        },
        "stages": {name: describe(value) for name, value in found.stages.items()},
        "output": {
            "stage": found.last,
            "first": [rounding(each) for each in output.reshape(-1)[:_FIRST]],
            "hash": {"sha256": grid_hash(output, grid), **grid},
        },
        "input_gradient": {
            "of": f"sum over logsumexp of {found.last}",
            "norm": rounding(np.linalg.norm(found.gradient.astype(np.float64))),
            **describe(found.gradient),
        },
    }
    return Checked(model, report, found, certificate, rerun)


def certified_model(certificate: Mapping[str, Any], where: str) -> Model:
    """The model that a certificate is of.

    Raises:
      WeightsError: it is no certificate.
    """
    try:
        if certificate["format"] != FORMAT:
            raise WeightsError(f"{where}: a certificate of format {certificate['format']!r}")
        about = certificate["model"]
        name, args, classes = about["name"], about["args"], about["num_classes"]
        made = make_model(name=name, args=args, num_classes=classes)
        channels = int(about["channels"])
        certificate["source"]["sha256"]
    except JftError:
        raise
    except (TypeError, LookupError, ValueError, OverflowError) as error:
        raise WeightsError(f"{where}: is no certificate of jft weights check") from error
    return dataclasses.replace(made, preprocess=adapt_preprocess(made.preprocess, channels))


def differences(then: Mapping[str, Any], now: Checked, where: str) -> list[str]:
    """What of a certificate does not hold any more, one line each; [] where all does.

    Leaves are compared bit for bit, what they compute to `TOLERANCE`.

    Raises:
      WeightsError: a part of the certificate is missing.
    """
    new = now.certificate
    try:
        found = _moved_leaves(then["conversion"]["leaves"], new["conversion"]["leaves"])
        for name in ("preprocess", "input"):
            keys = then[name].keys() | new[name].keys()
            changed = sorted(key for key in keys if new[name].get(key) != then[name].get(key))
            found += [
                f"{name} {key}: {new[name].get(key)!r}, was {then[name].get(key)!r}"
                for key in changed
            ]
        if then["stages"].keys() != new["stages"].keys():
            found.append("the model has other stages")
            return found
        pairs = [(name, then["stages"][name], new["stages"][name]) for name in then["stages"]]
        gradients = then["input_gradient"], new["input_gradient"]
        for name, old, own in [*pairs, ("input gradient", *gradients)]:
            apart = _apart(old, own)
            if not apart <= TOLERANCE:
                found.append(f"{name} is off by {apart:.2g}, at most {TOLERANCE:g} is allowed")
        grid = then["output"]["hash"]
        if not 0 < float(grid["step"]) < math.inf:
            raise ValueError(f"a step of {grid['step']!r}")
        output = now.activations.stages[now.activations.last]
        if grid_hash(output, grid) != grid["sha256"]:
            found.append(f"the rounded hash of {now.activations.last} is another")
    except (TypeError, LookupError, AttributeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{where}: a damaged certificate: {error!r}") from error
    return found


def describe_certificate(certificate: Mapping[str, Any]) -> str:
    """What the stages compute, beside the original where it was compared, as a table to print."""
    compared = certificate["compared_to"]
    columns = f"{'stage':<14}{'output':<20}{'mean':>12}{'std':>12}"
    lines = [columns + (f"{'original':>12}" if compared else "")]
    for name, stage in certificate["stages"].items():
        shape = "x".join(map(str, stage["shape"]))
        line = f"{name:<14}{shape:<20}{stage['mean']:>12.5g}{stage['std']:>12.5g}"
        if compared:
            beside = compared["stages"].get(name)
            line += f"{beside['distance']:>12.2g}" if beside else f"{'-':>12}"
        lines.append(line)
    gradient = certificate["input_gradient"]
    line = f"{'gradient':<14}{'norm ' + format(gradient['norm'], '.5g'):<44}"
    if compared:
        apart = compared["input_gradient"]["distance"]
        line += f"{apart:>12.2g}" if apart is not None else f"{'-':>12}"
    lines.append(line.rstrip())
    if not compared:
        return "\n".join([*lines, f"original  not compared: {certificate['not_compared']}"])
    versions = ", ".join(f"{name} {one}" for name, one in compared["versions"].items())
    within = "within" if compared["holds"] else "NOT within"
    lines.append(f"original  {compared['class']} ({versions}): {within} the bars")
    return "\n".join(lines)


def describe_failure(compared: Mapping[str, Any]) -> str:
    """The first stage where a model leaves the original, in one line."""
    for name, stage in compared["stages"].items():
        if stage["distance"] > stage["bar"]:
            return (
                f"{name} differs from {compared['class']} by {stage['distance']:.2g}, the bar is"
                f" {stage['bar']:g} (nearest: {stage['original']})"
            )
    gradient = compared["input_gradient"]
    if gradient["distance"] is None:
        return f"nothing in {compared['class']} has the shape of its output"
    return (
        f"the input gradient differs by {gradient['distance']:.2g}, the bar is {gradient['bar']:g}"
    )


def _moved_leaves(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines about leaves with other bits; those that changed places are named together."""
    lines = [f"{path} is missing" for path in then if path not in now]
    lines += [f"{path} is new" for path in now if path not in then]
    moved = [path for path in then if path in now and then[path] != now[path]]
    told: set[str] = set()
    for path in moved:
        twin = next((p for p in moved if p != path and now[p] == then[path]), None)
        if twin and now[path] == then[twin] and path not in told:
            lines.append(f"{path} and {twin} changed places")
            told |= {path, twin}
    return lines + [f"{path} has other bits" for path in moved if path not in told]


def _apart(then: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """The largest difference of two descriptions over the largest number described."""
    if then["shape"] != now["shape"]:
        return float("inf")
    names = ("mean", "std", "min", "max")
    old = np.array([*(then[name] for name in names), *then["sketch"]], np.float64)
    new = np.array([*(now[name] for name in names), *now["sketch"]], np.float64)
    return float(np.abs(new - old).max() / max(np.abs(old[2:4]).max(), 1e-30))


def _missing_head(model: Model, source: Source | None) -> list[str]:
    """What is made anew of a source that has no head at all, as most towers have none."""
    if source is None:
        return []
    arrays, _ = namings.without_module_prefix(read(source))
    naming = namings.choose_naming(model, namings.abstract_leaves(model), arrays, source.text)
    head = naming.head()
    return (
        [naming.table.head]
        if head and not any(naming.names[p].name in arrays for p in head)
        else []
    )


def _last_stage(model: Model, report: Report) -> str:
    """The last stage that the source says something about, before the first that is fresh."""
    fresh = {path.split("/")[0] for path in report.paths("fresh")}
    read = {row.path.split("/")[0] for row in report.rows} - fresh
    known = model.stages
    stop = next((at for at, stage in enumerate(known) if stage in fresh), len(known))
    while stop and fresh and known[stop - 1] not in read:
        stop -= 1
    if stop == 0:
        raise WeightsError(f"source {report.source!r}: nothing of the model comes from it")
    return known[stop - 1]


def _conversion(report: Report, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    hashes = {
        path: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:_LEAF_DIGITS]
        for path, leaf in leaves.items()
    }
    counts = {status: len(report.paths(status)) for status in STATUSES}
    about = report.to_dict()
    kept = ("coverage", "loaded_params", "all_params", "unread", "notes", "table", "rows")
    return {"counts": counts, **{name: about[name] for name in kept}, "leaves": hashes}


def _versions() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        **package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
    }
