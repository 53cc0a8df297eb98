"""Fine-tunes on images with any number of labels each, from a table.

    jft train --config=configs/tags.py --config.data.path=photos.csv --workdir=runs/tags

The table has one row an image: its path in a column `image`, and in a column `label` the names of
all its labels with a bar between them, `beach|dog`. With one column of 0 and 1 a label instead:
`--config.data.args.label_columns=[beach,dog]`. Rare labels weigh more; the best checkpoint has
the largest average precision.

Hardware and time: depends on the images; 300 of them take two CPU cores about 10 minutes at 224
px.
Expect: depends on the images; the report has a row a label with its average precision.
"""

from jft.config import read_file
from jft.config_file import locate


def get_config(arg: str = ""):
    """Returns the config; `arg` is "" or "tiny"."""
    config = read_file(locate("folder")[0], arg)
    config.data.name = "table"
    config.data.args = {"separator": "|"}
    config.loss.name, config.loss.args = "sigmoid", {}
    config.loss.class_weights = "balanced"
    return config
