"""A frozen prefix: the stages below a cut, what they see, and the key of what they compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.data.decode import BadImage
from jft.data.protocol import Source, root_of
from jft.train.parallel import Parallel
from jft.tree import Flat, unflatten

CHUNK = 256  # examples a chunk: enough to fill an accelerator, few enough for a CPU's memory
_SAMPLED = 64  # images whose pixels stand for a split that does not lie in memory


def split_identity(source: Source) -> str:
    """Returns a hash of a split: every label and name, and pixels.

    All pixels where images lie in memory, else those of 64 examples spread evenly; of what
    data.cache decoded the key, which tells of every file.
    """
    found = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    found.update(json.dumps([len(source), list(source.label_names)]).encode())
    decoded = getattr(root_of(source), "canvases", None)
    whole = decoded is None and source.gather(np.zeros(1, np.int64)) is not None
    for start in range(0, len(source), 4096):
        indices = np.arange(start, min(start + 4096, len(source)))
        found.update("\0".join(source.id(int(index)) for index in indices).encode())
        if whole:
            images = np.ascontiguousarray(source.gather(indices))
            found.update(str(images.shape).encode() + images.tobytes())
    if decoded is not None:
        found.update(decoded.key.encode())
    elif not whole:
        for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int):
            try:
                found.update(np.ascontiguousarray(source[int(index)]["image"]).tobytes())
            except BadImage as error:
                found.update(str(error).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Prefix:
    """The stages below a cut and what they see.

    Attributes:
      apply: of the model, with `start` and `stop`.
      transform: (uint8 images, example [B], view [B]) -> model input; see make_view_transform.
      stages: of the model, from input to output.
      cuts: ascending; the last is the cut, the others are where its computation is divided, so that
        the entries of a shallower cut can be its input without changing a bit.
      image_shape: (H, W, C) of the host's images.
      image_dtype: of the host's images: uint8 or uint16.
      views: K.
      described: JSON of all that decides the input and the model beside the weights:
        preprocessing, augmentation, seed, model and its arguments, `split_identity`.
      chunk: examples that are computed at once.
    """

    apply: Callable[..., Any]
    transform: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    stages: tuple[str, ...]
    cuts: tuple[int, ...]
    image_shape: tuple[int, int, int]
    views: int
    described: Mapping[str, Any]
    chunk: int = CHUNK
    image_dtype: np.dtype = np.dtype(np.uint8)

    @property
    def cut(self) -> int:
        """Number of stages below the cut."""
        return self.cuts[-1]

    def until(self, part: int) -> Prefix:
        """The prefix that ends at the cut of that index."""
        fields = {**vars(self), "cuts": self.cuts[: part + 1]}
        return Prefix(**fields)

    def variables(self, params: Flat, stats: Flat, start: int, stop: int) -> dict[str, Any]:
        """The leaves of stages [start, stop), as the model takes them."""
        used = set(self.stages[start:stop])
        kept = [
            {path: leaf for path, leaf in flat.items() if path.split("/")[0] in used}
            for flat in (params, stats)
        ]
        nested = {"params": unflatten(kept[0])}
        return nested | ({"batch_stats": unflatten(kept[1])} if kept[1] else {})

    def entry(self, params: Flat, stats: Flat) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one entry, from leaves or their shapes."""

        def run(variables: Any, image: jax.Array) -> jax.Array:
            index = jnp.zeros(1, jnp.int32)
            return self.apply(variables, self.transform(image, index, index), stop=self.cut)

        image = jax.ShapeDtypeStruct((1, *self.image_shape), self.image_dtype)
        out = jax.eval_shape(run, self.variables(params, stats, 0, self.cut), image)
        return jax.ShapeDtypeStruct(out.shape[1:], out.dtype)

    def key(self, params: Flat, stats: Flat, parallel: Parallel) -> str:
        """Hash of all that decides the entries."""
        device = parallel.mesh.devices.flat[0]
        facts = {
            "format": 1,
            "described": self.described,
            "cuts": self.cuts,
            "views": self.views,
            "image_shape": self.image_shape,
            "image_dtype": self.image_dtype.name,
            "chunk": chunk_rows(self, parallel),
            "devices": [parallel.num_devices, device.platform, device.device_kind],
            "jax": jax.__version__,
        }
        found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        used = set(self.stages[: self.cut])
        for kind, flat in (("params", params), ("batch_stats", stats)):
            for path in sorted(flat):
                if path.split("/")[0] in used:
                    leaf = np.asarray(flat[path])
                    found.update(f"{kind}/{path} {leaf.dtype.name}{leaf.shape}".encode())
                    found.update(np.ascontiguousarray(leaf).tobytes())
        return found.hexdigest()


def chunk_rows(prefix: Prefix, parallel: Parallel) -> int:
    """Examples a chunk, in equal shares for all devices."""
    devices = parallel.num_devices
    return -(-prefix.chunk // devices) * devices
