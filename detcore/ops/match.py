"""Which ground-truth box each anchor belongs to."""

import torch
from torch import Tensor

from detcore import ops
from detcore.boxes import areas
from detcore.device import native

OP = "detcore::match"

LOW_QUALITY = ("none", "ties", "best")  # in the order of csrc/match.h
UNMATCHED = -1
IGNORED = -2


def match_reference(
    anchors: Tensor, boxes: Tensor, labels: Tensor, high: float, low: float, low_quality: str = "none"
) -> Tensor:
    """`match` in plain PyTorch, for any floating dtype; the overlaps are walked in pieces of a few boxes."""
    n, m = labels.shape
    a = anchors.shape[-2]
    anchors = anchors if anchors.dim() == 2 else anchors[:, None]  # beside the boxes of their image
    used = m
    if labels.device.type == "cpu" and m:  # reading a value costs nothing here, and padding is mostly empty
        real = (labels >= 0).any(0).nonzero()
        used = int(real[-1]) + 1 if len(real) else 0
    best = anchors.new_zeros(n, a)
    index = torch.zeros(n, a, dtype=torch.int64, device=anchors.device)
    tied = torch.zeros(n, a, dtype=torch.bool, device=anchors.device)
    claims = torch.full((n, a + 1), m, dtype=torch.int64, device=anchors.device)  # the place a takes what claims none
    ax1, ay1, ax2, ay2 = anchors.unbind(-1)
    anchor_areas = areas(anchors)
    chunk = max(1, ops.work_elements(anchors.device) // max(1, n * a))
    for start in range(0, used, chunk):
        part = boxes[:, start : min(start + chunk, used)].to(anchors.dtype)
        x1, y1, x2, y2 = part.unsqueeze(2).unbind(-1)
        inter = torch.minimum(x2, ax2).sub_(torch.maximum(x1, ax1)).clamp_(min=0)
        inter.mul_(torch.minimum(y2, ay2).sub_(torch.maximum(y1, ay1)).clamp_(min=0))
        union = (areas(part).unsqueeze(2) + anchor_areas).sub_(inter)
        real = (labels[:, start : start + part.shape[1]] >= 0).unsqueeze(2)
        iou = torch.where(real & (inter > 0), inter.div_(union), inter.new_zeros(()))
        if low_quality == "ties" and a:
            highest = iou.amax(2, keepdim=True)
            tied |= ((iou == highest) & (highest > 0)).any(1)
        elif low_quality == "best" and a:
            highest, claimed = iou.max(2)
            numbers = torch.arange(start, start + part.shape[1], device=anchors.device).expand_as(claimed)
            claims.scatter_reduce_(1, torch.where(highest > 0, claimed, a), numbers, "amin")
        value, position = iou.max(1)
        better = value > best
        index = torch.where(better, position + start, index)
        best = torch.where(better, value, best)
    negative = torch.where(best < low, UNMATCHED, IGNORED)
    matched = torch.where(tied | (best >= high), index, negative)
    claims = claims[:, :a]
    return torch.where(claims < m, claims, matched)


@torch.no_grad()
def match(anchors: Tensor, boxes: Tensor, labels: Tensor, high: float, low: float, low_quality: str = "none") -> Tensor:
    """Assign ground truth to anchors: int64 [N, A], the index of the box, UNMATCHED or IGNORED.

    anchors: [A, 4], or [N, A, 4] where each image has its own. boxes: [N, M, 4], padded. labels: int64 [N, M], negative
    where padded; padding costs next to nothing, wherever it stands. The native op wants float32; no gradients.
    An anchor takes the box it overlaps most (of equals, the first), if the IoU is at least `high`; from `low` to `high`
    it is ignored. low_quality: what else is matched, whatever the IoU, provided it is above 0, so that a box outside
    the image, or without area, never is.
    "none": nothing.
    "ties": all the anchors that tie for a box's highest IoU take the box that they themselves overlap most (the
    low-quality matches of RetinaNet and Faster R-CNN).
    "best": every box takes the first anchor with its highest IoU, whoever had it; where boxes meet, the first one gets
    it (TensorFlow's object detection API, force_match_for_each_row; EfficientDet).
    IoU values are computed in the order of the MLCommons reference's operations, since ties are found by equality.
    """
    if native.runs(OP, anchors, boxes, labels, dtypes=(torch.float32,)):
        given = anchors.contiguous(), boxes.contiguous(), labels.contiguous()
        return torch.ops.detcore.match(*given, high, low, LOW_QUALITY.index(low_quality))
    return match_reference(anchors, boxes, labels, high, low, low_quality)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(anchors: Tensor, boxes: Tensor, labels: Tensor, high: float, low: float, low_quality: int) -> Tensor:
        return labels.new_empty(labels.shape[0], anchors.shape[-2])
