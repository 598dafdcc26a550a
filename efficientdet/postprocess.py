"""From EfficientDet's raw outputs to detections, for a whole batch at once and with fixed shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.boxes import decode
from detcore.ops.largest import largest
from detcore.ops.nms import nms
from detcore.ops.soft_nms import soft_nms

TOPK, NMS_IOU, DETECTIONS = 5000, 0.5, 100
SOFT_SIGMA, SOFT_FLOOR = 0.5, 0.001


def _rows(values: Tensor, at: Tensor) -> Tensor:
    """The rows at [N, P] of values [N, A, C]: [N, P, C]."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))


def candidates(logits: Sequence[Tensor], topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores float32, anchors and labels int64, each [N, P]: the topk (anchor, class) pairs of the highest logits.

    logits: over the levels, [N, A_l, K], any floating dtype. P = min(topk, pairs). Scores fall; of equal logits the
    lowest anchor and class comes first. An anchor with a NaN among its logits has no pair; unused places come last and
    have score -1.
    """
    every = torch.cat(tuple(logits), 1)
    classes = every.shape[2]
    best = every.amax(2).float()
    best = best.masked_fill(best.isnan(), -torch.inf)
    # Only the topk anchors by their best class can hold a pair of the topk, so what follows is narrow.
    anchors = largest(best, min(topk, best.shape[1]))[1].sort(1).values
    rows = _rows(every, anchors).float()
    rows = rows.masked_fill(best.gather(1, anchors).isneginf()[..., None], -torch.inf).flatten(1)
    values, pair = largest(rows, min(topk, rows.shape[1]))
    scores = values.sigmoid().masked_fill(values.isneginf(), -1)
    return scores, anchors.gather(1, pair // classes), pair % classes


@torch.no_grad()
def postprocess(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    extent: Tensor,
    topk: int = TOPK,
    nms_thresh: float = NMS_IOU,
    detections: int = DETECTIONS,
    soft: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of a batch: boxes [N, D, 4], scores [N, D] and labels int64 [N, D], best first, D = detections.

    logits: [N, A_l, K] and deltas: [N, A_l, 4] of the levels, any floating dtype; scores are computed in float32.
    anchors: [A, 4] of all levels. extent: int64 [N, 2], height and width of what the image covers of the canvas (see
    `detcore.data.batch.Batch`), to which boxes are clipped. Boxes are x1, y1, x2, y2 in pixels of the canvas, of the
    anchors' dtype; labels are 0..K-1. Unused places have box 0, 0, 0, 0, score 0 and label -1. No shape depends on the
    values, and nothing waits for the device.
    The topk (anchor, class) pairs over all levels are decoded; then a box is dropped if it overlaps a better one of its
    class by more than nms_thresh. soft: see `soft_nms`; nms_thresh is not used.
    """
    scores, anchor, labels = candidates(logits, topk)
    found = _rows(torch.cat(tuple(deltas), 1), anchor).to(anchors.dtype)
    limit = extent.flip(1).repeat(1, 2)[:, None].to(anchors.dtype)
    boxes = torch.minimum(decode(found, anchors[anchor]).clamp(min=0), limit)
    if soft:
        kept, scores = soft_nms(boxes, scores, labels, detections, SOFT_SIGMA, SOFT_FLOOR)
    else:
        kept = nms(boxes, scores, labels, nms_thresh, detections)
        scores = scores.gather(1, kept.clamp(min=0))
    empty, at = kept < 0, kept.clamp(min=0)
    boxes = boxes.gather(1, at[..., None].expand(-1, -1, 4)).masked_fill(empty[..., None], 0)
    return boxes, scores.masked_fill(empty, 0), labels.gather(1, at).masked_fill(empty, -1)
