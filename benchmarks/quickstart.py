"""The quickstart against the same steps from random weights, and against logistic regression.

    python -m benchmarks.quickstart --seeds=3 --out=benchmarks/results/quickstart.json

Each run is a process of its own. The seed changes data order, augmentation, fresh leaves, and
which examples are held out and labelled. `rows` are what the quickstart's report shows beside its
own run.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = {"quickstart.py": "fine-tuned", "scratch.py": "same steps from random weights"}


def train(config: str, seed: int, workdir: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs one config with a seed; returns its test accuracy and seconds."""
    command = [sys.executable, "-m", "jft", "train", f"--config={ROOT / 'configs' / config}"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}", *overrides]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    accuracy = next(row["test/accuracy"] for row in reversed(rows) if "test/accuracy" in row)
    baselines = workdir / "baselines.json"
    found = json.loads(baselines.read_text()) if baselines.exists() else []
    logistic = [row["accuracy"] for row in found if row["name"] == "logistic regression"]
    run = json.loads((workdir / "run.json").read_text())
    return {
        "config": config,
        "seed": seed,
        "test_accuracy": accuracy,
        "logistic_regression": logistic[0] if logistic else None,
        "seconds": seconds,
        "run": {key: run[key] for key in ("python", "platform", "versions", "devices")},
    }


def summary(samples: list[dict[str, Any]], date: str) -> list[dict[str, Any]]:
    """Returns the rows for the report: mean and range of each config over the seeds."""
    rows = []
    for config, name in NAMES.items():
        values = [s["test_accuracy"] for s in samples if s["config"] == config]
        spread = f"{100 * min(values):.2f} to {100 * max(values):.2f} %"
        note = f"mean of {len(values)} seeds ({spread}), measured {date}"
        rows.append({"name": name, "accuracy": statistics.mean(values), "note": note})
    return rows


def main() -> None:
    """Runs both configs for every seed, and writes the samples and the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the :tiny configs, to try this out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="--config.KEY=VALUE, after --")
    args = parser.parse_args()
    date = datetime.date.today().isoformat()
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for config in NAMES:
                workdir = Path(folder) / f"{config}-{seed}"
                name = config + (":tiny" if args.tiny else "")
                sample = train(name, seed, workdir, args.overrides) | {"config": config}
                samples.append(sample)
                accuracy, seconds = sample["test_accuracy"], sample["seconds"]
                print(f"{config} seed {seed}: {accuracy:.4f} in {seconds:.0f} s", flush=True)
    rows = summary(samples, date)
    # The report shows its own run; beside it only what it did not run itself.
    result = {"date": date, "rows": rows[1:], "all_rows": rows, "samples": samples}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
