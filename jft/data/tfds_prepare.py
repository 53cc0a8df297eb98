"""TFDS sets by name, downloaded and prepared as ArrayRecord."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jft.errors import DataError


def prepare_tfds(name: str, out: Path) -> Path:
    """Downloads and prepares a set of TFDS; TensorFlow is needed only where its builder uses it.

    Args:
      name: "beans", "imagenette/160px:1.0.0", ...
      out: data directory; the set goes below it.

    Returns:
      The directory to give as data.path, of data.name=tfds.

    Raises:
      DataError: no such set, no network, or a builder that needs TensorFlow.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError("tfds: needs: pip install tensorflow-datasets") from error
    try:
        builder: Any = tfds.builder(name, data_dir=str(out), file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise DataError(
            f"tfds:{name}: its builder needs TensorFlow, once ({error}): pip install 'jft[tf]',"
            " prepare, and train without it"
        ) from None
    except Exception as error:  # no network, no such set, a checksum: each of its own type
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"tfds:{name}: cannot be prepared ({line})") from None
    return Path(builder.data_dir)
