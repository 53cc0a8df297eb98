"""Measures what freezing saves: jft, with and without its cache, beside masks and PyTorch.

    python -m benchmarks.freezing --size smoke
    python -m benchmarks.freezing --size cpu --out benchmarks/results/freezing_2026-12-01-cpu.json
    python -m benchmarks.freezing --pool runs/1.json runs/2.json --out runs/pooled.json

For shares f of the forward FLOPs: step time, measured and analytic cap, efficiency, memory and
compilation; then every freezing method as a run. Writes JSON, and beside it the tables (.md) and a
chart a workload (.svg). Exits 1 if something fails to run, never for a time.
"""

import argparse
import datetime
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.caps import SHARES
from benchmarks.freezing_rows import PEERS, Measuring, Rows, device_kind, own_speedups
from benchmarks.freezing_table import chart, markdown
from benchmarks.pooled import pool
from benchmarks.presets import measure_presets
from benchmarks.run import FLAGS, environment, hardware
from benchmarks.timing import stopwatch
from benchmarks.workloads import LITE, Workload
from jft.hugepages import use_huge_pages

FORMAT = 1


@dataclass(frozen=True)
class Size:
    """One size of the benchmark.

    Attributes:
      workloads: measured at every share.
      measuring: windows, blocks, type and peers.
      shares: of the forward FLOPs.
      presets: models of the runs of every method.
      preset_steps: of each such run.
      run: methods that are trained, None for all; the others are planned.
      budget_seconds: after so long nothing new is begun.
    """

    workloads: tuple[Workload, ...]
    measuring: Measuring
    shares: tuple[float, ...] = SHARES
    presets: tuple[Workload, ...] = ()
    preset_steps: int = 60
    run: tuple[str, ...] | None = None
    budget_seconds: float = 3600.0


_SMALL = (
    Workload("vit_ti16", 64, 8, 6, (("depth", 6),)),
    Workload("efficientnet_lite0", 64, 8, 16, LITE),
)
SIZES = {
    "smoke": Size(
        (Workload("vit_tiny", 32, 4, 4),),
        Measuring(0.2, 1, peers=("naive",)),
        shares=(0.0, 0.5, 1.0),
        presets=(
            Workload("vit_tiny", 16, 4, 2, (("depth", 2),)),
            Workload("efficientnet_lite_tiny", 32, 4, 4, LITE),
        ),
        preset_steps=12,
        run=("linear_probe", "lp_ft"),
        budget_seconds=140.0,
    ),
    "cpu": Size(
        (Workload("vit_s16", 224, 8, 12), Workload("efficientnet_lite0", 96, 16, 16, LITE)),
        Measuring(1.0, 3),
        presets=_SMALL,
        budget_seconds=1700.0,
    ),
    "gpu": Size(
        (Workload("vit_b16", 224, 256, 12), Workload("efficientnet_lite0", 224, 512, 16, LITE)),
        Measuring(2.0, 5, dtype="bfloat16"),
        presets=tuple(replace(workload, batch_size=64) for workload in _SMALL),
    ),
}


def measure(size: Size, say: Any) -> dict[str, Any]:
    """Returns the whole result; what fails is kept with its error, and the rest still runs.

    Args:
      size: what to measure.
      say: takes one line of progress.
    """
    seconds = stopwatch()
    began, load = datetime.datetime.now(datetime.UTC), os.getloadavg()
    rows: list[dict[str, Any]] = []
    presets: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}

    def late() -> bool:
        return seconds() > size.budget_seconds

    for workload in size.workloads:
        found, missing = _rows(workload, size, late, lambda text: say(f"{seconds():5.0f} s {text}"))
        rows += found
        left_out |= missing
    own_speedups([row for row in rows if "error" not in row])
    for workload in size.presets:
        try:
            found, missing = measure_presets(
                workload, steps=size.preset_steps, run=size.run, late=late
            )
        except Exception as error:  # as for one method
            traceback.print_exc()
            found = [{"workload": workload.name, "what": "presets", "error": repr(error)}]
            missing = {}
        presets += found
        left_out |= missing
        say(f"{seconds():5.0f} s {workload.name}: {len(found)} presets")
    return {
        "format": FORMAT,
        "date": began.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "device": device_kind(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "environment": environment(),
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "measuring": vars(size.measuring),
        "elapsed_seconds": seconds(),
        "rows": rows,
        "presets": presets,
        "left_out": left_out,
    }


def _rows(
    workload: Workload, size: Size, late: Any, say: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of one workload, and what was left out of it."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    measured: Rows | None = None
    what = ""
    try:
        for share in size.shares:
            what = f"f = {share:g}"
            if late():
                left_out[f"{workload.name}, {what}"] = "not run within the budget"
                continue
            measured = measured or Rows(workload, size.measuring)
            rows += measured.at(share)
            say(f"{workload.name}, {what}: {_line(rows)}")
    except Exception as error:  # one broken workload must not hide the others
        traceback.print_exc()
        rows.append({"workload": workload.name, "what": what, "error": repr(error)})
    finally:
        if measured:
            left_out |= measured.left_out
            measured.close()
    return rows, left_out


def _line(rows: Sequence[dict[str, Any]]) -> str:
    row = next(row for row in reversed(rows) if row["peer"] == "jft" and not row["cache"])
    return (
        f"{row['speedup']:.2f}x of at most {row['cap']:.2f}x,"
        f" {100 * row['efficiency']:.0f} % of the measured cap (noise {row['noise']:.3f})"
    )


def save(result: dict[str, Any], out: Path) -> list[Path]:
    """Writes JSON, table and charts; returns their paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    table = out.with_suffix(".md")
    written = [out, table]
    names = dict.fromkeys(row["workload"] for row in result["rows"] if "error" not in row)
    pictures = []
    for at, name in enumerate(names):
        path = out.with_name(f"{out.stem}{f'-{at}' if at else ''}.svg")
        path.write_text(chart(result, name))
        written.append(path)
        pictures.append(f"![step time by frozen share, {name}]({path.name})")
    table.write_text("\n\n".join([markdown(result), *pictures]) + "\n")
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one size; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.freezing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="smoke")
    parser.add_argument("--only", metavar="TEXT", default="", help="workloads whose name has it")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: those of the size")
    parser.add_argument("--shares", nargs="+", type=float, metavar="F")
    parser.add_argument("--blocks", type=int, help="palindromes of windows, two samples each")
    parser.add_argument("--no-rows", action="store_true", help="the presets alone")
    parser.add_argument("--no-presets", action="store_true", help="the rows alone")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after")
    parser.add_argument(
        "--pool",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: put the results of several processes together",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default runs/freezing-SIZE.json")
    args = parser.parse_args(argv)
    if args.pool:
        try:
            result = pool([json.loads(path.read_text()) for path in args.pool])
        except (OSError, ValueError) as error:
            parser.error(f"--pool: {error}")
    else:
        found = measure(chosen(args), lambda text: print(text, file=sys.stderr))
        result = {"size": args.size, **found}
    written = save(result, args.out or _default_out(args))
    print(markdown(result))
    print("\n" + "\n".join(str(path) for path in written))
    failed = any("error" in row for row in (*result["rows"], *result["presets"]))
    return 1 if failed else 0


def _default_out(args: argparse.Namespace) -> Path:
    return Path("runs") / ("freezing-pooled.json" if args.pool else f"freezing-{args.size}.json")


def chosen(args: argparse.Namespace) -> Size:
    """Returns the size with what the command line changes."""
    size = SIZES[args.size]
    measuring = size.measuring
    if args.peers is not None:
        measuring = replace(measuring, peers=tuple(args.peers))
    if args.blocks is not None:
        measuring = replace(measuring, blocks=args.blocks)

    def kept(workloads: Sequence[Workload], skip: bool) -> tuple[Workload, ...]:
        return tuple(w for w in workloads if args.only in w.name and not skip)

    return replace(
        size,
        workloads=kept(size.workloads, args.no_rows),
        presets=kept(size.presets, args.no_presets),
        measuring=measuring,
        shares=tuple(args.shares) if args.shares else size.shares,
        budget_seconds=size.budget_seconds if args.budget is None else args.budget,
    )


if __name__ == "__main__":
    # A GPU is shared with the torch arm: jax must not take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    use_huge_pages()  # as `jft` does; every arm has them
    sys.exit(main())
