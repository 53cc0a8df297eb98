"""config.json of models that no other library has: what only jft reads, alike in every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from jft.models.family import Family
from jft.models.table import Table

_NO_FIELDS = ("parent", "name", "num_classes", "dtype")


def _names(family: Family) -> list[str]:
    return [field.name for field in fields(family.module) if field.name not in _NO_FIELDS]


def own_config(model: Any) -> dict[str, Any]:
    """The fields of a model's module, under a model_type of jft's own."""
    family, module = model.family, model.module
    sizes = {"num_classes": model.num_classes, "image_size": model.preprocess.image_size}
    values = {name: getattr(module, name) for name in _names(family)}
    return {"model_type": f"jft_{family.name}", **sizes, **values}


def own_fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The module fields that `own_config` wrote; None where it is another's config.json."""
    if config.get("model_type") != f"jft_{family.name}":
        return None
    return {name: _tuples(config[name]) for name in _names(family) if name in config}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def config_of(model: Any, table: Table) -> dict[str, Any]:
    """The content of config.json beside weights in the names of a table of the model's family."""
    if not table.writes(model):
        return own_config(model)
    return (table.config or model.family.source_config)(model)


def has_peer(model: Any) -> bool:
    """Whether another library has a model; one without a family is nobody else's business."""
    return model.family is None or any(table.writes(model) for table in model.family.tables)


def peerless(model: Any) -> list[str]:
    """The arguments whose usual values would give a model that another library has.

    Those alone that suffice by themselves, else all that are unusual.
    """
    family, size = model.family, model.preprocess.image_size
    if model.variant is None:
        return []
    usual = family.module(**family.variants[model.variant], num_classes=model.num_classes)
    names = [n for n in _names(family) if getattr(usual, n) != getattr(model.module, n)]
    tried = {
        name: replace(model, module=model.module.clone(**{name: getattr(usual, name)}))
        for name in names
    }
    if size != (side := family.preprocess(model.variant).image_size):
        tried["image_size"] = replace(model, preprocess=replace(model.preprocess, image_size=side))
    return [name for name, other in tried.items() if has_peer(other)] or list(tried)
