"""Loads exports of jft in timm and torchvision, strictly, and compares logits; run by hand.

    pip install -e '.[test,parity]'
    pip install --no-deps timm==1.0.31 torchvision==0.28.0   # they would ask for another torch
    pip install pyyaml
    OMP_NUM_THREADS=1 python tests/check_timm_export.py [WORD...]   # cases whose line has a word

A line a case: what is exported, how it is loaded, and max abs(a - b) / max(1, max abs(b)) of the
logits, in float32. Exits with 1 where a case is above the bar of `parity.LOGITS`.
"""

import functools
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import golden_files
import jax
import numpy as np
import torch
from make_goldens import CLASSES, timm, torchvision
from parity import LOGITS, distance, torch_images
from safetensors.torch import load_file

from jft.models.zoo import make_model
from jft.tree import unflatten
from jft.weights.export import export_weights
from jft.weights.naming import abstract_leaves, naming_of

LOCAL = "timm.create_model('local-dir:{folder}', pretrained=True)"


@dataclass(frozen=True)
class Export:
    """One export.

    Attributes:
      variant: of jft.
      names: title of the table whose names are written.
      loader: Python that makes the model; LOCAL reads config.json and weights by itself, others
        get the weights by a strict `load_state_dict`.
      args: of the variant.
      gain: as of a golden.
    """

    variant: str
    names: str
    loader: str = LOCAL
    args: dict = field(default_factory=dict)
    gain: float = golden_files.GAIN


SYMMETRIC = {"padding": "symmetric", "norm_epsilon": 1e-5}
_ODD_SWIN = {
    "features": 24,
    "depths": (2, 2),
    "heads": (2, 3),
    "window": 4,
    "mlp_ratio": 2.5,
    "image_size": 52,
}
TORCHVISION_SWIN = (
    "torchvision.models.SwinTransformer(patch_size=[4, 4], embed_dim=24, depths=[2, 2], "
    f"num_heads=[2, 3], window_size=[4, 4], mlp_ratio=2.5, num_classes={CLASSES})"
)
_SIX = {"epsilon": 1e-6}
SIZED = {"image_size": 64}
EPSILON = {"epsilon": 1e-6}
VISION = "torchvision.models.VisionTransformer"


def timm_tiny(blocks, features, act, pad, epsilon):
    """The constructor of a size that timm has no name for."""
    return (
        f"timm.models.efficientnet.EfficientNet({ARCH}({blocks}), num_classes={CLASSES}, "
        f"num_features={features}, stem_size=8, fix_stem=True, act_layer={act!r}, "
        f"pad_type={pad!r}, norm_layer=functools.partial(torch.nn.BatchNorm2d, eps={epsilon}))"
    )


ARCH = "timm.models._efficientnet_builder.decode_arch_def"
TINY = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k3_s2_e3_c24_se0.25"], ["ir_r1_k5_s2_e3_c32_se0.25"]]
LITE_TINY = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e3_c16"], ["ir_r1_k5_s2_e3_c24"]]
CONFIGS = (
    "[torchvision.models.efficientnet.MBConvConfig(*sizes, width_mult=0.25, depth_mult=1.0) "
    "for sizes in [(1, 3, 1, 32, 64, 1), (3, 3, 2, 64, 96, 2), (3, 5, 2, 96, 128, 1)]]"
)
EXPORTS = [
    Export("efficientnet_tiny", "timm", timm_tiny(TINY, 320, "swish", "same", 1e-3)),
    Export("efficientnet_tiny", "timm", timm_tiny(TINY, 320, "swish", "", 1e-5), SYMMETRIC),
    Export(
        "efficientnet_tiny",
        "torchvision",
        f"torchvision.models.EfficientNet({CONFIGS}, 0.2, num_classes={CLASSES}, last_channel=320)",
        SYMMETRIC,
    ),
    Export("efficientnet_lite_tiny", "timm", timm_tiny(LITE_TINY, 64, "relu6", "same", 1e-3)),
    Export(
        "efficientnet_lite_tiny", "timm", timm_tiny(LITE_TINY, 64, "relu6", "", 1e-5), SYMMETRIC
    ),
    *(
        Export(variant, "timm", args=args | SIZED, gain=1.45)
        for variant in ("efficientnet_b0", "efficientnet_b1", "efficientnet_lite0")
        for args in ({}, SYMMETRIC)
    ),
    *(
        Export("dinov2_tiny", "timm", args={"pooling": pooling, "gated": gated, "registers": count})
        for pooling in ("cls", "mean")
        for gated, count in ((False, 0), (True, 0))
    ),
    *(
        Export(
            "dinov2_tiny",
            "timm",
            args={"pooling": "cls", "class_position": False, "gated": gated, "registers": count},
        )
        for gated, count in ((False, 0), (True, 2))
    ),
    *(
        Export("vit_tiny", "timm", args=_SIX | args)
        for args in (
            {},
            {"pooling": "mean", "layer_scale": True, "registers": 2},
            {"class_position": False, "layer_scale": True, "gelu": "tanh"},
            {"distillation_token": True, "distillation_head": True},
        )
    ),
    Export(
        "vit_tiny",
        "timm, norm after the mean",
        args=_SIX | {"pooling": "mean", "norm_pooled": True, "qkv_bias": False},
    ),
    Export(
        "vit_tiny",
        "torchvision",
        "torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=4, "
        f"num_heads=4, hidden_dim=32, mlp_dim=64, num_classes={CLASSES})",
        _SIX,
    ),
    *(
        Export(
            f"convnext{second}_tiny",
            "timm",
            args={"depths": (1, 2, 1, 1), "widths": (16, 24, 32, 40), "final_epsilon": 1e-6},
        )
        for second in ("", "v2")
    ),
    *(
        Export("clip_tiny", "timm", args={"gelu": gelu, "pooling": pooling})
        for gelu, pooling in (("exact", "cls"), ("quick", "mean"))
    ),
    *(
        Export("siglip_tiny", "timm", args={"gelu": gelu, "pooling": pooling})
        for gelu, pooling in (("exact", "probe"), ("tanh", "mean"))
    ),
    Export("swin_tiny", "timm", args={"padding": "after"}),
    Export("resnet_tiny", "timm and torchvision"),
    *(
        Export(f"resnet{depth}", "timm and torchvision", loader, SIZED)
        for depth in (18, 50)
        for loader in (LOCAL, f"torchvision.models.resnet{depth}(num_classes={CLASSES})")
    ),
    Export("swin_tiny", "timm", args={"qkv_bias": False, "padding": "after"} | _ODD_SWIN),
    Export("swin_tiny", "torchvision", TORCHVISION_SWIN, _ODD_SWIN),
    Export(
        "efficientnet_b0",
        "torchvision",
        f"torchvision.models.efficientnet_b0(num_classes={CLASSES})",
        SYMMETRIC | SIZED,
        1.45,
    ),
    *(
        Export("vit_tiny", "timm", args=EPSILON | args)
        for args in (
            {},
            {"gelu": "tanh", "qkv_bias": False, "mlp_features": 83},
            {"layer_scale": True, "class_position": False},
            {"pooling": "mean", "class_token": False, "registers": 4},
        )
    ),
    Export(
        "vit_tiny",
        "timm, norm after the mean",
        args=EPSILON | {"pooling": "mean", "norm_pooled": True, "registers": 2},
    ),
    Export("vit_ti16", "timm", args=EPSILON | {"image_size": 48}),
    Export("deit_tiny", "timm", args=EPSILON),
    *(
        Export("vit_tiny", names, f"{VISION}(32, 8, 4, 4, 32, 64, num_classes={CLASSES})", EPSILON)
        for names in ("torchvision", "torchvision, before 0.14")
    ),
]


def made(model, gain):
    """Weights as those of the goldens, by paths of jft."""
    leaves = abstract_leaves(model).items()
    found = {kind: {} for _, (kind, _) in leaves}
    for path, (kind, leaf) in leaves:
        found[kind][path] = golden_files.make_array(path, leaf.shape, gain=gain)
    return {kind: unflatten(tree) for kind, tree in found.items()}


def run(case, folder):
    """The distance of a case."""
    model = make_model(name=case.variant, args=case.args, num_classes=CLASSES)
    variables = made(model, case.gain)
    leaves = abstract_leaves(model)
    naming = max(  # of those of one title, the one that knows the model
        (naming_of(model, leaves, at) for at in range(len(model.family.tables))),
        key=lambda naming: (
            naming.table.title == case.names,
            naming.table.writes(model),
            len(naming.names),
        ),
    )
    table = naming.index
    assert naming.table.title == case.names and naming.table.writes(model)
    export_weights(model, variables, folder, table=table)
    scope = {"functools": functools, "timm": timm, "torchvision": torchvision, "torch": torch}
    peer = eval(case.loader.format(folder=folder), scope)  # the loaders stand in this file
    if case.loader is not LOCAL:
        peer.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    side = model.preprocess.image_size
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = peer.eval()(torch_images(x)).numpy()
    found = np.asarray(jax.jit(model.apply)(variables, x))
    apart = np.abs(found[0] - found[1]).max()
    assert 0.05 < apart < 1e3, f"logits that are {apart} apart prove nothing"
    return distance(found, wanted)


def main(words):
    failed = 0
    for case in EXPORTS:
        line = f"{case.variant} {case.args} in {case.names}: {case.loader}"
        if words and not any(word in line for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            far = run(case, Path(folder) / "export")
        failed += far > LOGITS
        print(f"{'ok' if far <= LOGITS else 'FAILED':6} {far:.1e}  {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
