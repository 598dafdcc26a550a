"""What the configuration calls a body: a residual network, with a feature pyramid or cut off for the region heads."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from detcore import UserError
from detcore.nn.resnet import BACKBONES, FrozenNorm, ResNet

Norm = Callable[[int], nn.Module]

_NORMS = {"WithFixedBatchNorm": FrozenNorm, "WithBatchNorm": nn.BatchNorm2d, "WithGN": None}


def group_norm(config) -> Norm:
    """What makes GroupNorm modules as group_norm_num_groups, group_norm_dim_per_gp and group_norm_epsilon say."""

    def make(channels: int) -> nn.GroupNorm:
        each = config.group_norm_dim_per_gp
        groups = channels // each if each > 0 else config.group_norm_num_groups
        if groups < 1 or channels % groups or (each > 0 and channels % each):
            raise UserError(
                f"MODEL.GROUP_NORM: {channels} channels can't be split into {groups} groups; change NUM_GROUPS "
                f"{config.group_norm_num_groups} or DIM_PER_GP {each}"
            )
        return nn.GroupNorm(groups, channels, config.group_norm_epsilon)

    return make


def conv(
    inputs: int, outputs: int, kernel: int, norm: Norm | None = None, relu: bool = False, dilation: int = 1
) -> nn.Conv2d | nn.Sequential:
    """A convolution that keeps the resolution; followed by norm, which replaces its bias, and ReLU as asked for."""
    first = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=norm is None)
    if norm is None and not relu:
        return first
    return nn.Sequential(first, *([norm(outputs)] if norm else []), *([nn.ReLU(inplace=True)] if relu else []))


def initialise(module: nn.Module, weights: Callable[[Tensor], Tensor]) -> None:
    """Fills the weights of all convolutions and linear layers, and zeros their biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            weights(layer.weight.data)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class FeaturePyramid(nn.Module):
    """(C2, ..., C5) -> [P2, ..., P5, P6], each [N, channels, rows, columns]; P6 is every second cell of P5.

    Parameters carry the original's names: fpn_inner1 is the 1x1 convolution of C2, fpn_layer1 the 3x3 one of P2.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, norm: Norm | None, relu: bool):
        super().__init__()
        self.count = len(in_channels)
        for i, inputs in enumerate(in_channels, 1):
            self.add_module(f"fpn_inner{i}", conv(inputs, channels, 1, norm, relu))
            self.add_module(f"fpn_layer{i}", conv(channels, channels, 3, norm, relu))
        initialise(self, partial(nn.init.kaiming_uniform_, a=1))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        inner = [self.get_submodule(f"fpn_inner{i}")(x) for i, x in enumerate(features, 1)]
        for level in range(self.count - 2, -1, -1):
            inner[level] = inner[level] + F.interpolate(inner[level + 1], size=inner[level].shape[-2:], mode="nearest")
        pyramid = [self.get_submodule(f"fpn_layer{i}")(x) for i, x in enumerate(inner, 1)]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]


def _network(config) -> tuple[str, str]:
    """The residual network and C4, C5 or FPN."""
    found = re.fullmatch(r"R-(18|34|50|101|152)-(C4|C5|FPN)", config.backbone_conv_body)
    if not found:
        raise UserError(
            f"MODEL.BACKBONE.CONV_BODY is {config.backbone_conv_body!r}; choose R-18, R-34, R-50, R-101 or R-152 "
            "with -FPN, -C4 or -C5, such as R-50-FPN"
        )
    groups, width = config.resnets_num_groups, config.resnets_width_per_group
    name = f"resnet{found[1]}" if (groups, width) == (1, 64) else f"resnext{found[1]}_{groups}x{width}d"
    if name not in BACKBONES:
        raise UserError(
            f"MODEL.RESNETS.NUM_GROUPS {groups} with WIDTH_PER_GROUP {width} is unknown for {config.backbone_conv_body}"
            "; choose 1 and 64, for R-50 also 32 and 4, for R-101 32 and 8"
        )
    channels = config.resnets_res2_out_channels, config.resnets_stem_out_channels
    if channels != (256, 64):
        raise UserError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS {channels[0]} and STEM_OUT_CHANNELS {channels[1]}: these networks "
            "have 256 and 64; leave the keys out"
        )
    return name, found[2]


def _norm(config) -> Norm:
    """What TRANS_FUNC and STEM_FUNC name: they must agree."""
    kinds = config.resnets_trans_func.removeprefix("Bottleneck"), config.resnets_stem_func.removeprefix("Stem")
    if kinds[0] != kinds[1] or kinds[0] not in _NORMS:
        raise UserError(
            f"MODEL.RESNETS.TRANS_FUNC {config.resnets_trans_func} with STEM_FUNC {config.resnets_stem_func}: choose "
            f"Bottleneck and Stem with the same ending: {', '.join(_NORMS)}"
        )
    return _NORMS[kinds[0]] or group_norm(config)


class Backbone(nn.Module):
    """forward: normalised images, float [N, 3, H, W] -> feature maps, finest first: [P2..P6], [C4] or [C5].

    Every map has `channels` channels.
    """

    def __init__(self, body: ResNet, fpn: FeaturePyramid | None, channels: int):
        super().__init__()
        self.body, self.fpn, self.channels = body, fpn, channels

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        return self.fpn(features) if self.fpn is not None else list(features)


def make_backbone(config) -> tuple[Backbone, nn.Sequential | None]:
    """The backbone that backbone_conv_body and resnets_* name, and of a C4 body the stage that the box head runs.

    Convolutions begin as the original's, Kaiming-uniform, until weights are loaded. The stages 0, 1, ... up to
    backbone_freeze_conv_body_at do not learn. Raises UserError for values that are unknown or don't go together.
    """
    name, kind = _network(config)
    frozen = config.backbone_freeze_conv_body_at
    if not 0 <= frozen <= 5:
        raise UserError(f"MODEL.BACKBONE.FREEZE_CONV_BODY_AT is {frozen}; it must lie in 0..5")
    levels = {"FPN": (2, 3, 4, 5), "C4": (4, 5), "C5": (5,)}[kind]
    body = ResNet(name, _norm(config), 5 - frozen, levels, config.resnets_stride_in_1x1)
    initialise(body, partial(nn.init.kaiming_uniform_, a=1))
    stage = body.cut_last_stage() if kind == "C4" else None
    if kind != "FPN":
        return Backbone(body, None, body.channels[-1]), stage
    norm, channels = group_norm(config) if config.fpn_use_gn else None, config.backbone_out_channels
    return Backbone(body, FeaturePyramid(body.channels, channels, norm, config.fpn_use_relu), channels), None
