"""EfficientDet: an EfficientNet, a bidirectional feature pyramid and two heads shared by its levels.

Parameters carry the names of rwightman's effdet, which NVIDIA's program has too, except in its backbone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detcore import UserError
from detcore.nn.efficientnet import EfficientNet
from detcore.nn.norm_folding import folded_norms, norm_pairs, normed_act
from detcore.ops.fold import autocast_dtype
from detcore.ops.normalize import normalize
from efficientdet.anchors import PER_CELL, anchors
from efficientdet.architectures import architecture
from efficientdet.bifpn import BiFPN, named, norm, separable

PRIOR = 0.01
"""Probability that a fresh classification head gives to every class of every anchor."""

Outputs = tuple[list[Tensor], list[Tensor]]


class Head(nn.Module):
    """[P3, ...] -> [[N, A of P3, values], ...]: convolutions shared by the levels, each level with norms of its own."""

    def __init__(self, channels: int, repeats: int, levels: int, values: int, act: str, bias: bool):
        super().__init__()
        self.values, self.act = values, act
        self.conv_rep = nn.ModuleList(separable(channels, channels, bias) for _ in range(repeats))
        self.bn_rep = nn.ModuleList(
            nn.ModuleList(named(bn=norm(channels)) for _ in range(levels)) for _ in range(repeats)
        )
        self.predict = separable(channels, PER_CELL * values, True)

    def norm_pairs(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        return [
            (conv.conv_pw, norm.bn) for conv, norms in zip(self.conv_rep, self.bn_rep, strict=True) for norm in norms
        ]

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for level, x in enumerate(pyramid):
            for conv, norms in zip(self.conv_rep, self.bn_rep, strict=True):
                x = normed_act(conv.conv_pw, norms[level].bn, conv.conv_dw(x), self.act)
            # Channels are anchor-major: moved last, a cell's anchors follow each other. No copy in channels_last.
            x = self.predict(x).permute(0, 2, 3, 1)
            outputs.append(x.reshape(x.shape[0], -1, self.values).contiguous())
        return outputs


class EfficientDet(nn.Module):
    """forward: uint8 RGB [N, 3, H, W] -> (class logits, box deltas as `detcore.boxes.encode`), lists over P3, P4, ...

    A level's logits are [N, A_l, K] and its deltas [N, A_l, 4], contiguous, A_l = rows * columns * 9. The images must
    have `image_size` (height, width); values are normalised here, on the device. The order of the anchors is that of
    the buffer `anchors`, float32 [A, 4], which is not part of the state dictionary. Features are in channels_last; on a
    GPU call `model.to(memory_format=torch.channels_last)` for the weights.

    name: one of `efficientdet.architectures.ARCHITECTURES`, which image_size, redundant_bias, fusion and drop_path
    follow where they are None. num_classes: 90 for COCO's own ids 1..90, of which 10 never occur.

    Raises UserError for an unknown name or fusion, no classes, a size that is not positive, and images of another size.
    """

    def __init__(
        self,
        name: str = "efficientdet_d0",
        num_classes: int = 90,
        image_size: tuple[int, int] | None = None,
        redundant_bias: bool | None = None,
        fusion: str | None = None,
        drop_path: float | None = None,
    ):
        super().__init__()
        known = architecture(name)
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a detector needs at least one class")
        size = image_size or (known.image_size, known.image_size)
        if min(size) < 1:
            raise UserError(f"image_size is {tuple(size)}; height and width must be positive")
        self.name, self.num_classes, self.image_size = name, num_classes, (int(size[0]), int(size[1]))
        bias = known.redundant_bias if redundant_bias is None else redundant_bias
        act = known.activation
        drop = known.drop_path if drop_path is None else drop_path
        self.soft_nms = False  # what is done with overlapping boxes; see `efficientdet.postprocess`
        self.backbone = EfficientNet(known.backbone, known.same_backbone, drop, known.backbone_eps)
        self.fpn = BiFPN(
            self.backbone.channels, known.channels, known.cells, known.levels, fusion or known.fusion, act,
            known.same_neck, bias,
        )  # fmt: skip
        self.class_net = Head(known.channels, known.repeats, known.levels, num_classes, act, bias)
        self.box_net = Head(known.channels, known.repeats, known.levels, 4, act, bias)
        self._reset()
        self.register_buffer("anchors", anchors(self.image_size, known.levels, known.anchor_scale), False)
        mean, std = map(torch.tensor, known.pixels)
        self.register_buffer("pixel_scale", 1 / (255 * std), False)
        self.register_buffer("pixel_shift", -mean / std, False)

    @torch.no_grad()
    def _reset(self) -> None:
        """Fan-average initialisation: uniform in the pyramid, normal in the heads."""
        for part in (self.fpn, self.class_net, self.box_net):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    area = module.weight[0, 0].numel()
                    fans = area * module.weight.shape[1] + area * module.out_channels // module.groups
                    std = math.sqrt(2 / fans)
                    if part is self.fpn:
                        nn.init.uniform_(module.weight, -math.sqrt(3) * std, math.sqrt(3) * std)
                    else:
                        nn.init.normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_net.predict.conv_pw.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, images: Tensor) -> Outputs:
        if tuple(images.shape[-2:]) != self.image_size:
            raise UserError(f"images are {tuple(images.shape[-2:])}, but the model was built for {self.image_size}")
        dtype = autocast_dtype(self.pixel_scale)  # under autocast that of the first layer: no copy in float32 is made
        return self.predict(normalize(images, self.pixel_scale, self.pixel_shift, dtype))

    def predict(self, pixels: Tensor) -> Outputs:
        """The same from normalised pixels, float [N, 3, H, W] of any size."""
        if self.training or torch.is_grad_enabled():
            return self._network(pixels)
        with folded_norms(norm_pairs(self), pixels.dtype):
            return self._network(pixels)

    def _network(self, pixels: Tensor) -> Outputs:
        pyramid = self.fpn(self.backbone(pixels))
        # The network's own order is dy, dx, dh, dw.
        deltas = [level.unflatten(2, (2, 2)).flip(3).flatten(2) for level in self.box_net(pyramid)]
        return self.class_net(pyramid), deltas
