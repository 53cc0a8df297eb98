"""Loads foreign checkpoints by the family's table, strictly.

Every leaf is loaded, fresh because the config or a change of classes says so, or an error that
names it; every name in the source is read, deliberately ignored, or an error. What no table can see
are two tensors of equal shape that changed places: certificates (`jft weights check`) catch those.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.errors import WeightsError, nearest
from jft.models import forms
from jft.models.forms import Origin
from jft.tree import Flat, count_params, select, unflatten
from jft.weights import naming as namings
from jft.weights.agreement import check_card, check_fields
from jft.weights.channels import adapt_channels, adaptation_note
from jft.weights.naming import Leaves, Naming
from jft.weights.preprocessing import source_preprocess
from jft.weights.random_weights import write_random
from jft.weights.readers import read
from jft.weights.relative_positions import resize_table
from jft.weights.report import Report as Report
from jft.weights.report import Row
from jft.weights.resize import Grids
from jft.weights.source import Source, resolve

_SHOWN = 3  # leaves or names in one message


class _MisfitError(Exception):
    """One leaf that the source cannot fill; collected into one WeightsError."""


def load_pretrained(
    model: Any,
    source: str,
    *,
    fresh: Sequence[str] = (),
    key: jax.Array | None = None,
    image_shape: tuple[int, int, int] | None = None,
    scratch_dir: str | Path | None = None,
) -> tuple[dict[str, Any], Report]:
    """Loads a source's weights into the shape of a model.

    Args:
      model: a Model; one without a family reads files in its own path names.
      source: "pkg:DISTRIBUTION/path", "file:PATH", "hf:OWNER/NAME[@REVISION][/PATH]" or
        "random:SEED".
      fresh: regexes of the paths that are not loaded but made by the module's own init. The head
        needs none when the class counts differ: it is fresh then, and the report says so.
      key: a jax.random.key for the fresh leaves; key(0) by default.
      image_shape: (height, width, channels); by default a square of the model's image size.
      scratch_dir: where "random:SEED" writes its file; a temporary folder by default.

    Returns:
      ({"params", "batch_stats"} nested dicts of numpy arrays, the report). The report's
      `preprocess` is the source's own where it has one: use it in place of the model's.

    Raises:
      WeightsError: the source is missing, damaged, or does not fit the model leaf by leaf.
      ConfigError: a pattern of `fresh` matches no leaf.
    """
    leaves = namings.abstract_leaves(model, image_shape)
    found, sha256, arrays = _open(model, source, image_shape, scratch_dir)
    check_card(found, sha256)
    arrays, notes = namings.without_module_prefix(arrays)
    naming = namings.choose_naming(model, leaves, arrays, source)
    reasons = {path: f"by {rule!r}" for rule in fresh for path in select(leaves, rule, "fresh")}
    reasons |= _replaced_head(naming, leaves, arrays, reasons)
    notes += check_fields(model, found, naming.table, headless=_headless(naming, reasons))
    shape = namings.image_shape_of(model, image_shape)
    fit = _make_fit(model, leaves, naming, found, shape)
    rows, flat = _assign(fit, arrays, reasons, source)
    flat |= _fresh_leaves(model, reasons, key, shape)
    own = getattr(model, "preprocess", None)
    preprocess, remarks = source_preprocess(found, own) if own else (None, [])
    params = {path: leaf for path, (collection, leaf) in leaves.items() if collection == "params"}
    report = Report(
        source=source,
        sha256=sha256,
        rows=rows,
        unread=_unread(arrays, rows),
        loaded_params=count_params({p: v for p, v in params.items() if p not in reasons}),
        all_params=count_params(params),
        notes=notes + remarks,
        table=naming.index,
        preprocess=preprocess,
        revision=found.revision,
    )
    nested = {collection: {} for collection, _ in leaves.values()}
    for path, (collection, _) in leaves.items():
        nested[collection][path] = flat[path]
    return {collection: unflatten(part) for collection, part in nested.items()}, report


def _open(
    model: Any,
    source: str,
    image_shape: tuple[int, int, int] | None,
    scratch_dir: str | Path | None,
) -> tuple[Source, str, dict[str, np.ndarray]]:
    """The source, its hash and its arrays; "random:SEED" is written first, then read like any."""
    kind, _, seed = source.partition(":")
    if kind != "random":
        found = resolve(source)
        return found, found.sha256(), read(found)
    if not seed.isdecimal():
        raise WeightsError(f"source {source!r}: the seed must be a whole number, as in 'random:0'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(scratch_dir or temporary) / f"random-{seed}"
        write_random(model, folder, int(seed), image_shape=image_shape)
        found = resolve(f"file:{folder}")
        # Copied, since the mapped file may be gone in a moment.
        arrays = {name: np.array(value) for name, value in read(found).items()}
        return found, found.sha256(), arrays


def _replaced_head(
    naming: Naming, leaves: Leaves, arrays: dict[str, np.ndarray], reasons: Mapping[str, str]
) -> dict[str, str]:
    """path -> reason of the head's leaves, where the source has other classes, or none ever."""
    head = [path for path in naming.head() if path not in reasons]
    sign = next((name for name in arrays if naming.table.tells_no_head(name)), None)
    if sign and not any(naming.names[path].name in arrays for path in head):
        return {path: f"no head in the source, as {sign!r} shows" for path in head}
    counts = set()
    for path in head:
        origin = naming.names[path]
        if origin.name not in arrays:
            return {}
        ours = leaves[path][1].shape
        try:
            theirs = forms.to_jft(origin, arrays[origin.name], naming.heads).shape
        except ValueError:
            return {}
        if len(theirs) != len(ours) or theirs[:-1] != ours[:-1]:
            return {}
        counts.add((theirs[-1:], ours[-1:]))
    if len(counts) != 1 or min(counts)[0] == min(counts)[1]:
        return {}
    (theirs, ours) = counts.pop()
    return {path: f"{theirs[0]} classes in the source, {ours[0]} here" for path in head}


@dataclass(frozen=True)
class _Fit:
    """What the leaves of a model need, and how a source's arrays can be made to fit."""

    leaves: Leaves
    naming: Naming
    grids: Grids
    first_conv: str | None

    def reshape(self, path: str, value: np.ndarray) -> tuple[np.ndarray, str, str] | None:
        """(value in the model's shape, status, note), or None where nothing can make it fit."""
        wanted = self.leaves[path][1].shape
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        if path == self.first_conv and floating and value.ndim == len(wanted) == 4:
            have, channels = value.shape[2], wanted[2]
            if have and (*value.shape[:2], channels, value.shape[3]) == wanted:
                note = adaptation_note(have, channels)
                return adapt_channels(value, channels), "adapted", note
        resized = self.grids.resize(path, value) or resize_table(path, value, wanted)
        return resized and (resized[0], "resized", resized[1])


def _make_fit(
    model: Any, leaves: Leaves, naming: Naming, source: Source, shape: tuple[int, int, int]
) -> _Fit:
    grids = Grids(leaves, source.config or {}, shape, antialias=naming.table.antialias)
    family = getattr(model, "family", None)
    return _Fit(leaves, naming, grids, family.first_conv if family else None)


def _assign(
    fit: _Fit, arrays: dict[str, np.ndarray], reasons: Mapping[str, str], source: str
) -> tuple[list[Row], Flat]:
    """Rows and arrays of all leaves; raises on what is missing, misshapen or extra."""
    rows, flat, problems = [], {}, []
    naming = fit.naming
    extra = _extra_names(naming, arrays, reasons)
    for path, (_, leaf) in fit.leaves.items():
        origin = naming.names.get(path)
        name = origin and origin.name
        if path in reasons:
            rows.append(
                Row(path, "fresh", name if name in arrays else None, leaf.shape, reasons[path])
            )
            continue
        try:
            if origin is None or name is None:
                raise _MisfitError(f"the table has no name for {path!r}")
            if name not in arrays:
                shown = len(problems) < _SHOWN  # the search is slow, and only these are printed
                near = nearest(name, extra) if shown else ""
                if path in naming.head():
                    near += f" (a source without a head needs fresh = [{naming.table.head!r}])"
                raise _MisfitError(f"{path!r} needs {name!r}, which is missing{near}")
            flat[path], status, note = _convert(fit, path, arrays[name], origin)
            rows.append(Row(path, status, name, leaf.shape, note))
        except _MisfitError as misfit:
            problems.append(str(misfit))
    if problems or extra:
        raise WeightsError(f"source {source!r} does not fit: " + _summary(problems, extra, naming))
    return rows, flat


def _unread(arrays: Mapping[str, np.ndarray], rows: Sequence[Row]) -> list[str]:
    used = {row.source_name for row in rows if row.status != "fresh"}
    return [name for name in arrays if name not in used]


def _headless(naming: Naming, reasons: Mapping[str, str]) -> bool:
    """Whether the model's whole head is made anew."""
    head = naming.head()
    return bool(head) and all(path in reasons for path in head)


def _extra_names(
    naming: Naming, arrays: Mapping[str, np.ndarray], reasons: Mapping[str, str]
) -> list[str]:
    """Names in the source that no leaf of the model stands for, and that nothing excuses."""
    expected = {origin.name for origin in naming.names.values()}
    headless = _headless(naming, reasons)
    return [
        name
        for name in arrays
        if name not in expected
        and not naming.table.ignored(name)
        and not (headless and naming.table.only_before_head(name))
    ]


def _summary(problems: list[str], extra: list[str], naming: Naming) -> str:
    """The first few problems and unread names in one line."""
    parts = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        parts.append(f"and {len(problems) - _SHOWN} more leaves")
    expected = [origin.name for origin in naming.names.values()]
    for name in extra[:_SHOWN]:
        known = naming.table.paths_of(name, naming.prefix, naming.depths)
        to = f" (the model has no leaf {known[0][0]!r})" if known else nearest(name, expected)
        if naming.table.only_before_head(name):
            to = f" (only its own head reads it: fresh = [{naming.table.head!r}] leaves both out)"
        parts.append(f"{name!r} in the source belongs to no leaf{to}")
    if len(extra) > _SHOWN:
        parts.append(f"and {len(extra) - _SHOWN} more unread names")
    return "; ".join(parts)


def _convert(
    fit: _Fit, path: str, value: np.ndarray, origin: Origin
) -> tuple[np.ndarray, str, str]:
    """(array in the model's layout, shape and dtype; status; note) of one leaf."""
    leaf, name = fit.leaves[path][1], origin.name
    status, note = "loaded", ""
    stored = value.shape
    try:
        value = forms.to_jft(origin, value, fit.naming.heads)
    except ValueError as error:
        raise _MisfitError(
            f"{path!r} {leaf.shape} cannot be read from {name!r} {stored}: {error}"
        ) from None
    if value.shape != leaf.shape:
        fitted = fit.reshape(path, value)
        if fitted is None:
            raise _MisfitError(
                f"{path!r} has shape {leaf.shape}, {name!r} gives {value.shape} (stored: {stored})"
            )
        value, status, note = fitted
    theirs, ours = value.dtype, np.dtype(leaf.dtype)
    if theirs != ours:
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        if not any(jnp.issubdtype(theirs, kind) and jnp.issubdtype(ours, kind) for kind in kinds):
            raise _MisfitError(f"{path!r} is {ours.name}, {name!r} is {theirs.name}")
        if status == "loaded":
            status, note = "cast", f"from {theirs.name}"
    with np.errstate(over="ignore"):  # what overflows is caught below
        value = np.array(value, dtype=ours, order="C")  # own memory: the file may change later
    if jnp.issubdtype(ours, jnp.floating) and not np.isfinite(value).all():
        raise _MisfitError(f"{path!r} gets an infinite or undefined number from {name!r}")
    return value, status, note


def _fresh_leaves(
    model: Any, reasons: Mapping[str, str], key: jax.Array | None, shape: tuple[int, int, int]
) -> Flat:
    """The fresh leaves by the module's own init; the others are dead code and never computed."""
    if not reasons:
        return {}

    def init(key: jax.Array) -> Flat:
        variables = model.init(key, jnp.zeros((1, *shape), jnp.float32))
        return {
            path: leaf for path, (_, leaf) in namings.join(variables).items() if path in reasons
        }

    made = jax.jit(init)(jax.random.key(0) if key is None else key)
    return {path: np.array(leaf) for path, leaf in made.items()}
