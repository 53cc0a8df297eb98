"""Every key and mode that docs/training.md names is there."""

import re
from pathlib import Path

from jft.keys import KEYS
from jft.train.parallel import MODES

TEXT = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def test_every_key_and_mode_that_it_names_is_there():
    named = [word.partition("=")[0] for word in re.findall(r"`([a-z_]+\.[a-z_]+[^`]*)`", TEXT)]
    keys = {word for word in named if word.partition(".")[0] in SECTIONS}
    assert keys <= KEYS.keys() and {"optim.ema_decay", "distill.weight"} <= keys
    assert all(f"`{mode}`" in TEXT for mode in MODES)
