"""Which box every prior shall learn, and the loss of what it says: SSD's multibox loss, on fixed shapes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.boxes import areas
from detcore.device import native
from detcore.ops.scale import kept, take
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
    The native op wants float32 and gives the bits of the reference on a CPU; no gradients.
    """
    if native.runs(MATCH, priors, boxes, labels, dtypes=(torch.float32,)):
        return torch.ops.ssd300.multibox_match(priors.contiguous(), boxes.contiguous(), labels.contiguous())
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
    The native op computes the gradients in the forward pass and keeps them, in float16 times `_kept_in_float16`. It
    allows one backward pass for each loss and forward pass; a second one raises RuntimeError. A label that is no class
    makes its loss NaN. A prior that does not count has gradient 0; with NaN logits, without the native op, NaN.
    """
    truth = (priors, boxes, labels, matched)
    if native.runs(LOSS, deltas, logits) and native.runs(LOSS, *truth, dtypes=(torch.float32,)):
        arguments = (x.contiguous() for x in (deltas, logits, *truth))
        return torch.ops.ssd300.multibox_loss(*arguments, empty_negatives)[:2]
    return multibox_loss_reference(deltas, logits, priors, boxes, labels, matched, empty_negatives)


def _kept_in_float16(images: int) -> float:
    """What a float16 gradient is multiplied by while it is kept; as multibox_loss.h. None is above 1 / images."""
    return 65536.0 if images > 1 else 32768.0


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    kept(ctx, *output[2:])


def _backward(ctx, box: Tensor | None, cls: Tensor | None, *_: None) -> tuple:
    constant = _kept_in_float16(len(ctx.saved_tensors[0]))
    return take(ctx, box, constant, 0), take(ctx, cls, constant, 1), None, None, None, None, None


if native.loaded(MATCH) and native.loaded(LOSS):
    torch.library.register_autograd(LOSS, _backward, setup_context=_setup_context)

    @torch.library.register_fake(MATCH)
    def _(priors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        return labels.new_empty(labels.shape[0], priors.shape[0])

    @torch.library.register_fake(LOSS)
    def _(
        deltas: Tensor,
        logits: Tensor,
        priors: Tensor,
        boxes: Tensor,
        labels: Tensor,
        matched: Tensor,
        empty_negatives: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return priors.new_empty(()), priors.new_empty(()), torch.empty_like(deltas), torch.empty_like(logits)
