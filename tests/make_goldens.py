"""Makes tests/goldens/*.json.gz from timm and torchvision; run by hand, never in CI.

    python3.11 -m venv /tmp/timm && . /tmp/timm/bin/activate
    pip install torch==2.13.0                                # first: the small build for CPUs
    pip install --no-deps timm==1.0.31 torchvision==0.28.0   # they would ask for another torch
    pip install numpy pillow pyyaml safetensors huggingface_hub
    OMP_NUM_THREADS=1 python tests/make_goldens.py [NAME...]

The references compute in float64 on weights that `golden_files.make_array` makes. What is written:
the constructor, versions, names and shapes of the state dict, samples of the output of every stage
(in the names of jft's stages, channels last), logits, and the gradient of the sum of logsumexp of
the logits with regard to the images. `shapes-*` hold names and shapes of published sizes alone.
"""

import functools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import golden_files
import numpy as np
import torch

CLASSES = 7


def _import_torchvision():
    """torchvision, whose compiled operators are for another build of torch; no model needs them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision, library  # a library that is collected takes its operators along


torchvision, _LIBRARY = _import_torchvision()
import timm  # noqa: E402  (imports torchvision)
from timm.models import _hub  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One reference.

    Attributes:
      constructor: Python that makes the model, with `timm`, `torch` and `torchvision` in scope.
      stages: model -> {stage of jft: (module, "in" or "out", change of layout)}.
      shape: of the images, [B, H, W, C].
      npz: model -> {name: shape} where the weights come as npz that timm's own reader loads.
      gain: of the kernels, such that no stage dies out or blows up.
      small: regex of the arrays that are made small, as those that make what the first norm reads.
    """

    constructor: str
    stages: object
    shape: tuple[int, ...]
    npz: object = None
    gain: float = golden_files.GAIN
    small: str = ""


def same(x):
    return x


def last(x):
    """NCHW to NHWC."""
    return x.permute(0, 2, 3, 1)


def first_token(x):
    return x[:, 0]


def pooled(x):
    return x.flatten(1)


def build(case):
    """The model in evaluation mode, float32, initialised anyhow."""
    import timm.models.efficientnet
    import torchvision.models

    scope = {"timm": timm, "torch": torch, "torchvision": torchvision}
    return eval(case.constructor, scope).eval()  # the constructors stand in this file


def fill(model, case):
    """What a golden says of the weights; the model gets them."""
    made = {"gain": case.gain, "small": case.small}
    if case.npz:
        made["tensors"] = {name: list(shape) for name, shape in case.npz(model).items()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights.npz"
            np.savez(file, **golden_files.make_arrays(made))
            model.load_pretrained(str(file))
        return made
    own = model.state_dict()
    made["tensors"] = golden_files.shapes_of(own)
    arrays = golden_files.make_arrays(made)
    for name, value in own.items():
        assert value.is_floating_point() or np.array_equal(value.numpy(), arrays[name]), name
    model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    return made


def watch(model, stages):
    """{stage: array}, filled when the model runs."""
    modules, found = dict(model.named_modules()), {}

    def keep(stage, change, value):
        found[stage] = change(value).detach().numpy()

    for stage, (module, side, change) in stages.items():
        one = functools.partial(keep, stage, change)
        if side == "in":
            modules[module].register_forward_pre_hook(lambda _, given, one=one: one(given[0]))
        else:
            modules[module].register_forward_hook(lambda _, __, value, one=one: one(value))
    return found


def record(case):
    """The content of a golden."""
    torch.manual_seed(0)
    model = build(case)
    made = fill(model, case)
    by_name = case.constructor.startswith("timm.create_model(")
    config = timm_config(model) if by_name else None  # it tells of no other constructor's sizes
    model = model.double()
    states = watch(model, case.stages(model))
    image = torch.from_numpy(golden_files.pictures(case.shape)).double()
    image.requires_grad_()
    logits = model(image.permute(0, 3, 1, 2))
    torch.logsumexp(logits, 1).sum().backward()
    for stage, state in states.items():
        assert 0.1 < np.abs(state).max() < 1e3, (stage, np.abs(state).max())
    gradient = image.grad.numpy()
    assert np.abs(gradient).max() > 0.01, np.abs(gradient).max()
    return {
        "constructor": case.constructor,
        "versions": versions(),
        **made,
        "config": config,
        "image_shape": list(case.shape),
        "states": {stage: golden_files.sample(state) for stage, state in states.items()},
        "logits": golden_files.sample(logits.detach().numpy()),
        "gradient": golden_files.sample(gradient),
    }


def versions():
    return {module.__name__: module.__version__ for module in (timm, torch, torchvision)}


def timm_config(model):
    """What timm writes beside a model for the hub."""
    with tempfile.TemporaryDirectory() as folder:
        _hub.save_config_for_hf(model, Path(folder) / "config.json")
        return json.loads((Path(folder) / "config.json").read_text())


# --- EfficientNet -----------------------------------------------------------------------------


def timm_efficientnet_stages(model):
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    return {
        "stem": ("bn1", "out", last),
        **{f"blocks_{i}": (name, "out", last) for i, name in enumerate(blocks)},
        "final": ("classifier", "in", same),
    }


def torchvision_efficientnet_stages(model):
    groups = list(model.features)[1:-1]
    blocks = [f"features.{s + 1}.{b}" for s, group in enumerate(groups) for b in range(len(group))]
    return {
        "stem": ("features.0", "out", last),
        **{f"blocks_{i}": (name, "out", last) for i, name in enumerate(blocks)},
        "final": ("classifier", "in", same),
    }


TORCHVISION_BLOCKS = """
    [torchvision.models.efficientnet.MBConvConfig(*sizes, width_mult={0}, depth_mult={1})
     for sizes in {2}]
"""


def torchvision_efficientnet(width, depth, blocks, last_channel):
    setting = " ".join(TORCHVISION_BLOCKS.format(width, depth, blocks).split())
    return (
        f"torchvision.models.EfficientNet({setting}, 0.2, num_classes={CLASSES}, "
        f"last_channel={last_channel})"
    )


BLOCKS = "timm.models._efficientnet_builder.decode_arch_def"
EFFICIENTNET = {
    "timm-efficientnet-symmetric": Case(
        "timm.models.efficientnet._gen_efficientnet('efficientnet_b0', channel_multiplier=0.3, "
        f"depth_multiplier=0.6, channel_divisor=4, num_classes={CLASSES})",
        timm_efficientnet_stages,
        (2, 45, 45, 3),
        gain=1.6,
    ),
    "timm-efficientnet-same": Case(
        "timm.models.efficientnet._gen_efficientnet('tf_efficientnet_b0', channel_multiplier=0.4, "
        f"depth_multiplier=0.3, pad_type='same', bn_eps=1e-3, num_classes={CLASSES})",
        timm_efficientnet_stages,
        (2, 46, 46, 3),
        gain=1.65,
    ),
    "timm-efficientnet-lite-symmetric": Case(
        "timm.models.efficientnet._gen_efficientnet_lite('efficientnet_lite0', "
        f"channel_multiplier=0.3, depth_multiplier=0.3, num_classes={CLASSES})",
        timm_efficientnet_stages,
        (2, 50, 50, 3),
    ),
    "timm-efficientnet-lite-same": Case(
        "timm.models.efficientnet._gen_efficientnet_lite('tf_efficientnet_lite0', "
        "channel_multiplier=0.2, depth_multiplier=0.6, pad_type='same', bn_eps=1e-3, "
        f"num_classes={CLASSES})",
        timm_efficientnet_stages,
        (2, 47, 47, 3),
    ),
    "torchvision-efficientnet-7": Case(
        torchvision_efficientnet(
            0.4,
            0.4,
            "[(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), "
            "(6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), "
            "(6, 3, 1, 192, 320, 1)]",
            512,
        ),
        torchvision_efficientnet_stages,
        (2, 46, 46, 3),
        gain=1.6,
    ),
    "torchvision-efficientnet-3": Case(
        torchvision_efficientnet(
            0.5,
            1.0,
            "[(1, 5, 1, 32, 40, 1), (4, 3, 2, 40, 48, 3), (3, 5, 2, 48, 64, 2)]",
            640,
        ),
        torchvision_efficientnet_stages,
        (2, 35, 35, 3),
        gain=1.6,
    ),
}


# --- ViT --------------------------------------------------------------------------------------


def timm_vit_stages(model):
    depth = len(model.blocks)
    return {
        "embed": ("blocks.0", "in", same),
        **{f"blocks_{i}": (f"blocks.{i}", "out", same) for i in range(depth)},
        "norm": ("head", "in", same),
    }


def two_tokens(x):
    return x[:, :2]


def timm_distilled_stages(model):
    return timm_vit_stages(model) | {"norm": ("norm", "out", two_tokens)}


def torchvision_vit_stages(model):
    layers = [f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children()]
    return {
        "embed": (layers[0], "in", same),
        **{f"blocks_{i}": (name, "out", same) for i, name in enumerate(layers)},
        "norm": ("heads", "in", same),
    }


def augreg_shapes(model):
    """Names and shapes of the npz that timm's reader of AugReg's files takes."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    patch, inner = model.patch_embed.patch_size[0], model.blocks[0].mlp.fc1.out_features
    found = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": tuple(model.pos_embed.shape),
        "head/kernel": (width, model.num_classes),
        "head/bias": (model.num_classes,),
    }
    norms = ["Transformer/encoder_norm"]
    for i in range(len(model.blocks)):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"]
        for part in ("query", "key", "value"):
            found[f"{attention}/{part}/kernel"] = (width, heads, width // heads)
            found[f"{attention}/{part}/bias"] = (heads, width // heads)
        found[f"{attention}/out/kernel"] = (heads, width // heads, width)
        found[f"{attention}/out/bias"] = (width,)
        for number, (rows, columns) in enumerate(((width, inner), (inner, width))):
            found[f"{block}/MlpBlock_3/Dense_{number}/kernel"] = (rows, columns)
            found[f"{block}/MlpBlock_3/Dense_{number}/bias"] = (columns,)
    return found | {f"{norm}/{leaf}": (width,) for norm in norms for leaf in ("scale", "bias")}


AUGREG_SMALL = r"cls|embedding/.*|.*pos_embedding"
VIT = {
    "timm-vit-augreg-exact": Case(
        "timm.models.vision_transformer.VisionTransformer(img_size=45, patch_size=9, embed_dim=60, "
        f"depth=3, num_heads=5, mlp_ratio=1.5, num_classes={CLASSES})",
        timm_vit_stages,
        (2, 45, 45, 3),
        augreg_shapes,
        small=AUGREG_SMALL,
    ),
    "timm-vit-augreg-tanh": Case(
        "timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, "
        f"depth=2, num_heads=3, mlp_ratio=2, act_layer='gelu_tanh', num_classes={CLASSES})",
        timm_vit_stages,
        (2, 32, 32, 3),
        augreg_shapes,
        small=AUGREG_SMALL,
    ),
}

TOWER_SMALL = r"cls_token|dist_token|reg_token|pos_embed|patch_embed\..*"
VIT_45 = "img_size=45, patch_size=9, embed_dim=60, depth=3, num_heads=5, mlp_ratio=1.5"
VIT_32 = "img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2"
VIT |= {
    "timm-vit-token": Case(
        f"timm.create_model('vit_base_patch16_224', {VIT_45}, num_classes={CLASSES})",
        timm_vit_stages,
        (2, 45, 45, 3),
        small=TOWER_SMALL,
    ),
    "timm-vit-pooled": Case(
        f"timm.create_model('vit_small_patch16_224', {VIT_32}, num_classes={CLASSES}, "
        "global_pool='avg', qkv_bias=False, init_values=0.1, reg_tokens=2)",
        timm_vit_stages,
        (2, 32, 32, 3),
        small=TOWER_SMALL,
    ),
    "timm-deit-distilled": Case(
        f"timm.create_model('deit_tiny_distilled_patch16_224', {VIT_32}, num_classes={CLASSES})",
        timm_distilled_stages,
        (2, 32, 32, 3),
        small=TOWER_SMALL,
    ),
    "timm-deit3": Case(
        f"timm.create_model('deit3_small_patch16_224', {VIT_45}, num_classes={CLASSES})",
        timm_vit_stages,
        (2, 45, 45, 3),
        small=TOWER_SMALL,
    ),
    "torchvision-vit-45": Case(
        "torchvision.models.VisionTransformer(image_size=45, patch_size=9, num_layers=3, "
        f"num_heads=5, hidden_dim=60, mlp_dim=90, num_classes={CLASSES})",
        torchvision_vit_stages,
        (2, 45, 45, 3),
        small=r"class_token|.*pos_embedding|conv_proj\..*",
    ),
    "torchvision-vit-32": Case(
        "torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, "
        f"num_heads=3, hidden_dim=48, mlp_dim=100, num_classes={CLASSES})",
        torchvision_vit_stages,
        (2, 32, 32, 3),
        small=r"class_token|.*pos_embedding|conv_proj\..*",
    ),
}

# --- DINOv2 -----------------------------------------------------------------------------------

DINOV2 = {
    "timm-dinov2-token": Case(
        "timm.create_model('vit_small_patch14_dinov2', img_size=45, patch_size=9, embed_dim=60, "
        f"depth=3, num_heads=5, mlp_ratio=1.5, num_classes={CLASSES})",
        timm_vit_stages,
        (2, 45, 45, 3),
        small=TOWER_SMALL,
    ),
    "timm-dinov2-gated-registers": Case(
        "timm.create_model('vit_giant_patch14_reg4_dinov2', img_size=42, patch_size=7, "
        "embed_dim=48, depth=2, num_heads=3, mlp_ratio=4, reg_tokens=3, global_pool='avg', "
        f"fc_norm=False, num_classes={CLASSES})",
        timm_vit_stages,
        (2, 42, 42, 3),
        small=TOWER_SMALL,
    ),
}

# --- ConvNeXt ---------------------------------------------------------------------------------


def timm_convnext_stages(model):
    found, block = {"stem": ("stem", "out", last)}, 0
    for s, stage in enumerate(model.stages):
        if s:
            found[f"down_{s}"] = (f"stages.{s}.downsample", "out", last)
        for b in range(len(stage.blocks)):
            found[f"blocks_{block}"] = (f"stages.{s}.blocks.{b}", "out", last)
            block += 1
    return found | {"norm": ("head.fc", "in", same)}


def torchvision_convnext_stages(model):
    found, block = {"stem": ("features.0", "out", last)}, 0
    for s, stage in enumerate(list(model.features)[1::2]):
        if s:
            found[f"down_{s}"] = (f"features.{2 * s}", "out", last)
        for b in range(len(stage)):
            found[f"blocks_{block}"] = (f"features.{2 * s + 1}.{b}", "out", last)
            block += 1
    return found | {"norm": ("classifier.2", "in", same)}


CONVNEXT = {
    "timm-convnext": Case(
        "timm.create_model('convnext_tiny', depths=(1, 2, 1, 1), dims=(12, 20, 24, 36), "
        f"num_classes={CLASSES})",
        timm_convnext_stages,
        (2, 70, 70, 3),
        small=r"stem\.0\..*",
    ),
    "timm-convnextv2": Case(
        "timm.create_model('convnextv2_atto', depths=(1, 1, 2, 1), dims=(8, 16, 24, 40), "
        f"num_classes={CLASSES})",
        timm_convnext_stages,
        (2, 64, 64, 3),
        small=r"stem\.0\..*",
    ),
    **{
        f"torchvision-convnext-{len(sizes)}": Case(
            "torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(*sizes) for "
            f"sizes in {sizes}], num_classes={CLASSES})",
            torchvision_convnext_stages,
            (2, side, side, 3),
            small=r"features\.0\.0\..*",
        )
        for side, *sizes in (
            (70, (12, 20, 1), (20, 24, 2), (24, 36, 1), (36, None, 1)),
            (45, (16, 24, 2), (24, None, 1)),
        )
    },
}

# --- CLIP and SigLIP --------------------------------------------------------------------------


def timm_clip_stages(model):
    found = timm_vit_stages(model)
    found |= {"embed": ("norm_pre", "in", same), "pre_norm": ("norm_pre", "out", same)}
    if model.global_pool == "avg":
        found["pool"] = found.pop("norm")
    return found


def timm_siglip_stages(model):
    found = timm_vit_stages(model)
    if model.attn_pool is not None:
        found |= {"norm": ("norm", "out", same), "pool": ("head", "in", same)}
    return found


CLIP = {
    "timm-clip-exact": Case(
        f"timm.create_model('vit_base_patch16_clip_224', {VIT_45}, num_classes={CLASSES})",
        timm_clip_stages,
        (2, 45, 45, 3),
        small=TOWER_SMALL,
    ),
    "timm-clip-quick-mean": Case(
        f"timm.create_model('vit_base_patch32_clip_quickgelu_224', {VIT_32}, "
        f"global_pool='avg', final_norm=False, num_classes={CLASSES})",
        timm_clip_stages,
        (2, 32, 32, 3),
        small=TOWER_SMALL,
    ),
}
SIGLIP = {
    "timm-siglip-probe": Case(
        f"timm.create_model('vit_base_patch16_siglip_224', {VIT_45}, num_classes={CLASSES})",
        timm_siglip_stages,
        (2, 45, 45, 3),
        small=TOWER_SMALL,
    ),
    "timm-siglip-mean-tanh": Case(
        f"timm.create_model('vit_base_patch32_siglip_gap_256', {VIT_32}, num_classes={CLASSES})",
        timm_siglip_stages,
        (2, 32, 32, 3),
        small=TOWER_SMALL,
    ),
}

# --- Swin -------------------------------------------------------------------------------------


def swin_stages(depths, block, down, embed, head):
    """Blocks and merges under their names, which hold "{s}" and "{b}"."""
    found, at = {"embed": (embed, "out", same)}, 0
    for s, depth in enumerate(depths):
        if s:
            found[f"down_{s}"] = (down(s), "out", same)
        for b in range(depth):
            found[f"blocks_{at}"] = (block(s, b), "out", same)
            at += 1
    return found | {"norm": (head, "in", same)}


def timm_swin_stages(model):
    return swin_stages(
        [len(layer.blocks) for layer in model.layers],
        "layers.{}.blocks.{}".format,
        "layers.{}.downsample".format,
        "patch_embed",
        "head.fc",
    )


def torchvision_swin_stages(model):
    return swin_stages(
        [len(stage) for stage in list(model.features)[1::2]],
        lambda s, b: f"features.{2 * s + 1}.{b}",
        lambda s: f"features.{2 * s}",
        "features.0",
        "head",
    )


SWIN = {
    **{
        f"timm-swin-{name}": Case(
            f"timm.create_model('swin_tiny_patch4_window7_224', img_size={side}, "
            f"window_size={window}, embed_dim=24, depths=(2, 2), num_heads=(2, 3), mlp_ratio=2.5, "
            f"num_classes={CLASSES})",
            timm_swin_stages,
            (2, side, side, 3),
            small=r"patch_embed\.proj\..*",
        )
        for name, side, window in (("whole", 48, 3), ("padded", 52, 4))
    },
    **{
        f"torchvision-swin-{name}": Case(
            "torchvision.models.SwinTransformer(patch_size=[4, 4], embed_dim=24, depths=[2, 2], "
            f"num_heads=[2, 3], window_size=[{window}, {window}], mlp_ratio=2.5, "
            f"num_classes={CLASSES})",
            torchvision_swin_stages,
            (2, side, side, 3),
            small=r"features\.0\.0\..*",
        )
        for name, side, window in (("whole", 48, 3), ("padded", 52, 4))
    },
}

# --- ResNet -----------------------------------------------------------------------------------


def resnet_stages(model):
    layers = [model.layer1, model.layer2, model.layer3, model.layer4]
    blocks = [f"layer{s}.{b}" for s, layer in enumerate(layers, 1) for b in range(len(layer))]
    found = {f"blocks_{at}": (name, "out", last) for at, name in enumerate(blocks)}
    # The stem ends behind the pooling, and the last block's map is averaged.
    pooled = {f"blocks_{len(blocks) - 1}": ("fc", "in", same)}
    return {"stem": ("maxpool", "out", last)} | found | pooled


RESNET = {
    "timm-resnet-basic": Case(
        "timm.create_model('resnet18', layers=(1, 2, 1, 1), channels=(16, 24, 32, 40), "
        f"num_classes={CLASSES})",
        resnet_stages,
        (2, 45, 45, 3),
    ),
    "timm-resnet-bottleneck": Case(
        "timm.create_model('resnet50', layers=(1, 1, 2, 1), channels=(8, 16, 24, 32), "
        f"act_layer='silu', num_classes={CLASSES})",
        resnet_stages,
        (2, 64, 64, 3),
    ),
    "torchvision-resnet-basic": Case(
        "torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], "
        f"num_classes={CLASSES})",
        resnet_stages,
        (2, 45, 45, 3),
        gain=1.1,
    ),
    "torchvision-resnet-bottleneck": Case(
        "torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], "
        f"width_per_group=64, num_classes={CLASSES})",
        resnet_stages,
        (2, 38, 38, 3),
    ),
}

CASES = EFFICIENTNET | VIT | DINOV2 | CONVNEXT | CLIP | SIGLIP | SWIN | RESNET

# --- published sizes --------------------------------------------------------------------------

PUBLISHED = {
    "efficientnet": {
        "timm": [
            *(f"{tf}efficientnet_b{number}" for tf in ("", "tf_") for number in range(5)),
            *(f"{tf}efficientnet_lite{number}" for tf in ("", "tf_") for number in range(5)),
        ],
        "torchvision": [f"efficientnet_b{number}" for number in range(5)],
    },
    "vit": {
        "timm": [
            *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
            *(f"vit_{size}_patch32_224" for size in ("small", "base")),
            "vit_large_patch32_384",
            "vit_base_patch16_224.mae",
            *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
        ],
        "torchvision": ["vit_b_16", "vit_b_32", "vit_l_16"],
    },
    "dinov2": {
        "timm": [
            f"vit_{size}_patch14_{registers}dinov2"
            for size in ("small", "base", "large", "giant")
            for registers in ("", "reg4_")
        ]
    },
    "clip": {
        "timm": [
            f"vit_{name}_clip_{side}"
            for name, side in (
                ("base_patch32", 224),
                ("base_patch16", 224),
                ("large_patch14", 224),
                ("large_patch14", 336),
            )
        ]
    },
    "siglip": {
        "timm": [
            "vit_base_patch16_siglip_224",
            "vit_large_patch16_siglip_256",
            "vit_so400m_patch14_siglip_384",
            "vit_base_patch16_siglip_gap_224",
        ]
    },
    "convnext": {
        "timm": [
            *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
            *(f"convnextv2_{size}" for size in ("atto", "nano", "tiny", "base", "large")),
        ],
        "torchvision": [f"convnext_{size}" for size in ("tiny", "small", "base", "large")],
    },
    "swin": {
        "timm": [
            *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")),
            "swin_base_patch4_window12_384",
        ],
        "torchvision": ["swin_t", "swin_s", "swin_b"],
    },
    "resnet": {
        "timm": [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)],
        "torchvision": [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)],
    },
}


def published(library, name):
    """Names, shapes and timm's config of a model of published size, without its numbers."""
    with torch.device("meta"):
        if library == "timm":
            model = timm.create_model(name)
        else:
            model = torchvision.models.get_model(name)
    tensors = golden_files.shapes_of(model.state_dict())
    config = {"config": timm_config(model)} if library == "timm" else {}
    return {"tensors": tensors} | config


def published_of(family):
    """The content of a golden of shapes."""
    models, first = {}, {}
    for library, names in PUBLISHED[family].items():
        for name in names:
            model = published(library, name)
            key = json.dumps(model["tensors"])
            if key in first:  # many names, one architecture
                model["tensors"] = first[key]
            first.setdefault(key, f"{library}/{name}")
            models[f"{library}/{name}"] = model
    return {"versions": versions(), "models": models}


def main(wanted):
    golden_files.FOLDER.mkdir(exist_ok=True)
    jobs = {name: functools.partial(record, case) for name, case in CASES.items()}
    jobs |= {f"shapes-{name}": functools.partial(published_of, name) for name in PUBLISHED}
    for name, make in jobs.items():
        if not wanted or name in wanted:
            golden_files.save(name, make())
            print(name, (golden_files.FOLDER / f"{name}.json.gz").stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
