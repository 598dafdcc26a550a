"""SSD300's loss of a batch: matching on the device, then the multibox loss; fixed shapes on every device."""

import torch
from torch import Tensor

from ssd300.ops.multibox import BACKGROUND, NEGATIVES_PER_POSITIVE, match, multibox_loss

__all__ = ["BACKGROUND", "losses", "match"]


def losses(
    model_outputs: tuple[Tensor, Tensor],
    priors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    empty_negatives: int = NEGATIVES_PER_POSITIVE,
) -> dict[str, Tensor]:
    """Box and class loss of a batch, {"box": scalar, "cls": scalar}; their sum is what the training minimises.

    model_outputs: (box deltas [N, 8732, 4], class logits [N, 8732, K + 1]) of any floating dtype; the arithmetic is
    float32 at least. priors: cx, cy, w, h [8732, 4]. boxes: [N, M, 4] in pixels of the 300 x 300 image; labels: int64
    [N, M], class 0..K-1 or -1 where padded. No box at all, and M = 0, are fine: such images contribute their
    `empty_negatives` hardest priors as background (0: nothing, as in the original); see `multibox_loss`.
    """
    deltas, logits = model_outputs
    with torch.no_grad():
        matched = match(priors, boxes, labels)
    box, cls = multibox_loss(deltas, logits, priors, boxes, labels, matched, empty_negatives)
    return {"box": box, "cls": cls}
