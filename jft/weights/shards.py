"""Small JSON files beside weights, and the index of weights that come in several files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jft.errors import WeightsError
from jft.weights.limits import check_name

JSON_BYTES = 16 << 20
INDEX = "model.safetensors.index.json"
SHARDS = 1_000
_TENSORS = 200_000  # of all shards
_NAME_BYTES = 255  # of a file's name, on the usual file systems


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file.

    Raises:
      WeightsError: it is no JSON object, or larger than `JSON_BYTES`.
    """
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > JSON_BYTES:
            raise WeightsError(f"{path}: larger than {JSON_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: not readable as JSON: {str(error)[:120]}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return content


def read_index(source: str, index: Path) -> Mapping[str, str]:
    """Tensor name -> file name of an index, each a plain name of a file beside it.

    Raises:
      WeightsError: there is no such map, or it names what is not a file beside it.
    """
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"source {source!r}: {INDEX} has no weight_map")
    if len(weight_map) > _TENSORS:
        raise WeightsError(f"source {source!r}: {INDEX} lists more than {_TENSORS} tensors")
    for tensor, name in weight_map.items():
        check_name(index, tensor)
        plain = isinstance(name, str) and name.isprintable() and len(name.encode()) <= _NAME_BYTES
        if not plain or name in ("", ".", "..") or "/" in name or "\\" in name:
            shown = str(name)[:_NAME_BYTES]
            raise WeightsError(f"source {source!r}: {INDEX} names {shown!r}, not a file beside it")
    if len(set(weight_map.values())) > SHARDS:
        raise WeightsError(f"source {source!r}: {INDEX} names more than {SHARDS} files")
    return weight_map
