"""Names of what an NNX module holds: where it stands, as a path and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from jft.errors import ConfigError

# Where something stands in a module: attribute names, and numbers of lists.
Place = tuple[str | int, ...]


def sorting(place: Place) -> list[tuple[bool, Any]]:
    """A key to sort places by, whose numbers count as numbers."""
    return [(isinstance(key, str), key) for key in place]


def leading_numbers(place: Place) -> int:
    """How many numbers a place begins with."""
    return next((at for at, key in enumerate(place) if not isinstance(key, int)), len(place))


def path_of(place: Place) -> str:
    """A place as a path: ("layers", 0, "kernel") is "layers_0/kernel"."""
    names: list[str] = []
    for key in place:
        if isinstance(key, int) and names:
            names[-1] += f"_{key}"
        else:
            names.append(str(key))
    return "/".join(names)


def check_names(places: Sequence[Place]) -> None:
    """Raises ConfigError where two parts have one name, as a list `a` and a part `a_0` may."""
    known: dict[str, Place] = {}
    for place in places:
        if any("/" in key for key in place if isinstance(key, str)):
            raise ConfigError(f"from_nnx: the name {place!r} holds a '/'")
        for stop in range(1, len(place) + 1):
            if leading_numbers(place[stop:]) and stop < len(place):
                continue
            name = path_of(place[:stop])
            if known.setdefault(name, place[:stop]) != place[:stop]:
                raise ConfigError(f"from_nnx: {known[name]} and {place[:stop]} are both {name!r}")


def top_of(path: str) -> str:
    """The name of the top-level part of a path."""
    return path.partition("/")[0]


def part_at(node: Any, place: Place) -> Any:
    """The part of a module that stands at a place."""
    for key in place:
        named = isinstance(key, str) and not isinstance(node, Mapping)
        node = getattr(node, str(key)) if named else node[key]
    return node
