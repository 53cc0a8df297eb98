"""What `make_goldens.py` recorded of small models of timm and torchvision, replayed in jft."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import GRADIENTS, HIDDEN, LOGITS
from safetensors.numpy import save_file

from jft.models.mbconv import B0_BLOCKS, scale
from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
from jft.weights.recognise import recognise
from jft.weights.source import Source


@dataclass(frozen=True)
class Twin:
    """The model of jft that a golden is about.

    Attributes:
      variant: of jft.
      args: of the variant.
      loaded: arguments that the file asks for and that are changed back after it is read: what its
        reference computes otherwise than its authors did.
    """

    variant: str
    args: dict = field(default_factory=dict)
    loaded: dict = field(default_factory=dict)

    def model(self, golden, **changed):
        args = self.args | {"image_size": golden["image_shape"][1]} | changed
        return make_model(name=self.variant, args=args, num_classes=golden["logits"]["shape"][1])


def _lite(width, depth):
    """Blocks of a Lite network: the first and the last group do not repeat more often."""
    scaled = scale(B0_BLOCKS, width, depth)
    return tuple((1, *scaled[at][1:]) if at in (0, 6) else scaled[at] for at in range(7))


_SYMMETRIC = {"padding": "symmetric", "norm_epsilon": 1e-5}
_VIT_45 = {"patch": 9, "features": 60, "depth": 3, "heads": 5, "mlp_features": 90}
_VIT_32 = {"patch": 8, "features": 48, "depth": 2, "heads": 3, "mlp_features": 96}
_SWIN = {"features": 24, "depths": (2, 2), "heads": (2, 3), "mlp_ratio": 2.5}
TWINS = {
    "timm-efficientnet-symmetric": Twin(
        "efficientnet_b0", {"width": 0.3, "depth": 0.6, "divisor": 4} | _SYMMETRIC
    ),
    "timm-efficientnet-same": Twin("efficientnet_b0", {"width": 0.4, "depth": 0.3}),
    "timm-efficientnet-lite-symmetric": Twin(
        "efficientnet_lite0", {"blocks": _lite(0.3, 0.3)} | _SYMMETRIC
    ),
    "timm-efficientnet-lite-same": Twin("efficientnet_lite0", {"blocks": _lite(0.2, 0.6)}),
    "torchvision-efficientnet-7": Twin(
        "efficientnet_b0", {"width": 0.4, "depth": 0.4} | _SYMMETRIC
    ),
    "torchvision-efficientnet-3": Twin(
        "efficientnet_tiny",
        {"width": 0.5, "blocks": ((1, 5, 1, 1, 40), (3, 3, 2, 4, 48), (2, 5, 2, 3, 64))}
        | _SYMMETRIC,
    ),
    # timm reads AugReg's files with the exact GELU, which is not what they were trained with.
    "timm-vit-augreg-exact": Twin(
        "vit_tiny", _VIT_45 | {"epsilon": 1e-6, "gelu": "exact"}, {"gelu": "tanh"}
    ),
    "timm-vit-augreg-tanh": Twin("vit_tiny", _VIT_32 | {"epsilon": 1e-6, "gelu": "tanh"}),
    "timm-vit-token": Twin("vit_tiny", _VIT_45 | {"epsilon": 1e-6}),
    "timm-vit-pooled": Twin(
        "vit_tiny",
        _VIT_32
        | {"epsilon": 1e-6, "pooling": "mean", "norm_pooled": True, "qkv_bias": False}
        | {"layer_scale": True, "registers": 2},
    ),
    "timm-deit-distilled": Twin(
        "vit_tiny",
        _VIT_32 | {"epsilon": 1e-6, "distillation_token": True, "distillation_head": True},
    ),
    "timm-deit3": Twin(
        "vit_tiny", _VIT_45 | {"epsilon": 1e-6, "layer_scale": True, "class_position": False}
    ),
    "torchvision-vit-45": Twin("vit_tiny", _VIT_45 | {"epsilon": 1e-6}),
    "torchvision-vit-32": Twin("vit_tiny", _VIT_32 | {"epsilon": 1e-6, "mlp_features": 100}),
    "timm-convnext": Twin(
        "convnext_tiny",
        {"depths": (1, 2, 1, 1), "widths": (12, 20, 24, 36), "final_epsilon": 1e-6},
    ),
    "timm-convnextv2": Twin(
        "convnextv2_tiny",
        {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 40), "final_epsilon": 1e-6},
    ),
    "torchvision-convnext-4": Twin(
        "convnext_tiny",
        {"depths": (1, 2, 1, 1), "widths": (12, 20, 24, 36), "final_epsilon": 1e-6},
    ),
    "torchvision-convnext-2": Twin(
        "convnext_tiny", {"depths": (2, 1), "widths": (16, 24), "final_epsilon": 1e-6}
    ),
    "timm-clip-exact": Twin("clip_tiny", _VIT_45 | {"gelu": "exact", "pooling": "cls"}),
    "timm-clip-quick-mean": Twin("clip_tiny", _VIT_32 | {"gelu": "quick", "pooling": "mean"}),
    "timm-siglip-probe": Twin("siglip_tiny", _VIT_45 | {"gelu": "exact", "pooling": "probe"}),
    "timm-siglip-mean-tanh": Twin("siglip_tiny", _VIT_32 | {"gelu": "tanh", "pooling": "mean"}),
    "timm-swin-whole": Twin("swin_tiny", _SWIN | {"window": 3}),
    "timm-swin-padded": Twin("swin_tiny", _SWIN | {"window": 4, "padding": "after"}),
    "torchvision-swin-whole": Twin("swin_tiny", _SWIN | {"window": 3}),
    "torchvision-swin-padded": Twin("swin_tiny", _SWIN | {"window": 4}),
    "timm-resnet-basic": Twin("resnet18", {"depths": (1, 2, 1, 1), "widths": (16, 24, 32, 40)}),
    "timm-resnet-bottleneck": Twin(
        "resnet50",
        {"depths": (1, 1, 2, 1), "widths": (32, 64, 96, 128), "act": "silu", "inner_act": "silu"},
    ),
    "torchvision-resnet-basic": Twin("resnet18", {"depths": (1, 1, 1, 1)}),
    "torchvision-resnet-bottleneck": Twin("resnet50", {"depths": (1, 1, 1, 1)}),
    "timm-dinov2-token": Twin("dinov2_tiny", _VIT_45 | {"registers": 0, "pooling": "cls"}),
    "timm-dinov2-gated-registers": Twin(
        "dinov2_tiny",
        {"patch": 7, "features": 48, "depth": 2, "heads": 3, "mlp_features": 96, "gated": True}
        | {"registers": 3, "pooling": "mean", "class_position": False},
    ),
}


@functools.cache
def golden_of(name):
    return golden_files.load(name)


def write(folder, arrays):
    """`source` of a file with the arrays: npz for names of Flax, safetensors for those of torch."""
    if any("/" in name for name in arrays):
        np.savez(folder / "weights.npz", **arrays)
        return f"file:{folder / 'weights.npz'}"
    save_file(arrays, folder / "model.safetensors")
    return f"file:{folder / 'model.safetensors'}"


def load(name, folder, change=None):
    """(variables, report) through the real loader; `change` of the arrays makes a mutant."""
    golden, twin = golden_of(name), TWINS[name]
    arrays = golden_files.make_arrays(golden)
    source = write(folder, change(arrays) if change else arrays)
    return load_pretrained(twin.model(golden, **twin.loaded), source)


@functools.cache  # mutants of the arrays run what the model itself runs
def compiled(name, changed=()):
    """(variables, images) -> ((loss, outputs of stages), input gradient) of a golden's twin.

    Without the gradient, None in its place, where arguments are changed.
    """
    model = TWINS[name].model(golden_of(name), **dict(changed))

    def outputs(variables, x):
        states = {}
        for index, stage in enumerate(model.stages):
            x = states[stage] = model.apply(variables, x, start=index, stop=index + 1)
        return jax.nn.logsumexp(x, axis=1).sum(), states | {"logits": x}

    if changed:
        return jax.jit(lambda variables, x: (outputs(variables, x), None))
    return jax.jit(jax.value_and_grad(outputs, argnums=1, has_aux=True))


def distances(name, variables, changed=()):
    """{what: distance from the golden}, of the outputs of stages, logits and input gradient."""
    golden = golden_of(name)
    x = jnp.asarray(golden_files.pictures(golden["image_shape"]))
    (_, found), gradient = compiled(name, changed)(variables, x)
    wanted = golden["states"] | {"logits": golden["logits"]}
    if gradient is not None:
        wanted, found = wanted | {"gradient": golden["gradient"]}, found | {"gradient": gradient}
    return {what: float(golden_files.distance(found[what], it)) for what, it in wanted.items()}


# What others say too: in the long suite.
_LONG = (
    *("timm-efficientnet-lite-symmetric", "torchvision-efficientnet-3", "timm-deit3"),
    *("torchvision-vit-32", "torchvision-swin-whole", "torchvision-resnet-basic"),
    *("torchvision-convnext-4", "timm-siglip-mean-tanh", "timm-vit-pooled", "timm-clip-quick-mean"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in _LONG else []) for n in TWINS],
)
def test_outputs_of_stages_logits_and_input_gradients_are_the_originals(name, tmp_path):
    variables, report = load(name, tmp_path)
    assert report.coverage == 1.0 and report.paths("loaded") == [row.path for row in report.rows]
    for what, distance in distances(name, variables).items():
        bar = {"logits": LOGITS, "gradient": GRADIENTS}.get(what, HIDDEN)
        assert distance <= bar, what


def swap(arrays, parts):
    """The arrays with `parts` of their names in each other's place."""
    one, other = parts
    found = dict(arrays)
    for name in arrays:
        if one in name:
            twin = name.replace(one, other)
            found[name], found[twin] = arrays[twin], arrays[name]
    assert any(found[name] is not arrays[name] for name in arrays)
    return found


def roll(arrays, part):
    """The arrays with the leaves that those named so hold in another order."""
    held = {"attn.qkv": 3, "in_proj": 3, "mlp.fc1": 2, "attn_pool.kv": 2}[part]
    found = {n: np.roll(a, len(a) // held, axis=0) if part in n else a for n, a in arrays.items()}
    assert any(found[name] is not arrays[name] for name in arrays)
    return found


# golden -> {what is wrong: arguments, or a change of the arrays, that must show}
WRONG = {
    "timm-vit-augreg-exact": {
        "epsilon": {"epsilon": 1e-12},
        "gelu": {"gelu": "tanh"},
        "query and key": functools.partial(swap, parts=("query", "key")),
        "layers": functools.partial(swap, parts=("encoderblock_0", "encoderblock_1")),
    },
    "timm-efficientnet-symmetric": {
        "epsilon": {"norm_epsilon": 1e-3},
        "layers": functools.partial(swap, parts=("blocks.3.0.bn3", "blocks.3.1.bn3")),
    },
    "timm-efficientnet-same": {"padding": {"padding": "symmetric"}},
    "timm-efficientnet-lite-same": {
        "padding": {"padding": "symmetric"},
        "statistics": functools.partial(swap, parts=("running_mean", "bias")),
    },
    "timm-dinov2-gated-registers": {
        "epsilon": {"epsilon": 1e-12},
        "query and value": functools.partial(roll, part="attn.qkv"),
        "gate and up": functools.partial(roll, part="mlp.fc1"),
        "scales": functools.partial(swap, parts=("blocks.0.ls1", "blocks.0.ls2")),
    },
    "timm-vit-token": {
        "epsilon": {"epsilon": 1e-12},
        "query and value": functools.partial(roll, part="attn.qkv"),
    },
    "timm-deit-distilled": {"tokens": functools.partial(swap, parts=("cls_token", "dist_token"))},
    "timm-clip-exact": {"gelu": {"gelu": "quick"}, "epsilon": {"epsilon": 1e-6}},
    "timm-siglip-probe": {
        "key and value": functools.partial(roll, part="attn_pool.kv"),
        "gelu": {"gelu": "tanh"},
    },
    "timm-swin-whole": {
        "epsilon": {"epsilon": 1e-2},
        "tables": functools.partial(swap, parts=("0.attn.relative", "1.attn.relative")),
    },
    "timm-swin-padded": {"padding": {"padding": "before"}},
    "torchvision-swin-padded": {"padding": {"padding": "after"}},
    "timm-resnet-basic": {
        "epsilon": {"norm_epsilon": 1e-3},
        "layers": functools.partial(swap, parts=("layer2.1.conv1", "layer2.1.conv2")),
    },
    "timm-resnet-bottleneck": {"stride": {"stride_in": "conv1"}},
    "torchvision-vit-45": {
        "query and value": functools.partial(roll, part="in_proj"),
        "gelu": {"gelu": "tanh"},
    },
    "timm-convnext": {
        "final epsilon": {"final_epsilon": 1e-2},
        "gelu": {"gelu": "tanh"},
        "layers": functools.partial(swap, parts=("stages.1.blocks.0", "stages.1.blocks.1")),
    },
    "torchvision-convnext-2": {
        "layers": functools.partial(swap, parts=("features.1.0.block", "features.1.1.block")),
    },
    "timm-convnextv2": {
        "response": functools.partial(swap, parts=("mlp.grn.weight", "mlp.grn.bias")),
    },
    "torchvision-efficientnet-7": {
        "squeeze": functools.partial(swap, parts=("7.0.block.0.1.weight", "7.0.block.1.1.weight"))
    },
}


# Changed arguments are compiled anew, which takes its time for networks of convolutions.
_SLOW = ("efficientnet-symmetric", "efficientnet-lite", "convnext", "swin", "resnet")


def _marks(name, wrong):
    long = name in _LONG or not callable(wrong) and any(part in name for part in _SLOW)
    return [pytest.mark.slow] if long else []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        pytest.param(name, what, marks=_marks(name, one))
        for name, wrong in WRONG.items()
        for what, one in wrong.items()
    ],
)
def test_what_is_wrong_shows(name, what, tmp_path):
    wrong = WRONG[name][what]
    if callable(wrong):
        variables, _ = load(name, tmp_path, change=wrong)
        far = distances(name, variables)
    else:
        variables, _ = load(name, tmp_path)
        far = distances(name, variables, changed=tuple(wrong.items()))
    assert max(far[stage] for stage in golden_of(name)["states"]) > 2 * HIDDEN


@pytest.mark.parametrize("name", [name for name in TWINS if golden_of(name).get("config")])
def test_a_file_and_timms_config_tell_the_whole_model(name, tmp_path):
    golden, twin = golden_of(name), TWINS[name]
    source = Source(name, tmp_path, (), golden["config"])
    (match,) = recognise(source, golden_files.empty_arrays(golden["tensors"]))
    found = make_model(name=match.variant, args=match.args, num_classes=match.num_classes)
    wanted = twin.model(golden)
    assert found.module == wanted.module
    # Of networks that take any size timm states the one of the architecture, not of these images.
    if "img_size" in golden["config"].get("model_args", {}):
        assert found.preprocess.image_size == wanted.preprocess.image_size


# --- published sizes --------------------------------------------------------------------------

_SIZES = [*(f"b{number}" for number in range(5)), *(f"lite{number}" for number in range(5))]
_SHORT = {"tiny": "ti", "small": "s", "base": "b", "large": "l"}
_LETTERS = {size: size[0] for size in ("tiny", "small", "base", "large")}
_CONVNEXT = {
    "": _LETTERS,
    "v2": {"atto": "atto", "nano": "nano", "tiny": "t", "base": "b", "large": "l"},
}
_SIX, _FINAL_SIX = {"epsilon": 1e-6}, {"final_epsilon": 1e-6}
# Where timm states other images than those of our variants.
_TF_SIDES = {"lite3": 300, "lite4": 380}
_TIMM_SIDES = {"b2": 256, "b3": 288, "b4": 320} | _TF_SIDES


def _sized(size, sides):
    return {"image_size": sides[size]} if size in sides else {}


# file of shapes -> {name in its library: (variant of jft, its arguments)}
PUBLISHED = {
    "efficientnet": {
        **{
            f"timm/efficientnet_{of}": (f"efficientnet_{of}", _SYMMETRIC | _sized(of, _TIMM_SIDES))
            for of in _SIZES
        },
        **{
            f"timm/tf_efficientnet_{of}": (f"efficientnet_{of}", _sized(of, _TF_SIDES))
            for of in _SIZES
        },
        **{
            f"torchvision/efficientnet_{of}": (f"efficientnet_{of}", _SYMMETRIC)
            for of in _SIZES[:5]
        },
    },
    "vit": {
        **{
            f"timm/{kind}_{size}_patch16_224": (f"vit_{short}16", _SIX)
            for kind, size, short in (
                *(("vit", size, short) for size, short in _SHORT.items()),
                *(("deit", size, short) for size, short in list(_SHORT.items())[:3]),
            )
        },
        **{
            f"timm/vit_{size}_patch32_224": (f"vit_{size[0]}32", _SIX) for size in ("small", "base")
        },
        "timm/vit_large_patch32_384": ("vit_l32", _SIX | {"image_size": 384}),
        "timm/vit_base_patch16_224.mae": ("vit_b16", _SIX),
        **{
            f"torchvision/vit_{of}": (f"vit_{of.replace('_', '')}", _SIX)
            for of in ("b_16", "b_32", "l_16")
        },
    },
    "convnext": {
        **{
            f"timm/convnext_{size}": (f"convnext_{size[0]}", _FINAL_SIX)
            for size in ("tiny", "small", "base", "large")
        },
        **{
            f"timm/convnextv2_{size}": (f"convnextv2_{short}", _FINAL_SIX)
            for size, short in (
                ("atto", "atto"),
                ("nano", "nano"),
                ("tiny", "t"),
                ("base", "b"),
                ("large", "l"),
            )
        },
        **{
            f"torchvision/convnext_{size}": (f"convnext_{size[0]}", _FINAL_SIX)
            for size in ("tiny", "small", "base", "large")
        },
    },
    "clip": {
        f"timm/vit_{theirs}_clip_{side}": (f"clip_vit_{ours}", {"gelu": "exact", "pooling": "cls"})
        for theirs, side, ours in (
            ("base_patch32", 224, "b32"),
            ("base_patch16", 224, "b16"),
            ("large_patch14", 224, "l14"),
            ("large_patch14", 336, "l14_336"),
        )
    },
    "siglip": {
        f"timm/vit_{theirs}": (f"siglip_{ours}", {"gelu": "exact"} | args)
        for theirs, ours, args in (
            ("base_patch16_siglip_224", "b16_224", {"pooling": "probe"}),
            ("large_patch16_siglip_256", "l16_256", {"pooling": "probe"}),
            ("so400m_patch14_siglip_384", "so400m14_384", {"pooling": "probe"}),
            ("base_patch16_siglip_gap_224", "b16_224", {}),
        )
    },
    "swin": {
        **{
            f"timm/swin_{size}_patch4_window7_224": (f"swin_{size[0]}", {})
            for size in ("tiny", "small", "base", "large")
        },
        "timm/swin_base_patch4_window12_384": ("swin_b_384", {}),
        **{f"torchvision/swin_{of}": (f"swin_{of}", {}) for of in "tsb"},
    },
    "dinov2": {
        f"timm/vit_{size}_patch14_{registers}dinov2": (
            f"dinov2_{size[0]}14{registers and '_reg4'}",
            {"image_size": 518} | ({"class_position": False} if registers else {}),
        )
        for size in ("small", "base", "large", "giant")
        for registers in ("", "reg4_")
    },
    "resnet": {
        f"{library}/resnet{depth}": (f"resnet{depth}", {})
        for library in ("timm", "torchvision")
        for depth in (18, 34, 50, 101, 152)
    },
}
# Of each family a small one, and what stands for a form of its own.
_QUICK = (
    *("timm/efficientnet_b0", "torchvision/efficientnet_b0", "timm/tf_efficientnet_lite0"),
    *(
        "timm/vit_small_patch14_reg4_dinov2",
        "timm/vit_base_patch16_224.mae",
        "torchvision/vit_b_16",
    ),
    *("timm/convnext_tiny", "timm/convnextv2_atto", "timm/vit_base_patch16_clip_224"),
    *(
        "timm/vit_base_patch16_siglip_224",
        "timm/swin_tiny_patch4_window7_224",
        "torchvision/swin_t",
    ),
    *("torchvision/resnet18",),
)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if name in _QUICK else [pytest.mark.slow])
        for family, names in PUBLISHED.items()
        for name in names
    ],
)
def test_files_of_published_sizes_are_recognised_whole(family, name):
    """Every name is read or ignored, every leaf is filled: what a strict load asks for."""
    models = golden_of(f"shapes-{family}")["models"]
    config, tensors = models[name].get("config"), models[name]["tensors"]
    if isinstance(tensors, str):  # those of another model
        tensors = models[tensors]["tensors"]
    arrays = golden_files.empty_arrays(tensors)
    source = Source(name, Path(name), (), config)
    (match,) = recognise(source, arrays)
    assert (match.variant, dict(match.args)) == PUBLISHED[family][name]
    assert match.known + match.ignored == len(arrays)
    assert name.partition("/")[0] in match.table.title.lower()
    if config is None:
        return
    classes = match.num_classes or 1  # without a head there are none to count
    model = make_model(name=match.variant, args=match.args, num_classes=classes)
    written = match.table.config(model)
    assert written["num_classes"] == (config["num_classes"] or 1)
    first, theirs = written["pretrained_cfg"], config["pretrained_cfg"]
    assert first["first_conv"] == theirs["first_conv"]
    assert not match.num_classes or first["classifier"] == theirs["classifier"]
    said = match.table.fields or match.family.variant_from_config
    own = said(written)
    assert own.items() >= {k: v for k, v in said(config).items() if k in own}.items()
