"""A converted model beside the original in transformers: every stage, the logits, the gradient.

No family says which module of the original is which stage. Every module's inputs and outputs are
looked at, and a stage is compared with the one that comes nearest to it: that an unrelated one
agrees with thousands of numbers to five digits does not happen. torch and transformers are needed
here alone.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jft.errors import ConfigError, WeightsError
from jft.weights.activations import IMAGES, Activations, rounding
from jft.weights.source import Source

Rerun = Callable[[str], Activations]
MODES = ("auto", "transformers", "none")
# max abs(a - b) / max(1, max abs(b)), in float32.
BARS = {"hidden": 1e-5, "logits": 1e-4, "input_gradient": 1e-4}
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Nearest:
    """What of the original comes nearest to a stage.

    Attributes:
      distance: to it.
      where: "NAME output" or "NAME input" of a module.
      largest: of its absolute values; what is below 1 is compared as if it were 1.
      value: the torch tensor, of the last stage alone.
    """

    distance: float
    where: str
    largest: float
    value: Any


def compare_with_original(
    source: Source | None, found: Activations, rerun: Rerun, mode: str
) -> tuple[dict[str, Any] | None, str]:
    """Returns (what the comparison gave, as JSON, or None; why there is none).

    Args:
      source: of the weights; None for random ones.
      found: what the converted model made of the input.
      rerun: stage -> what it makes of it up to and with that stage.
      mode: "auto" compares where it can, "transformers" must, "none" does not.

    Raises:
      ConfigError: an unknown mode, or "transformers" where it cannot.
      WeightsError: "transformers", which does not load or run the source.
    """
    if mode not in MODES:
        raise ConfigError(f"--reference={mode}: should be one of {', '.join(MODES)}")
    if mode == "none":
        return None, "--reference=none"
    why = _obstacle(source)
    if why or source is None:
        if mode == "transformers":
            raise ConfigError(f"--reference=transformers: {why}")
        return None, why
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, about their own ways
        try:
            return _compare(source, found, rerun), ""
        except WeightsError as error:
            if mode == "transformers":
                raise
            return None, str(error)


def _obstacle(source: Source | None) -> str:
    """Why a source cannot be compared; "" where it can."""
    for name in ("torch", "transformers"):
        try:
            importlib.import_module(name)
        except ImportError:
            return f"{name} is not installed; run: pip install 'jft[parity]'"
    if source is None or "model_type" not in (source.config or {}):
        return "there is no config.json of transformers beside the weights"
    if _class_of(source.config or {}) is None:
        return f"transformers has no model {_names(source.config or {})[0]!r}"
    folder = _folder(source)
    if source.path.is_file() and source.path.name not in _NAMES:
        return f"transformers loads {_NAMES[0]}, not {source.path.name}"
    if not any((folder / name).is_file() for name in _NAMES):
        return f"{folder} has none of {', '.join(_NAMES)}"
    return ""


def _folder(source: Source) -> Path:
    return source.path.parent if source.path.is_file() else source.path


def _compare(source: Source, found: Activations, rerun: Rerun) -> dict[str, Any]:
    import torch
    import transformers

    every, head = list(found.stages), found.stages.get("head")
    peer, fresh = _load(source, None if head is None else head.shape[-1])
    nearest, x = _look(source, peer, found)
    if head is None:
        # The head is made anew, and how its input is pooled belongs to it.
        other = [n for n in nearest if nearest[n].distance > BARS["hidden"]]
        nearest = {n: each for n, each in nearest.items() if n not in other or not _pools(found, n)}
    if nearest and found.last not in nearest:
        # The original does not come that far: the gradient is that of the last it has.
        found = rerun(list(nearest)[-1])
        nearest, x = _look(source, peer, found)
    last = nearest.get(found.last)
    gradient = None
    if last is not None:
        torch.logsumexp(last.value, 1 if last.value.ndim == 4 else -1).sum().backward()
        assert x.grad is not None
        gradient = distance(found.gradient, x.grad.numpy().transpose(0, 2, 3, 1))
    bars = {name: BARS["logits" if name == "head" else "hidden"] for name in nearest}
    holds = gradient is not None and gradient <= BARS["input_gradient"]
    holds &= all(each.distance <= bars[name] for name, each in nearest.items())
    return {
        "class": f"transformers.{type(peer).__name__}",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "stages": {
            name: {
                "distance": rounding(each.distance),
                "bar": bars[name],
                "original": each.where,
                "largest": rounding(each.largest),
            }
            for name, each in nearest.items()
        },
        "made_anew": fresh,
        "without_counterpart": [name for name in every if name not in nearest],
        "input_gradient": {
            "of": found.last,
            "distance": None if gradient is None else rounding(gradient),
            "bar": BARS["input_gradient"],
            "largest": rounding(np.abs(found.gradient).max()),
        },
        "distance": "max abs(a - b) / max(1, max abs(b)), float32",
        "holds": bool(holds),
    }


def _pools(found: Activations, name: str) -> bool:
    """Whether a stage makes a vector of what was a map or a row of tokens before."""
    names = list(found.stages)
    before = names[max(names.index(name) - 1, 0)]
    return found.stages[name].ndim == 2 and found.stages[before].ndim > 2


def _look(source: Source, peer: Any, found: Activations) -> tuple[dict[str, Nearest], Any]:
    """({stage: what is nearest to it}, the input as torch has it) of one pass of the original."""
    import torch

    nearest: dict[str, Nearest] = {}
    x = torch.from_numpy(np.ascontiguousarray(found.x.transpose(0, 3, 1, 2))).requires_grad_()
    hooks = [
        module.register_forward_hook(_looker(name or "model", found, nearest), with_kwargs=True)
        for name, module in peer.named_modules()
    ]
    try:
        call = getattr(peer, "get_image_features", peer)  # of two towers the one for images
        call(pixel_values=x, **_unmasked(peer))
    except Exception as error:  # whatever stands in a foreign forward pass
        text = " ".join(str(error).split())
        raise WeightsError(f"source {source.text!r}: the original does not run: {text}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return {name: nearest[name] for name in found.stages if name in nearest}, x


def _unmasked(peer: Any) -> dict[str, Any]:
    """What keeps a masked autoencoder from shuffling its patches."""
    import torch

    if "noise" not in inspect.signature(peer.forward).parameters:
        return {}
    patches = (peer.config.image_size // peer.config.patch_size) ** 2
    return {"noise": torch.arange(patches).repeat(IMAGES, 1) / patches}


def _names(config: Mapping[str, Any]) -> list[str]:
    """What a config.json says that its model is."""
    return [*(config.get("architectures") or ()), config.get("model_type", "")]


def _class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config.json speaks of; None where it has none."""
    import transformers

    if config["model_type"] not in transformers.CONFIG_MAPPING:
        return None
    kind = getattr(transformers, str(_names(config)[0]), transformers.AutoModel)
    known = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known or kind is transformers.AutoModel else None


def _load(source: Source, classes: int | None) -> tuple[Any, list[str]]:
    """(the original with a source's weights, names of what it had to make anew).

    Args:
      source: of the weights.
      classes: width of its logits, told where its config.json does not; None without a head.

    Raises:
      WeightsError: transformers does not load it.
    """
    import torch
    import transformers

    config: Mapping[str, Any] = source.config or {}
    kind = _class_of(config)
    options: dict[str, Any] = {"mask_ratio": 0.0} if "mask_ratio" in config else {}
    if classes is not None and not {"id2label", "num_labels"} & config.keys():
        options["num_labels"] = classes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        peer, about = kind.from_pretrained(
            str(_folder(source)),
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # every kind of complaint about files
        text = " ".join(str(error).split())
        if "ignore_mismatched_sizes" in text:  # it refers to a table that was printed
            text = "its config.json and its weights differ in shapes"
        raise WeightsError(f"source {source.text!r}: transformers refuses it: {text}") from error
    return peer.eval(), sorted(map(str, about["missing_keys"]))


def _looker(name: str, found: Activations, nearest: dict[str, Nearest]) -> Any:
    """A hook that keeps what of a module's inputs and outputs is nearest to each stage."""

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        sides = (("output", output), ("input", (args, kwargs)))
        for side, value in ((side, value) for side, held in sides for value in _tensors(held)):
            array = value.detach().float().cpu().numpy()
            for stage, ours in found.stages.items():
                theirs = _as_ours(array, ours.shape)
                if theirs is None:
                    continue
                apart = distance(ours, theirs)
                if stage not in nearest or apart < nearest[stage].distance:
                    # A copy: a layer that follows may work in place.
                    kept = value.clone() if stage == found.last else None
                    largest = float(np.abs(array).max())
                    nearest[stage] = Nearest(apart, f"{name} {side}", largest, kept)

    return look


def _tensors(held: Any) -> Iterator[Any]:
    """The floating tensors in what a module takes or gives."""
    import torch

    if isinstance(held, torch.Tensor):
        if held.is_floating_point():
            yield held
    elif isinstance(held, Mapping):
        for each in held.values():
            yield from _tensors(each)
    elif isinstance(held, tuple | list):
        for each in held:
            yield from _tensors(each)


def _as_ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A torch array in jft's layout where it has just these numbers; else None."""
    if array.ndim == 4 and len(shape) in (2, 3, 4):
        if len(shape) == 2:
            return array[:, :, 0, 0] if array.shape == (*shape, 1, 1) else None
        array = array.transpose(0, 2, 3, 1)
    if array.shape == shape:
        return array
    maps = {array.ndim, len(shape)} == {3, 4}  # [B, N, D] beside [B, H, W, D]
    same = maps and array.size == np.prod(shape)
    same = same and (array.shape[0], array.shape[-1]) == (shape[0], shape[-1])
    return array.reshape(shape) if same else None


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """max abs(a - b) / max(1, max abs(b))."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))
