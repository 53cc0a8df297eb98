"""Runs of the real command that tests train, kill, damage and resume."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from jft.train import loop
from jft.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
COLOURS = ("blue", "green", "red")
# What is compiled is kept, however small it is and however fast it was compiled.
KEEP_COMPILED = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def quick_compiles(folder):
    """Compiles with little optimisation, and each program once: speed is not what is tested."""
    values = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        **KEEP_COMPILED,
    }
    before = {name: jax.config.values[name] for name in values}
    _configure(values)
    try:
        yield
    finally:
        _configure(before)


def _configure(values):
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # the folder is read at the first use only


class Stop(Exception):
    """Stands for a kill: nothing of the loop's own runs after it."""


def stop_at(monkeypatch, step):
    """Makes a run fail once `step` updates are done, without saving."""
    plain = loop._Trainer.update

    def update(trainer):
        if trainer.step == step:
            raise Stop
        plain(trainer)

    monkeypatch.setattr(loop._Trainer, "update", update)


def environment(folder, **values):
    """Returns the variables of a subprocess that keeps what it compiled in `folder`."""
    kept = {name.upper(): str(value) for name, value in KEEP_COMPILED.items()}
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder), **kept, **values}


def command(*argv):
    """Returns the command line of `jft`, by this interpreter."""
    return [sys.executable, "-m", "jft", *map(str, argv)]


def start(*argv, env):
    """Starts `jft`; its output goes where nobody waits for it to be read."""
    return subprocess.Popen(
        command(*argv), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(*argv, env):
    """Runs `jft` to its end; returns (exit code, stdout, stderr)."""
    done = subprocess.run(command(*argv), cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def wait_for(condition, process, limit_seconds=300.0):
    """Waits until `condition()` holds; False if the process ended before."""
    until = time.monotonic() + limit_seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.0005)
    return True


def logged_rows(workdir):
    """Returns the rows of metrics.jsonl without what depends on the clock."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def last_step(workdir):
    """Returns the newest checkpoint: every leaf, moving or frozen, checked against its hash."""
    restored = Checkpoints(workdir).restore()
    assert restored is not None and not restored.skipped, workdir
    return restored


def saved_steps(workdir):
    """Returns the numbers of the finished checkpoints, newest last, without reading them."""
    folder = Path(workdir) / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def assert_same_leaves(one, other):
    """Fails unless two {path: leaf} are equal bit for bit."""
    assert one.keys() == other.keys()
    for path in one:
        a, b = np.asarray(one[path]), np.asarray(other[path])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


def assert_same_end(workdir, straight):
    """Fails unless a run ended as the uninterrupted one: leaves, rows, saved steps, evaluation."""
    ended, wanted = last_step(workdir), last_step(straight)
    assert (ended.step, ended.info, ended.metrics) == (wanted.step, wanted.info, wanted.metrics)
    assert_same_leaves(ended.state, wanted.state)
    assert_same_leaves(ended.frozen, wanted.frozen)
    assert logged_rows(workdir) == logged_rows(straight)
    assert saved_steps(workdir) == saved_steps(straight)
    for name in ("val", "test"):
        file = f"eval/{name}.json"
        assert (Path(workdir) / file).read_bytes() == (Path(straight) / file).read_bytes(), file


def coloured(rng, label, side):
    """Returns noise uint8 [side, side + 4, 3] with more of one colour."""
    image = rng.integers(0, 140, (side, side + 4, 3))
    image[..., 2 - label] += 100
    return image.astype(np.uint8)


def write_photos(folder, train=8, val=4, test=4, side=20):
    """Writes folder/{train,val,test}/{blue,green,red}/*.png, coloured noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label, name in enumerate(COLOURS):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(coloured(rng, label, side))
                image.save(folder / split / name / f"{index}.png")
    return folder


def write_newcomer(folder):
    """Writes what the commands of the documents use: configs, photos of two classes, one more."""
    (folder / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (40, 36 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    Image.fromarray(pixels).save(folder / "new.jpg")
    return folder


def write_arrays(file, train=96, val=24, test=24, side=16):
    """Writes an npz of coloured noise in three splits."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("val", val), ("test", test)):
        labels = np.arange(count) % len(COLOURS)
        images = [coloured(rng, label, side)[:, :side] for label in labels]
        arrays |= {f"{split}_image": np.stack(images), f"{split}_label": labels}
    np.savez(file, **arrays)
    return file
