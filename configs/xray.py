"""Fine-tunes on grey medical images whose classes are far from equally frequent.

    jft train --config=configs/xray.py --config.data.path=scans --workdir=runs/scans

One folder a class, as with `folder`. Grey stays one channel, with all 16 bits where the files
have them; the first convolution is adapted, so that a grey image gets the response that it had as
RGB. Rare classes are drawn as often as frequent ones, the best checkpoint is the one with the
largest area under the ROC curve, and the run stops when that no longer grows.

Hardware and time: depends on the images; 300 of them take two CPU cores about 10 minutes at 224
px.
Expect: depends on the images; the report has ROC and calibration curves beside the confusion
matrix.
"""

from jft.config import read_file
from jft.config_file import locate


def get_config(arg: str = ""):
    """Returns the config; `arg` is "" or "tiny"."""
    config = read_file(locate("folder")[0], arg)
    config.data.channels = 1
    config.data.sampling = "balanced"
    config.augment.flip = False  # organs have a side
    config.augment.ops = "rotate(10) | colour(0.2, 0.2)"
    config.checkpoint.best = "eval/auroc"
    config.eval.every_steps = config.checkpoint.every_steps = 50
    config.train.patience_evals = 8
    if arg == "tiny":
        config.eval.every_steps = config.checkpoint.every_steps = 4
    return config
