"""PyTorch on the same shapes, for whoever has it: eager, AdamW, frozen by `requires_grad=False`.

On a CPU it is float32 with two threads; on a GPU float32, or bfloat16 by autocast.

EfficientNet-Lite is that of efficientnet-lite-pytorch, every other model that of transformers, from
the very config.json that jft exports. Networks of convolutions run in channels_last.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.bare import LEARNING_RATE, WEIGHT_DECAY
from benchmarks.timing import stopwatch
from benchmarks.workloads import CLASSES, Workload
from jft.weights.naming import exported_table

THREADS = 2
CONVOLUTIONS = ("efficientnet", "convnext", "resnet")
_BLOCK = re.compile(r"(?:layers?|_blocks)\.(\d+)\.")
_ABOVE = re.compile(r"vit\.layernorm|classifier|_conv_head|_bn1\.|_fc")
_HEAD = re.compile(r"classifier|_fc")


class Torch:
    """The torch arm: a training loop over the same numpy batches."""

    def __init__(
        self,
        workload: Workload,
        phase: str | int,
        *,
        clip_norm: float | None = None,
        dtype: str = "float32",
    ) -> None:
        """Builds model and optimizer.

        Args:
          workload: model and shapes.
          phase: a name of PHASES, or the index of the first stage that trains.
          clip_norm: largest global norm of the gradients; None does not clip.
          dtype: "bfloat16" computes under autocast.

        Raises:
          ImportError: torch, or the package that holds the model, is missing.
        """
        import torch

        torch.set_num_threads(THREADS)
        self.torch, self.clip_norm, self.dtype = torch, clip_norm, dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        lite = workload.model.startswith("efficientnet_lite")
        self.conv = workload.model.startswith(CONVOLUTIONS)
        self.model = _lite(workload) if lite else _transformers(workload)
        preprocess = workload.zoo_model().preprocess
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(preprocess.mean).view(shape).to(self.device)
        self.std = torch.tensor(preprocess.std).view(shape).to(self.device)
        self.size = workload.image_size
        if self.conv:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model = self.model.to(self.device).train()
        for name, leaf in self.model.named_parameters():
            leaf.requires_grad_(trains(name, workload, phase))
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if "BatchNorm" in type(module).__name__ and not any(p.requires_grad for p in own):
                module.eval()
        self.live = [leaf for leaf in self.model.parameters() if leaf.requires_grad]
        decayed = [leaf for leaf in self.live if leaf.ndim > 1]
        rest = [leaf for leaf in self.live if leaf.ndim <= 1]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optim = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.batches, self.at = workload.batches(), 0

    def window(self, steps: int) -> float:
        """Runs `steps` steps; returns the seconds."""
        seconds = stopwatch()
        for _ in range(steps):
            self._step(self.batches[self.at % len(self.batches)])
            self.at += 1
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return seconds()

    def _step(self, batch: Mapping[str, np.ndarray]) -> None:
        torch = self.torch
        self.optim.zero_grad(set_to_none=True)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.loss(self.model, batch)
        loss.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.live, self.clip_norm)
        self.optim.step()

    def loss(self, model: Any, batch: Mapping[str, np.ndarray]) -> Any:
        """Returns the mean loss of `model` on a numpy batch."""
        torch = self.torch
        edge = round((batch["image"].shape[1] - self.size) / 2)
        image = batch["image"][:, edge : edge + self.size, edge : edge + self.size]
        # A view of NHWC memory as NCHW is what channels_last means.
        x = torch.from_numpy(image).to(self.device).permute(0, 3, 1, 2).float()
        x = (x - self.mean) / self.std
        found = model(x if self.conv else x.contiguous())
        label = torch.from_numpy(batch["label"]).to(self.device).long()
        logits = getattr(found, "logits", found)
        return torch.nn.functional.cross_entropy(logits, label)


def trains(name: str, workload: Workload, phase: str | int) -> bool:
    """Returns whether the torch parameter `name` trains in a phase."""
    return stage_index(name, workload) >= workload.cut(phase)


def stage_index(name: str, workload: Workload) -> int:
    """Returns the position of the stage of jft's model that the torch parameter belongs to."""
    if _HEAD.search(name):
        return workload.blocks + 2
    block = _BLOCK.search(name)
    if block:
        return 1 + int(block.group(1))
    return workload.blocks + 1 if _ABOVE.match(name) else 0


def _transformers(workload: Workload) -> Any:
    import transformers

    model = workload.zoo_model()
    family = model.family
    assert family is not None
    table = family.tables[exported_table(model, 0)]
    content = (table.config or family.source_config)(model)
    kind = getattr(transformers, content["architectures"][0])
    config = kind.config_class.from_dict(content)
    config.num_labels = CLASSES
    return kind(config)


def _lite(workload: Workload) -> Any:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name(
        workload.model.replace("_", "-"),
        num_classes=CLASSES,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
