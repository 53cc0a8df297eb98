"""Measures jft's loop beside a bare hand-written step, and beside PyTorch where it is installed.

    python -m benchmarks.run --suite smoke
    python -m benchmarks.run --suite cpu --peers torch --out benchmarks/results/2026-12-01-cpu.json

Exits 1 if a row fails to run. It never fails on a time: a machine that CI shares proves nothing.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.bare import Bare
from benchmarks.timing import compare, interleave, steps_for, stopwatch
from benchmarks.workloads import PHASES, SUITES, JftLoop, Workload
from jft.costs import hlo
from jft.hugepages import use_huge_pages
from jft.provenance import describe_run

PEERS = ("torch",)
# Seconds a window, blocks of two windows an arm, and the seconds after which no row is begun.
SIZES = {"smoke": (0.6, 2, 150.0), "cpu": (1.5, 8, 3600.0)}
FORMAT = 1
FLAGS = ("XLA_FLAGS", "OMP_NUM_THREADS", "GLIBC_TUNABLES")


def measure(
    workload: Workload, phase: str, *, window_seconds: float, blocks: int, peers: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns one row: raw samples, ratios, compilation, FLOPs and bytes of one phase.

    Args:
      workload: model and shapes.
      phase: a name of PHASES.
      window_seconds: length of a window of the slowest arm, at least two steps.
      blocks: palindromes of windows.
      peers: of PEERS.
    """
    with tempfile.TemporaryDirectory(prefix="jft-benchmark-") as folder:
        loop = JftLoop(workload, phase, Path(folder))
        try:
            leaves = loop.run.start()
            bare = Bare(workload.zoo_model(), workload.cut(phase), leaves, workload.batches())
            arms = {"jft": loop.window, "bare": bare.window}
            arms |= {name: _peer(name, workload, phase).window for name in peers}
            steps = min(steps_for(window, window_seconds) for window in arms.values())
            samples, busy = interleave(arms, steps, blocks)
        finally:
            loop.close()
    costs = {"jft": hlo.count(loop.compiled), "bare": hlo.count(bare.compiled)}
    ratios = {name: compare(samples["jft"], samples[name]) for name in samples if name != "jft"}
    return {
        "workload": workload.name,
        "phase": phase,
        "batch_size": workload.batch_size,
        "image_size": workload.image_size,
        "steps_per_window": steps,
        "seconds": samples,
        "ratio": ratios["bare"].ratio,
        "noise": ratios["bare"].noise,
        "cpu_seconds": busy,
        "cpu_ratio": compare(busy["jft"], busy["bare"]).ratio,
        "ratios": {name: vars(found) for name, found in ratios.items()},
        "compile_seconds": {"jft": loop.compile_seconds, "bare": bare.compile_seconds},
        "compiled_flops": {name: cost.flops for name, cost in costs.items()},
        "analytic_flops": loop.flops,
        "temp_bytes": {name: cost.temp_bytes for name, cost in costs.items()},
    }


def _peer(name: str, workload: Workload, phase: str) -> Any:
    if name != "torch":
        raise ValueError(f"no peer {name!r}; known: {', '.join(PEERS)}")
    from benchmarks.torch_peer import Torch

    return Torch(workload, phase)


def run_suite(
    workloads: Sequence[Workload],
    *,
    phases: Sequence[str] = PHASES,
    window_seconds: float,
    blocks: int,
    budget_seconds: float,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the whole result; a row that fails is kept with its error, later ones still run."""
    seconds = stopwatch()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    began = datetime.datetime.now(datetime.UTC)
    load = os.getloadavg()
    for workload in workloads:
        for phase in phases:
            if seconds() > budget_seconds:
                left_out.append(f"{workload.name}, {phase}")
                continue
            try:
                row = measure(
                    workload, phase, window_seconds=window_seconds, blocks=blocks, peers=peers
                )
            except Exception as error:  # one broken row must not hide the others
                traceback.print_exc()
                row = {"workload": workload.name, "phase": phase, "error": repr(error)}
            rows.append(row)
            print(f"{seconds():6.0f} s  {_line(row)}", file=sys.stderr, flush=True)
    return {
        "format": FORMAT,
        "date": began.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "environment": environment(),
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "window_seconds": window_seconds,
        "blocks": blocks,
        "elapsed_seconds": seconds(),
        "rows": rows,
        "left_out": left_out,
    }


def hardware() -> dict[str, Any]:
    """Returns processor, usable cores and memory."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(usable) if usable else os.cpu_count()
    return {"processor": model, "cores": cores, "memory_bytes": memory}


def environment() -> dict[str, Any]:
    """Returns versions, devices, commit and command, without the folders of this machine."""
    found = describe_run(0)
    argv = [Path(word).name if Path(word).is_absolute() else word for word in found["argv"]]
    return found | {"argv": argv, "peers": peer_versions()}


def peer_versions() -> dict[str, str]:
    """Returns {distribution: version} of the peers that are installed."""
    found = {}
    for name in ("torch", "transformers", "efficientnet-lite-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"{row['workload']}, {row['phase']}: {row['error']}"
    return f"{row['workload']}, {row['phase']}: {row['ratio']:.3f}x bare, noise {row['noise']:.3f}"


def table(result: Mapping[str, Any]) -> str:
    """Returns the rows as a Markdown table, with what it was measured on above."""
    hardware, rows = result["hardware"], result["rows"]
    good = [row for row in rows if "error" not in row]
    peers = sorted({name for row in good for name in row["ratios"]} - {"bare"})
    titles = ["workload", "phase", "jft ms", "bare ms", "jft / bare speed", "A/A noise"]
    titles += ["bare / jft CPU time"]
    titles += [f"jft / {name} speed" for name in peers]
    titles += ["compile s, jft / bare", "GFLOP compiled / analytic", "temp MB, jft / bare"]
    lines = [
        f"{result['date']}, {hardware['processor']}, {hardware['cores']} cores,"
        f" jax {result['environment']['versions']['jax']}",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    lines += ["| " + " | ".join(_cells(row, peers)) + " |" for row in good]
    lines += [f"\nfailed: {_line(row)}" for row in rows if "error" in row]
    lines += [f"\nnot run within the budget: {name}" for name in result["left_out"]]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    def both(values: Mapping[str, float], scale: float) -> str:
        return f"{values['jft'] / scale:.4g} / {values['bare'] / scale:.4g}"

    best = {name: 1e3 * min(samples) for name, samples in row["seconds"].items()}
    flops = f"{row['compiled_flops']['jft'] / 1e9:.4g} / {row['analytic_flops'] / 1e9:.4g}"
    return [
        row["workload"],
        row["phase"],
        f"{best['jft']:.4g}",
        f"{best['bare']:.4g}",
        f"{row['ratio']:.3f}",
        f"{row['noise']:.3f}",
        f"{row['cpu_ratio']:.3f}",
        *(f"{row['ratios'][name]['ratio']:.2f}" for name in peers),
        both(row["compile_seconds"], 1.0),
        flops,
        both(row["temp_bytes"], 1e6),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--only", metavar="TEXT", default="", help="workloads whose name has it")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=())
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no row after")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default runs/benchmark-SUITE.json"
    )
    args = parser.parse_args(argv)
    window_seconds, blocks, budget = SIZES[args.suite]
    result = run_suite(
        [workload for workload in SUITES[args.suite] if args.only in workload.name],
        phases=args.phases,
        window_seconds=window_seconds,
        blocks=blocks,
        budget_seconds=budget if args.budget is None else args.budget,
        peers=args.peers,
    )
    out = args.out or Path("runs") / f"benchmark-{args.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"suite": args.suite, **result}, indent=1) + "\n")
    print(table(result))
    print(f"\n{out}")
    return 1 if any("error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    use_huge_pages()  # as `jft` does; every arm has them
    sys.exit(main())
