"""`python -m jft`: the same command line as `jft`."""

import sys

from jft.cli import main

if __name__ == "__main__":
    sys.exit(main())
