"""The EfficientDet models by name: NVIDIA's `efficientdet_*`, and `tf_efficientdet_*` with TensorFlow's padding."""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from detcore import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Architecture:
    """What a name stands for.

    image_size: height and width in pixels. channels, cells: of the BiFPN; repeats: convolutions of each head.
    same_backbone, same_neck: padding as TensorFlow's, of convolutions of stride 2 and of pooling. redundant_bias:
    convolutions before a normalisation have a bias. fusion: fastattn, attn or sum. anchor_scale: smallest anchor in
    strides of its level. levels: P3 and the following ones. drop_path: see `EfficientNet`. pixels: mean and standard
    deviation of R, G and B, values being in 0..1.
    """

    backbone: str
    image_size: int
    channels: int
    cells: int
    repeats: int
    same_backbone: bool = False
    same_neck: bool = False
    redundant_bias: bool = False
    fusion: str = "fastattn"
    activation: str = "silu"
    anchor_scale: float = 4.0
    levels: int = 5
    drop_path: float = 0.2
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    @property
    def backbone_eps(self) -> float:
        """What the backbone's normalisation adds to a variance: that of the weights there are for this model, which
        is TensorFlow's or torchvision's."""
        return 1e-3 if self.same_backbone else 1e-5


_SIZES = (  # backbone, image, channels, cells, repeats
    ("b0", 512, 64, 3, 3),
    ("b1", 640, 88, 4, 3),
    ("b2", 768, 112, 5, 3),
    ("b3", 896, 160, 6, 4),
    ("b4", 1024, 224, 7, 4),
    ("b5", 1280, 288, 7, 4),
    ("b6", 1280, 384, 8, 5),
    ("b6", 1536, 384, 8, 5),
)
_TENSORFLOW = {"same_backbone": True, "same_neck": True, "redundant_bias": True}


def _symmetric(size: tuple, **more) -> Architecture:
    return Architecture(f"efficientnet_{size[0]}", *size[1:], **more)


def _tensorflow(size: tuple, **more) -> Architecture:
    return _symmetric(size, **_TENSORFLOW, **more)


def _lite(level: int, image_size: int) -> Architecture:
    size = (f"lite{level}", image_size, *_SIZES[level][2:])
    scale, drop = (3.0 if level < 3 else 4.0), (0.2 if level else 0.0)
    return _tensorflow(
        size, fusion="sum", activation="relu6", anchor_scale=scale, drop_path=drop, pixels=HALF
    )  # fmt: skip


ARCHITECTURES = {
    **{f"efficientdet_d{i}": _symmetric(_SIZES[i]) for i in range(5)},
    "efficientdet_d4_legacy": _symmetric(_SIZES[4], same_neck=True, redundant_bias=True),
    "efficientdet_w0": _symmetric(("b0", 512, 80, 3, 3)),
    **{f"tf_efficientdet_d{i}": _tensorflow(_SIZES[i]) for i in range(6)},
    "tf_efficientdet_d6": _tensorflow(_SIZES[6], fusion="sum"),
    "tf_efficientdet_d7": _tensorflow(_SIZES[7], fusion="sum", anchor_scale=5.0),
    "tf_efficientdet_d7x": _tensorflow(("b7", *_SIZES[7][1:]), fusion="sum", levels=6),
    **{f"tf_efficientdet_lite{i}": _lite(i, size) for i, size in enumerate((320, 384, 448, 512, 640))},
}
"""By name. efficientdet_d4_legacy is d4 as its published checkpoints are: with redundant biases and TensorFlow's
pooling, which the original forgot to switch off."""


def architecture(name: str) -> Architecture:
    """What a model's name stands for. Raises UserError for an unknown one."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith(("mixdet", "mobiledet")):
        raise UserError(
            f"model {name!r} has a MixNet or MobileNet backbone, which this program does not have; choose one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    near = get_close_matches(name, ARCHITECTURES, 1)
    hint = f"did you mean {near[0]}? Otherwise choose" if near else "choose"
    if re.fullmatch(r"efficientdet_d\d+x?", name):  # like efficientdet_d0 in its letters, but large
        large = f"tf_{name}" if f"tf_{name}" in ARCHITECTURES else "tf_efficientdet_d7"
        hint = f"did you mean {large} (d5 to d7x are there only as tf_...)? Otherwise choose"
    raise UserError(f"model {name!r} is unknown; {hint} one of {', '.join(ARCHITECTURES)}")
