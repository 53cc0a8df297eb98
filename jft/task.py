"""The model of a config, fitted to its data: what all that make or use a run share."""

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jft.data.fit import Fit, Shape
from jft.data.images import canvas_fit, canvas_shape
from jft.data.pixels import Pixels, make_pixels
from jft.data.protocol import Kind, label_layout
from jft.data.sources import Splits, make_splits
from jft.errors import ConfigError, DataError, WeightsError
from jft.freeze.groups import COMMON_SETS, Groups, make_groups
from jft.models.family import Preprocess, adapt_preprocess
from jft.models.own import OwnModel, own_model
from jft.models.zoo import Model, make_model
from jft.tree import Flat, flatten
from jft.weights.convert import load_pretrained
from jft.weights.hub import pinned
from jft.weights.naming import abstract_variables

# Folded into the run's key for fresh leaves; no step of a run has this number.
INIT_FOLD = 0xFFFFFFFF


@dataclass(frozen=True)
class Task:
    """What training, evaluation, prediction and plan share: no weights, and no data either.

    Attributes:
      config: the locked config.
      label_names: a name a class, or a value to predict.
      kind: of the labels, see jft.data.protocol.
      native_shape: (H, W, C) that every image of the data has, or None.
      model: from the zoo, or the user's own.
      preprocess: of the model, or of its source where that has its own.
      image_shape: (H, W, C) of a batch on the host.
      pixels: how files become canvases: bands, depth, range.
      shapes: {path: shape and dtype} of params and of statistics.
    """

    config: ConfigDict
    label_names: list[str]
    kind: Kind
    native_shape: Shape | None
    model: Model | OwnModel
    preprocess: Preprocess
    image_shape: tuple[int, int, int]
    pixels: Pixels
    shapes: tuple[Flat, Flat]

    @property
    def fit(self) -> Fit:
        """How the host makes a picture into `image_shape`."""
        return canvas_fit(self.preprocess, self.image_shape)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages from input to output; for a module without any, its top-level names."""
        return self.model.stages or tuple(dict.fromkeys(p.split("/")[0] for p in self.shapes[0]))

    @property
    def scanned(self) -> str | None:
        """Prefix of the stages that are to run as loops, "blocks"; None runs each by itself.

        Raises:
          ConfigError: the model cannot.
        """
        if not self.config.train.scan_blocks:
            return None
        prefix = getattr(self.model.module, "scanned", None)
        if prefix is None:
            name = self.model.variant or "the model"
            raise ConfigError(f"train.scan_blocks: {name} cannot run its blocks as a loop")
        return prefix

    def augment(self) -> dict[str, Any]:
        """What of config.augment `make_train_transform` and `make_view_transform` take.

        Each key is named: one that is added has to be an argument of both.
        """
        section = self.config.augment
        return {
            "flip": section.flip,
            "crop": section.crop,
            "scale": tuple(section.scale),
            "ratio": tuple(section.ratio),
            "ops": section.ops,
        }

    def mixing(self) -> dict[str, float]:
        """The rest of config.augment, as `make_mixing` takes it."""
        section = self.config.augment
        return {
            "mixup": section.mixup,
            "cutmix": section.cutmix,
            "prob": section.mix_prob,
            "cutmix_share": section.cutmix_share,
        }

    def groups(self) -> Groups:
        """Groups of the model, with the config's own."""
        family = self.model.family
        order = {stage: index for index, stage in enumerate(self.stages)}
        paths = sorted(self.shapes[0], key=lambda p: (order.get(p.split("/")[0], 0), p))
        return make_groups(
            paths,
            structural=self.model.groups,
            sets=family.sets if family else COMMON_SETS,
            extra=[tuple(pair) for pair in self.config.freeze.groups],
        )


def make_data(config: ConfigDict) -> Splits:
    """Returns the splits of a config's data section."""
    data = config.data
    return make_splits(
        name=data.name,
        path=data.path,
        args=data.args.to_dict(),
        seed=config.seed,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        train_examples=data.train_examples,
        pixels=make_pixels(
            channels=data.channels,
            bands=data.bands,
            depth=data.depth,
            value_range=data.range,
        ),
    )


def make_task(
    config: ConfigDict,
    label_names: list[str],
    native_shape: Shape | None,
    model: Any = None,
    kind: Kind = "class",
    pixels: Pixels | None = None,
) -> Task:
    """Returns the model of a config, fitted to its data.

    Args:
      config: from `load_config`.
      label_names: a name a class.
      native_shape: (H, W, C) that every image of the data has, or None.
      model: the user's own module; None makes the one of `config.model`.
      kind: of the labels.
      pixels: of the splits; 8 bits and the model's own channels by default.
    """
    pixels = pixels or Pixels()
    if len(label_names) < (2 if kind == "class" else 1):
        only = f"only one class, {label_names[0]!r}" if label_names else "no labels"
        raise DataError(
            f"data.path={config.data.path!r}: {only}: is it a folder too high, or another column?"
        )
    made = _make_model(config, model, len(label_names), pixels)
    used = _fitted(config, made.preprocess, pixels)
    size, channels = used.image_size, len(used.mean)
    variables = abstract_variables(made, (size, size, channels))
    shapes = (flatten(variables["params"]), flatten(variables.get("batch_stats", {})))
    canvas = canvas_shape(native_shape, used)
    return Task(config, label_names, kind, native_shape, made, used, canvas, pixels, shapes)


def _fitted(config: ConfigDict, preprocess: Preprocess, pixels: Pixels) -> Preprocess:
    """`preprocess` for the channels of the data, with the config's own mean and std.

    Raises:
      ConfigError: as many numbers as the images do not have channels.
    """
    channels = pixels.channels or len(preprocess.mean)
    fitted = adapt_preprocess(preprocess, channels)
    for name in ("mean", "std"):
        given = config.data[name]
        if given is None:
            continue
        if len(given) != channels or not all(isinstance(x, int | float) for x in given):
            raise ConfigError(f"data.{name}={list(given)}: give {channels} numbers, a channel each")
        if name == "std" and min(given) <= 0:
            raise ConfigError(f"data.std={list(given)}: give numbers above 0")
        fitted = replace(fitted, **{name: tuple(float(x) for x in given)})
    return fitted


def with_preprocess(task: Task, values: Mapping[str, Any] | None) -> Task:
    """Returns the task with the preprocessing that its source brought along, if any."""
    if not values:
        return task
    size = {"image_size": task.preprocess.image_size}
    used = _fitted(task.config, Preprocess.from_dict({**values, **size}), task.pixels)
    shape = canvas_shape(task.native_shape, used)
    return replace(task, preprocess=used, image_shape=shape)


def _make_model(
    config: ConfigDict, module: Any, num_classes: int, pixels: Pixels
) -> Model | OwnModel:
    size = config.data.image_size
    if module is not None:
        if config.train.dtype != "float32":
            raise ConfigError("train.dtype: an own module sets its dtype itself; leave it float32")
        own = getattr(module, "preprocess", None) or OwnModel.preprocess
        if size is not None:
            own = Preprocess.from_dict(own.to_dict() | {"image_size": size})
        return own_model(module, num_classes, _fitted(config, own, pixels))
    args = config.model.args.to_dict()
    args.setdefault("dtype", config.train.dtype)
    if size is not None:
        args["image_size"] = size
    return make_model(name=config.model.name, args=args, num_classes=num_classes)


def converted(task: Task, report: Mapping[str, Any] | None) -> Task:
    """Returns the task with what the conversion of its source brought along: pixels and dtypes.

    Args:
      task: fitted to its data.
      report: of the conversion, as conversion.json holds it; None where there is none.
    """
    report = report or {}
    if task.config.init.dtype == "source":
        dtypes = {row["path"]: row.get("dtype") for row in report.get("rows", ())}
        params = {
            path: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path) or leaf.dtype)
            for path, leaf in task.shapes[0].items()
        }
        task = replace(task, shapes=(params, task.shapes[1]))
    return with_preprocess(task, report.get("preprocess"))


def initial_leaves(
    task: Task,
    recorded: Mapping[str, Any] | None = None,
    place: Callable[[Any], Any] | None = None,
) -> tuple[Flat, Flat, dict[str, Any] | None]:
    """Returns (params, model_state, conversion report or None) that a run starts from.

    Args:
      task: the fitted model.
      recorded: the conversion report of a run that started already: the same commit of a source on
        a hub is taken, and any source must still hold what it held.
      place: puts each leaf where it belongs as soon as it is there; None leaves numpy arrays.

    Raises:
      WeightsError: the source is missing, does not fit, or is not what was recorded.
    """
    config, size = task.config, task.preprocess.image_size
    if recorded is not None and recorded.get("source") != config.init.source:
        recorded = None  # resumed by force with another one
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_FOLD)
    shape = (size, size, len(task.preprocess.mean))
    put = place or functools.partial(np.asarray, order="C")
    if config.init.source is None:
        variables = task.model.init(key, jnp.zeros((1, *shape)))
        flat = (flatten(variables["params"]), flatten(variables.get("batch_stats", {})))
        params, stats = ({path: put(leaf) for path, leaf in leaves.items()} for leaves in flat)
        return params, stats, None

    def put_leaf(path: str, leaf: np.ndarray) -> Any:
        # Moving sums need their bits: statistics are float32 in every run.
        if path in task.shapes[1]:
            leaf = leaf.astype(task.shapes[1][path].dtype)
        return jax.block_until_ready(put(leaf))  # so that no two of them are on their way

    # Random weights are the same every time: they need no place in the run directory, which a
    # wrong config, or another process's run, must find untouched.
    with tempfile.TemporaryDirectory(prefix="jft-random-") as scratch:
        variables, found = load_pretrained(
            task.model,
            pinned(config.init.source, (recorded or {}).get("revision")),
            fresh=list(config.init.fresh),
            key=key,
            image_shape=shape,
            scratch_dir=Path(scratch),
            dtype=None if config.init.dtype == "source" else "model",
            place=put_leaf,
        )
    then = (recorded or {}).get("sha256")
    if then is not None and then != found.sha256:
        raise WeightsError(
            f"init.source: {found.source} has changed since the run started: its SHA-256 is"
            f" {found.sha256[:16]}..., it was {str(then)[:16]}..."
        )
    flat = (flatten(variables["params"]), flatten(variables.get("batch_stats", {})))
    return *flat, found.to_dict() | {"text": found.text()}


def batch_shapes(task: Task, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a global batch of `rows` examples."""
    shape, dtype = label_layout(task.kind, len(task.label_names))
    return {
        "image": jax.ShapeDtypeStruct((rows, *task.image_shape), task.pixels.dtype),
        "label": jax.ShapeDtypeStruct((rows, *shape), dtype),
        "mask": jax.ShapeDtypeStruct((rows,), np.float32),
    }
