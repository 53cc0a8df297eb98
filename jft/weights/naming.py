"""One weight table applied to one model: which source name stands for which leaf, both ways."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.errors import ConfigError, WeightsError
from jft.models import forms
from jft.models import table as tables
from jft.models.forms import Origin
from jft.models.table import Table
from jft.models.zoo import Model
from jft.tree import flatten
from jft.weights.arrays import Arrays
from jft.weights.copying import own_copy
from jft.weights.dtypes import common_float

# Path -> (collection, shape and dtype). Parameters and statistics share the path space.
Leaves = dict[str, tuple[str, jax.ShapeDtypeStruct]]
_MODULE = "module."
_RUNNING, _COUNTER = ".running_var", ".num_batches_tracked"


@dataclass(frozen=True)
class Naming:
    """The names of one model's leaves in one naming style.

    Attributes:
      names: path -> where it comes from; a path that the table does not know is left out.
      table: the naming style.
      prefix: what "{p}" stands for.
      index: of the table in its family.
      heads: attention heads of the model, for forms that show them.
      depths: blocks of each stage of the model, where the source counts by stages.
    """

    names: dict[str, Origin]
    table: Table
    prefix: str
    index: int = 0
    heads: int | None = None
    depths: tuple[int, ...] = ()

    def head(self) -> list[str]:
        """Paths that are made anew when the class counts differ."""
        return [path for path in self.names if re.fullmatch(self.table.head, path)]


def image_shape_of(model: Any, image_shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(height, width, channels) as given, else a square of the model's image size."""
    if image_shape is not None:
        return image_shape
    preprocess = getattr(model, "preprocess", None)
    if preprocess is None:
        raise ConfigError("model: give image_shape=(height, width, channels), it has no preprocess")
    return preprocess.image_size, preprocess.image_size, len(preprocess.mean)


def abstract_variables(model: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """{"params", "batch_stats"} of a model as shapes and dtypes, without computing any.

    Args:
      model: a Model, or any object with `init(key, image)`.
      image_shape: (height, width, channels).
    """
    if isinstance(model, Model):
        return model.abstract(image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(model.init, jax.random.key(0), image))


def abstract_leaves(model: Any, image_shape: tuple[int, int, int] | None = None) -> Leaves:
    """The leaves of a model in the order of its stages, without computing any.

    Args:
      model: a Model, or any object with `init(key, image)`.
      image_shape: (height, width, channels); by default a square of the model's image size.

    Raises:
      ConfigError: a path stands for a parameter and a statistic at once.
    """
    variables = abstract_variables(model, image_shape_of(model, image_shape))
    stages: tuple[str, ...] = getattr(model, "stages", ())
    order = {stage: index for index, stage in enumerate(stages)}
    leaves = join(variables)
    return dict(sorted(leaves.items(), key=lambda item: order.get(item[0].split("/")[0], 0)))


def join(variables: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """path -> (collection, leaf) of {"params", "batch_stats"} trees."""
    leaves: dict[str, tuple[str, Any]] = {}
    for collection, tree in variables.items():
        for path, leaf in flatten(tree).items():
            if path in leaves:
                raise ConfigError(f"model: {path!r} names a leaf of two collections")
            leaves[path] = (collection, leaf)
    return leaves


def naming_of(
    model: Any, paths: Iterable[str], index: int = 0, prefix: str | None = None
) -> Naming:
    """The naming of a model's own table; jft's own paths for a model without a family."""
    family = getattr(model, "family", None)
    if family is None:
        return Naming({path: Origin(path) for path in paths}, Table(entries=()), "")
    table = family.tables[index]
    used = table.prefixes[0] if prefix is None else prefix
    module = getattr(model, "module", None)
    depths = tuple(getattr(module, "depths", ()))
    found = {path: table.source_of(path, used, depths) for path in paths}
    names = {path: origin for path, origin in found.items() if origin}
    heads = getattr(module, "heads", None)
    return Naming(names, table, used, index, heads if isinstance(heads, int) else None, depths)


def choose_naming(model: Any, paths: Iterable[str], names: Iterable[str], source: str) -> Naming:
    """The naming under which most of a source's names are known.

    Raises:
      WeightsError: none is.
    """
    paths, names = list(paths), list(names)
    family = getattr(model, "family", None)
    if family is None:
        return naming_of(model, paths)
    found = [
        naming_of(model, paths, family.tables.index(table), table.prefix_for(names)[0])
        for table in tables.best_tables(family.tables, names)
    ]
    if not found:
        expected = next(iter(naming_of(model, paths).names.values())).name
        held = f"{names[0]!r}" if names else "nothing at all"
        raise WeightsError(
            f"source {source!r} does not fit the model: family {family.name} expects names such as "
            f"{expected!r}, the source has {held}"
        )
    # Of styles that know the names alike, the one that knows the model best; the first of equals.
    return max(found, key=lambda naming: len(naming.names))


def exported_table(model: Any, index: int) -> int:
    """The index of the table that a model is exported under, where it was read under another's.

    Where none can express the model for others, the family's first that has a name for every leaf.

    Raises:
      WeightsError: there is none either.
    """
    family = getattr(model, "family", None)
    if family is None:
        return index
    order = [index, *(at for at in range(len(family.tables)) if at != index)]
    for at in order:
        if family.tables[at].writes(model):
            return at
    paths = abstract_leaves(model)
    for at in range(len(family.tables)):
        if len(naming_of(model, paths, at).names) == len(paths):
            return at
    raise WeightsError(f"export: no table of {family.name} has names for all leaves of this model")


def without_module_prefix(
    arrays: Mapping[str, np.ndarray],
) -> tuple[Arrays, list[str]]:
    """Strips the "module." that torch's DataParallel puts before every name, and says so."""
    arrays = arrays if isinstance(arrays, Arrays) else Arrays(arrays)
    if not arrays or not all(name.startswith(_MODULE) for name in arrays):
        return arrays, []
    stripped = arrays.renamed(lambda name: name.removeprefix(_MODULE))
    return stripped, [f"the prefix {_MODULE!r} was stripped from all {len(arrays)} names"]


def to_source_arrays(
    naming: Naming, flat: Mapping[str, Any], model: Any = None
) -> dict[str, np.ndarray]:
    """Leaves under their source names and in the source's layout, bitwise.

    Args:
      naming: of the leaves.
      flat: {path: leaf}.
      model: adds the constants of the table, in the dtype of the leaves where they have one.

    Raises:
      WeightsError: a leaf has no name in the table.
    """
    arrays, parts = {}, {}
    for path, leaf in flat.items():
        if path not in naming.names:
            raise WeightsError(
                f"the leaf {path!r} has no name in the family's table, no way to write it"
            )
        name, form, part = naming.names[path]
        value = forms.to_source(form, np.asarray(leaf), naming.heads)
        if part is None:
            arrays[name] = _contiguous(value)
            continue
        arrays.setdefault(name, None)  # keeps the order of the leaves
        parts.setdefault(name, {})[part[0]] = value
        if len(parts[name]) == part[1]:
            held = parts.pop(name)
            # Of transposed parts numpy makes a transposed whole, whose memory has another order.
            arrays[name] = _contiguous(np.concatenate([held[at] for at in range(part[1])]))
    if parts:
        raise WeightsError(f"a part of {next(iter(parts))!r} is missing, no way to write it")
    # torch's counters of batches: nothing reads them, but a strict load asks for them.
    running = [name for name in arrays if name.endswith(_RUNNING)]
    counters = {n.removesuffix(_RUNNING) + _COUNTER: np.zeros((), np.int64) for n in running}
    return arrays | counters | _constants(naming, model, common_float(arrays))


def _contiguous(value: np.ndarray) -> np.ndarray:
    return value if value.flags.c_contiguous else own_copy(value, value.dtype)


def _constants(naming: Naming, model: Any, dtype: np.dtype | None) -> dict[str, np.ndarray]:
    if model is None or naming.table.constants is None:
        return {}
    made = naming.table.constants(model)
    floats = {n: v for n, v in made.items() if dtype and jnp.issubdtype(v.dtype, jnp.floating)}
    return made | {name: value.astype(dtype) for name, value in floats.items()}
