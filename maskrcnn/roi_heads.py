"""What happens to regions: which of them train, features of one size for each, and the heads for classes, boxes, masks.

Parameters carry the original's names.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore import UserError
from detcore.boxes import areas
from detcore.nn.resnet import LastStage
from detcore.ops.bias_relu import bias_relu
from detcore.ops.match import match
from detcore.ops.roi_align import roi_align
from maskrcnn.anchors import pooled
from maskrcnn.bodies import Norm, conv, group_norm, initialise
from maskrcnn.rpn import Draws, Matching, Proposals, sample

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4


class Regions(NamedTuple):
    """Regions that train, a fixed number of each image; positive ones first.

    boxes: [N, S, 4], half-open pixels of the canvas, without gradient. labels: int64 [N, S], 0 for background, k + 1
    for class k of the batch. box_of: int64 [N, S], the box that a positive region belongs to, else -1. valid: bool
    [N, S]; the others count nothing.
    """

    boxes: Tensor
    labels: Tensor
    box_of: Tensor
    valid: Tensor


@torch.no_grad()
def sample_regions(
    proposals: Proposals, boxes: Tensor, labels: Tensor, matching: Matching, draws: Draws = torch.rand_like
) -> Regions:
    """Regions among the proposals and the ground truth: boxes [N, M, 4], labels int64 [N, M], negative where padded."""
    boxes = boxes.to(proposals.boxes.dtype)
    candidates = torch.cat((proposals.boxes, boxes), 1)
    usable = torch.cat((proposals.scores >= 0, (labels >= 0) & (areas(boxes) > 0)), 1)
    matched = match(candidates, boxes, labels, matching.high, matching.low)
    chosen = sample(usable & (matched >= 0), usable & (matched == -1), matching.count, matching.fraction, draws)
    box_of = matched.gather(1, chosen.at).masked_fill(~chosen.positive, -1)
    found = torch.zeros_like(box_of)
    if labels.shape[1]:
        found = (labels.gather(1, box_of.clamp(min=0)) + 1).masked_fill(~chosen.positive, 0)
    picked = candidates.gather(1, chosen.at[..., None].expand(-1, -1, 4))
    return Regions(picked, found, box_of, chosen.valid)


def levels_of(boxes: Tensor, finest: int, coarsest: int) -> Tensor:
    """int64 [N, S]: the pyramid level, finest = 0, that suits a box's size; 224 pixels suit level 4 (P4)."""
    size = areas(boxes).clamp(min=0).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + 1e-6))
    return level.clamp(finest, coarsest).nan_to_num(finest).long() - finest


class Pooler(nn.Module):
    """Features of one size for each region: [N, S, 4] of the maps -> [N * S, C, resolution, resolution].

    scales: cells per pixel of the maps that are used, finest first: more maps are left alone. sampling_ratio: samples
    of a bin along each axis, 0 for as many as it has cells. legacy: see `maskrcnn.anchors`.
    """

    def __init__(self, resolution: int, scales: Sequence[float], sampling_ratio: int, legacy: bool):
        super().__init__()
        self.resolution, self.scales, self.sampling_ratio = resolution, tuple(scales), sampling_ratio
        self.legacy = legacy
        self.finest, self.coarsest = (round(-math.log2(s)) for s in (scales[0], scales[-1]))
        if self.coarsest - self.finest + 1 != len(scales):
            raise UserError(f"POOLER_SCALES {tuple(scales)}: each must be half of the one before it")

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        used, level = features[: len(self.scales)], levels_of(boxes, self.finest, self.coarsest)
        corners = pooled(boxes, self.legacy)
        return roi_align(used, corners, level, self.scales, self.resolution, self.sampling_ratio).flatten(0, 1)


def _linear(inputs: int, outputs: int, norm: Norm | None = None) -> nn.Linear | nn.Sequential:
    layer = nn.Linear(inputs, outputs, bias=norm is None)
    initialise(layer, partial(nn.init.kaiming_uniform_, a=1))
    return nn.Sequential(layer, norm(outputs)) if norm else layer


class TwoLayers(nn.Module):
    """FPN2MLPFeatureExtractor: [R, C, r, r] -> [R, width] by two linear layers."""

    def __init__(self, channels: int, resolution: int, width: int, norm: Norm | None):
        super().__init__()
        self.fc6 = _linear(channels * resolution**2, width, norm)
        self.fc7 = _linear(width, width, norm)
        self.channels = width

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))


class ConvsAndLayer(nn.Module):
    """FPNXconv1fcFeatureExtractor: [R, C, r, r] -> [R, width] by 3x3 convolutions and one linear layer."""

    def __init__(self, channels: int, config):
        super().__init__()
        head = config.roi_box_head_conv_head_dim
        norm = group_norm(config) if config.roi_box_head_use_gn else None
        inputs = [channels, *[head] * (config.roi_box_head_num_stacked_convs - 1)]
        stack = [conv(i, head, 3, norm, True, config.roi_box_head_dilation) for i in inputs]
        self.xconvs = nn.Sequential(*(layer for one in stack for layer in one))
        initialise(self.xconvs, partial(nn.init.normal_, std=0.01))
        self.channels = config.roi_box_head_mlp_head_dim
        self.fc6 = _linear(head * config.roi_box_head_pooler_resolution**2, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc6(self.xconvs(x).flatten(1)))


class StageFive(nn.Module):
    """ResNet50Conv5ROIFeatureExtractor: [R, C4, r, r] -> [R, C5, r / 2, r / 2] by the body's own last stage."""

    def __init__(self, stage: nn.Sequential, dilation: int):
        super().__init__()
        self.head = LastStage(stage, dilation)
        last = stage[-1]
        self.channels = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def box_features(config, channels: int, stage: nn.Sequential | None) -> nn.Module:
    """The feature extractor that roi_box_head_feature_extractor names, with the `channels` that it gives.

    channels: of the backbone's maps. stage: the last stage of a C4 body. Raises UserError for an unknown name.
    """
    name = config.roi_box_head_feature_extractor
    if name == "ResNet50Conv5ROIFeatureExtractor":
        if stage is None:
            raise UserError(f"MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR {name} wants a body R-...-C4")
        return StageFive(stage, config.resnets_res5_dilation)
    if name == "FPN2MLPFeatureExtractor":
        norm = group_norm(config) if config.roi_box_head_use_gn else None
        return TwoLayers(channels, config.roi_box_head_pooler_resolution, config.roi_box_head_mlp_head_dim, norm)
    if name == "FPNXconv1fcFeatureExtractor":
        return ConvsAndLayer(channels, config)
    raise UserError(
        f"MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR is {name!r}; choose FPN2MLPFeatureExtractor, "
        "FPNXconv1fcFeatureExtractor or ResNet50Conv5ROIFeatureExtractor"
    )


class BoxPredictor(nn.Module):
    """[R, C] or [R, C, r, r], which is averaged -> class logits [R, K + 1] and box deltas [R, K + 1, 4]."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(channels, classes)
        self.bbox_pred = nn.Linear(channels, 4 * classes)
        initialise(self.cls_score, partial(nn.init.normal_, std=0.01))
        initialise(self.bbox_pred, partial(nn.init.normal_, std=0.001))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.mean((2, 3)) if x.dim() == 4 else x
        return self.cls_score(x), self.bbox_pred(x).unflatten(1, (-1, 4))


class BoxHead(nn.Module):
    """forward: maps and regions [N, S, 4] -> class logits [N, S, K + 1], deltas [N, S, K + 1, 4], what they came from.

    Class 0 is the background. Deltas are `detcore.boxes.encode`'s by roi_heads_bbox_reg_weights. The last output, the
    extractor's [N, S, ...], is what the mask head of a C4 network shares.
    """

    def __init__(self, config, channels: int, stage: nn.Sequential | None):
        super().__init__()
        self.pooler = Pooler(
            config.roi_box_head_pooler_resolution, config.roi_box_head_pooler_scales,
            config.roi_box_head_pooler_sampling_ratio, config.legacy_boxes,
        )  # fmt: skip
        self.feature_extractor = box_features(config, channels, stage)
        self.predictor = BoxPredictor(self.feature_extractor.channels, config.roi_box_head_num_classes)

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.feature_extractor(self.pooler(features, boxes))
        logits, deltas = self.predictor(x)
        return tuple(y.unflatten(0, boxes.shape[:2]) for y in (logits, deltas, x))


class MaskLayers(nn.Module):
    """MaskRCNNFPNFeatureExtractor: [R, C, r, r] -> [R, C', r, r] by 3x3 convolutions mask_fcn1, mask_fcn2, ..."""

    def __init__(self, channels: int, config):
        super().__init__()
        norm = group_norm(config) if config.roi_mask_head_use_gn else None
        self.count = len(config.roi_mask_head_conv_layers)
        for i, outputs in enumerate(config.roi_mask_head_conv_layers, 1):
            self.add_module(f"mask_fcn{i}", conv(channels, outputs, 3, norm, False, config.roi_mask_head_dilation))
            channels = outputs
        initialise(self, _kaiming_normal)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.count + 1):
            x = F.relu(self.get_submodule(f"mask_fcn{i}")(x), inplace=True)
        return x


def _kaiming_normal(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


class MaskPredictor(nn.Module):
    """MaskRCNNC4Predictor: [R, C, r, r] -> the logits [R, 2 r, 2 r] of one class for each region.

    Only the class that is asked for is computed: the others would be 80 of 81 parts of the work.
    """

    def __init__(self, channels: int, hidden: int, classes: int):
        super().__init__()
        self.classes = classes
        self.conv5_mask = nn.ConvTranspose2d(channels, hidden, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(hidden, classes, 1)
        initialise(self, _kaiming_normal)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """labels: int64 [R], 0..K; 0 is the background."""
        # The squares of 2 x 2 do not overlap: one matrix product, and only the few logits are put in their places.
        up = self.conv5_mask.weight.permute(2, 3, 1, 0)  # [2, 2, hidden, C]
        squares = F.linear(x.permute(0, 2, 3, 1), up.flatten(0, 2)).permute(0, 3, 1, 2)
        squares = bias_relu(squares, self.conv5_mask.bias.repeat(4)).permute(0, 2, 3, 1)
        squares = squares.unflatten(3, (2, 2, -1))  # [R, r, r, 2, 2, hidden]
        # As products with rows that choose a class: their gradients are sums in a fixed order.
        which = F.one_hot(labels, self.classes).to(self.mask_fcn_logits.weight.dtype)
        weight = which @ self.mask_fcn_logits.weight.flatten(1)
        logits = torch.bmm(squares.flatten(1, 4), weight[:, :, None].to(squares.dtype)).view(squares.shape[:5])
        logits = logits.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return logits + (which @ self.mask_fcn_logits.bias)[:, None, None].to(logits.dtype)


class MaskHead(nn.Module):
    """forward: maps and regions [N, S, 4] with labels [N, S] -> mask logits [N, S, M, M] of each region's class.

    shared: the box head's features [N, S, C, r, r], which a C4 network uses instead of its own.
    """

    def __init__(self, config, channels: int, box_channels: int):
        super().__init__()
        if config.roi_mask_head_predictor != "MaskRCNNC4Predictor":
            raise UserError(
                f"MODEL.ROI_MASK_HEAD.PREDICTOR is {config.roi_mask_head_predictor!r}; it must be MaskRCNNC4Predictor"
            )
        self.shares = config.roi_mask_head_share_box_feature_extractor
        name, hidden = config.roi_mask_head_feature_extractor, config.roi_mask_head_conv_layers[-1]
        if self.shares:
            if config.roi_box_head_feature_extractor != "ResNet50Conv5ROIFeatureExtractor":
                raise UserError(
                    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR wants a box head whose features are maps, "
                    "ResNet50Conv5ROIFeatureExtractor; set it False"
                )
        elif name == "MaskRCNNFPNFeatureExtractor":
            self.pooler = Pooler(
                config.roi_mask_head_pooler_resolution, config.roi_mask_head_pooler_scales,
                config.roi_mask_head_pooler_sampling_ratio, config.legacy_boxes,
            )  # fmt: skip
            self.feature_extractor = MaskLayers(channels, config)
        else:
            raise UserError(
                f"MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR is {name!r}; choose MaskRCNNFPNFeatureExtractor, or set "
                "SHARE_BOX_FEATURE_EXTRACTOR with a C4 body"
            )
        side = config.roi_mask_head_pooler_resolution
        if self.shares:
            side = config.roi_box_head_pooler_resolution
            side = side if config.resnets_res5_dilation > 1 else -(-side // 2)
        if config.roi_mask_head_resolution != 2 * side:
            raise UserError(
                f"MODEL.ROI_MASK_HEAD.RESOLUTION is {config.roi_mask_head_resolution}, but the head's masks are "
                f"{2 * side} x {2 * side}: twice the side of its features"
            )
        inputs = box_channels if self.shares else self.feature_extractor.channels
        self.predictor = MaskPredictor(inputs, hidden, config.roi_box_head_num_classes)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, shared: Tensor) -> Tensor:
        x = shared.flatten(0, 1) if self.shares else self.feature_extractor(self.pooler(features, boxes))
        return self.predictor(x, labels.flatten()).unflatten(0, labels.shape)
