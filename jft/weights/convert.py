"""Loads foreign checkpoints by the family's table, strictly.

Every leaf is loaded, fresh because the config or a change of classes says so, or an error that
names it; every name in the source is read, deliberately ignored, or an error. What no table can see
are two tensors of equal shape that changed places: certificates (`jft weights check`) catch those.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jft.errors import WeightsError, nearest
from jft.models import forms
from jft.models.own_config import has_peer, peerless
from jft.tree import Flat, count_params, select, unflatten
from jft.weights import naming as namings
from jft.weights.agreement import check_fields
from jft.weights.arrays import Arrays
from jft.weights.dtypes import LeafDtype, leaf_dtypes
from jft.weights.fitting import Fit, MisfitError, convert, make_fit
from jft.weights.naming import Leaves, Naming
from jft.weights.preprocessing import source_preprocess
from jft.weights.random_weights import write_random
from jft.weights.readers import open_source
from jft.weights.report import Report as Report
from jft.weights.report import Row
from jft.weights.source import Source, resolve
from jft.weights.verified import Verified

# (path, array) -> what stands in the array's place
Place = Callable[[str, np.ndarray], Any]
_SHOWN = 3  # leaves or names in one message


def load_pretrained(
    model: Any,
    source: str,
    *,
    fresh: Sequence[str] = (),
    key: jax.Array | None = None,
    image_shape: tuple[int, int, int] | None = None,
    scratch_dir: str | Path | None = None,
    dtype: str | None = None,
    place: Place | None = None,
) -> tuple[dict[str, Any], Report]:
    """Loads a source's weights into the shape of a model, leaf by leaf.

    Beside the leaves themselves, memory holds one of them at a time: files are mapped. An array has
    the order in memory that it has in the file, so most kernels are transposed views of it.

    Args:
      model: a Model; one without a family reads files in its own path names.
      source: "pkg:DISTRIBUTION/path", "file:PATH", "hf:OWNER/NAME[@REVISION][/PATH]" or
        "random:SEED".
      fresh: regexes of the paths that are not loaded but made by the module's own init. The head
        needs none when the class counts differ: it is fresh then, and the report says so.
      key: a jax.random.key for the fresh leaves; key(0) by default.
      image_shape: (height, width, channels); by default a square of the model's image size.
      scratch_dir: where "random:SEED" writes its file; a temporary folder by default.
      dtype: of floating leaves: None keeps float32, bfloat16 and float16 as the source has them,
        and makes float32 of all others; "float32", "bfloat16" or "float16" casts all; "model" casts
        to what the module's own init makes. Fresh leaves are as the module makes them, but for a
        named dtype.
      place: takes each leaf's path and array once it is converted; what it returns stands in the
        array's place, which is let go.

    Returns:
      ({"params", "batch_stats"} nested dicts of numpy arrays, or of what `place` returns; the
      report). The report's `preprocess` is the source's own where it has one: use it in place of
      the model's.

    Raises:
      WeightsError: the source is missing, damaged, or does not fit the model leaf by leaf.
      ConfigError: a pattern of `fresh` matches no leaf, or an unknown dtype.
    """
    options = _Options(fresh, key, leaf_dtypes(dtype), place or (lambda _, value: value))
    shape = namings.image_shape_of(model, image_shape)
    leaves = namings.abstract_leaves(model, shape)
    opened = _open(model, source, shape, scratch_dir)
    with Verified(*opened) as verified:
        flat, report = _load(model, leaves, shape, source, opened, options, verified.sha256)
    return _nested(leaves, flat), report


class _Options(NamedTuple):
    """Arguments of `load_pretrained` that say what becomes of the leaves."""

    fresh: Sequence[str]
    key: jax.Array | None
    dtype: LeafDtype
    place: Place


class _Opened(NamedTuple):
    """A source's files, open; and their hash where they are gone in a moment."""

    source: Source
    arrays: Arrays
    sha256: str | None = None


def _load(
    model: Any,
    leaves: Leaves,
    shape: tuple[int, int, int],
    source: str,
    opened: _Opened,
    options: _Options,
    hashed: Callable[[], str],
) -> tuple[Flat, Report]:
    """The leaves by path, and the report."""
    found = opened.source
    arrays, notes = namings.without_module_prefix(opened.arrays)
    naming = namings.choose_naming(model, leaves, arrays, source)
    reasons = {p: f"by {rule!r}" for rule in options.fresh for p in select(leaves, rule, "fresh")}
    reasons |= _replaced_head(naming, leaves, arrays.outline(), reasons)
    notes += _alone(model)
    headless = _headless(naming, reasons) or not _has_head(naming, arrays)
    notes += check_fields(model, found, naming.table, headless)
    fit = make_fit(model, leaves, naming, found, shape, options.dtype)
    rows, flat = _assign(fit, arrays, reasons, source, options.place)
    flat |= _fresh_leaves(model, reasons, shape, options)
    own = getattr(model, "preprocess", None)
    preprocess, remarks = source_preprocess(found, own) if own else (None, [])
    report = Report(
        source=source,
        hashed=hashed,
        rows=rows,
        unread=_unread(arrays, rows),
        notes=notes + remarks,
        table=naming.index,
        preprocess=preprocess,
        revision=found.revision,
        **_counts(leaves, reasons),
    )
    return flat, report


def _alone(model: Any) -> list[str]:
    """A note where the model's arguments leave it to jft."""
    if getattr(model, "family", None) is None or has_peer(model):
        return []
    named = ", ".join(f"model.args.{name}" for name in peerless(model))
    return [
        f"no other library has this model ({named or 'its arguments'}): jft alone reads its export"
    ]


def _counts(leaves: Leaves, reasons: Mapping[str, str]) -> dict[str, int]:
    params = {path: leaf for path, (collection, leaf) in leaves.items() if collection == "params"}
    loaded = {path: leaf for path, leaf in params.items() if path not in reasons}
    return {"loaded_params": count_params(loaded), "all_params": count_params(params)}


def _nested(leaves: Leaves, flat: Flat) -> dict[str, Any]:
    nested = {collection: {} for collection, _ in leaves.values()}
    for path, (collection, _) in leaves.items():
        nested[collection][path] = flat[path]
    return {collection: unflatten(part) for collection, part in nested.items()}


def _open(
    model: Any,
    source: str,
    shape: tuple[int, int, int],
    scratch_dir: str | Path | None,
) -> _Opened:
    """The source and its arrays; "random:SEED" is written first, then read like any."""
    kind, _, seed = source.partition(":")
    if kind != "random":
        found = resolve(source)
        return _Opened(found, open_source(found))
    if not seed.isdecimal():
        raise WeightsError(f"source {source!r}: the seed must be a whole number, as in 'random:0'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(scratch_dir or temporary) / f"random-{seed}"
        write_random(model, folder, int(seed), image_shape=shape)
        found = resolve(f"file:{folder}")
        # Copied, since the mapped file may be gone in a moment.
        arrays = Arrays({name: np.array(value) for name, value in open_source(found).items()})
        return _Opened(found, arrays, found.sha256())


def _replaced_head(
    naming: Naming, leaves: Leaves, arrays: Mapping[str, np.ndarray], reasons: Mapping[str, str]
) -> dict[str, str]:
    """path -> reason of the head's leaves, where the source has other classes, or none ever."""
    head = [path for path in naming.head() if path not in reasons]
    sign = next((name for name in arrays if naming.table.tells_no_head(name)), None)
    if sign and not _has_head(naming, arrays):
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
        if len(theirs) != len(ours):  # a head may read another width, as of another pooling
            return {}
        counts.add((theirs[-1:], ours[-1:]))
    if len(counts) != 1 or min(counts)[0] == min(counts)[1]:
        return {}
    (theirs, ours) = counts.pop()
    return {path: f"{theirs[0]} classes in the source, {ours[0]} here" for path in head}


def _assign(
    fit: Fit, arrays: Arrays, reasons: Mapping[str, str], source: str, place: Place
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
                raise MisfitError(f"the table has no name for {path!r}")
            if name not in arrays:
                shown = len(problems) < _SHOWN  # the search is slow, and only these are printed
                near = nearest(name, extra) if shown else ""
                if path in naming.head():
                    near += f" (a source without a head needs fresh = [{naming.table.head!r}])"
                raise MisfitError(f"{path!r} needs {name!r}, which is missing{near}")
            value, status, note = convert(fit, path, arrays[name], origin)
            rows.append(Row(path, status, name, leaf.shape, note, value.dtype.name))
            if not problems and not extra:  # else all is let go
                flat[path] = place(path, value)
            del value  # before the next one is made
        except MisfitError as misfit:
            problems.append(str(misfit))
            flat.clear()
    if problems or extra:
        raise WeightsError(f"source {source!r} does not fit: " + _summary(problems, extra, naming))
    return rows, flat


def _unread(arrays: Mapping[str, np.ndarray], rows: Sequence[Row]) -> list[str]:
    used = {row.source_name for row in rows if row.status != "fresh"}
    return [name for name in arrays if name not in used]


def _has_head(naming: Naming, arrays: Mapping[str, np.ndarray]) -> bool:
    return any(naming.names[path].name in arrays for path in naming.head())


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


def _fresh_leaves(
    model: Any, reasons: Mapping[str, str], shape: tuple[int, int, int], options: _Options
) -> Flat:
    """The fresh leaves by the module's own init; the others are dead code and never computed."""
    if not reasons:
        return {}

    def init(key: jax.Array) -> Flat:
        variables = model.init(key, jnp.zeros((1, *shape), jnp.float32))
        return {
            path: leaf for path, (_, leaf) in namings.join(variables).items() if path in reasons
        }

    made = jax.jit(init)(jax.random.key(0) if options.key is None else options.key)
    return {
        path: options.place(path, np.array(leaf, options.dtype(leaf.dtype, leaf.dtype)))
        for path, leaf in made.items()
    }
