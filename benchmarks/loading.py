"""Measures how long weights take from a file to arrays, and what memory that needs.

    python -m benchmarks.loading --suite smoke
    python -m benchmarks.loading --suite cpu --out benchmarks/results/loading_2026-12-01-cpu.json

Random weights of a ViT as safetensors and torch files. Three arms take turns in one process, A B C
C B A, on files that the system has in memory: jft's `load_pretrained` (names, layouts, casts,
checks; with and without the SHA-256 of the file, which follows in a thread), bare numpy (reads the
file, casts each tensor, and nothing else) and transformers' `from_pretrained`, which leaves float32
in the file until it is used. Memory is the peak of anonymous pages of a process of its own
that loads once, over the bytes of the parameters. Exits 1 if an arm does not run. It never fails on
a time.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks.run import environment, hardware
from benchmarks.timing import compare, interleave, stopwatch
from jft.models.zoo import Model, make_model
from jft.train.parallel import make_parallel
from jft.weights import hashes
from jft.weights.convert import load_pretrained
from jft.weights.random_weights import write_random

FORMAT = 1
CLASSES = 2  # what transformers takes where a config names no labels


@dataclass(frozen=True)
class Suite:
    """What is measured: fields of a `vit_l16` that change, and how often each arm loads.

    Attributes:
      args: of the model.
      steps, blocks: of the interleaved windows.
    """

    args: dict[str, int]
    steps: int
    blocks: int


SUITES = {
    "smoke": Suite(
        {"image_size": 32, "depth": 2, "features": 64, "heads": 4, "mlp_features": 128}, 1, 1
    ),
    "cpu": Suite({"depth": 10}, 1, 5),
}


@dataclass(frozen=True)
class Row:
    """One file, and the dtype that its leaves get.

    Attributes:
      kind: "safetensors" or "torch".
      stored: dtype of the file.
      wanted: dtype of the arrays.
    """

    kind: str
    stored: str
    wanted: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind} {self.stored}" + (
            f" -> {self.wanted}" if self.stored != self.wanted else ""
        )


ROWS = (
    Row("safetensors", "float32", "float32"),
    Row("safetensors", "bfloat16", "float32"),
    Row("safetensors", "bfloat16", "bfloat16"),
    Row("torch", "float32", "float32"),
)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def model_of(suite: Suite) -> Model:
    """The model of a suite."""
    return make_model(name="vit_l16", args=suite.args, num_classes=CLASSES)


def write_files(suite: Suite, folder: Path) -> dict[tuple[str, str], Path]:
    """Writes the weights of all rows; {(kind, dtype): folder}, torch files only where torch is."""
    found = {}
    for dtype in DTYPES:
        found["safetensors", dtype] = write_random(
            model_of(suite), folder / dtype, seed=0, dtype=dtype
        )
    if importlib.util.find_spec("torch") is not None:
        import torch
        from safetensors.torch import load_file

        out = folder / "torch"
        out.mkdir()
        arrays = load_file(folder / "float32" / "model.safetensors")
        torch.save(arrays, out / "pytorch_model.bin")
        (out / "config.json").write_text((folder / "float32" / "config.json").read_text())
        found["torch", "float32"] = out
    return found


def load_jft(suite: Suite, row: Row, folder: Path) -> Any:
    """What jft makes of a folder of weights; the file's SHA-256 may be under way still."""
    return load_pretrained(model_of(suite), f"file:{folder}", dtype=row.wanted)


def load_hashed(suite: Suite, row: Row, folder: Path) -> Any:
    """The same, until the SHA-256 is known too."""
    found = load_jft(suite, row, folder)
    return found, found[1].sha256


def load_placed(suite: Suite, row: Row, folder: Path) -> Any:
    """The same with each leaf put on the device as a run puts it."""
    place = make_parallel(devices=1).place
    return load_pretrained(
        model_of(suite),
        f"file:{folder}",
        dtype=row.wanted,
        place=lambda _, leaf: jax.block_until_ready(place(leaf)),
    )


def load_bare(_: Suite, row: Row, folder: Path) -> dict[str, np.ndarray]:
    """Each tensor read and cast by numpy, under the file's own names and in its own layout."""
    wanted, stored = DTYPES[row.wanted], DTYPES[row.stored]
    if row.kind == "torch":
        # No names: each storage is one tensor here, whose dtype is known.
        with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
            members = [info for info in archive.infolist() if "/data/" in info.filename]
            return {
                info.filename: np.frombuffer(archive.read(info), stored).astype(wanted)
                for info in members
            }
    data = np.fromfile(folder / "model.safetensors", np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = (8 + length + at for at in entry["data_offsets"])
        found[name] = data[start:stop].view(stored).reshape(entry["shape"]).astype(wanted)
    return found


def load_transformers(_: Suite, row: Row, folder: Path) -> Any:
    """What transformers makes of it."""
    import torch
    from transformers import ViTForImageClassification

    dtype = getattr(torch, row.wanted)
    return ViTForImageClassification.from_pretrained(folder, dtype=dtype)


ARMS: dict[str, Callable[[Suite, Row, Path], Any]] = {
    "jft": load_jft,
    "jft, hashed": load_hashed,
    "bare": load_bare,
    "transformers": load_transformers,
}
MEMORY_ARMS = {**ARMS, "jft, placed": load_placed}


def window_of(arm: str, suite: Suite, row: Row, folder: Path) -> Callable[[int], float]:
    """A window that loads so often; what was loaded is let go outside of the time."""

    def window(steps: int) -> float:
        took = 0.0
        for _ in range(steps):
            hashes.forget()  # a process hashes a file once
            seconds = stopwatch()
            held = ARMS[arm](suite, row, folder)
            took += seconds()
            if arm == "jft":
                _ = held[1].sha256  # not beside the next arm
            del held
            gc.collect()
        return took

    return window


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def peak_of(arm: str, suite: Suite, row: Row, folder: Path) -> int:
    """Growth of anonymous memory at its highest, while an arm loads once in this process."""
    tiny = SUITES["smoke"]
    with tempfile.TemporaryDirectory() as temporary:  # what is imported and compiled once
        small = write_files(tiny, Path(temporary))[row.kind, row.stored]
        MEMORY_ARMS[arm](tiny, row, small)
    gc.collect()
    before, peaks, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks.append(anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    held = MEMORY_ARMS[arm](suite, row, folder)
    peaks.append(anonymous_bytes())
    done.set()
    thread.join()
    del held
    return max(peaks) - before


def measured_peak(arm: str, suite_name: str, row: Row, folder: Path) -> int:
    """`peak_of` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.loading", "--suite", suite_name, "--peak-of", arm]
    words += ["--row", str(ROWS.index(row)), "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm}, {row.name}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.splitlines()[-1])


def parameter_bytes(suite: Suite, dtype: str) -> tuple[int, int]:
    """(bytes of all parameters, bytes of the largest leaf) in a dtype."""
    from jft.weights.naming import abstract_leaves

    sizes = [leaf.size for _, leaf in abstract_leaves(model_of(suite)).values()]
    width = DTYPES[dtype].itemsize
    return sum(sizes) * width, max(sizes) * width


def measure(suite_name: str, folder: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a dict a row of the table."""
    suite, found = SUITES[suite_name], []
    files = write_files(suite, folder)
    for row in ROWS:
        if (row.kind, row.stored) not in files:
            continue
        path = files[row.kind, row.stored]
        windows = {arm: window_of(arm, suite, row, path) for arm in arms}
        samples, _ = interleave(windows, suite.steps, suite.blocks)
        held, largest = parameter_bytes(suite, row.wanted)
        peaks = {
            arm: measured_peak(arm, suite_name, row, path)
            for arm in MEMORY_ARMS
            if arm != "jft, hashed" and arm.split(",")[0] in arms and sys.platform == "linux"
        }
        found.append(
            {
                "row": row.name,
                "parameter_bytes": held,
                "largest_leaf_bytes": largest,
                "file_bytes": sum(file.stat().st_size for file in path.iterdir()),
                "seconds": samples,
                "time_ratio": {
                    arm: vars(compare(samples["jft"], samples[arm])) for arm in arms if arm != "jft"
                },
                "peak_bytes": peaks,
            }
        )
    return found


def table(result: dict[str, Any]) -> str:
    """Returns the rows as Markdown: medians, ratios over jft, and peaks over the parameters."""
    arms = result["arms"]
    others = [arm for arm in arms if arm != "jft"]
    head = ["file", "MB", *(f"{arm} s" for arm in arms), *(f"jft / {arm}" for arm in others)]
    peaks = list(dict.fromkeys(arm for row in result["rows"] for arm in row["peak_bytes"]))
    head += [f"memory, {arm}" for arm in peaks]
    lines = [
        f"{result['date']}, {result['hardware']['processor']}, {result['hardware']['cores']} cores",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for row in result["rows"]:
        cells = [row["row"], f"{row['file_bytes'] / 1e6:,.0f}"]
        cells += [f"{float(np.median(row['seconds'][arm])):.3f}" for arm in arms]
        cells += [f"{1 / row['time_ratio'][arm]['ratio']:.2f}" for arm in others]
        held = row["parameter_bytes"]
        shown = [row["peak_bytes"].get(arm) for arm in peaks]
        cells += ["-" if peak is None else f"{peak / held:.2f}" for peak in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), help="default: all there are")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default runs/loading-SUITE.json")
    for name in ("--peak-of", "--row", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak_of:
        row = ROWS[int(args.row)]
        print(peak_of(args.peak_of, SUITES[args.suite], row, Path(args.folder)))
        return 0
    there = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    arms = args.arms or [arm for arm in ARMS if arm != "transformers" or there]
    arms = list(dict.fromkeys(["jft", *arms]))
    began, load = datetime.datetime.now(datetime.UTC), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="jft-loading-") as folder:
        rows = measure(args.suite, Path(folder), arms)
    result = {
        "format": FORMAT,
        "suite": args.suite,
        "date": began.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "environment": environment(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "setting": dataclasses.asdict(SUITES[args.suite]),
        "arms": arms,
        "rows": rows,
    }
    out = args.out or Path("runs") / f"loading-{args.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
