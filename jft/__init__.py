"""jft, the JAX fine-tuner: converted weights, config-driven runs, freezing that costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jft.config import load_config
    from jft.models.nnx_module import from_nnx
    from jft.models.zoo import add_family
    from jft.prepare import setup
    from jft.train.loop import fit
    from jft.trained import evaluate, export, predict
    from jft.tree import merge, split
    from jft.weights.convert import load_pretrained

# Name -> module. Loaded at first use, so that `jft --help` does not wait for jax. No module or
# package of jft may have one of these names: importing it would take the function's place.
_PUBLIC = {
    "load_config": "jft.config",
    "from_nnx": "jft.models.nnx_module",
    "add_family": "jft.models.zoo",
    "setup": "jft.prepare",
    "fit": "jft.train.loop",
    "evaluate": "jft.trained",
    "predict": "jft.trained",
    "export": "jft.trained",
    "load_pretrained": "jft.weights.convert",
    "split": "jft.tree",
    "merge": "jft.tree",
}

__all__ = [
    "add_family",
    "evaluate",
    "export",
    "fit",
    "from_nnx",
    "load_config",
    "load_pretrained",
    "merge",
    "predict",
    "setup",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jft' has no attribute {name!r}")
    found = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found
