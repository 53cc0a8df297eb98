"""The verb `compare`: several runs beside each other."""

import argparse
from pathlib import Path

from jft.report.compare import blocks, load, markdown
from jft.report.compare_page import render
from jft.report.rundir import write_atomic


def run(args: argparse.Namespace) -> None:
    """Prints the comparison of run directories, and writes it as a page where --out says so."""
    runs = load(args.words)
    found = blocks(runs)
    print(markdown(runs, found))
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, render(runs, found).encode("utf-8", "xmlcharrefreplace"))
        print(f"\nwrote {out}")
