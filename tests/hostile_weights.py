"""What the tests of hostile weights try, in a process with limits: `python FILE KIND [few]`.

Prints {case: [outcome, message]} as JSON. A case is a folder of files; the judge of the fuzzer
watches memory, time and side effects of each.
"""

import functools
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations
import fuzz_seeds
import hostile_torch
import numpy as np
from fuzz_readers import Judge
from fuzz_seeds import MAIN, Files
from safetensors.numpy import load, save

Arrays = dict[str, np.ndarray]
FORMATS = ("safetensors", "npz", "torch-zip", "torch-legacy")
CUTS = 50  # random places of each file
FEW_SWAPS = 1  # partners of each tensor in the short form
# Of the models, the smallest that have every kind of leaf, {variant: (arguments, naming style)}:
# one chain of blocks, one with statistics, and one of timm's whose query, key and value are one
# tensor and whose blocks are counted by stages.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny": ({"depth": 1}, 0),
    "efficientnet_tiny": ({"blocks": [[1, 3, 1, 1, 8], [1, 5, 2, 3, 16]]}, 0),
    "swin_tiny": ({"depths": (1, 2)}, 1),
}


def file_cases() -> Iterator[tuple[str, Files]]:
    """Cut, absurd and hostile files of every format."""
    from test_readers import BAD_NPZ, BAD_SAFETENSORS

    for reader in FORMATS:
        for at, files in enumerate(fuzz_seeds.seeds(reader)):
            for length in _lengths(reader, len(files[MAIN])):
                yield f"{reader} {at} cut to {length}", {MAIN: files[MAIN][:length]}
    for what, content in (BAD_SAFETENSORS | _absurd_headers()).items():
        yield f"safetensors: {what}", {MAIN: content}
    for what, content in BAD_NPZ.items():
        yield f"npz: {what}", {MAIN: content}
    for what, content in hostile_torch.hostile(Path(fuzz_mutations._MARKER)).items():
        yield f"torch {what}", {MAIN: content}


def folder_cases() -> Iterator[tuple[str, Files]]:
    """Shards of which one is cut, missing or another's, and indexes that lie."""
    whole = fuzz_seeds.seeds("shards")[0]
    for name, content in whole.items():
        for length in _lengths(name, len(content)):
            yield f"{name} cut to {length}", whole | {name: content[:length]}
        yield f"{name} missing", {other: c for other, c in whole.items() if other != name}
    first, second = sorted(name for name in whole if name != fuzz_seeds.INDEX)
    yield "shards change places", whole | {first: whole[second], second: whole[first]}
    yield "a shard twice", whole | {second: whole[first]}
    index = json.loads(whole[fuzz_seeds.INDEX])["weight_map"]
    tensor = next(iter(index))
    maps = {
        "a tensor more": index | {"more": first},
        "a tensor less": {name: file for name, file in index.items() if name != tensor},
        "a tensor elsewhere": index | {tensor: second},
        "a file outside": index | {tensor: "../" + index[tensor]},
        "an absolute file": index | {tensor: "/etc/passwd"},
        "a folder": index | {tensor: "."},
        "a name of a megabyte": index | {"x" * (1 << 20): first},
        "a file name of a megabyte": index | {tensor: "x" * (1 << 20)},
        "a file name with a zero byte": index | {tensor: "a\0b"},
        "a number for a file": index | {tensor: 7},
        "a list for a map": list(index),
        "no map": {},
        "2,000 files": {f"t{i}": f"{i}.safetensors" for i in range(2_000)},
        "half a million tensors": {f"t{i}": first for i in range(500_000)},
    }
    for what, weight_map in maps.items():
        content = json.dumps({"weight_map": weight_map}).encode()
        yield f"the index names {what}", whole | {fuzz_seeds.INDEX: content}
    deep = b'{"weight_map":' + b"[" * 200_000
    yield "an index too deep", whole | {fuzz_seeds.INDEX: deep}


def _lengths(what: str, size: int) -> list[int]:
    rng = Random(what)
    return sorted({*(rng.randrange(size) for _ in range(CUTS)), 0, size - 1})


def _absurd_headers() -> dict[str, bytes]:
    """Headers that a generic parser takes seconds or gigabytes for."""
    one = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = "{" + ",".join(f'"{i}":{one}' for i in range(110_000)) + "}"
    long = "{" + ",".join(f'"{"x" * 600}{i}":{one}' for i in range(10_000)) + "}"
    wide = '{"a":{"dtype":"F32","shape":[' + "1," * 2_000_000 + '1],"data_offsets":[0,4]}}'
    meta = '{"__metadata__":{"a":"' + "x" * (8 << 20) + '"}}'
    texts = {"110,000 tensors": many, "a shape of millions": wide, "long names": long}
    texts["metadata beyond the limit"] = meta
    made = {what: len(text).to_bytes(8, "little") + text.encode() for what, text in texts.items()}
    made["all bits set"] = b"\xff" * 8 + b"{" * 64
    return made


def key_cases(name: str, few: bool = False) -> Iterator[tuple[str, Files]]:
    """Each tensor of a model dropped, renamed, transposed, swapped and more."""
    good = _model(name)[1]
    arrays = load(good["model.safetensors"])
    counters = {key for key in arrays if key.endswith("num_batches_tracked")}
    needed = [key for key in arrays if key not in counters]
    for what, changed in _changed(arrays, needed, few):
        yield what, good | {"model.safetensors": save(changed)}
    yield "a key more", good | {"model.safetensors": save(arrays | {"more": np.ones(2)})}
    for what, more in _many(needed).items():
        yield f"keys by the ten thousand {what}", good | {"model.safetensors": save(arrays | more)}
    yield "no key", good | {"model.safetensors": save({})}
    other = next(one for one in MODELS if one != name)
    yield "another model's", good | {"model.safetensors": _model(other)[1]["model.safetensors"]}


def _many(needed: list[str]) -> dict[str, Arrays]:
    """Tensors by the ten thousand: of no known name, and of layers that no model has."""
    empty = np.zeros(0, np.float32)
    mark = ".1." if any(".1." in key for key in needed) else ".0."
    # The order of the keys of a file is another one in every process.
    template = min(key for key in needed if mark in key).replace(mark, ".{}.", 1)
    return {
        "more": {f"x{i}": empty for i in range(49_000)},
        "deeper": {template.format(i): empty for i in range(100, 30_100)},
    }


def shown_cases() -> Iterator[tuple[str, Files]]:
    """Files and configs that claim models without end, for what looks for the model of a file."""
    for name in MODELS:
        good = _model(name)[1]
        arrays, config = load(good["model.safetensors"]), json.loads(good["config.json"])
        needed = [key for key in arrays if not key.endswith("num_batches_tracked")]
        for what, more in _many(needed).items():
            yield (
                f"{name}: keys by the ten thousand {what}",
                good | {"model.safetensors": save(arrays | more)},
            )
        for key, value in config.items():
            if isinstance(value, int | float | list) and not isinstance(value, bool):
                whole = not isinstance(value, list)
                for absurd in (10**6, 10**9, 10**30) if whole else ([10**6] * 7, [10**9] * 7):
                    content = json.dumps(config | {key: absurd}).encode()
                    yield f"{name}: {key} = {absurd}", good | {"config.json": content}


def _changed(arrays: Arrays, needed: list[str], few: bool) -> Iterator[tuple[str, Arrays]]:
    for key in needed:
        value = arrays[key]
        rest = {other: array for other, array in arrays.items() if other != key}
        yield f"{key} dropped", rest
        names = (key + "_", key.upper(), "model." + key, key.replace(".", "/"))
        for new in names[:1] if few else names:
            yield f"{key} renamed {new}", rest | {new: value}
        orders = itertools.permutations(range(value.ndim))
        moved = {axes: np.ascontiguousarray(value.transpose(axes)) for axes in orders}
        moved = {axes: array for axes, array in moved.items() if array.shape != value.shape}
        for axes in list(moved)[-1:] if few else moved:
            yield f"{key} transposed {axes}", rest | {key: moved[axes]}
        yield f"{key} with an axis more", rest | {key: value[None]}
        yield f"{key} one row longer", rest | {key: np.concatenate([value, value[:1]])}
        yield f"{key} of whole numbers", rest | {key: value.astype(np.int32)}
        broken = value.copy()
        broken.flat[-1] = np.nan
        yield f"{key} with a NaN", rest | {key: broken}
    shapes: dict[tuple[int, ...], str] = {}
    for key in needed:
        shapes.setdefault(arrays[key].shape, key)
    for at, key in enumerate(needed):  # every tensor with one of each other shape
        others = [other for shape, other in shapes.items() if shape != arrays[key].shape]
        for k in range(FEW_SWAPS if few else len(others)):
            other = others[(at + k) % len(others)]
            swapped = arrays | {key: arrays[other], other: arrays[key]}
            yield f"{key} and {other} change places", swapped


@functools.cache
def _model(name: str) -> tuple[Any, Files]:
    """A model and a folder of random weights for it."""
    import tempfile

    from jft.models.zoo import make_model
    from jft.weights.convert import load_pretrained
    from jft.weights.export import export_weights

    args, table = MODELS[name]
    model = make_model(name=name, args=args, num_classes=5)
    variables, _ = load_pretrained(model, "random:0")
    with tempfile.TemporaryDirectory() as folder:
        export_weights(model, variables, folder, table=table)
        return model, {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _loader(name: str) -> Callable[[Path], Any]:
    from jft.weights import convert, naming

    model, *_ = [_model(one)[0] for one in (name, *MODELS)]  # each, before the next line but one
    leaves = naming.abstract_leaves(model)
    naming.abstract_leaves = lambda *_: leaves  # the same for every source

    def load_into(folder: Path) -> dict[str, Any]:
        convert.load_pretrained(model, f"file:{folder}")
        return {}

    return load_into


def judge_of(kind: str, few: bool = False) -> tuple[Judge, list[tuple[str, Files]]]:
    """The cases of a kind, and a judge for them, with its limits set behind them."""
    from jft.weights.readers import read, read_file
    from jft.weights.recognise import recognise
    from jft.weights.source import resolve

    def show(folder: Path) -> dict[str, Any]:
        found = resolve(f"file:{folder}")
        return {str(at): np.zeros(1) for at, _ in enumerate(recognise(found, read(found)))}

    if kind == "files":
        cases = list(file_cases())
        good = [files for one in FORMATS for files in fuzz_seeds.seeds(one)]
        warm_up = [{MAIN: files[MAIN][:-1]} for files in good]
        return Judge(lambda folder: read_file(folder / MAIN), good, warm_up), cases
    if kind == "folders":
        cases, good = list(folder_cases()), fuzz_seeds.seeds("shards")
        warm_up = [files | {fuzz_seeds.INDEX: b"{"} for files in good]
        return Judge(lambda folder: read(resolve(f"file:{folder}")), good, warm_up), cases
    if kind == "shown":
        cases, good = list(shown_cases()), [_model(name)[1] for name in MODELS]
        return Judge(show, good, [files for _, files in cases[:8]]), cases
    cases = list(key_cases(kind, few))
    return Judge(_loader(kind), [_model(kind)[1]], [files for _, files in cases[:20]]), cases


def main(kind: str, few: bool) -> None:
    """Runs the cases of a kind."""
    judge, cases = judge_of(kind, few)
    try:
        outcomes = {what: judge.run(files) for what, files in cases}
    finally:
        judge.close()
    out = io.StringIO()
    json.dump(outcomes, out)
    print(out.getvalue())


if __name__ == "__main__":
    main(sys.argv[1], few=sys.argv[2:] == ["few"])
