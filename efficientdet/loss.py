"""EfficientDet's targets and losses, for a whole batch at once, on any device, with fixed shapes."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from detcore.ops.focal import focal_loss
from detcore.ops.match import match
from efficientdet.ops.wanted_deltas import wanted_deltas

MATCH = {"high": 0.5, "low": 0.5, "low_quality": "best"}
FOCAL = {"alpha": 0.25, "gamma": 1.5}
DELTA = 0.1
"""Error of a coordinate up to which the box loss is quadratic."""
BOX_WEIGHT = 50.0


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
    arithmetic is of the anchors' dtype. anchors: [A, 4], of all levels. boxes: [N, M, 4] in pixels of the canvas;
    labels: int64 [N, M], class 0..K-1 or -1 where padded. No box at all, and M = 0, are fine.
    An anchor takes the box it overlaps most, from an IoU of 0.5 on; besides, every box takes the first anchor with its
    highest IoU, provided that is above 0.
    Class loss: focal loss with smoothed labels, summed over classes and anchors. Box loss: 50 / 4 times the Huber loss
    summed over the deltas of positive anchors. Both are divided by the normaliser, (positives + 1) of the batch.
    mean_over_ranks: gives the mean over `ranks` processes of a scalar. The normaliser is then (positives of all + 1) /
    ranks, so that gradients that are averaged over the processes are those of one process with all images. Without it
    the normaliser is that of this process's images alone, as in the original program.
    skip_zero_targets: as the original, leave out a coordinate of a positive anchor whose target is exactly 0.
    """
    matched = match(anchors, boxes, labels, **MATCH)
    wanted = wanted_deltas(anchors, boxes, matched)
    positives = (matched >= 0).sum().to(anchors.dtype)
    together = mean_over_ranks(positives) * ranks if mean_over_ranks else positives
    terms = losses_of_targets(model_outputs, matched, labels, wanted, together + 1, smoothing, skip_zero_targets)
    return {name: term * ranks for name, term in terms.items()} if mean_over_ranks else terms


def losses_of_targets(
    model_outputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    matched: Tensor,
    labels: Tensor,
    wanted: Tensor,
    normaliser: Tensor,
    smoothing: float = 0.0,
    skip_zero_targets: bool = False,
) -> dict[str, Tensor]:
    """`losses` of given targets: matched int64 [N, A] and labels [N, M] as `match` has them, deltas [N, A, 4].

    normaliser: scalar of 1 or more, float32 at least; its dtype is that of the arithmetic.
    """
    logits, deltas = model_outputs
    weight = (1 / normaliser).expand(len(matched))
    counted = (matched >= 0)[..., None].expand_as(wanted)
    if skip_zero_targets:
        counted = counted & (wanted != 0)
    cls, box, first = weight.new_zeros(()), weight.new_zeros(()), 0
    for level_logits, level_deltas in zip(logits, deltas, strict=True):
        rows = slice(first, first + level_logits.shape[1])
        cls = cls + focal_loss(level_logits, matched, labels, weight, first, **FOCAL, smoothing=smoothing)
        error = F.huber_loss(level_deltas.to(weight.dtype), wanted[:, rows], reduction="none", delta=DELTA)
        box = box + error.masked_fill(~counted[:, rows], 0).sum()
        first = rows.stop
    return {"cls": cls, "box": box * (BOX_WEIGHT / 4) * weight[0]}
