"""The quickstart from random weights: what its pre-training is worth.

    jft train --config=configs/scratch.py --workdir=runs/scratch

Same data, model, steps and augmentation; everything trains from the first step.

Hardware and time: two CPU cores, about 2 minutes, compilation included.
Expect: 91.1 % on the test images, mean of 3 seeds (benchmarks/results/quickstart.json).
"""

from jft.config import read_file
from jft.config_file import locate


def get_config(arg: str = ""):
    """Returns the config; `arg` is "" or "tiny"."""
    config = read_file(locate("quickstart")[0], arg)
    config.init.source = None
    config.freeze.name, config.freeze.args = "full", {}
    config.report.baselines = []
    return config
