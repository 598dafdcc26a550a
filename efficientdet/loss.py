"""EfficientDet's targets and losses, for a whole batch at once, on any device, with fixed shapes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.boxes import encode
from detcore.ops.focal import focal_reference
from detcore.ops.match import UNMATCHED, match_reference

ALPHA, GAMMA = 0.25, 1.5
DELTA = 0.1
"""Error of a coordinate up to which the box loss is quadratic."""
BOX_WEIGHT = 50.0
MATCH_IOU = 0.5


@torch.no_grad()
def assign(anchors: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each anchor is to predict: classes int64 [N, A], deltas [N, A, 4], and the number of positives, a scalar.

    anchors: [A, 4]; their dtype is that of the deltas and of the count. boxes: [N, M, 4] in pixels of the canvas;
    labels: int64 [N, M], class 0..K-1 or -1 where padded. A class is UNMATCHED (-1) where the anchor is to see nothing;
    there the deltas are zeros. Deltas are those of `detcore.boxes.encode`.
    An anchor takes the box it overlaps most, from an IoU of 0.5 on; besides, every box takes the first anchor with its
    highest IoU, provided that is above 0.
    """
    if not boxes.shape[1]:  # for the rows without a match to point to
        boxes, labels = boxes.new_zeros(len(boxes), 1, 4), labels.new_full((len(labels), 1), -1)
    matched = match_reference(anchors, boxes, labels, MATCH_IOU, MATCH_IOU, ties=False)
    positive, at = matched >= 0, matched.clamp(min=0)
    classes = labels.gather(1, at).masked_fill(~positive, UNMATCHED)
    chosen = boxes.to(anchors.dtype).gather(1, at[..., None].expand(-1, -1, 4))
    # Where nothing is matched the anchor stands in for the box: its deltas are zeros, not NaN.
    deltas = encode(torch.where(positive[..., None], chosen, anchors), anchors)
    return classes, deltas, positive.sum().to(anchors.dtype)


def losses(
    model_outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ranks: int = 1,
    skip_zero_targets: bool = False,
) -> dict[str, Tensor]:
    """Class and box loss of a batch, {"cls": scalar, "box": scalar}; their sum is what the training minimises.

    model_outputs: class logits [N, A_l, K] and box deltas [N, A_l, 4] of every level, of any floating dtype; the
    arithmetic is of the anchors' dtype. anchors, boxes, labels: see `assign`. No box at all, and M = 0, are fine.
    Class loss: focal loss with smoothed labels, summed over classes and anchors. Box loss: 50 / 4 times the Huber loss
    summed over the deltas of positive anchors. Both are divided by the normaliser, (positives + 1) of the batch.
    mean_over_ranks: gives the mean over `ranks` processes of a scalar. The normaliser is then (positives of all + 1) /
    ranks, so that gradients that are averaged over the processes are those of one process with all images. Without it
    the normaliser is that of this process's images alone, as in the original program.
    skip_zero_targets: as the original, leave out a coordinate of a positive anchor whose target is exactly 0.
    """
    classes, wanted, positives = assign(anchors, boxes, labels)
    normaliser = positives + 1 if mean_over_ranks is None else mean_over_ranks(positives) + 1 / ranks
    return losses_of_targets(model_outputs, classes, wanted, normaliser, smoothing, skip_zero_targets)


def losses_of_targets(
    model_outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    classes: Tensor,
    wanted: Tensor,
    normaliser: Tensor,
    smoothing: float = 0.0,
    skip_zero_targets: bool = False,
) -> dict[str, Tensor]:
    """`losses` of what `assign` gave, classes int64 [N, A], IGNORED where an anchor does not count, and deltas.

    normaliser: scalar, float32 at least; its dtype is that of the arithmetic.
    """
    logits, deltas = model_outputs
    weight = (1 / normaliser).expand(len(classes))
    counted = (classes >= 0)[..., None].expand_as(wanted)
    if skip_zero_targets:
        counted = counted & (wanted != 0)
    cls, box, first = weight.new_zeros(()), weight.new_zeros(()), 0
    for level_logits, level_deltas in zip(logits, deltas, strict=True):
        rows = slice(first, first + level_logits.shape[1])
        cls = cls + focal_reference(level_logits, classes[:, rows], weight, ALPHA, GAMMA, smoothing)
        error = F.huber_loss(level_deltas.to(weight.dtype), wanted[:, rows], reduction="none", delta=DELTA)
        box = box + error.masked_fill(~counted[:, rows], 0).sum()
        first = rows.stop
    return {"cls": cls, "box": box * (BOX_WEIGHT / 4) * weight[0]}
