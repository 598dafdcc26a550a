"""What the positive anchors are to predict, for the box loss."""

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.device import native

OP = "efficientdet::wanted_deltas"


def wanted_deltas_reference(anchors: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """`wanted_deltas` in plain PyTorch, for any floating dtype."""
    none = anchors.new_full((1, 4), torch.nan)  # the first row, for anchors without a box
    rows = torch.cat((none, _places(boxes.to(anchors.dtype)).flatten(0, 1)))
    first = torch.arange(len(boxes), device=boxes.device)[:, None] * boxes.shape[1] + 1
    chosen = F.embedding((matched + first).masked_fill_(matched < 0, 0), rows)
    sizes = anchors[:, 2:] - anchors[:, :2]  # centres are in anchor sizes, logarithms as they are
    chosen.sub_(_places(anchors)).div_(torch.cat((sizes, torch.ones_like(sizes)), 1))
    return chosen.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _places(boxes: Tensor) -> Tensor:
    """Centres and logarithms of width and height of boxes [..., 4], [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    sizes = high - low
    return torch.cat((low + 0.5 * sizes, sizes.log()), -1)


@torch.no_grad()
def wanted_deltas(anchors: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """What positive anchors are to predict, [N, A, 4], as `detcore.boxes.encode`; zeros for the other anchors.

    anchors: [A, 4], whose dtype is the result's. boxes: [N, M, 4] in pixels of the canvas. matched: int64 [N, A] as
    `match` has it, each below M. No gradients. What is no number, as of a box with x2 < x1, becomes 0; the logarithm of
    a box of no size stays minus infinity.

    The native op wants float32. Its logarithms are rounded to float32 from float64, so that they are alike on every
    processor; those of PyTorch on a CPU are the same but for some 1 in 10,000, which differ in the last bit.
    """
    if native.runs(OP, anchors, boxes, matched, dtypes=(torch.float32,)):
        return torch.ops.efficientdet.wanted_deltas(anchors.contiguous(), boxes.contiguous(), matched.contiguous())
    return wanted_deltas_reference(anchors, boxes, matched)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(anchors: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
        return anchors.new_empty((*matched.shape, 4))
