"""From SSD300's raw outputs to detections, for a whole batch at once and with fixed shapes."""

import math

import torch
from torch import Tensor

from detcore.ops.nms import nms
from ssd300.anchors import IMAGE_SIZE, corners, decode


def _may_look(tensor: Tensor) -> bool:
    """Whether shapes may follow the values: on a CPU, where reading one costs nothing. Elsewhere they stay fixed."""
    return tensor.device.type == "cpu"


def _needed(alive: Tensor) -> int:
    """How many of the first places of a sorted dimension (the last) are worth keeping: the fullest row's, or all."""
    return max(1, int(alive.sum(-1).max())) if _may_look(alive) else alive.shape[-1]


def _least_margin(score_thresh: float) -> float:
    """How far the best class must at least be above the background for a score above the threshold, or a bit less."""
    low = score_thresh * (1 - 1e-5)  # float32 rounds the score
    return math.log(low / (1 - low)) if 0 < low < 1 else -math.inf


def _busiest(logits: Tensor, score_thresh: float) -> tuple[Tensor, Tensor]:
    """The priors that may hold a score above the threshold, as indices [N, W], and their logits [N, W, K + 1].

    A score is at most 1 / (1 + exp(background - class)), so that the best class of a prior tells without a softmax.
    Where shapes are fixed all priors stay; a row with fewer than W is filled with others, which do no harm.
    """
    n, p, _ = logits.shape
    margin = logits[..., 1:].amax(2).float() - logits[..., 0].float()
    alive = margin > _least_margin(score_thresh)
    width = _needed(alive)
    if width == p:
        return torch.arange(p, device=logits.device).expand(n, p), logits
    index = torch.where(alive, margin, -torch.inf).topk(width, 1).indices
    return index, logits.gather(1, index.unsqueeze(2).expand(-1, -1, logits.shape[2]))


def _pairs(scores: Tensor, score_thresh: float) -> tuple[Tensor, Tensor]:
    """Scores above the threshold, descending, -1 where a row has no more, and their places in the row, each [N, C].

    scores: [N, S]. C is the fullest row's count, so this is not for fixed shapes.
    """
    row, place = (scores > score_thresh).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(scores))
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    shape = len(scores), max(1, int(counts.max()))
    values = scores.new_full(shape, -1).index_put_((row, column), scores[row, place])
    places = place.new_zeros(shape).index_put_((row, column), place)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def _candidates(logits: Tensor, score_thresh: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `per_class` best priors of every class: scores (-1 up to the threshold), priors and classes, each [N, C].

    Descending by score.
    """
    prior, logits = _busiest(logits, score_thresh)
    scores = logits.float().softmax(2)[..., 1:]
    classes = scores.shape[2]
    if _may_look(scores) and int((scores > score_thresh).sum(1).max()) <= per_class:  # no class has too many
        scores, at = _pairs(scores.flatten(1), score_thresh)
        return scores, prior.gather(1, at // classes), at % classes
    width = min(per_class, scores.shape[1])
    scores, at = torch.where(scores > score_thresh, scores, -1).transpose(1, 2).topk(width, 2)
    prior = prior.gather(1, at.flatten(1))
    scores, order = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    order = order[:, : _needed(scores >= 0)]
    return scores[:, : order.shape[1]], prior.gather(1, order), order // width


def _below(threshold: float) -> float:
    """The float32 before the threshold: an overlap above it is one of at least the threshold."""
    return float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))


@torch.no_grad()
def postprocess(
    model_outputs: tuple[Tensor, Tensor],
    priors: Tensor,
    score_thresh: float = 0.05,
    per_class: int = 200,
    nms_thresh: float = 0.5,
    detections: int = 200,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of a batch: boxes [N, D, 4], scores [N, D] and labels int64 [N, D], best first, D = detections.

    model_outputs: (box deltas [N, P, 4], class logits [N, P, K + 1]), any floating dtype. priors: cx, cy, w, h [P, 4].
    Boxes are x1, y1, x2, y2 in pixels of the 300 x 300 image and may reach over its border, as the original's do;
    labels are 0..K-1, those of a Batch. Unused places have box 0, 0, 0, 0, score 0 and label -1.
    Of every class the `per_class` best priors with a softmax above score_thresh are candidates; then a box is dropped
    if its IoU with a better one of its class is nms_thresh or more; the best `detections` of all classes remain.
    """
    deltas, logits = model_outputs
    scores, prior, labels = _candidates(logits, score_thresh, min(per_class, len(priors)))
    deltas = deltas.gather(1, prior.unsqueeze(2).expand(-1, -1, 4)).to(priors.dtype)
    boxes = corners(decode(deltas, priors[prior]))
    kept = nms(boxes, scores, labels, _below(nms_thresh), detections)
    empty, at = kept < 0, kept.clamp(min=0)
    boxes = (boxes * IMAGE_SIZE).gather(1, at.unsqueeze(2).expand(-1, -1, 4)).masked_fill(empty.unsqueeze(2), 0)
    return boxes, scores.gather(1, at).masked_fill(empty, 0), labels.gather(1, at).masked_fill(empty, -1)
