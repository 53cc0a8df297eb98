"""What the goldens of other libraries and the tests that replay them share; numpy alone.

A golden holds the names and shapes of a model's arrays, never the arrays: both sides make the same
numbers from a name and a shape, `numpy.random.RandomState` being frozen for good.
"""

import gzip
import json
import re
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "goldens"
SAMPLES = 40  # positions of an array that are kept
GAIN = 2**0.5  # of kernels: keeps activations near 1 through layers that halve them
SMALL = 0.05  # so that a norm's epsilon shows


def save(name, content):
    """Writes a golden; the same content gives the same bytes."""
    text = json.dumps(content, separators=(",", ":")).encode()
    (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text, compresslevel=9, mtime=0))


def load(name):
    """The content of a golden."""
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def names():
    """Names of all goldens, sorted."""
    return sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))


def shapes_of(tensors):
    """{name: shape, or [shape, dtype] where it is not float32} of arrays or tensors."""
    found = {}
    for name, value in tensors.items():
        shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
        found[name] = shape if dtype == "float32" else [shape, dtype]
    return found


def make_arrays(golden):
    """The arrays of a golden: of `tensors`, with its `gain`, those that `small` matches small."""
    arrays, gain, small = {}, golden["gain"], golden["small"]
    for name, value in golden["tensors"].items():
        array = make_array(name, *_shape_dtype(value), gain)
        arrays[name] = array * np.float32(SMALL) if re.fullmatch(small, name) else array
    return arrays


def empty_arrays(shapes):
    """Arrays of a golden's `tensors` that take no memory: every element is the same zero."""
    found = {}
    for name, value in shapes.items():
        shape, dtype = _shape_dtype(value)
        found[name] = np.broadcast_to(np.zeros((), dtype), shape)
    return found


def _shape_dtype(value):
    if value and isinstance(value[0], list):
        return tuple(value[0]), np.dtype(value[1])
    return tuple(value), np.dtype("float32")


def make_array(name, shape, dtype=np.float32, gain=GAIN):
    """An array that its name and shape decide: kernels scaled by their fan-in, scales near 1."""
    if np.issubdtype(dtype, np.integer):
        return _integers(name, shape).astype(dtype)
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.replace("/", ".").rsplit(".", 1)[-1]
    if leaf in ("running_var", "var"):
        draw = np.exp(0.3 * draw)
    elif leaf in ("gamma", "scale", "layer_scale", "lambda1") or (
        leaf == "weight" and len(shape) == 1
    ):
        draw = 1.0 + 0.2 * draw
    elif leaf in ("bias", "running_mean", "mean", "in_proj_bias"):
        draw = 0.2 * draw
    elif leaf in ("weight", "in_proj_weight"):  # torch: [out, in, ...]
        draw = draw * (gain * np.prod(shape[1:]) ** -0.5)
    elif leaf == "kernel":  # Flax: [..., in, out]; of query, key and value [in, heads, out / heads]
        apart = name.split("/")[-2] in ("query", "key", "value")
        draw = draw * (gain * np.prod(shape[:1] if apart else shape[:-1]) ** -0.5)
    else:  # tokens, positions
        draw = 0.5 * draw
    return draw.astype(dtype)


def _integers(name, shape):
    """Buffers that no weights fill: counters, and the table look-ups of square windows."""
    if not name.endswith("relative_position_index"):
        return np.zeros(shape, np.int64)
    side = round(np.prod(shape) ** 0.25)
    row, column = np.divmod(np.arange(side * side), side)
    down, right = (at[:, None] - at[None] + side - 1 for at in (row, column))
    return (down * (2 * side - 1) + right).reshape(shape)


def pictures(shape, seed=1):
    """Images [B, H, W, C], standard normal, float32."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def _positions(size):
    return np.random.RandomState(size % 2**32).randint(0, size, SAMPLES)


def sample(array):
    """Shape, mean, deviation, largest magnitude and some values of an array."""
    array = np.asarray(array, np.float64)
    values = (
        array.reshape(-1) if array.size <= SAMPLES else array.reshape(-1)[_positions(array.size)]
    )
    numbers = {"mean": array.mean(), "std": array.std(), "largest": np.abs(array).max()}
    short = {name: float(f"{value:.9g}") for name, value in numbers.items()}
    return {
        "shape": list(array.shape),
        **short,
        "values": [float(f"{value:.9g}") for value in values],
    }


def distance(found, wanted):
    """max abs(a - b) / max(1, max abs(b)) of an array and a `sample`, moments included."""
    found = sample(found)
    assert found["shape"] == wanted["shape"], (found["shape"], wanted["shape"])
    off = np.abs(np.subtract(found["values"], wanted["values"])).max()
    off = max(off, *(abs(found[name] - wanted[name]) for name in ("mean", "std", "largest")))
    return off / max(1.0, wanted["largest"])
