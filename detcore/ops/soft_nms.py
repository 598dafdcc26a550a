"""Soft non-maximum suppression of a batch, with outputs of a fixed shape."""

import torch
from torch import Tensor

from detcore.boxes import areas


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, detections: int, sigma: float, floor: float
) -> tuple[Tensor, Tensor]:
    """Gaussian soft non-maximum suppression (Bodla et al. 2017): positions int64 and scores, each [N, detections].

    boxes: [N, P, 4], x1, y1, x2, y2. scores: [N, P]. labels: int64 [N, P]. The best box is kept, the scores of the
    others of its label are multiplied by exp(-IoU^2 / sigma), and so on; a score not above `floor` is none. Best first;
    unused places have position -1 and score 0.
    """
    live = scores.masked_fill(~(scores > floor), 0)
    low, high, area = boxes[..., :2], boxes[..., 2:], areas(boxes)
    found = []
    for _ in range(detections):
        score, at = live.max(1, keepdim=True)
        own = boxes.gather(1, at[..., None].expand(-1, -1, 4))
        sides = (torch.minimum(high, own[..., 2:]) - torch.maximum(low, own[..., :2])).clamp_(min=0)
        inter = sides[..., 0] * sides[..., 1]
        iou = (inter / (area + area.gather(1, at) - inter)).masked_fill(inter <= 0, 0)
        decay = torch.exp(iou.square().neg_().div_(sigma)).masked_fill_(labels != labels.gather(1, at), 1)
        live = (live * decay).scatter(1, at, 0)
        live = live.masked_fill(~(live > floor), 0)
        found.append((at.masked_fill(score <= 0, -1), score))
    positions, values = (torch.cat(column, 1) for column in zip(*found, strict=True))
    return positions, values
