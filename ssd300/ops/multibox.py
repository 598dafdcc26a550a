"""Which box every prior shall learn, and the loss of what it says: SSD's multibox loss, on fixed shapes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore import native
from detcore.boxes import areas
from ssd300.anchors import IMAGE_SIZE, centres, corners, encode

POSITIVE_IOU = 0.5
NEGATIVES_PER_POSITIVE = 3
BACKGROUND = -1

MATCH = "ssd300::multibox_match"
LOSS = "ssd300::multibox_loss"


def match_reference(priors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """`match` in plain PyTorch, in the dtype of the priors."""
    if labels.device.type == "cpu":  # reading a value costs nothing here, and padding is mostly empty
        used = int((labels >= 0).any(0).nonzero().max()) + 1 if (labels >= 0).any() else 0
        boxes, labels = boxes[:, :used], labels[:, :used]
    n, m = labels.shape
    p = priors.shape[0]
    if m == 0:
        return torch.full((n, p), BACKGROUND, dtype=torch.int64, device=priors.device)
    boxes = boxes.to(priors.dtype) / IMAGE_SIZE
    real = (labels >= 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    x1, y1, x2, y2 = corners(priors).unbind(-1)
    u1, v1, u2, v2 = boxes.unsqueeze(2).unbind(-1)
    inter = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)
    inter.mul_(torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0))
    union = (areas(boxes).unsqueeze(2) + areas(corners(priors))).sub_(inter)
    iou = torch.where(real.unsqueeze(2), inter.div_(union), -1)  # [N, M, P]
    best, index = iou.max(1)
    own = iou.argmax(2)
    # Of the boxes that have the same best prior, the last one gets it. The place p takes what isn't a box.
    number = torch.arange(m, device=priors.device).expand(n, m)
    claims = torch.full((n, p + 1), BACKGROUND, dtype=torch.int64, device=priors.device)
    claims = claims.scatter_reduce(1, torch.where(real, own, p), number, "amax")[:, :p]
    return torch.where(claims >= 0, claims, torch.where(best > POSITIVE_IOU, index, BACKGROUND))


def match(priors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """The box of every prior: int64 [N, P], an index of M, or BACKGROUND.

    priors: cx, cy, w, h [P, 4] of 0..1. boxes: [N, M, 4], x1, y1, x2, y2 in pixels of the 300 x 300 image, padded.
    labels: int64 [N, M], negative where padded. A prior takes the box it overlaps most (of equals, the first), if the
    IoU is above 0.5. Besides, every box takes the prior that overlaps it most (of equals, the first), whatever the IoU
    and whoever had it; where boxes meet on a prior, the last one gets it. A box without area takes none.
    """
    if native.runs(MATCH, priors, boxes, labels):
        return torch.ops.ssd300.multibox_match(priors, boxes, labels)
    return match_reference(priors, boxes, labels)


def hardest(values: Tensor, count: Tensor) -> Tensor:
    """Which of the values are among the `count` largest of their row: bool [N, P]; of equals, the first.

    values: [N, P]. count: int64 [N]; more than P is P.
    """
    order = values.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(values.shape[1], device=values.device) < count.unsqueeze(1)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def multibox_loss_reference(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    matched: Tensor,
    empty_negatives: int = NEGATIVES_PER_POSITIVE,
) -> tuple[Tensor, Tensor]:
    """`multibox_loss` in plain PyTorch; gradients by autograd."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    deltas, logits, priors = deltas.to(dtype), logits.to(dtype), priors.to(dtype)
    positive = matched >= 0
    if labels.shape[1]:
        at = matched.clamp(min=0)
        target = torch.where(positive, labels.gather(1, at) + 1, 0)
        chosen = boxes.to(dtype).gather(1, at.unsqueeze(2).expand(-1, -1, 4)) / IMAGE_SIZE
        # Where nothing is matched the prior stands in for the box: its deltas are zeros, not NaN.
        goal = encode(torch.where(positive.unsqueeze(2), centres(chosen), priors), priors)
    else:
        target, goal = torch.zeros_like(matched), torch.zeros_like(deltas)
    positives = positive.sum(1)
    weight = (1 / len(logits)) / positives.clamp(min=1).to(dtype)
    apart = (deltas - goal).abs()
    # F.smooth_l1_loss in operations that every device has.
    distance = torch.where(apart < 1, 0.5 * apart * apart, apart - 0.5).sum(2)
    box = torch.where(positive, distance, 0).sum(1)

    entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    with torch.no_grad():
        negatives = torch.where(positives > 0, NEGATIVES_PER_POSITIVE * positives, empty_negatives)
        kept = positive | hardest(torch.where(positive, 0, entropy), negatives)
    return (box * weight).sum(), (torch.where(kept, entropy, 0).sum(1) * weight).sum()


def multibox_loss(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    matched: Tensor,
    empty_negatives: int = NEGATIVES_PER_POSITIVE,
) -> tuple[Tensor, Tensor]:
    """Box and class loss of a batch, two scalars in at least float32, with gradients for deltas and logits.

    deltas: [N, P, 4] and logits: [N, P, K + 1], any floating dtype. priors, boxes, labels: as for `match`, whose
    result is `matched`. Box loss of an image: Smooth-L1 (beta 1), summed over the coordinates of its positive priors.
    Class loss: cross-entropy of its positive priors and of the hardest others, three to a positive. Both are divided
    by the positives and averaged over the batch. An image without positives is taken as if it had one, which isn't
    counted itself: its `empty_negatives` hardest priors, divided by 1. The original skips such images: 0 does.
    """
    if native.runs(LOSS, deltas, logits, priors, boxes, labels, matched):
        return torch.ops.ssd300.multibox_loss(deltas, logits, priors, boxes, labels, matched, empty_negatives)
    return multibox_loss_reference(deltas, logits, priors, boxes, labels, matched, empty_negatives)
