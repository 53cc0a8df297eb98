"""Whether a source and a model speak of the same function, beyond names and shapes of arrays."""

import math
import re
from typing import Any

from jft.errors import WeightsError
from jft.models.own_config import own_fields
from jft.models.table import Table
from jft.weights.guarded_json import guarded, plain
from jft.weights.source import Source

# What families raise on fields of another type or size than they take for granted.
_MALFORMED = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
_LARGEST = 1 << 24  # width, depth, size of an image or of a vocabulary
_MOST_ITEMS = 1_000
_DEEPEST = 3  # lists in lists
# Fields of a source's config that shape training, not the function that the weights compute.
_FREE_FIELDS = re.compile(r".*(_rate|momentum)")
# Those in which a model may differ from its source: what depends on them is resized.
_ADAPTED_FIELDS = ("window",)


def check_card(source: Source, sha256: str) -> None:
    """Refuses an export whose weights are not the ones that its jft.json was written for.

    Raises:
      WeightsError: the file has another SHA-256 than its card says.
    """
    recorded = (source.card or {}).get("weights_sha256")
    if recorded and source.files[0].name == "model.safetensors" and recorded != sha256:
        raise WeightsError(f"{source.files[0]}: damaged or replaced, jft.json has another SHA-256")


def stated_fields(
    family: Any, source: Source, table: Table, headless: bool = False
) -> dict[str, Any]:
    """The module fields that a source fixes: by its config.json, else by the names of its arrays.

    Raises:
      WeightsError: its config.json tells of an architecture that the family does not have.
    """
    implied = table.implies if headless else table.implies + table.head_implies
    fields = dict(implied) | _config_fields(family, source, table)
    for name, value in fields.items():
        if not _sensible(value):
            raise WeightsError(
                f"source {source.text!r}: its config.json has {name} = {str(value)[:60]!r}"
            )
    return {name: value for name, value in fields.items() if not _FREE_FIELDS.fullmatch(name)}


def _config_fields(family: Any, source: Source, table: Table) -> dict[str, Any]:
    try:
        return {} if source.config is None else _fields(family, guarded(source.config), table)
    except _MALFORMED as error:
        raise WeightsError(
            f"source {source.text!r}: its config.json does not fit: {error}"
        ) from error


def _fields(family: Any, config: dict[str, Any], table: Table) -> dict[str, Any]:
    own = own_fields(family, config)
    return plain((table.fields or family.variant_from_config)(config) if own is None else own)


def _sensible(value: Any, depth: int = _DEEPEST) -> bool:
    """Whether a field of a config.json is text, or numbers that some model might have."""
    if isinstance(value, list | tuple):
        few = depth > 0 and len(value) <= _MOST_ITEMS
        return few and all(_sensible(item, depth - 1) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return (
        value is None or isinstance(value, str) or isinstance(value, int) and abs(value) <= _LARGEST
    )


def check_fields(model: Any, source: Source, table: Table, headless: bool = False) -> list[str]:
    """Refuses a source that tells of another architecture, epsilon or activation than the model's.

    Args:
      model: a Model.
      source: with its config.json.
      table: the style of its names.
      headless: whether the model's head is made anew.

    Returns:
      What nothing says that the source holds, and what is taken for it; for the report.

    Raises:
      WeightsError: naming the arguments of the model to change.
    """
    family = getattr(model, "family", None)
    if family is None:
        return []
    fields = stated_fields(family, source, table, headless)
    wrong = {
        name: (value, getattr(model.module, name))
        for name, value in fields.items()
        if name not in _ADAPTED_FIELDS
        and getattr(model.module, name, value) != value
        and not (headless and name in table.head_fields)
    }
    if not wrong:
        return [
            f"names of {table.title} do not say {name}: taken to be "
            f"{getattr(model.module, name)!r}, as model.args.{name} has it ({choices})"
            for name, choices in table.unsaid
            if name not in fields and not (headless and name in table.head_fields)
        ]
    said = wrong.keys() <= _config_fields(family, source, table).keys()
    where = "its config.json has" if said else "weights so named have"
    theirs = " and ".join(f"{name} = {value!r}" for name, (value, _) in wrong.items())
    ours = " and ".join(repr(own) for _, own in wrong.values())
    names = " and ".join(f"model.args.{name}" for name in wrong)
    raise WeightsError(
        f"source {source.text!r}: {where} {theirs}, the model has {ours}; set {names} to match"
    )
