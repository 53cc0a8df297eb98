"""Measures how fast each kind of data is read, and what it costs a training step.

    python -m benchmarks.loader --suite smoke
    python -m benchmarks.loader --suite gpu --out benchmarks/results/2026-12-01-loader-gpu.json

Two tables. Reading: images a second of the training loader alone, by kind of data. Feeding: the
trainer of `jft train` fed by each kind, beside the same trainer fed with batches that lie ready in
memory ("synthetic"); windows take turns in one process, and the ratio compares neighbours.
Exits 1 if an arm does not run. It never fails on a time.
"""

import argparse
import dataclasses
import datetime
import io
import itertools
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import jft
from benchmarks.run import environment, hardware
from benchmarks.timing import compare, interleave, steps_for, stopwatch
from benchmarks.workloads import JftLoop, Workload, make_config
from jft.data.loader import make_train_loader
from jft.hugepages import use_huge_pages
from jft.task import make_data, make_task

CLASSES = 10
FORMAT = 1


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Attributes:
      workload: model and shapes; its phase is "head": the cheapest step asks most of the loader.
      photos: JPEG files, of 4:3.
      height: of a photo in pixels.
      workers: processes that decode files; 0 uses threads.
      window_seconds, blocks: of the interleaved windows.
    """

    workload: Workload
    photos: int
    height: int
    workers: int
    window_seconds: float
    blocks: int


SUITES = {
    "smoke": Suite(Workload("efficientnet_lite_tiny", 32, 8, 2), 48, 60, 0, 0.2, 1),
    "cpu": Suite(Workload("efficientnet_lite0", 224, 16, 16), 512, 375, 0, 3.0, 4),
    "gpu": Suite(Workload("vit_s16", 224, 256, 12), 4096, 375, 12, 5.0, 6),
}
# arm -> (kind of data, data.cache)
ARMS = {
    "folder": ("folder", "off"),
    "webdataset": ("webdataset", "off"),
    "parquet": ("table", "off"),
    "disk cache": ("folder", "disk"),
    "memory cache": ("folder", "memory"),
    "npz": ("npz", "off"),
}


def write_photos(folder: Path, count: int, height: int) -> dict[str, str]:
    """Writes smooth pictures as files, as a tar shard, as Parquet and as an npz of canvases.

    Returns:
      {kind of data: its path}.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, width = np.random.default_rng(0), height * 4 // 3
    rows, columns = np.mgrid[0:height, 0:width]
    contents = []
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for i in range(count):
            slopes = rng.uniform(0.02, 0.3, (3, 2))
            waves = [np.sin(rows * a) * np.cos(columns * b) for a, b in slopes]
            noise = rng.normal(0, 4, (height, width, 3))
            pixels = np.clip(127 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=90)
            contents.append(stream.getvalue())
            name = f"{i % CLASSES}"
            (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
            (folder / "photos" / name / f"{i:05}.jpg").write_bytes(contents[-1])
            for extension, content in (("jpg", contents[-1]), ("cls", name.encode())):
                info = tarfile.TarInfo(f"{i:05}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    labels = [i % CLASSES for i in range(count)]
    table = {"image": pa.array(contents, pa.binary()), "label": labels}
    pq.write_table(pa.table(table), folder / "photos.parquet", row_group_size=100)
    return {
        "folder": str(folder / "photos"),
        "webdataset": str(folder / "photos.tar"),
        "table": str(folder / "photos.parquet"),
        "npz": str(folder / "photos.npz"),
    }


def config_of(suite: Suite, kind: str, path: str, cache: str) -> Any:
    """Returns the config of a run on one kind of data."""
    overrides = {
        "data.name": kind,
        "data.path": path,
        "data.cache": cache,
        "data.check": "off",
        "data.workers": suite.workers,
    }
    return make_config(suite.workload, "head", Path(path), "pmap", overrides)


def write_canvases(suite: Suite, path: str, photos: str) -> None:
    """Writes the npz: canvases of the photos as a loader makes them."""
    config = config_of(suite, "folder", photos, "off")
    splits = make_data(config)
    task = make_task(config, splits.label_names, splits.train.image_shape)
    rows, labels = [], []
    loader = _train_loader(suite, task, splits.train)
    for batch in itertools.islice(loader, -(-suite.photos // suite.workload.batch_size)):
        rows.append(batch["image"])
        labels.append(batch["label"])
    loader.close()
    np.savez(path, image=np.concatenate(rows), label=np.concatenate(labels))


def _train_loader(suite: Suite, task: Any, source: Any) -> Any:
    return make_train_loader(
        source,
        batch_size=suite.workload.batch_size,
        seed=0,
        image_shape=task.image_shape,
        workers=suite.workers,
        fit=task.fit,
    )


class FedLoop(JftLoop):
    """The trainer of `jft train` on one kind of data; `synthetic` batches lie ready in memory."""

    def __init__(self, config: Any, folder: Path, synthetic: bool = False) -> None:
        self.run = jft.setup(config, folder)
        if synthetic:
            stream: Any = self.run.batches(0)
            kept = list(itertools.islice(stream, 8))
            stream.close()

            def images(step: int, views: int | None = None) -> Any:
                del step, views
                return itertools.cycle(kept)

            inputs = self.run.inputs and dataclasses.replace(self.run.inputs, images=images)
            self.run = dataclasses.replace(self.run, batches=images, inputs=inputs)
        with ExitStack() as opened:
            self._begin(opened)
            self._open = opened.pop_all()


def reading(suite: Suite, run: Any, seconds: Callable[[], float]) -> dict[str, float]:
    """Returns images a second of a run's training stream, over at least one pass."""
    stream: Any = run.batches(0)
    size = suite.workload.batch_size
    least = max(4, suite.photos // size)
    next(stream)  # threads and processes start
    began, count = seconds(), 0
    while count < least or seconds() - began < suite.window_seconds:
        next(stream)
        count += 1
    took = seconds() - began
    stream.close()
    return {"images_per_second": count * size / took, "images": count * size}


def measure(suite: Suite, folder: Path, arms: Sequence[str]) -> dict[str, Any]:
    """Returns the rows of both tables."""
    seconds = stopwatch()
    paths = write_photos(folder, suite.photos, suite.height)
    write_canvases(suite, paths["npz"], paths["folder"])
    read: dict[str, Any] = {}
    with ExitStack() as opened:
        loops: dict[str, FedLoop] = {}
        for at, name in enumerate(("synthetic", *arms)):
            kind, cache = ARMS.get(name, ("npz", "off"))
            config = config_of(suite, kind, paths[kind], cache)
            loop = FedLoop(config, folder / f"run{at}", synthetic=name == "synthetic")
            opened.callback(loop.close)
            loops[name] = loop
            if name != "synthetic":
                read[name] = reading(suite, loop.run, seconds)
        windows = {name: loop.window for name, loop in loops.items()}
        steps = min(steps_for(window, suite.window_seconds) for window in windows.values())
        samples, _ = interleave(windows, steps, suite.blocks)
    fed = {n: vars(compare(samples[n], samples["synthetic"])) for n in arms}
    return {"reading": read, "feeding": fed, "seconds_per_step": samples, "steps_a_window": steps}


def table(result: dict[str, Any]) -> str:
    """Returns both tables as Markdown."""
    lines = [
        f"{result['date']}, {result['hardware']['processor']}, {result['hardware']['cores']} cores",
        "",
        "| data | images/s read | step speed, fed / synthetic | A/A noise |",
        "|---|---|---|---|",
    ]
    for name, found in result["rows"]["feeding"].items():
        rate = result["rows"]["reading"][name]["images_per_second"]
        lines.append(f"| {name} | {rate:,.0f} | {found['ratio']:.3f} | {found['noise']:.3f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="default runs/loader-SUITE.json")
    args = parser.parse_args(argv)
    began = datetime.datetime.now(datetime.UTC)
    suite, load = SUITES[args.suite], os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="jft-loader-") as folder:
        # Canvases of generated photos are of no use to later runs.
        os.environ["XDG_CACHE_HOME"] = folder
        rows = measure(suite, Path(folder), args.arms)
    result = {
        "format": FORMAT,
        "suite": args.suite,
        "date": began.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "environment": environment(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "setting": dataclasses.asdict(suite),
        "rows": rows,
    }
    out = args.out or Path("runs") / f"loader-{args.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"\n{out}")
    return 0


if __name__ == "__main__":
    use_huge_pages()  # as `jft` does; every arm has them
    sys.exit(main())
