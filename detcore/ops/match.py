"""Which ground-truth box each anchor belongs to, by overlap: the rules of RetinaNet and of EfficientDet."""

import torch
from torch import Tensor

from detcore.boxes import areas
from detcore.ops.pieces import work_elements

UNMATCHED = -1
IGNORED = -2


@torch.no_grad()
def match_reference(
    anchors: Tensor, boxes: Tensor, labels: Tensor, foreground: float, background: float, ties: bool
) -> Tensor:
    """Assign ground truth to anchors: int64 [N, A], the index of the box, UNMATCHED or IGNORED.

    anchors: [A, 4], with an area; their floating dtype is that of the arithmetic. boxes: [N, M, 4], x1, y1, x2, y2,
    padded. labels: int64 [N, M], negative where padded. No gradients; the overlaps are walked in pieces of a few boxes.
    An anchor takes the box it overlaps most, if the IoU is at least `foreground`; below `background` it is UNMATCHED,
    between them IGNORED. Besides, every box has an anchor, whatever the IoU, provided it overlaps any: so a box
    outside the image, or without area, is never matched. ties says which:
    True, RetinaNet's rule: all anchors that tie for the box's highest IoU take the box that they overlap most.
    False, EfficientDet's: the first anchor with the box's highest IoU takes this box; of several such boxes the first.
    IoU values are computed in one fixed order of operations, since ties are found by equality.
    """
    (n, m), a = labels.shape, len(anchors)
    used = m
    if labels.device.type == "cpu" and m:  # reading a value costs nothing here, and padding is mostly empty
        real = (labels >= 0).any(0).nonzero()
        used = int(real[-1]) + 1 if len(real) else 0
    best = anchors.new_zeros(n, a)
    index = torch.zeros(n, a, dtype=torch.int64, device=anchors.device)
    tied = torch.zeros(n, a, dtype=torch.bool, device=anchors.device)
    claimed = torch.full((n, a), m, dtype=torch.int64, device=anchors.device)
    anchor_areas, planes = areas(anchors), anchors.t().contiguous()
    step = max(1, work_elements(anchors.device) // max(1, n * a))
    for start in range(0, used, step):
        stop = min(start + step, used)
        # A padded box becomes one without area at a corner, which overlaps nothing.
        part = boxes[:, start:stop].to(anchors.dtype).masked_fill(labels[:, start:stop, None] < 0, 0)
        x1, y1, x2, y2 = part.unsqueeze(2).unbind(-1)
        inter = torch.minimum(x2, planes[2]).sub_(torch.maximum(x1, planes[0])).clamp_(min=0)
        inter.mul_(torch.minimum(y2, planes[3]).sub_(torch.maximum(y1, planes[1])).clamp_(min=0))
        iou = inter.div_((areas(part).unsqueeze(2) + anchor_areas).sub_(inter))
        highest, at = iou.max(2, keepdim=True)
        if ties:
            tied |= ((iou == highest) & (highest > 0)).any(1)
        else:
            box = torch.arange(start, stop, device=anchors.device).expand(n, -1)
            claimed.scatter_reduce_(1, at[..., 0], box.masked_fill(highest[..., 0] <= 0, m), "amin")
        value, position = iou.max(1)
        better = value > best
        index = torch.where(better, position + start, index)
        best = torch.where(better, value, best)
    negative = torch.where(best < background, UNMATCHED, IGNORED)
    matched = torch.where(tied | (best >= foreground), index, negative)
    return torch.where(claimed < m, claimed, matched)
