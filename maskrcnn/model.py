"""Mask R-CNN, Faster R-CNN and the region proposal network alone, as the configuration's keys describe them.

Parameters carry the names of maskrcnn-benchmark, except that its `stem` is the body itself:
backbone.body.{conv1, bn1, layer1...}, backbone.fpn.{fpn_inner1, fpn_layer1...}, rpn.head.{conv, cls_logits, bbox_pred},
roi_heads.box.{feature_extractor, predictor}.*, roi_heads.mask.{feature_extractor, predictor}.*.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detcore import UserError
from detcore.ops.fold import autocast_dtype
from detcore.ops.normalize import normalize
from maskrcnn.anchors import cell_anchors, inside, level_anchors
from maskrcnn.bodies import make_backbone
from maskrcnn.roi_heads import BoxHead, MaskHead
from maskrcnn.rpn import Matching, Proposals, RPNHead, Selection, propose


class RPN(nn.Module):
    """The head with its anchors: `anchors(grids)` for maps of any size, and `forward` for what it predicts."""

    def __init__(self, config, channels: int):
        super().__init__()
        sizes, self.strides = config.rpn_anchor_sizes, tuple(config.rpn_anchor_stride)
        each = [(size,) for size in sizes] if config.rpn_use_fpn else [tuple(sizes)]
        if config.rpn_rpn_head != "SingleConvRPNHead":
            raise UserError(f"MODEL.RPN.RPN_HEAD is {config.rpn_rpn_head!r}; it must be SingleConvRPNHead")
        if len(self.strides) != len(each):
            raise UserError(
                f"MODEL.RPN.ANCHOR_STRIDE {self.strides} with ANCHOR_SIZES {tuple(sizes)}: with USE_FPN as many "
                "strides as sizes, without it one stride"
            )
        for i, (stride, own) in enumerate(zip(self.strides, each, strict=True)):
            cell = cell_anchors(stride, own, config.rpn_aspect_ratios, config.legacy_boxes)
            self.register_buffer(f"cell_anchors{i}", cell, False)
        self.head = RPNHead(channels, len(cell))

    def anchors(self, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """[A_l, 4] of each level, whose feature map has the given rows and columns."""
        cells = (self.get_buffer(f"cell_anchors{i}") for i in range(len(self.strides)))
        return [level_anchors(*of) for of in zip(cells, grids, self.strides, strict=True)]


class Found(NamedTuple):
    """What the region proposal network says of a batch, level by level.

    logits [N, A_l] and deltas [N, A_l, 4]; anchors [A_l, 4]; grids: rows and columns of each level.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]
    grids: list[tuple[int, int]]


class MaskRCNN(nn.Module):
    """The network; `maskrcnn.loss.losses` and `maskrcnn.postprocess.postprocess` say what is computed with it.

    config: the fields of `maskrcnn.config.Config` that stand for MODEL.* and INPUT.PIXEL_MEAN, PIXEL_STD and TO_BGR255.
    legacy_boxes counts pixels inclusively as the original does, else as torchvision (`maskrcnn.anchors`).
    rpn_fpn_post_nms_per_batch: in training the best proposals are those of the whole batch, else of each image.
    Raises UserError for what the original doesn't have, or what doesn't go together. All canvases are welcome whose
    sides the coarsest stride divides.
    """

    def __init__(self, config):
        super().__init__()
        self.legacy, self.num_classes = config.legacy_boxes, config.roi_box_head_num_classes - 1
        self.backbone, stage = make_backbone(config)
        self.rpn = RPN(config, self.backbone.channels)
        self.matching = Matching(
            config.rpn_fg_iou_threshold, config.rpn_bg_iou_threshold, config.rpn_batch_size_per_image,
            config.rpn_positive_fraction,
        )  # fmt: skip
        self.straddle = config.rpn_straddle_thresh
        self.selections = {training: _selection(config, training) for training in (True, False)}
        self.roi_heads: nn.ModuleDict | None = None
        if not config.rpn_only:
            self._add_roi_heads(config, stage)
        self.bgr = config.input_to_bgr255
        mean, std = torch.tensor(config.input_pixel_mean), torch.tensor(config.input_pixel_std)
        mean, std = (mean.flip(0), std.flip(0)) if self.bgr else (mean, std)
        self.register_buffer("pixel_scale", 1 / ((1 if self.bgr else 255) * std), False)
        self.register_buffer("pixel_shift", -mean / std, False)

    def _add_roi_heads(self, config, stage: nn.Sequential | None) -> None:
        self.roi_heads = nn.ModuleDict({"box": BoxHead(config, self.backbone.channels, stage)})
        if config.mask_on:
            box_channels = self.roi_heads["box"].feature_extractor.channels
            self.roi_heads["mask"] = MaskHead(config, self.backbone.channels, box_channels)
        self.mask_size = config.roi_mask_head_resolution
        self.roi_matching = Matching(
            config.roi_heads_fg_iou_threshold, config.roi_heads_bg_iou_threshold,
            config.roi_heads_batch_size_per_image, config.roi_heads_positive_fraction,
        )  # fmt: skip
        self.box_weights = tuple(config.roi_heads_bbox_reg_weights)
        self.score_thresh, self.nms_thresh = config.roi_heads_score_thresh, config.roi_heads_nms
        self.detections = config.roi_heads_detections_per_img

    @property
    def makes_masks(self) -> bool:
        return self.roi_heads is not None and "mask" in self.roi_heads

    def forward(self, images: Tensor, extent: Tensor | None = None) -> list[Tensor]:
        """Feature maps of uint8 images, finest first, as `normalized` and then `features` make them.

        Floats are taken as normalised. What follows the maps is called by its own name: the reducer of gradients over
        processes only wants to know when a forward pass begins.
        """
        return self.features(images if images.is_floating_point() else self.normalized(images, extent))

    def normalized(self, images: Tensor, extent: Tensor | None = None) -> Tensor:
        """uint8 RGB [N, 3, H, W] -> what `features` wants, in autocast's type and channels_last.

        extent: int64 [N, 2], height and width of the images on their canvas, beyond which all values are 0; None: all
        of it.
        """
        out = normalize(images, self.pixel_scale, self.pixel_shift, autocast_dtype(self.pixel_scale))
        if extent is None:
            return out.flip(1) if self.bgr else out
        rows, columns = (torch.arange(n, device=extent.device) for n in images.shape[2:])
        covered = (rows < extent[:, :1])[:, :, None] & (columns < extent[:, 1:])[:, None]
        out.masked_fill_(~covered[:, None], 0)  # in place: the layout stays
        return out.flip(1) if self.bgr else out

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised images, float [N, 3, H, W] -> feature maps, finest first; see `maskrcnn.bodies.Backbone`."""
        return self.backbone(images)

    def find(self, features: Sequence[Tensor]) -> Found:
        """What the region proposal network says of the maps."""
        grids = [tuple(x.shape[2:]) for x in features]
        return Found(*self.rpn.head(features), self.rpn.anchors(grids), grids)

    def within(self, anchors: Tensor, extent: Tensor) -> Tensor:
        """bool [N, A]: the anchors that train, by rpn_straddle_thresh."""
        return inside(anchors, extent, self.straddle, self.legacy)

    def propose(self, found: Found, extent: Tensor, training: bool) -> Proposals:
        """Proposals of a batch, by the settings of training or of evaluation."""
        return propose(
            found.logits, found.deltas, found.anchors, self.rpn.strides, found.grids, extent,
            self.selections[training], self.legacy,
        )  # fmt: skip


def _selection(config, training: bool) -> Selection:
    kind = "train" if training else "test"
    before, after = (getattr(config, f"rpn_{time}_nms_top_n_{kind}") for time in ("pre", "post"))
    together = getattr(config, f"rpn_fpn_post_nms_top_n_{kind}") if config.rpn_use_fpn else None
    over_batch = training and config.rpn_fpn_post_nms_per_batch
    return Selection(before, after, together, over_batch, config.rpn_nms_thresh, config.rpn_min_size)
