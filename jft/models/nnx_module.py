"""A user's own Flax NNX module as `init` and `apply` over plain nested dicts."""

import functools
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal

from jft.errors import ConfigError
from jft.models.family import Preprocess
from jft.models.layers import Training
from jft.models.nnx_names import (
    Place,
    check_names,
    leading_numbers,
    part_at,
    path_of,
    sorting,
    top_of,
)
from jft.tree import Flat, flatten, unflatten

_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
_ADVICE = (
    "nnx.Param is trained, nnx.BatchStat is saved with the model, the rest belongs in __call__"
)


@dataclass(frozen=True, eq=False)
class NnxModule:
    """An NNX module without its variables; `from_nnx` makes it.

    A part of a list has the name of the list and its number: "layers_0/kernel" is
    `module.layers[0].kernel`.

    Attributes:
      graph: the module without variables.
      places: {path: (collection, where it stands)}.
      shapes: {path: shape and dtype}.
      streams: {where it stands: shape} of keys and counters of the module's random streams.
      parameters: names of the arguments of its `__call__`.
      make: key -> {path: initial leaf}.
      declared: its own `stages`.
      preprocess: its own, if it has one.
      order: names of its top-level parts, as it calls them once `ordered`.
    """

    graph: Any
    places: dict[str, tuple[str, Place]]
    shapes: Flat
    streams: dict[Place, tuple[int, ...]]
    parameters: frozenset[str]
    make: Callable[[jax.Array], Flat]
    declared: tuple[str, ...]
    preprocess: Preprocess | None
    order: tuple[str, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """The module's own `stages`, else its top-level parts."""
        return self.declared or self.order

    @property
    def call_arguments(self) -> frozenset[str]:
        """What `apply` takes beside variables and images."""
        parts = {"start", "stop"}
        return frozenset({"training"} | (parts if parts <= self.parameters else set()))

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """(name, pattern) of the top-level parts; those of a list are numbered, `layers[0]`.

        A list that has parts without parameters in it is left as it is: "layers_0", "layers_2".
        """
        trained = {top_of(path) for path, (kind, _) in self.places.items() if kind == "params"}
        tops = [top for top in self.order if top in trained]
        numbers: dict[str, list[int]] = {}
        for name, *number in map(self._top, tops):
            numbers.setdefault(str(name), []).extend(int(at) for at in number[:1])
        found: dict[str, str] = {}
        for top in tops:
            name = str(self._top(top)[0])
            if numbers[name] and set(numbers[name]) == set(range(len(set(numbers[name])))):
                found[name] = rf"{name}_(\d+)(?:[_/].*)?"
            else:
                found[top] = rf"{top}(?:/.*)?"
        return tuple(found.items())

    def init(self, key: jax.Array, image: Any, training: Training | None = None) -> dict[str, Any]:
        """The {"params", "batch_stats"} that the module starts with, in the order of its calls."""
        del image, training
        rank = {top: at for at, top in enumerate(self.order)}
        made = self.make(key)
        return self._nested({p: made[p] for p in sorted(made, key=lambda p: rank[top_of(p)])})

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        *,
        training: Training | None = None,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
        **borders: Any,
    ) -> Any:
        """Calls the module with its variables; returns also {"batch_stats"} if `mutable`.

        In training it runs as after `module.train()`, but for what is frozen: parts below the cut
        and normalisations that keep their statistics run as in evaluation. `nnx.BatchNorm` takes
        its moments over all devices. Leaves of stages that do not run may be missing.
        """
        given = _paths(variables)
        key = jax.random.key(0)
        if training is not None and rngs:
            # Such a module draws one mask a call: rows on other devices and micro-batches get
            # another key, since their first row has another place in the global batch.
            key = jax.random.fold_in(rngs["dropout"], training.index[0])
        module = self._merged(given, key)
        self._switch(module, training)
        values = {"training": training, "train": training is not None}
        values["deterministic"] = training is None
        values["rngs"] = None if training is None else nnx.Rngs(jax.random.fold_in(key, 0))
        known = {name: value for name, value in values.items() if name in self.parameters}
        out = module(x, **known, **borders)
        if not mutable:
            return out
        return out, self._nested(self._statistics(module, given), ("batch_stats",))

    def to_nnx(self, variables: Mapping[str, Any]) -> Any:
        """The NNX module with these variables, in evaluation mode.

        Args:
          variables: {"params": ..., "batch_stats": ...}, each nested or {path: leaf}, as of
            `jft.load_pretrained` or of {"params": outcome.params,
            "batch_stats": outcome.model_state}.

        Raises:
          ConfigError: a leaf is missing, unknown, or of another shape.
        """
        given = _paths(variables)
        for path in given.keys() ^ self.shapes.keys():
            what = "is missing" if path in self.shapes else "is not the module's"
            raise ConfigError(f"to_nnx: the leaf {path!r} {what}")
        for path, leaf in given.items():
            if leaf.shape != self.shapes[path].shape:
                raise ConfigError(
                    f"to_nnx: {path!r} has shape {leaf.shape}, needs {self.shapes[path].shape}"
                )
        module = self._merged({p: jnp.array(leaf) for p, leaf in given.items()}, jax.random.key(0))
        module.eval()
        return module

    def ordered(self, image: jax.ShapeDtypeStruct) -> "NnxModule":
        """The module with `order` as it calls its parts, by the first use of their leaves."""
        paths = sorted(self.shapes)

        def call(leaves: Flat, x: jax.Array) -> Any:
            return self.apply(self._nested(leaves), x)

        jaxpr = jax.make_jaxpr(call)({path: self.shapes[path] for path in paths}, image).jaxpr
        first: dict[Any, int] = {}
        for at, equation in enumerate(jaxpr.eqns):
            for value in equation.invars:
                if not isinstance(value, Literal):
                    first.setdefault(value, at)
        last = len(jaxpr.eqns)
        rank = dict.fromkeys(self.order, last)
        for path, value in zip(paths, jaxpr.invars, strict=False):
            rank[top_of(path)] = min(rank[top_of(path)], first.get(value, last))
        return replace(self, order=tuple(sorted(self.order, key=rank.__getitem__)))

    def _merged(self, given: Flat, key: jax.Array) -> Any:
        state: dict[Place, Any] = {}
        for path, (_, place) in self.places.items():
            # Of a stage that does not run only the shape is known: to use it is an error of jax.
            leaf = given.get(path, self.shapes[path])
            # NNX would write statistics into a numpy array in place.
            state[place] = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        for place, shape in self.streams.items():
            if place[-1] == "count":
                state[place] = jnp.zeros(shape, jnp.uint32)
                continue
            name = "/".join(map(str, place))
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            state[place] = jax.random.split(own, shape) if shape else own
        return nnx.merge(self.graph, nnx.from_flat_state(list(state.items())))

    def _switch(self, module: Any, training: Training | None) -> None:
        if training is None:
            module.eval()
            return
        module.train()
        parts: Any = nnx.iter_modules(module)
        for place, part in parts:
            if isinstance(part, nnx.BatchNorm):
                part.axis_name = training.axis_name
            if place and path_of(place) in self.stages[: training.cut]:
                part.eval()
        for path, (collection, place) in self.places.items():
            if collection == "batch_stats" and path.rpartition("/")[0] in training.frozen_norms:
                norm = part_at(module, place[:-1])
                if hasattr(norm, "use_running_average"):
                    norm.use_running_average = True

    def _top(self, name: str) -> Place:
        place = next((p for path, (_, p) in self.places.items() if top_of(path) == name), ())
        return place[: 1 + leading_numbers(place[1:])]

    def _statistics(self, module: Any, given: Flat) -> Flat:
        held = _by_place(nnx.state(module, nnx.BatchStat))
        found = {path: place for path, (kind, place) in self.places.items() if kind != "params"}
        return {
            path: held[place].get_value().astype(self.shapes[path].dtype)
            for path, place in found.items()
            if path in given
        }

    def _nested(self, flat: Flat, kinds: Sequence[str] = tuple(_KINDS)) -> dict[str, Any]:
        parts = {
            kind: {p: v for p, v in flat.items() if self.places[p][0] == kind} for kind in kinds
        }
        return {kind: unflatten(part) for kind, part in parts.items() if part}


def from_nnx(module: Any) -> NnxModule:
    """Makes a Flax NNX module usable wherever `model=` takes a Linen module.

    Args:
      module: an instance, whose weights are those that a run starts from unless init.source names
        others; or what makes one of `rngs`, for fresh weights by the config's seed:
        `lambda rngs: Net(rngs=rngs)`, or the class itself where it needs nothing else. Its
        `stages` and `preprocess` mean what they do on a Linen module.

    Raises:
      ConfigError: it holds a variable twice, or something that is neither nnx.Param nor
        nnx.BatchStat nor a random stream.
    """
    if isinstance(module, nnx.Module):
        leaves, rest = _split(module)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
            raise ConfigError("from_nnx: the module has shapes alone; give what makes it")
        # Copies: what trains on may change them in place.
        copies = {path: np.array(leaf) for path, leaf in leaves.items()}
        return NnxModule(make=lambda _: {p: leaf.copy() for p, leaf in copies.items()}, **rest)
    if not callable(module):
        raise ConfigError(
            f"from_nnx: takes an nnx.Module or what makes one, not {type(module).__name__}"
        )
    build = functools.partial(_build, module)
    try:
        made = nnx.eval_shape(build, jax.random.key(0))
    except jax.errors.JAXTypeError as error:
        raise ConfigError(
            "from_nnx: the module computes with numbers as it is made; give an instance of it"
        ) from error
    make = jax.jit(lambda key: _split(build(key))[0])
    return NnxModule(make=make, **_split(made)[1])


def _build(module: Callable[..., Any], key: jax.Array) -> Any:
    """Calls what makes a module with its `rngs`."""
    rngs = nnx.Rngs(key)
    named = "rngs" in inspect.signature(module).parameters
    made = module(rngs=rngs) if named else module(rngs)
    if not isinstance(made, nnx.Module):
        raise ConfigError(f"from_nnx: {module!r} made a {type(made).__name__}, no nnx.Module")
    return made


def _split(module: nnx.Module) -> tuple[Flat, dict[str, Any]]:
    """({path: leaf}, the fields of an `NnxModule`)."""
    variables = (nnx.Param, nnx.BatchStat)
    shared: list[list[Any]] = nnx.find_duplicates(module)
    for twice in shared:
        part = part_at(module, twice[0])
        if any(isinstance(held, variables) for _, held in nnx.iter_graph(part)):
            names = " and ".join(repr(path_of(place)) for place in twice)
            raise ConfigError(f"from_nnx: {names} are one: what is shared cannot be trained")
    graph, *states = nnx.split(module, *variables, nnx.RngKey, nnx.RngCount, ...)
    held: list[dict[Place, Any]] = [_by_place(state) for state in states]
    params, stats, keys, counts, others = held
    # An array by itself: shapes alone, of a constructor, count as a part of the graph.
    arrays = (jax.Array, jax.ShapeDtypeStruct)
    others |= _by_place((p, part) for p, part in nnx.iter_graph(module) if isinstance(part, arrays))
    for place, other in others.items():
        kind = f"an nnx.{type(other).__name__}" if isinstance(other, nnx.Variable) else "an array"
        raise ConfigError(f"from_nnx: {path_of(place)!r} is {kind}; {_ADVICE}")
    leaves: Flat = {}
    places: dict[str, tuple[str, Place]] = {}
    for collection, found in zip(_KINDS, (params, stats), strict=True):
        for place, variable in found.items():
            path, leaf = path_of(place), variable.get_value()
            if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ConfigError(f"from_nnx: {path!r} is no array of floating numbers; {_ADVICE}")
            leaves[path], places[path] = leaf, (collection, place)
    check_names([*params, *stats])
    preprocess = getattr(module, "preprocess", None)
    return leaves, {
        "graph": graph,
        "places": places,
        "shapes": {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in leaves.items()},
        "streams": {place: v.get_value().shape for place, v in (keys | counts).items()},
        "parameters": frozenset(inspect.signature(type(module).__call__).parameters),
        "declared": tuple(getattr(module, "stages", ())),
        "preprocess": preprocess if isinstance(preprocess, Preprocess) else None,
        "order": _as_written(module, sorted([*params, *stats], key=sorting)),
    }


def _by_place(items: Iterable[tuple[Any, Any]]) -> dict[Place, Any]:
    return dict(nnx.to_flat_state(items) if isinstance(items, nnx.State) else items)


def _as_written(module: nnx.Module, places: Sequence[Place]) -> tuple[str, ...]:
    """Names of the top-level parts, as the module's own attributes follow each other."""
    rank = {name: at for at, name in enumerate(vars(module))}
    ordered = sorted(places, key=lambda place: rank.get(str(place[0]), len(rank)))
    return tuple(dict.fromkeys(top_of(path_of(place)) for place in ordered))


def _paths(variables: Mapping[str, Any]) -> Flat:
    """{path: leaf} of {"params", "batch_stats"}, each nested or flat."""
    given: Flat = {}
    for tree in variables.values():
        given |= dict(tree) if any("/" in name for name in tree) else flatten(tree)
    return given
