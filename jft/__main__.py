"""The process behind `jft` and `python -m jft`."""

import sys

from jft.hugepages import use_huge_pages


def run() -> int:
    """Runs the command line of this process; returns its exit code."""
    use_huge_pages()
    from jft.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
