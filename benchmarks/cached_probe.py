"""LP-FT of the quickstart with the frozen-prefix cache and without, in turns.

    python -m benchmarks.cached_probe --out benchmarks/results/cached_probe.json

Each run is a process of its own: `jft train --config=configs/quickstart.py` with a probe of whole
epochs and fixed views. The seconds of the probe are all that passed from the start of the loop to
the last step of the phase: compilation (the next phase's too, beside it), filling the cache, and
the steps; but not the evaluations between them, the same work in both, which are told apart. The
saved parameters and the losses of both are compared.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jft
from benchmarks.run import environment, hardware

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
MODES = ("off", "on")


def flags(epochs: int, views: int, overrides: Sequence[str]) -> list[str]:
    """Returns what every run of the comparison is given, whatever its cache."""
    return [
        f"--config.freeze.args.head_until={epochs}ep",
        f"--config.freeze.views={views}",
        "--config.log.every_steps=1",
        "--config.log.tensorboard=False",
        "--config.report.baselines=[]",
        *overrides,
    ]


def train(config: str, mode: str, workdir: Path, given: Sequence[str]) -> dict[str, Any]:
    """Runs LP-FT with freeze.cache=`mode`; returns the times of its probe and its results."""
    command = [sys.executable, "-m", "jft", "train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.freeze.cache={mode}", *given]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    probe = [row for row in rows if row.get("phase") == 0 and "train/loss" in row]
    seconds = [row["time/step_seconds"] for row in probe]
    last = probe[-1]["step"]
    evaluations = sum(r.get("time/eval_seconds", 0.0) for r in rows if r.get("step", last) < last)
    return {
        "cache": mode,
        "probe_steps": len(probe),
        "probe_seconds": probe[-1]["time/elapsed_seconds"] - evaluations,
        "evaluation_seconds": evaluations,
        "compile_seconds": probe[-1]["time/compile_seconds"],
        "median_step_seconds": statistics.median(seconds),
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
        "test_accuracy": next(r["test/accuracy"] for r in rows[::-1] if "test/accuracy" in r),
        "folder": workdir,
    }


def largest_difference(folders: Sequence[Path]) -> float:
    """Returns the largest difference of any trained element between two run directories."""
    states = []
    for folder in folders:
        run = jft.setup(jft.load_config(str(folder / "config.json"), []), folder)
        restored = run.checkpoints.restore()
        assert restored is not None  # the run has ended
        states.append(restored.state)
    one, other = states
    assert one.keys() == other.keys()
    return max(
        float(np.max(np.abs(np.asarray(one[name], np.float64) - other[name]), initial=0.0))
        for name in one
        if name.startswith("params/")
    )


def compare(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the speed-up of neighbours in time, and how far their results lie apart."""
    off = [sample for sample in samples if sample["cache"] == "off"]
    on = [sample for sample in samples if sample["cache"] == "on"]
    pairs = list(zip(off, on, strict=True))
    return {
        "speedup": statistics.median(a["probe_seconds"] / b["probe_seconds"] for a, b in pairs),
        "speedups": [a["probe_seconds"] / b["probe_seconds"] for a, b in pairs],
        "step_speedup": statistics.median(
            a["median_step_seconds"] / b["median_step_seconds"] for a, b in pairs
        ),
        "largest_parameter_difference": max(
            largest_difference((a["folder"], b["folder"])) for a, b in pairs
        ),
        "largest_loss_difference": max(
            abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True)
        ),
        "test_accuracy": {mode: [s["test_accuracy"] for s in samples if s["cache"] == mode]
                          for mode in MODES},
    }  # fmt: skip


def measure(config: str, given: Sequence[str], repeats: int) -> dict[str, Any]:
    """Returns {"samples", "comparison"} of `repeats` pairs of runs: off on, on off, off on ..."""
    samples = []
    with tempfile.TemporaryDirectory(prefix="jft-benchmark-") as folder:
        for at in range(repeats):
            for mode in MODES[:: -1 if at % 2 else 1]:
                sample = train(config, mode, Path(folder) / f"{mode}-{at}", given)
                samples.append(sample)
                print(f"cache {mode}: probe {sample['probe_seconds']:.1f} s", file=sys.stderr)
        comparison = compare(samples)
    for sample in samples:
        del sample["folder"]
    return {"comparison": comparison, "samples": samples}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the comparison, and writes it with its samples."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cached_probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=5, help="of the probe")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--tiny", action="store_true", help="the :tiny config, to try this out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="--config.KEY=VALUE, after --")
    args = parser.parse_args(argv)
    given = flags(args.epochs, args.views, args.overrides)
    config = f"{CONFIG}:tiny" if args.tiny else str(CONFIG)
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "environment": environment(),
        "epochs": args.epochs,
        "views": args.views,
        "flags": given,
        **measure(config, given, args.repeats),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["comparison"], indent=1))


if __name__ == "__main__":
    main()
