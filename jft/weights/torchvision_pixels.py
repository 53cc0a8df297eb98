"""Preprocessing of torchvision's published weights, told by the names of their files.

Such a file holds weights alone; what its pictures were like stands in torchvision's code (0.28,
BSD-3): `ImageClassification(crop_size, resize_size, interpolation)`, ImageNet's mean and std, the
crop at the nearest pixel. The name ends in the first digits of the file's SHA-256.
"""

from __future__ import annotations

from jft.models.family import Preprocess

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# File name without ".pth" -> (crop, resize, interpolation).
PRESETS: dict[str, tuple[int, int, str]] = {
    "resnet18-f37072fd": (224, 256, "bilinear"),
    "resnet34-b627a593": (224, 256, "bilinear"),
    "resnet50-0676ba61": (224, 256, "bilinear"),
    "resnet50-11ad3fa6": (224, 232, "bilinear"),
    "resnet101-63fe2227": (224, 256, "bilinear"),
    "resnet101-cd907fc2": (224, 232, "bilinear"),
    "resnet152-394f9c45": (224, 256, "bilinear"),
    "resnet152-f82ba261": (224, 232, "bilinear"),
    "convnext_tiny-983f1562": (224, 236, "bilinear"),
    "convnext_small-0c510722": (224, 230, "bilinear"),
    "convnext_base-6075fbad": (224, 232, "bilinear"),
    "convnext_large-ea097f82": (224, 232, "bilinear"),
    "efficientnet_b0_rwightman-7f5810bc": (224, 256, "bicubic"),
    "efficientnet_b1_rwightman-bac287d4": (240, 256, "bicubic"),
    "efficientnet_b1-c27df63c": (240, 255, "bilinear"),
    "efficientnet_b2_rwightman-c35c1473": (288, 288, "bicubic"),
    "efficientnet_b3_rwightman-b3899882": (300, 320, "bicubic"),
    "efficientnet_b4_rwightman-23ab8bcd": (380, 384, "bicubic"),
    "swin_t-704ceda3": (224, 232, "bicubic"),
    "swin_s-5e29d889": (224, 246, "bicubic"),
    "swin_b-68c6b09e": (224, 238, "bicubic"),
    "vit_b_16-c867db91": (224, 256, "bilinear"),
    "vit_b_16_swag-9ac1b537": (384, 384, "bicubic"),
    "vit_b_16_lc_swag-4e70ced5": (224, 224, "bicubic"),
    "vit_b_32-d86f8d99": (224, 256, "bilinear"),
    "vit_l_16-852ce7e3": (224, 242, "bilinear"),
    "vit_l_16_swag-4f3808c9": (512, 512, "bicubic"),
    "vit_l_16_lc_swag-4d563306": (224, 224, "bicubic"),
    "vit_l_32-c7638314": (224, 256, "bilinear"),
    "vit_h_14_swag-80465313": (518, 518, "bicubic"),
    "vit_h_14_lc_swag-c1eb923e": (224, 224, "bicubic"),
}


def torchvision_preprocess(
    crop: int, resize: int | None = None, interpolation: str = "bilinear"
) -> Preprocess:
    """What `ImageClassification(crop_size=crop, resize_size=resize)` of torchvision does.

    Args:
      crop: side of what is seen, in pixels.
      resize: of the shorter side before; 256 by default, as there.
      interpolation: the filter.
    """
    fraction = crop / (256 if resize is None else resize)
    return Preprocess(_MEAN, _STD, crop, fraction, interpolation, rounding="nearest")


def preset_of(stem: str) -> Preprocess | None:
    """Of a published file, by its name without the ending; None of any other."""
    return torchvision_preprocess(*PRESETS[stem]) if stem in PRESETS else None
