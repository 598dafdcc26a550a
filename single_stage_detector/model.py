"""RetinaNet: a residual network, a feature pyramid P3..P7 and two heads shared by its levels.

Parameters carry the names of the MLCommons reference (torchvision's of that time).
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore import UserError
from detcore.device import native
from detcore.device.streams import side_by_side
from detcore.nn.resnet import ResNet
from detcore.nn.weights import load_with_classes
from detcore.ops.bias_relu import conv2d, conv_bias_relu
from detcore.ops.conv3x3 import EightBits, conv3x3, in_8_bits
from detcore.ops.fold import autocast_dtype, narrow_copies
from detcore.ops.normalize import normalize
from single_stage_detector.anchors import OCTAVE_STEPS, RATIOS, SIZES, anchors, grids

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
Outputs = tuple[list[Tensor], list[Tensor]] | tuple[list[Tensor], list[Tensor], Tensor]

LARGE_LEVELS = 2
"""Pyramid levels that fill a GPU by themselves: P3 and P4."""

PRIOR = 0.01
"""Probability that a fresh classification head gives to every class of every anchor."""


def _convolve(x: Tensor, conv: nn.Conv2d, narrow: Mapping[Tensor, Tensor], biased: bool = True) -> Tensor:
    """conv(x), from narrow copies of its parameters where there are some, and with its bias or without."""
    if biased and conv.weight not in narrow:
        return conv(x)
    bias = narrow.get(conv.bias, conv.bias) if biased else None
    return conv2d(x, conv, narrow.get(conv.weight, conv.weight), bias)


def _two_wide(x: Tensor) -> Tensor:
    """A map of one column gets a column of zeros, which a 3x3 convolution of stride 2 and padding 1 sees anyway.

    torch's convolutions in bf16 on the CPU leave parts of the weight's gradient unset where the map has one column
    (2.11 to 2.14): the optimizer would get whatever lay in that memory.
    """
    return F.pad(x, (0, 1)) if x.shape[-1] == 1 else x


class FeaturePyramid(nn.Module):
    """(C3, C4, C5) -> [P3, ..., P7], each [N, channels, rows, columns]. P6 is made from P5, P7 from ReLU(P6)."""

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.layer_blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.extra_blocks = nn.ModuleDict({k: nn.Conv2d(channels, channels, 3, 2, 1) for k in ("p6", "p7")})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        narrow = narrow_copies(self.parameters()) if native.variant("multi_cast") else {}
        inner = [_convolve(x, block, narrow) for block, x in zip(self.inner_blocks, features, strict=True)]
        for level in range(len(inner) - 2, -1, -1):
            inner[level] = inner[level] + F.interpolate(inner[level + 1], size=inner[level].shape[-2:], mode="nearest")
        pyramid = [_convolve(x, block, narrow) for block, x in zip(self.layer_blocks, inner, strict=True)]
        p6 = _convolve(_two_wide(pyramid[-1]), self.extra_blocks["p6"], narrow)
        return [*pyramid, p6, _convolve(_two_wide(F.relu(p6)), self.extra_blocks["p7"], narrow)]


class Head(nn.Module):
    """A tower of 3x3 convolutions and one to `values` numbers per anchor: [P3, ...] -> [[N, A of P3, values], ...].

    The last layer's attribute is called `output_name`, so that parameters have the reference's names.
    """

    def __init__(self, channels: int, convs: int, per_cell: int, values: int, output_name: str, bias: float = 0.0):
        super().__init__()
        tower = [m for _ in range(convs) for m in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))]
        self.conv = nn.Sequential(*tower)
        self.output_name, self.values = output_name, values
        self.add_module(output_name, nn.Conv2d(channels, per_cell * values, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.get_submodule(output_name).bias, bias)

    @property
    def output(self) -> nn.Conv2d:
        """The last layer."""
        return self.get_submodule(self.output_name)

    def _in_8_bits(self, x: Tensor) -> dict[Tensor, EightBits]:
        """The weights that are multiplied in 8 bits: of the tower and of class logits, which is where the time goes;
        box deltas, 36 values a cell, stay exact. Empty unless variant fp8_heads is on, and where no gradients flow: a
        detection would depend on the images beside its own, whose values set the scale."""
        if not (torch.is_grad_enabled() and native.fp8_heads(x.device.type)):
            return {}
        layers = [m for name, m in self.named_modules() if isinstance(m, nn.Conv2d) and name != "bbox_reg"]
        return {layer.weight: in_8_bits(layer) for layer in layers}

    def _tower(self, x: Tensor, narrow: Mapping[Tensor, Tensor], eight: Mapping[Tensor, EightBits]) -> Tensor:
        """self.conv, each convolution and the ReLU after it as one."""
        for layer in self.conv:
            if isinstance(layer, nn.Conv2d) and layer.weight in eight:
                x = conv3x3(x, layer.weight, layer.bias, eight[layer.weight], relu=True)
            elif isinstance(layer, nn.Conv2d):
                x = conv_bias_relu(x, layer, narrow.get(layer.weight))
        return x

    def forward(
        self, pyramid: Sequence[Tensor], narrow: Mapping[Tensor, Tensor] | None = None, biased: bool = True
    ) -> list[Tensor]:
        """narrow: copies of parameters to compute with, if any. biased: whether the last layer's bias is added."""
        narrow, eight, last = narrow or {}, self._in_8_bits(pyramid[0]), self.output

        def outputs(x: Tensor) -> Tensor:
            x = self._tower(x, narrow, eight)
            if last.weight in eight:
                return conv3x3(x, last.weight, last.bias if biased else None, eight[last.weight])
            return _convolve(x, last, narrow, biased)

        # Channels are anchor-major: moved last, a cell's anchors follow each other. In channels_last that is no copy.
        cells = [outputs(x).permute(0, 2, 3, 1) for x in pyramid]
        return [x.reshape(x.shape[0], -1, self.values).contiguous() for x in cells]


class RetinaNet(nn.Module):
    """forward: uint8 RGB [N, 3, H, W] -> (class logits, box deltas as `detcore.boxes.encode`), lists over P3..P7.

    A level's logits are [N, A_l, K] and its deltas [N, A_l, 4], contiguous, A_l = rows * columns * 9; with weights in
    channels_last they are views of what the convolution wrote. The levels are left apart, since joining the logits
    would copy the widest tensors of all. The images must have `image_size` (height, width); values are normalised
    here, on the device. The order of the anchors is that of the buffer `anchors`, float32 [A, 4], which follows
    `image_size` and `anchor_sizes` and is not part of the state dictionary. backbone, norm and trainable_layers: see
    `detcore.nn.resnet.ResNet`. Features are in channels_last; on a GPU call
    `model.to(memory_format=torch.channels_last)` for the weights.

    With the variant class_bias a third output follows, the bias [9 * K] of the class convolution, and the logits lack
    it: `losses` and `postprocess` add it.

    Raises UserError for values that do not fit together and for images of another size.
    """

    def __init__(
        self,
        backbone: str = "resnext50_32x4d",
        num_classes: int = 264,
        image_size: tuple[int, int] = (800, 800),
        norm: str = "frozen",
        trainable_layers: int = 3,
        fpn_channels: int = 256,
        head_convs: int = 4,
        anchor_sizes: Sequence[float] = SIZES,
    ):
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a detector needs at least one class")
        if len(anchor_sizes) != len(SIZES) or min(anchor_sizes) < 1:
            raise UserError(f"anchor_sizes is {tuple(anchor_sizes)}; give {len(SIZES)} sizes in pixels, one a level")
        if min(image_size) < 1:
            raise UserError(f"image_size is {tuple(image_size)}; height and width must be positive")
        self.num_classes, self.image_size = num_classes, (int(image_size[0]), int(image_size[1]))
        body = ResNet(backbone, norm, trainable_layers)
        self.backbone = nn.ModuleDict({"body": body, "fpn": FeaturePyramid(body.channels, fpn_channels)})
        per_cell = len(OCTAVE_STEPS) * len(RATIOS)
        prior_bias = -math.log((1 - PRIOR) / PRIOR)
        self.head = nn.ModuleDict(
            {
                "classification_head": Head(fpn_channels, head_convs, per_cell, num_classes, "cls_logits", prior_bias),
                "regression_head": Head(fpn_channels, head_convs, per_cell, 4, "bbox_reg"),
            }
        )
        self.register_buffer("anchors", anchors(self.image_size, grids(self.image_size), anchor_sizes), False)
        std = torch.tensor(STD)
        self.register_buffer("pixel_scale", 1 / (255 * std), False)
        self.register_buffer("pixel_shift", -torch.tensor(MEAN) / std, False)

    def forward(self, images: Tensor) -> Outputs:
        if tuple(images.shape[-2:]) != self.image_size:
            raise UserError(f"images are {tuple(images.shape[-2:])}, but the model was built for {self.image_size}")
        dtype = autocast_dtype(self.pixel_scale)  # under autocast that of the first layer: no copy in float32 is made
        body = self.backbone["body"]
        x = normalize(images, self.pixel_scale, self.pixel_shift, dtype, channels=body.image_channels)
        return self._heads(self.backbone["fpn"](body(x)))

    def _heads(self, pyramid: Sequence[Tensor]) -> Outputs:
        classify, regress = self.head["classification_head"], self.head["regression_head"]
        inside, aside = native.variant("class_bias"), native.variant("small_levels")
        narrow = {}
        # A convolution inside of autocast gets its weight from autocast's cache; these do not, and there are 5 levels.
        if aside or any(map(native.variant, ("multi_cast", "conv_epilogues", "frozen_stage"))):
            biases = [regress.output.bias] if inside else [classify.output.bias, regress.output.bias]
            narrow = narrow_copies([*(p for p in self.head.parameters() if p.dim() == 4), *biases])

        def heads(levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            return classify(levels, narrow, not inside), regress(levels, narrow)

        if aside:
            large, small = pyramid[:LARGE_LEVELS], pyramid[LARGE_LEVELS:]
            parts = side_by_side(lambda: heads(large), lambda: heads(small), (*small, *narrow.values()))
            outputs = tuple(first + second for first, second in zip(*parts, strict=True))
        else:
            outputs = heads(pyramid)
        return (*outputs, classify.output.bias) if inside else outputs


_CLASSES = "head.classification_head.cls_logits."


def known_classes(state: Mapping) -> int | None:
    """Number of classes of a state dictionary of RetinaNet, by whatever prefix; None if it is none."""
    parts = [value for name, value in state.items() if str(name).endswith((f"{_CLASSES}weight", f"{_CLASSES}bias"))]
    rows = {len(value) if isinstance(value, Tensor) and value.ndim else 0 for value in parts}
    return rows.pop() // (len(OCTAVE_STEPS) * len(RATIOS)) if len(rows) == 1 else None


def load_reference_state(
    model: RetinaNet, state: Mapping, source: str = "the checkpoint", *, other_classes: bool = False
) -> bool:
    """Load the weights of an MLCommons reference or torchvision RetinaNet, in place.

    state: a state dictionary, or a checkpoint that holds one under "model"; names may begin with "module."
    and may be torchvision's newer ones (`inner_blocks.0.0.weight`, `conv.0.0.weight`). `source` names the
    file in errors. other_classes: where the state is of another number of classes, the convolution that predicts them
    stays as it is. Returns whether it did. Raises UserError that names another number of classes, or lists missing,
    unexpected and misshapen entries.
    """
    state = state.get("model", state)
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds {type(state).__name__} under 'model', not a dictionary of weights")

    def own_name(key: str) -> str:
        key = key.removeprefix("module.")
        key = re.sub(r"(inner_blocks|layer_blocks)\.(\d+)\.0\.", r"\1.\2.", key)
        return re.sub(r"(_head\.conv)\.(\d+)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)

    state = {own_name(str(key)): value for key, value in state.items()}
    return load_with_classes(model, state, source, known_classes(state), _CLASSES, other_classes=other_classes)
