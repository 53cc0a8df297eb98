"""What Hugging Face's config.json says, alike in all families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError

# config.json's hidden_act -> Tower.gelu, and back.
HF_GELUS = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
}
GELU_NAMES = {"exact": "gelu", "tanh": "gelu_new", "quick": "quick_gelu"}
# What transformers takes where a config.json that names its class does not say it, and no shape
# shows it.
HF_DEFAULTS = {"heads": 12}


def hf_fields(
    config: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The module fields that a config.json of Hugging Face's fixes.

    Args:
      config: its content.
      names: {their name: ours}.
      defaults: {our name: value} of the class, where the config has a model_type.
    """
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    patch = found.get("patch")
    if isinstance(patch, list | tuple) and len(patch) == 2 and patch[0] == patch[1]:
        found["patch"] = patch[0]  # some write both sides of the square
    return (dict(defaults) if "model_type" in config else {}) | found


def hf_kind(config: Mapping[str, Any], *kinds: str) -> str:
    """The model_type of a config.json of Hugging Face's; the first of `kinds` where it has none.

    Raises:
      WeightsError: it is none of `kinds`.
    """
    kind = config.get("model_type") or kinds[0]
    if kind not in kinds:
        raise WeightsError(f"model_type {kind!r} of the source is none of {', '.join(kinds)}")
    return kind


def hf_gelu(config: Mapping[str, Any], usual: str = "gelu") -> str:
    """The `Tower.gelu` of a config.json of Hugging Face's; `usual` where it has no hidden_act.

    Raises:
      WeightsError: it has one that is not among HF_GELUS.
    """
    form = config.get("hidden_act", usual)
    if not isinstance(form, str) or form not in HF_GELUS:
        raise WeightsError(f"hidden_act {form!r} of the source is none of {', '.join(HF_GELUS)}")
    return HF_GELUS[form]
