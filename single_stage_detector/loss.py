"""RetinaNet's targets and losses, for a whole batch at once, on any device, with fixed shapes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detcore.boxes import areas, encode

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.4
ALPHA = 0.25
GAMMA = 2

UNMATCHED = -1
IGNORED = -2


def _work_elements(device: torch.device) -> int:
    """Elements of one intermediate: small enough for the caches of a CPU, large enough to fill an accelerator."""
    return 2**18 if device.type == "cpu" else 2**25


def match(anchors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Assign ground truth to anchors: int64 [N, A], the index of the box, UNMATCHED or IGNORED.

    anchors: [A, 4]. boxes: [N, M, 4], padded. labels: int64 [N, M], negative where padded.
    An anchor takes the box it overlaps most, if the IoU is at least 0.5; from 0.4 to 0.5 it is ignored. Besides,
    all the anchors that tie for a box's highest IoU take the box that they themselves overlap most, whatever the
    IoU, provided the box's highest is above 0: so a box outside the image, or without area, is never matched.
    IoU values are computed in the order of the reference's operations, since ties are found by equality.
    """
    n, m = labels.shape
    a = anchors.shape[0]
    used = m
    if labels.device.type == "cpu" and m:  # reading a value costs nothing here, and padding is mostly empty
        real = (labels >= 0).any(0).nonzero()
        used = int(real[-1]) + 1 if len(real) else 0
    best = anchors.new_zeros(n, a)
    index = torch.zeros(n, a, dtype=torch.int64, device=anchors.device)
    tied = torch.zeros(n, a, dtype=torch.bool, device=anchors.device)
    ax1, ay1, ax2, ay2 = anchors.unbind(-1)
    anchor_areas = areas(anchors)
    chunk = max(1, _work_elements(anchors.device) // (n * a))
    for start in range(0, used, chunk):
        part = boxes[:, start : min(start + chunk, used)].to(anchors.dtype)
        x1, y1, x2, y2 = part.unsqueeze(2).unbind(-1)
        inter = torch.minimum(x2, ax2).sub_(torch.maximum(x1, ax1)).clamp_(min=0)
        inter.mul_(torch.minimum(y2, ay2).sub_(torch.maximum(y1, ay1)).clamp_(min=0))
        union = (areas(part).unsqueeze(2) + anchor_areas).sub_(inter)
        real = (labels[:, start : start + part.shape[1]] >= 0).unsqueeze(2)
        iou = torch.where(real & (inter > 0), inter.div_(union), inter.new_zeros(()))
        highest = iou.amax(2, keepdim=True)
        tied |= ((iou == highest) & (highest > 0)).any(1)
        value, position = iou.max(1)
        better = value > best
        index = torch.where(better, position + start, index)
        best = torch.where(better, value, best)
    negative = torch.where(best < BACKGROUND_IOU, UNMATCHED, IGNORED)
    return torch.where(tied | (best >= FOREGROUND_IOU), index, negative)


def _rows(logits: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Pieces of flat logits [R, K] in at least float32, with their weights [R, 1]."""
    step = max(1, _work_elements(logits.device) // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield logits[rows].to(weights.dtype), weights[rows, None], rows


def _negative(x: Tensor) -> Tensor:
    """Focal loss of logits whose target is 0."""
    return torch.sigmoid(x).square_().mul_(F.softplus(x)).mul_(1 - ALPHA)


def _negative_gradient(x: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    # d/dx p^2 softplus(x) = p^2 (2 (1 - p) softplus(x) + p)
    gradient = F.softplus(x).mul_(torch.sub(1, p)).mul_(GAMMA).add_(p)
    return gradient.mul_(p.square_()).mul_(1 - ALPHA)


class _WeightedFocal(torch.autograd.Function):
    """sum over rows of weight * focal loss of the row; nothing but the logits is kept for the backward pass.

    Every class of every row counts as a negative first; then the one positive entry of a foreground row is
    corrected. This needs no one-hot targets, and the wide tensors are walked in pieces.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target, weights)
        total = weights.new_zeros(())
        for x, weight, _ in _rows(logits, weights):
            total += (_negative(x).sum(1, keepdim=True) * weight).sum()
        x = logits.gather(1, target.clamp(min=0)[:, None])[:, 0].to(weights.dtype)
        # With target 1 the focal loss is the negative one of -x, with ALPHA in place of 1 - ALPHA.
        correction = _negative(-x) * (ALPHA / (1 - ALPHA)) - _negative(x)
        return total + torch.where(target >= 0, correction * weights, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, target, weights = ctx.saved_tensors
        weights = weights * upstream
        gradient = torch.empty_like(logits)
        for x, weight, rows in _rows(logits, weights):
            torch.mul(_negative_gradient(x), weight, out=gradient[rows])
        at = target.clamp(min=0)[:, None]
        x = logits.gather(1, at)[:, 0].to(weights.dtype)
        positive = _negative_gradient(-x) * (-ALPHA / (1 - ALPHA)) * weights
        value = torch.where(target >= 0, positive.to(gradient.dtype), gradient.gather(1, at)[:, 0])
        return gradient.scatter_(1, at, value[:, None]), None, None


def focal_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of sigmoid focal losses (alpha 0.25, gamma 2): a scalar in at least float32.

    logits: [R, K], any floating dtype. target: int64 [R], the row's class or a negative number for none.
    weights: [R], the factor of all K terms of a row (0 leaves it out), no gradient; its dtype is that of
    the arithmetic.
    """
    return _WeightedFocal.apply(logits, target, weights)


def losses(
    model_outputs: tuple[Sequence[Tensor], Sequence[Tensor]], anchors: Tensor, boxes: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Class and box loss of a batch, {"cls": scalar, "box": scalar}; their sum is what the training minimises.

    model_outputs: class logits [N, A_l, K] and box deltas [N, A_l, 4] of every level, of any floating dtype; the
    arithmetic is float32 at least. anchors: [A, 4], of all levels. boxes: [N, M, 4] in pixels of the resized image;
    labels: int64 [N, M], class 0..K-1 or -1 where padded. No box at all, and M = 0, are fine.
    Class loss: focal loss summed over classes and all anchors that are not ignored. Box loss: L1 on the deltas of
    foreground anchors. Both are divided by max(1, foreground anchors) of the image and averaged over the batch.
    """
    logits, deltas = model_outputs
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    lengths = [level.shape[1] for level in logits]
    with torch.no_grad():
        matched = match(anchors, boxes, labels)
        foreground = matched >= 0
        weight = (1 / len(labels)) / foreground.sum(1, keepdim=True).clamp(min=1).to(dtype)
        if labels.shape[1]:
            at = matched.clamp(min=0)
            target = torch.where(foreground, labels.gather(1, at), UNMATCHED)
            chosen = boxes.to(anchors.dtype).gather(1, at[..., None].expand(-1, -1, 4))
            # Where nothing is matched the anchor stands in for the box: its deltas are zeros, not NaN.
            goal = encode(torch.where(foreground[..., None], chosen, anchors), anchors)
        else:
            target, goal = matched, anchors.new_zeros(*matched.shape, 4)
        class_weight = weight * (matched != IGNORED)
    cls = box = weight.new_zeros(())
    parts = (x.split(lengths, 1) for x in (target, class_weight, foreground, goal))
    for x, d, level_target, level_weight, level_foreground, level_goal in zip(logits, deltas, *parts, strict=True):
        cls = cls + focal_loss(x.flatten(0, 1), level_target.flatten(), level_weight.flatten())
        distance = (d.to(dtype) - level_goal).abs().sum(2)
        box = box + torch.where(level_foreground, distance * weight, 0).sum()
    return {"cls": cls, "box": box}
