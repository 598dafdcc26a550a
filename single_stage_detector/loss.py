"""RetinaNet's targets and losses, for a whole batch at once, on any device, with fixed shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.ops.focal import focal_loss
from detcore.ops.match import match
from single_stage_detector.ops.box import box_loss

MATCH = {"high": 0.5, "low": 0.4, "low_quality": "ties"}
FOCAL = {"alpha": 0.25, "gamma": 2.0}


def losses(
    model_outputs: tuple[Sequence[Tensor], Sequence[Tensor], *tuple[Tensor, ...]],
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Class and box loss of a batch, {"cls": scalar, "box": scalar}; their sum is what the training minimises.

    model_outputs: class logits [N, A_l, K] and box deltas [N, A_l, 4] of every level, of any floating dtype; the
    arithmetic is float32 at least. If they end with the class convolution's bias [9 * K], the logits lack it: see
    `detcore.ops.focal.focal_loss`. anchors: [A, 4], of all levels. boxes: [N, M, 4] in pixels of the
    resized image; labels: int64 [N, M], class 0..K-1 or -1 where padded. No box at all, and M = 0, are fine.
    Class loss: focal loss summed over classes and all anchors that are not ignored. Box loss: L1 on the deltas of
    foreground anchors. Both are divided by max(1, foreground anchors) of the image and averaged over the batch.
    """
    logits, deltas, *rest = model_outputs
    bias = rest[0] if rest else None
    matched = match(anchors, boxes, labels, **MATCH)
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    weight = (1 / len(labels)) / (matched >= 0).sum(1).clamp(min=1).to(dtype)
    total = {"cls": weight.new_zeros(()), "box": weight.new_zeros(())}
    first = 0
    for level_logits, level_deltas in zip(logits, deltas, strict=True):
        total["cls"] = total["cls"] + focal_loss(level_logits, matched, labels, weight, first, bias, **FOCAL)
        total["box"] = total["box"] + box_loss(level_deltas, anchors, boxes, matched, labels, weight, first)
        first += level_logits.shape[1]
    return total
