"""Fine-tunes on tiles with any number of spectral bands, seen from above.

    jft train --config=configs/satellite.py --config.data.path=tiles --workdir=runs/tiles \\
        --config.data.bands=[3,2,1,7] --config.data.range=[0,3000]

One folder a class of TIFF, PNG or .npy tiles. Without `data.bands` the tiles should have three;
with them the first convolution is adapted to as many. `data.range` says which values are black
and white. There is no up or down: tiles are mirrored, turned by quarters and by any angle.

Hardware and time: depends on the tiles; 300 of them take two CPU cores about 10 minutes at 224
px.
Expect: depends on the tiles; `jft data inspect` shows what they look like after augmentation.
"""

from jft.config import read_file
from jft.config_file import locate


def get_config(arg: str = ""):
    """Returns the config; `arg` is "" or "tiny"."""
    config = read_file(locate("folder")[0], arg)
    config.augment.ops = "overhead"
    config.eval.tta = "flips"
    config.optim.ema_decay = 0.999
    if arg == "tiny":
        config.optim.ema_decay = 0.9
    return config
