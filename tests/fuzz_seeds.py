"""Small good files of every format that jft reads: what the fuzzer mutates.

A file is {name: content}; a folder of shards has several names. They hold what trips readers: views
and transposes, one storage under two names, scalars, empty tensors, bfloat16 and float8, names that
are long, wrappers around a state_dict, and no tensor at all.
"""

import functools
import io
import json
import struct
import zipfile

import hostile_torch as make
import ml_dtypes
import numpy as np
from safetensors.numpy import save

Files = dict[str, bytes]
MAIN = "weights"
INDEX = "model.safetensors.index.json"
READERS = ("safetensors", "shards", "npz", "torch-zip", "torch-legacy", "configs")

CONFIG = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "id2label": {"0": "ant", "1": "bee"},
    "label2id": {"ant": 0, "bee": 1},
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "crop_pct": None,
}
CARD = {
    "format_version": 1,
    "family": "vit",
    "variant": "vit_tiny",
    "model_args": {"depth": 2, "dtype": "float32"},
    "num_classes": 2,
    "label_names": ["ant", "bee"],
    "preprocess": {
        "mean": [127.5, 127.5, 127.5],
        "std": [127.5, 127.5, 127.5],
        "image_size": 32,
        "crop_fraction": 0.875,
        "interpolation": "bicubic",
        "antialias": True,
    },
    "weights_sha256": "0" * 64,
}


@functools.cache
def seeds(reader: str) -> tuple[Files, ...]:
    """The good files of one reader, each of which it must read."""
    single = {"safetensors": _safetensors, "npz": _npz, "torch-zip": _zips, "torch-legacy": _older}
    if reader in single:
        return tuple({MAIN: content} for content in single[reader]())
    return tuple(_shards() if reader == "shards" else _configs())


def arrays() -> dict[str, np.ndarray]:
    """A few tensors of different shapes and dtypes."""
    rng = np.random.default_rng(0)
    return {
        "layer.0.weight": rng.normal(size=(2, 3)).astype(np.float32),
        "layer.0.bias": rng.normal(size=3).astype(ml_dtypes.bfloat16),
        "layer.1.weight": rng.normal(size=(2, 1, 2)).astype(np.float16),
        "count": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False]),
    }


def _safetensors() -> list[bytes]:
    header = json.dumps({"f8": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return [
        save(arrays(), metadata={"format": "pt"}),
        save({"a" * 200: np.ones(2)}),
        struct.pack("<Q", len(header)) + header + bytes(range(4)),
        save({}),
        save({"empty": np.zeros((0, 2), np.float32)}),
    ]


def _shards() -> list[Files]:
    parts = [dict(list(arrays().items())[at::2]) for at in range(2)]
    names = [f"model-{k + 1:05}-of-00002.safetensors" for k in range(2)]
    index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    content = {"metadata": {"total_size": 60}, "weight_map": index}
    folder = {name: save(part) for name, part in zip(names, parts, strict=True)}
    folder[INDEX] = json.dumps(content).encode()
    return [folder, folder | {"config.json": json.dumps(CONFIG).encode()}]


def _configs() -> list[Files]:
    """The configs of every family's tiny model, in each style that it writes."""
    from jft.models.zoo import FAMILIES, make_model
    from jft.weights.preprocessing import to_hugging_face

    weights = {"model.safetensors": save({"classifier.bias": np.zeros(2, np.float32)})}
    twice = PROCESSOR | {"image_processor_type": "EfficientNetImageProcessor", "include_top": True}
    documents = [{"config.json": CONFIG, "preprocessor_config.json": PROCESSOR, "jft.json": CARD}]
    for family in FAMILIES.values():
        tiny = next(name for name in family.variants if name.endswith("_tiny"))
        model = make_model(name=tiny, num_classes=2)
        writers = [family.source_config, *(table.config for table in family.tables)]
        for write in filter(None, dict.fromkeys(writers)):
            processor = to_hugging_face(model.preprocess)
            documents.append({"config.json": write(model), "preprocessor_config.json": processor})
    documents.append({"config.json": CONFIG, "preprocessor_config.json": twice})
    return [
        weights | {name: json.dumps(content).encode() for name, content in one.items()}
        for one in documents
    ]


def _npz() -> list[bytes]:
    tensors = {f"params/{name}": value for name, value in arrays().items()}
    tensors["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    tensors["big"] = np.arange(3, dtype=">f4")
    made = []
    for save_npz, content in (
        (np.savez, tensors),
        (np.savez_compressed, tensors),
        (np.savez, {"a": np.arange(3)}),
    ):
        buffer = io.BytesIO()
        save_npz(buffer, **content)
        made.append(buffer.getvalue())
    return made


def _pickles(legacy: bool) -> list[bytes]:
    def storage(key: str = "0", numel: int = 6, kind: str = "FloatStorage") -> bytes:
        return make.storage(key, numel, kind, legacy)

    views = {
        "transposed": make.tensor(storage(), (3, 2), (1, 3)),
        "row": make.tensor(storage(), (3,), (1,), offset=3),
        "scalar": make.tensor(storage(), (), (), offset=5),
        "empty": make.tensor(storage(), (0, 3), (3, 1)),
        "parameter": make.name("torch._utils", "_rebuild_parameter")
        + b"("
        + make.tensor(storage())
        + b"\x88"
        + make.name("collections", "OrderedDict")
        + b")RtR",
    }
    many = b"".join(make.text(name) + value for name, value in views.items())
    half = make.tensor(storage(numel=12, kind="BFloat16Storage"), (3, 4), (4, 1))
    inner = make.state_dict(make.tensor(storage()))[2:-1]
    memo = b"q\x00" + b"}q\x01X\x09\x00\x00\x00_metadatah\x01sb"  # as torch writes it
    ordered = make.name("collections", "OrderedDict") + b")R" + memo
    untyped = (
        make.name("torch._utils", "_rebuild_tensor_v3")
        + b"("
        + make.storage("0", 24, "FloatStorage", legacy).replace(
            make.name("torch", "FloatStorage"), make.name("torch.storage", "UntypedStorage")
        )
        + make.number(0)
        + make.numbers((4,))
        + make.numbers((1,))
        + b"\x89"
        + make.name("collections", "OrderedDict")
        + b")R"
        + make.name("torch", "uint16")
        + b"tR"
    )
    return [
        make.state_dict(make.tensor(storage())),
        make.state_dict(make.tensor(storage()) + many),
        make.state_dict(half),
        b"\x80\x02}(" + make.text("epoch") + make.number(3) + make.text("model") + inner + b"u.",
        b"\x80\x02" + ordered + b"(" + make.text("w") + make.tensor(storage()) + b"u.",
        make.state_dict(untyped),
    ]


def _zips() -> list[bytes]:
    made = [make.archive(pickled) for pickled in _pickles(legacy=False)]
    two = make.state_dict(
        make.tensor(make.storage())
        + make.text("v")
        + make.tensor(make.storage("1", 3, "LongStorage"), (3,), (1,))
    )
    version = ("archive/version", b"3\n")
    return [
        *made,
        make.archive(two, members=(("archive/data/1", struct.pack("<3q", 1, 2, 3)), version)),
    ]


def _older() -> list[bytes]:
    made = []
    for pickled in _pickles(legacy=True):
        numel = 12 if b"BFloat16" in pickled else 24 if b"Untyped" in pickled else 6
        made.append(make.older(pickled, counts=(numel,)))
    return made


def members_of(content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
    """Members of a zip archive with their contents."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]
