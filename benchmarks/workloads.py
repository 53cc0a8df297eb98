"""What is measured: models, shapes and phases, and the jft side of each as a user would run it."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jft
from benchmarks.bare import LEARNING_RATE, WEIGHT_DECAY
from benchmarks.timing import stopwatch
from jft.config import base, from_json, to_json
from jft.data.images import canvas_side
from jft.models.zoo import Model, make_model
from jft.report.progress import Progress
from jft.report.writers import RunWriter
from jft.train.lock import Lock
from jft.train.loop import _Trainer

CLASSES = 10
BATCHES = 8  # distinct ones, so that no data set fits into a cache with the model


@dataclass(frozen=True)
class Workload:
    """One model at one size.

    Attributes:
      model: name in jft's zoo.
      image_size: side of the input in pixels.
      batch_size: examples a step.
      blocks: blocks of the model; the phase "half" trains the upper half of them.
      args: further fields of the model. Dropout is off: peers draw other numbers.
    """

    model: str
    image_size: int
    batch_size: int
    blocks: int
    args: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """How the tables call it."""
        depth = dict(self.args).get("depth")
        model = f"{self.model}, {depth} blocks," if depth else self.model
        return f"{model} {self.image_size} px batch {self.batch_size}"

    def cut(self, phase: str | int) -> int:
        """Returns the index of the first stage that trains; a phase may be such an index."""
        if isinstance(phase, int):
            return phase
        return {"head": self.blocks + 2, "half": 1 + self.blocks - self.blocks // 2, "all": 0}[
            phase
        ]

    def train(self, phase: str | int) -> str:
        """Returns the phase as jft's config says it."""
        if isinstance(phase, int):
            stages = self.zoo_model().stages[phase:] if phase else ()
            return " + ".join(f"'{stage}/.*'" for stage in stages) or "all"
        return {"half": f"block[-{self.blocks // 2}:] + final + head"}.get(phase, phase)

    def zoo_model(self) -> Model:
        """Returns the model."""
        args = {**dict(self.args), "image_size": self.image_size}
        return make_model(name=self.model, args=args, num_classes=CLASSES)

    def images(self) -> np.ndarray:
        """Returns random uint8 canvases [N, S, S, 3], of which the model sees the centre."""
        side = canvas_side(self.image_size, self.zoo_model().preprocess.crop_fraction)
        shape = (BATCHES * self.batch_size, side, side, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def labels(self) -> np.ndarray:
        """Returns int32 classes [N], balanced."""
        return np.arange(BATCHES * self.batch_size, dtype=np.int32) % CLASSES

    def batches(self) -> list[dict[str, np.ndarray]]:
        """Returns the data cut into batches."""
        images, labels = np.split(self.images(), BATCHES), np.split(self.labels(), BATCHES)
        return [{"image": i, "label": k} for i, k in zip(images, labels, strict=True)]


PHASES = ("head", "half", "all")
LITE = (("dropout_rate", 0.0), ("drop_path_rate", 0.0))
SUITES: dict[str, tuple[Workload, ...]] = {
    "smoke": (
        Workload("vit_tiny", 32, 4, 4),
        Workload("efficientnet_lite_tiny", 32, 4, 4, LITE),
    ),
    "cpu": (
        Workload("vit_s16", 224, 8, 12),
        Workload("efficientnet_lite0", 224, 8, 16, LITE),
        Workload("efficientnet_lite0", 96, 16, 16, LITE),
    ),
}


class JftLoop:
    """The jft arm: the trainer that `jft train` runs, with its loader, metrics and log files.

    Attributes:
      run: the built parts, from `jft.setup`.
      compiled: the step, as `jax.stages.Compiled`.
      compile_seconds: tracing, lowering and compilation.
      enter_seconds: of entering the phase: the split of the state and its placement.
      flops: of a step by jft's own analysis of its jaxpr.
      fill_seconds: of filling the cache of the frozen prefix; 0 without one.
    """

    fill_seconds: float = 0.0

    def __init__(
        self,
        workload: Workload,
        phase: str | int,
        folder: Path,
        mode: str = "pmap",
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Builds the run in `folder` and compiles its step.

        Args:
          workload: what to train.
          phase: a name of PHASES, or the index of the first stage that trains; the run has this
            phase alone.
          folder: an empty one, for data and run directory.
          mode: parallel.mode.
          overrides: {config key: value} on top.
        """
        data = folder / "data.npz"
        np.savez(data, image=workload.images(), label=workload.labels())
        config = make_config(workload, phase, data, mode, overrides)
        self.run = jft.setup(config, folder / "run")
        with contextlib.ExitStack() as opened:
            self._begin(opened)
            self._open = opened.pop_all()

    def _begin(self, opened: contextlib.ExitStack) -> None:
        """Starts the run up to its first step; what it opens is closed even where this fails."""
        run = self.run
        opened.enter_context(Lock(run.workdir))
        opened.enter_context(run.checkpoints)
        run.begin()
        plan = json.loads((run.workdir / "plan.json").read_text())
        self.flops: int = plan["phases"][0]["flops"]
        shown = opened.enter_context(open(os.devnull, "w"))
        progress = Progress(run.total_steps, stream=shown)
        writer = RunWriter(run.workdir, total_steps=run.total_steps, progress=progress)
        opened.enter_context(writer)
        self._trainer = _Trainer(run, writer, None)
        for part in (self._trainer.steps, self._trainer.guard, self._trainer.feed):
            opened.callback(part.close)
        self.compiled, self.compile_seconds = self._trainer.steps.get(run.phases[0])
        seconds = stopwatch()
        self._trainer.enter(run.phases[0])
        self.enter_seconds = seconds()
        self.fill_seconds = self._trainer.feed.fill_seconds

    def window(self, steps: int) -> float:
        """Runs `steps` steps of the loop to their end; returns the seconds."""
        trainer, seconds = self._trainer, stopwatch()
        for _ in range(steps):
            trainer.update()
            trainer.after_update(last=False)
        jax.block_until_ready(trainer.state)
        return seconds()

    def params(self) -> dict[str, np.ndarray]:
        """Returns the trainable leaves as they are now."""
        return {path: np.asarray(leaf) for path, leaf in self._trainer.state.params.items()}

    def close(self) -> None:
        """Closes files and threads."""
        self._open.close()


def make_config(
    workload: Workload,
    phase: str | int,
    data: Path,
    mode: str,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Returns the config of a run that only trains: no evaluation and no save falls due."""
    config = base()
    config.data.name, config.data.path = "npz", str(data)
    config.data.val_fraction = 0.0
    config.data.image_size = workload.image_size
    config.model.name, config.model.args = workload.model, dict(workload.args)
    config.augment.flip = False
    config.freeze.phases = workload.train(phase)
    config.optim.learning_rate, config.optim.weight_decay = LEARNING_RATE, WEIGHT_DECAY
    config.optim.schedule = "constant"
    config.train.steps, config.train.batch_size = 1_000_000, workload.batch_size
    config.parallel.mode, config.parallel.devices = mode, 1
    for dotted, value in (overrides or {}).items():
        section, _, name = dotted.rpartition(".")
        setattr(config[section] if section else config, name, value)
    return from_json(to_json(config))
