"""Lightning on the same torch model, frozen by a callback, for whoever has it.

The callback is a `BaseFinetuning` that freezes the prefix before training and thaws nothing, the
way Lightning's documentation freezes a backbone. Its loop, hooks and precision plugin are timed
with the step; start-up and the first step of each window are not.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.bare import LEARNING_RATE, WEIGHT_DECAY, Batch, cycle
from benchmarks.timing import stopwatch
from benchmarks.torch_peer import Torch, trains
from benchmarks.workloads import Workload


class Lightning:
    """The Lightning arm: a `Trainer` over the same numpy batches."""

    def __init__(self, workload: Workload, cut: int, *, clip_norm: float, dtype: str) -> None:
        """Builds the module.

        Args:
          workload: model and shapes.
          cut: index of the first stage that trains.
          clip_norm: largest global norm of the gradients.
          dtype: train.dtype.

        Raises:
          ImportError: lightning, torch, or the package that holds the model, is missing.
        """
        import lightning

        self.lightning, self.clip_norm = lightning, clip_norm
        self.precision = "bf16-mixed" if dtype == "bfloat16" else "32-true"
        self.torch = Torch(workload, 0)
        self.module = _module(lightning, self.torch)
        self.frozen = [
            module
            for prefix, module in self.torch.model.named_modules()
            if (own := [name for name, _ in module.named_parameters(prefix, recurse=False)])
            and not any(trains(name, workload, cut) for name in own)
        ]

    def window(self, steps: int) -> float:
        """Runs one step that is not timed and `steps` that are; returns their seconds."""
        clock = _clock(self.lightning)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on loaders and loggers
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            trainer = self.lightning.Trainer(
                max_steps=steps + 1,
                max_epochs=-1,
                accelerator="gpu" if self.torch.device == "cuda" else "cpu",
                devices=1,
                precision=self.precision,
                gradient_clip_val=self.clip_norm,
                callbacks=[_finetuning(self.frozen), clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(self.module, _Stream(self.torch.batches))
        if self.torch.device == "cuda":
            self.torch.torch.cuda.synchronize()
        return clock.watch()


class _Stream:
    """The batches for ever; a bare list would be taken for several loaders."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return cycle(self.batches)


def _module(lightning: Any, peer: Torch) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = peer.model

        def training_step(self, batch: Any, _: int) -> Any:
            return peer.loss(self.model, batch)

        def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
            return batch  # numpy; the loss moves it

        def configure_optimizers(self) -> Any:
            live = [leaf for leaf in self.model.parameters() if leaf.requires_grad]
            groups = [
                {"params": [leaf for leaf in live if leaf.ndim > 1]},
                {"params": [leaf for leaf in live if leaf.ndim <= 1], "weight_decay": 0.0},
            ]
            return peer.torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    return Module()


def _finetuning(frozen: Any) -> Any:
    from lightning.pytorch.callbacks import BaseFinetuning

    class FreezePrefix(BaseFinetuning):
        def freeze_before_training(self, _: Any) -> None:
            self.freeze(frozen, train_bn=False)

        def finetune_function(self, *_: Any) -> None:
            """Nothing is thawed."""

    return FreezePrefix()


def _clock(lightning: Any) -> Any:
    class Clock(lightning.Callback):
        watch = staticmethod(stopwatch())

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                self.watch = stopwatch()

    return Clock()
