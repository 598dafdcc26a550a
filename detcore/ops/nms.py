"""Greedy class-wise non-maximum suppression of a batch, with outputs of a fixed shape."""

import torch
from torch import Tensor

from detcore.boxes import areas
from detcore.device import native

OP = "detcore::nms"


def nms_reference(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
    """The same in plain PyTorch, of any floating dtype: one step for each output slot, and no list of survivors."""
    few = 6 * detections
    if scores.device.type == "cpu" and few < scores.shape[1]:
        # Where the best candidates fill every slot, worse ones cannot change the result. Only a CPU can look whether
        # they did without waiting.
        kept = _suppressed(boxes[:, :few], scores[:, :few], labels[:, :few], threshold, detections)
        if not detections or ((kept[:, -1] >= 0) | (scores[:, few] < 0)).all():
            return kept
    return _suppressed(boxes, scores, labels, threshold, detections)


def _suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
    live = scores.clone()
    planes = boxes.permute(2, 0, 1).contiguous()  # [4, N, P]
    low, high = planes[:2], planes[2:]
    area = areas(boxes)
    kept = []
    for _ in range(detections if scores.shape[1] else 0):
        score, at = live.max(1, keepdim=True)
        alive = score >= 0
        if live.device.type == "cpu" and not alive.any():  # reading a value costs nothing here
            break
        kept.append(at.masked_fill(~alive, -1))
        own = at.expand(2, -1, -1)
        inter = torch.minimum(high, high.gather(2, own)).sub_(torch.maximum(low, low.gather(2, own))).clamp_(min=0)
        inter = inter[0] * inter[1]
        overlap = inter / (area.gather(1, at) + area - inter)
        live.masked_fill_((overlap > threshold) & (labels == labels.gather(1, at)), -1)
        live.scatter_(1, at, -1)
    positions = torch.cat(kept, 1) if kept else labels.new_zeros(len(labels), 0)
    return torch.nn.functional.pad(positions, (0, detections - positions.shape[1]), value=-1)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
    """Positions int64 [N, D] of the boxes that suppression keeps, best first; -1 for none. D = detections.

    boxes: [N, P, 4], x1, y1, x2, y2. scores: [N, P], falling in each row; negative for what is no candidate. labels:
    int64 [N, P]. A candidate is dropped if it overlaps a kept one of its label by more than threshold (intersection
    over union; a box with a NaN overlaps nothing). Of equal scores the lower position is the better. The native op
    takes float32; both give the same bits. No gradients.
    """
    if native.runs(OP, boxes, scores, labels, dtypes=(torch.float32,)):
        return torch.ops.detcore.nms(
            boxes.contiguous(), scores.contiguous(), labels.contiguous(), threshold, detections
        )
    return nms_reference(boxes, scores, labels, threshold, detections)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
        return boxes.new_empty((len(boxes), detections), dtype=torch.int64)
