"""L1 loss of one level's box deltas, with its gradient in the same pass."""

import torch
from torch import Tensor

from detcore.boxes import encode
from detcore.device import native
from detcore.ops.scale import kept, take

OP = "single_stage_detector::box"

KEPT_IN_FLOAT16 = 32768.0
"""What a float16 gradient is multiplied by while it is kept; as box.h. A gradient can be as large as the weight."""


def box_reference(
    deltas: Tensor, anchors: Tensor, boxes: Tensor, matched: Tensor, labels: Tensor, weight: Tensor, first: int = 0
) -> Tensor:
    """`box_loss` in plain PyTorch, for any floating dtype; the dtype of weight is that of the arithmetic."""
    if not boxes.shape[1]:
        boxes = boxes.new_zeros(len(boxes), 1, 4)  # for the rows without a match to point to
    rows = slice(first, first + deltas.shape[1])
    matched, anchors = matched[:, rows], anchors[rows]
    foreground = matched >= 0
    chosen = boxes.to(anchors.dtype).gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4))
    # Where nothing is matched the anchor stands in for the box: its deltas are zeros, not NaN.
    wanted = encode(torch.where(foreground[..., None], chosen, anchors), anchors)
    distance = (deltas.to(weight.dtype) - wanted).abs().sum(2)
    return torch.where(foreground, distance * weight[:, None], 0).sum()


def box_loss(
    deltas: Tensor, anchors: Tensor, boxes: Tensor, matched: Tensor, labels: Tensor, weight: Tensor, first: int = 0
) -> Tensor:
    """Weighted sum of |delta - `detcore.boxes.encode`| over a level's matched rows: a scalar in the dtype of weight.

    deltas: [N, R, 4], the rows of the anchors first..first + R. anchors: [A, 4]. boxes: [N, M, 4], padded.
    matched: int64 [N, A], what `match` gave for all anchors. labels: int64 [N, M]. weight: [N], float32 at least, the
    factor of all terms of an image; 0..1. Gradients for deltas only, and 0 where a delta is met exactly.
    Of the native op holds what `detcore.ops.focal.focal_loss` says: one backward pass.
    """
    if native.runs(OP, deltas, matched, labels, weight) and anchors.dtype == boxes.dtype == torch.float32:
        arguments = (x.contiguous() for x in (deltas, anchors, boxes, matched, labels, weight))
        return torch.ops.single_stage_detector.box(*arguments, first)[0]
    return box_reference(deltas, anchors, boxes, matched, labels, weight, first)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    kept(ctx, output[1])


def _backward(ctx, upstream: Tensor | None, _: None) -> tuple:
    return take(ctx, upstream, KEPT_IN_FLOAT16), None, None, None, None, None, None


if native.loaded(OP):
    torch.library.register_autograd(OP, _backward, setup_context=_setup_context)

    @torch.library.register_fake(OP)
    def _(
        deltas: Tensor, anchors: Tensor, boxes: Tensor, matched: Tensor, labels: Tensor, weight: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        return weight.new_empty(()), torch.empty_like(deltas)
