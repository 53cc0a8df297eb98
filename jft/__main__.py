"""The process behind `jft` and `python -m jft`."""

import sys
from pathlib import Path

from jft.compilation_cache import use_compilation_cache
from jft.hugepages import use_huge_pages


def run() -> int:
    """Runs the command line of this process; returns its exit code."""
    # Called from another program (a test, a script), the process is not ours to start again.
    if sys.argv[0] == __file__ or Path(sys.argv[0]).name == "jft":
        use_huge_pages()
        use_compilation_cache()
    from jft.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
