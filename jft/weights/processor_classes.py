"""The image processors of Hugging Face's transformers: what each does where its file is silent.

Defaults are those of transformers 5.24 (Apache-2.0); since its version 5 one body serves all of
them, and only the classes named below do more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.weights.json_values import Values

_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# What every processor has.
ALL = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CROPPED = {
    **ALL,
    **_OPENAI,
    "resample": 3,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": 224,
}

CONVNEXT, EFFICIENTNET = "ConvNextImageProcessor", "EfficientNetImageProcessor"
# From this size on ConvNext's processor crops nothing and ignores the aspect.
CONVNEXT_SQUARE = 384

DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {**ALL, **_HALF, "resample": 2, "size": 224, "default_to_square": True},
    "DeiTImageProcessor": {
        **ALL,
        **_HALF,
        "resample": 3,
        "size": 256,
        "default_to_square": True,
        "do_center_crop": True,
        "crop_size": 224,
    },
    "CLIPImageProcessor": _CROPPED,
    "BitImageProcessor": _CROPPED,
    "SiglipImageProcessor": {
        **ALL,
        **_HALF,
        "resample": 3,
        "size": {"height": 224, "width": 224},
        "default_to_square": False,
    },
    CONVNEXT: {
        **ALL,
        **_HALF,
        "resample": 3,
        "size": 384,
        "default_to_square": False,
        "crop_pct": 224 / 256,
    },
    EFFICIENTNET: {
        **ALL,
        **_HALF,
        "resample": 3,
        "size": 346,
        "default_to_square": True,
        "crop_size": 289,
        "include_top": True,
    },
    "MobileViTImageProcessor": {
        **_CROPPED,
        "do_normalize": False,
        "crop_size": 256,
        "do_flip_channel_order": True,
    },
    "Siglip2ImageProcessor": {**ALL, **_HALF, "resample": 2, "max_num_patches": 256},
}

# model_type of config.json -> the processor that transformers takes where the file names none.
BY_MODEL = {
    "bit": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "efficientnet": EFFICIENTNET,
    "regnet": CONVNEXT,
    "resnet": CONVNEXT,
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "swin": "ViTImageProcessor",
    "swinv2": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
    "vit_mae": "ViTImageProcessor",
    "vit_msn": "ViTImageProcessor",
}


def class_of(content: Mapping[str, Any], model_type: Any) -> str | None:
    """The processor that a file is for, without the "Fast" or "Pil" of its name; None is not said.

    Files of before transformers 4.26 name a feature extractor.

    Raises:
      ValueError: a name that is none.
    """
    values = Values(content)
    name = values.name("image_processor_type")
    if name is None:
        extractor = values.name("feature_extractor_type")
        if extractor is not None:
            name = extractor.replace("FeatureExtractor", "ImageProcessor")
    if name is None:
        return BY_MODEL.get(model_type) if isinstance(model_type, str) else None
    for suffix in ("Fast", "Pil"):
        name = name.removesuffix(suffix)
    return name
