"""Measures a training step of every family beside PyTorch's on the same cores.

    python -m benchmarks.families --suite smoke
    python -m benchmarks.families --suite cpu --out benchmarks/results/families_2026-12-01-cpu.json
    python -m benchmarks.families --suite cpu --only resnet lite0 --profile

The jft arm is the bare step of `benchmarks.bare` (everything trains, AdamW); the torch arm is the
class of transformers that loads jft's export, eager, float32, with as many threads. Needs the
`parity` extra. Exits 1 if a row fails to run; it never fails on a time.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.bare import Bare
from benchmarks.run import FLAGS, environment, hardware
from benchmarks.step_profile import shares_of_jax, shares_of_torch
from benchmarks.timing import compare, interleave, steps_for, stopwatch
from benchmarks.workloads import Workload
from jft.costs import hlo
from jft.hugepages import use_huge_pages
from jft.tree import count_params, flatten

_OFF = (("drop_path_rate", 0.0),)
_LITE = (*_OFF, ("dropout_rate", 0.0))


def _row(model: str, size: int, batch: int, *args: tuple[str, Any]) -> Workload:
    return Workload(model, size, batch, 0, args)  # every stage trains: no blocks to count


SUITES: dict[str, tuple[Workload, ...]] = {
    "smoke": (_row("vit_tiny", 32, 4), _row("convnext_tiny", 32, 4)),
    "cpu": (
        _row("vit_s16", 224, 8),
        _row("deit_ti16", 224, 8),
        _row("dinov2_s14", 112, 8),
        _row("clip_vit_b32", 224, 8),
        _row("siglip_b16_224", 96, 8, ("pooling", "mean")),
        _row("swin_t", 224, 4, *_OFF),
        _row("convnext_t", 96, 8, *_OFF),
        _row("convnextv2_atto", 96, 16, *_OFF),
        _row("resnet18", 96, 16),
        _row("resnet50", 96, 16),
        _row("efficientnet_b0", 96, 16, *_LITE),
        _row("efficientnet_lite0", 96, 16, *_LITE),
    ),
}
# Seconds a window, and blocks of two windows an arm.
SIZES = {"smoke": (0.05, 1), "cpu": (1.0, 3)}


def measure(
    workload: Workload, window_seconds: float, blocks: int, profiled: bool = False
) -> dict[str, Any]:
    """Returns one row: raw samples, the ratio, compilation, FLOPs and parameters.

    With `profiled`, also the shares of the step's time by kind of operation.
    """
    from benchmarks.torch_peer import Torch

    model = workload.zoo_model()
    side, channels = model.preprocess.image_size, len(model.preprocess.mean)
    image = jax.numpy.zeros((1, side, side, channels))
    variables = model.init(jax.random.key(0), image)
    leaves = tuple(flatten(variables.get(kind, {})) for kind in ("params", "batch_stats"))
    bare = Bare(model, 0, leaves, workload.batches())
    arms = {"jft": bare.window, "torch": Torch(workload, "all").window}
    steps = min(steps_for(window, window_seconds) for window in arms.values())
    samples, busy = interleave(arms, steps, blocks)
    found = compare(samples["jft"], samples["torch"])
    shares = {}
    if profiled:
        shares = {"jft": shares_of_jax(bare.window, bare.compiled)}
        shares["torch"] = shares_of_torch(arms["torch"])
    return {
        "workload": workload.name,
        "family": model.family.name if model.family else None,
        "parameters": count_params(leaves[0]),
        "steps_per_window": steps,
        "seconds": samples,
        "cpu_seconds": busy,
        **vars(found),
        "compile_seconds": bare.compile_seconds,
        "compiled_flops": hlo.count(bare.compiled).flops,
        "shares": shares,
    }


def run_suite(
    workloads: Sequence[Workload], window_seconds: float, blocks: int, profiled: bool = False
) -> dict[str, Any]:
    """Returns the whole result; a row that fails is kept with its error, later ones still run."""
    seconds, rows = stopwatch(), []
    for workload in workloads:
        try:
            rows.append(measure(workload, window_seconds, blocks, profiled))
        except Exception as error:  # one broken row must not hide the others
            traceback.print_exc()
            rows.append({"workload": workload.name, "error": repr(error)})
        print(f"{seconds():6.0f} s  {_line(rows[-1])}", file=sys.stderr, flush=True)
    return {
        "hardware": hardware(),
        "environment": environment(),
        "window_seconds": window_seconds,
        "blocks": blocks,
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "elapsed_seconds": seconds(),
        "rows": rows,
    }


def _line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"{row['workload']}: {row['error']}"
    return f"{row['workload']}: {row['ratio']:.2f}x torch, noise {row['noise']:.3f}"


def table(result: Mapping[str, Any]) -> str:
    """Returns the rows as a Markdown table, the slowest against torch first."""
    good = [row for row in result["rows"] if "error" not in row]
    titles = ["step", "parameters", "jft ms", "torch ms", "jft / torch speed", "A/A noise"]
    titles += ["GFLOP", "compile s"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in sorted(good, key=lambda row: row["ratio"]):
        best = {name: 1e3 * min(samples) for name, samples in row["seconds"].items()}
        cells = [row["workload"], f"{row['parameters'] / 1e6:.1f} M", f"{best['jft']:.4g}"]
        cells += [f"{best['torch']:.4g}", f"{row['ratio']:.2f}", f"{row['noise']:.3f}"]
        cells += [f"{row['compiled_flops'] / 1e9:.3g}", f"{row['compile_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    profiled = [row for row in good if row["shares"]]
    if profiled:
        lines += ["", "| step | arm | where its time goes |", "|---|---|---|"]
    for row in profiled:
        for arm, shares in row["shares"].items():
            parts = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())
            lines.append(f"| {row['workload']} | {arm} | {parts} |")
    lines += [f"\nfailed: {_line(row)}" for row in result["rows"] if "error" in row]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose name has one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default runs/families-SUITE.json")
    parser.add_argument("--profile", action="store_true", help="shares by kind of operation too")
    args = parser.parse_args(argv)
    workloads = [
        workload
        for workload in SUITES[args.suite]
        if args.only is None or any(text in workload.name for text in args.only)
    ]
    result = run_suite(workloads, *SIZES[args.suite], args.profile)
    out = args.out or Path("runs") / f"families-{args.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"suite": args.suite, **result}, indent=1) + "\n")
    print(table(result))
    print(f"\n{out}")
    return 1 if any("error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    use_huge_pages()  # as `jft` does; both arms have them
    sys.exit(main())
