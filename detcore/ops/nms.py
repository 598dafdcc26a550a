"""Class-wise greedy non-maximum suppression of a batch, with fixed shapes."""

import torch
from torch import Tensor

from detcore.boxes import areas


def nms_reference(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
    """The same in plain PyTorch: one step for each output slot, and no list of survivors."""
    live = scores.clone()
    planes = boxes.permute(2, 0, 1).contiguous()  # [4, N, P]
    low, high = planes[:2], planes[2:]
    area = areas(boxes)
    kept = []
    for _ in range(detections if live.shape[1] else 0):
        score, at = live.max(1, keepdim=True)
        alive = score >= 0
        if live.device.type == "cpu" and not alive.any():  # reading a value costs nothing here
            break
        kept.append(torch.where(alive, at, -1))
        own = at.expand(2, -1, -1)
        inter = torch.minimum(high, high.gather(2, own)).sub_(torch.maximum(low, low.gather(2, own))).clamp_(min=0)
        inter = inter[0] * inter[1]
        overlap = inter / (area.gather(1, at) + area - inter)
        live.masked_fill_((overlap > threshold) & (labels == labels.gather(1, at)), -1)
        live.scatter_(1, at, -1)
    kept = torch.cat(kept, 1) if kept else labels.new_zeros(len(labels), 0)
    return torch.nn.functional.pad(kept, (0, detections - kept.shape[1]), value=-1)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
    """Positions int64 [N, detections] of the boxes that class-wise greedy suppression keeps, best first; -1 for none.

    boxes: [N, P, 4]. scores: [N, P], descending, negative for what is no candidate. labels: [N, P]. A box is dropped
    if it overlaps a better one of its class by more than the threshold.
    """
    return nms_reference(boxes, scores, labels, threshold, detections)
