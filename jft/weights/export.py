"""Writes a model's weights in its source's own format, so that other tools can load them."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from safetensors.numpy import save_file

from jft.errors import ConfigError, WeightsError
from jft.models.family import Preprocess
from jft.models.own_config import config_of
from jft.models.table import Table
from jft.weights import naming as namings
from jft.weights.dtypes import common_float
from jft.weights.hashes import file_sha256
from jft.weights.preprocessing import to_hugging_face
from jft.weights.random_weights import write_random as write_random
from jft.weights.rounding import round_leaves

FORMAT_VERSION = 1


def export_weights(
    model: Any,
    variables: Mapping[str, Any],
    out_dir: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    table: int = 0,
    provenance: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes model.safetensors, config.json, preprocessor_config.json and jft.json into a folder.

    The folder appears whole or not at all. Converting it again gives the same bits and dtypes.

    Args:
      model: a Model; one without a family is written in its own path names.
      variables: {"params", "batch_stats"} nested dicts of arrays.
      out_dir: the folder; must not exist, or be empty.
      label_names: one a class.
      preprocess: of the source where it differs from the model's (`Report.preprocess`).
      table: index of the family's naming style (`Report.table`); those that no other tool reads
        from safetensors, and models that no other library has, are written in the family's first.
      provenance: where the weights came from: source, sha256, run, ...
      extra: further JSON content for jft.json.
      dtype: "float32", "bfloat16" or "float16" rounds floating leaves to it; jft.json says under
        "rounding" what that changed.

    Returns:
      `out_dir`.

    Raises:
      WeightsError: the folder has content, a leaf has no name in the table, or a number is beyond
        the range of `dtype`.
      ConfigError: the number of label names is not the number of classes, or an unknown dtype.
    """
    out = Path(out_dir)
    _check_export(model, out, label_names)
    preprocess = preprocess or getattr(model, "preprocess", None)
    flat = {path: leaf for path, (_, leaf) in namings.join(variables).items()}
    flat, rounding = round_leaves(flat, dtype) if dtype else (flat, None)
    table = namings.exported_table(model, table)
    naming = namings.naming_of(model, flat, table)
    arrays = namings.to_source_arrays(naming, flat, model)
    config = _config(_with(model, preprocess), naming.table, label_names, common_float(arrays))
    card = _card(model, label_names, preprocess, table)
    card |= {"rounding": rounding.to_dict()} if rounding else {}
    card |= {"provenance": dict(provenance or {}), **(extra or {})}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_folder(temporary, arrays, config, preprocess, card)
        os.replace(temporary, out)  # takes the place of an empty folder too
    except OSError as error:
        raise WeightsError(f"export: cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(out.parent)
    return out


def _check_export(model: Any, out: Path, label_names: Sequence[str] | None) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"export: {out} exists and is not empty; name a new folder")
    num_classes = getattr(model, "num_classes", None)
    if label_names is not None and num_classes is not None and len(label_names) != num_classes:
        raise ConfigError(f"export: {len(label_names)} label names for {num_classes} classes")


def _write_folder(
    folder: Path,
    arrays: dict[str, np.ndarray],
    config: dict[str, Any],
    preprocess: Preprocess | None,
    card: dict[str, Any],
) -> None:
    weights = folder / "model.safetensors"
    # "format" is what transformers asks for; one key alone keeps the file the same every time.
    save_file(arrays, weights, metadata={"format": "pt"})
    card = card | {"weights_sha256": file_sha256(weights)}
    _write_json(folder / "config.json", config)
    if preprocess is not None:
        _write_json(
            folder / "preprocessor_config.json",
            to_hugging_face(preprocess, config.get("model_type")),
        )
    _write_json(folder / "jft.json", card)
    for file in folder.iterdir():
        file.chmod(0o644)
        _sync(file)
    folder.chmod(0o755)  # mkdtemp's are private
    _sync(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _with(model: Any, preprocess: Preprocess | None) -> Any:
    """The model with its source's preprocessing, which some styles keep in config.json."""
    if preprocess is None or getattr(model, "family", None) is None:
        return model
    return dataclasses.replace(model, preprocess=preprocess)


def _config(
    model: Any, table: Table, label_names: Sequence[str] | None, dtype: np.dtype | None
) -> dict[str, Any]:
    """config.json: the architecture as the source's tools read it, and the label names."""
    family = getattr(model, "family", None)
    config = {"model_type": type(model).__name__}
    if family is not None:
        config = config_of(model, table)
    if "architectures" in config and dtype is not None and dtype != np.float32:
        config = {**config, "dtype": dtype.name}  # what transformers loads it in
    num_classes = getattr(model, "num_classes", None)
    names = list(label_names or [f"LABEL_{i}" for i in range(num_classes or 0)])
    if not names:
        return dict(config)
    by_name = {"label2id": {name: i for i, name in enumerate(names)}}
    return {**config, "id2label": {str(i): name for i, name in enumerate(names)}, **by_name}


def _card(
    model: Any, label_names: Sequence[str] | None, preprocess: Preprocess | None, table: int
) -> dict[str, Any]:
    """jft.json: all that jft needs to build the same model again."""
    family = getattr(model, "family", None)
    return {
        "format_version": FORMAT_VERSION,
        "family": family.name if family else None,
        "variant": getattr(model, "variant", None),
        "model_args": args_of(model),
        "num_classes": getattr(model, "num_classes", None),
        "label_names": list(label_names) if label_names is not None else None,
        "preprocess": preprocess.to_dict() if preprocess else None,
        "table": table,
    }


def args_of(model: Any) -> dict[str, Any]:
    """Fields of the module as `make_model(args=...)` takes them, and the image size."""
    module = getattr(model, "module", None)
    if getattr(model, "family", None) is None or not isinstance(module, nn.Module):
        return {}
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name", "num_classes"}
    args = {name: getattr(module, name) for name in sorted(names)}
    if "dtype" in args:
        args["dtype"] = np.dtype(args["dtype"]).name
    return args | {"image_size": model.preprocess.image_size}
