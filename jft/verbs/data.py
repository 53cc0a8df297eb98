"""The verb `data`: looks at the data of a config."""

import argparse

from jft.config import load_config
from jft.data.sources import describe
from jft.errors import ConfigError
from jft.task import make_data


def data(args: argparse.Namespace) -> None:
    """Prints the splits of a config's data: classes, sizes, and what could not be decoded."""
    if args.words != ["inspect"]:
        raise ConfigError("jft data: should be jft data inspect --config=FILE.py")
    config = load_config(args.config, args.overrides)
    print(describe(make_data(config)))
