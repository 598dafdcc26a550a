"""From SSD300's raw outputs to detections, for a whole batch at once and with fixed shapes."""

import math

import torch
from torch import Tensor

from detcore.ops.nms import nms
from ssd300.anchors import IMAGE_SIZE, corners, decode


def _may_look(tensor: Tensor) -> bool:
    """Whether shapes may follow the values: on a CPU, where reading one costs nothing. Elsewhere they stay fixed."""
    return tensor.device.type == "cpu"


def _least_margin(score_thresh: float) -> float:
    """How far the best class must at least be above the background for a score above the threshold, or a bit less.

    A score is at most 1 / (1 + exp(background - class)).
    """
    low = score_thresh * (1 - 1e-5)  # float32 rounds the score
    return math.log(low / (1 - low)) if 0 < low < 1 else -math.inf


def _place(group: Tensor, groups: int) -> Tensor:
    """The place of each element among those of its group, from 0. group: rising int64 [C] of 0..groups - 1."""
    counts = group.bincount(minlength=groups)
    return torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]


def _few_candidates(logits: Tensor, score_thresh: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_candidates` from the pairs above the threshold alone; C is that of the fullest image."""
    n, _, classes = logits.shape
    margin = logits[..., 1:].amax(2).float() - logits[..., 0].float()
    image, prior = (margin > _least_margin(score_thresh)).nonzero(as_tuple=True)
    scores = logits[image, prior].float().softmax(1)[:, 1:]
    row, label = (scores > score_thresh).nonzero(as_tuple=True)
    scores, image, prior = scores[row, label], image[row], prior[row]

    def falling(chosen: Tensor, group: Tensor) -> Tensor:
        """The chosen pairs group by group, in each by falling score."""
        chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
        return chosen[group[chosen].argsort(stable=True)]

    group = image * classes + label
    order = falling(torch.arange(len(scores)), group)
    order = order[_place(group[order], n * classes) < per_class]
    order = falling(order, image)
    image, column = image[order], _place(image[order], n)
    shape = n, int(column.max()) + 1 if len(column) else 1

    def packed(values: Tensor, empty: int) -> Tensor:
        return values.new_full(shape, empty).index_put_((image, column), values[order])

    return packed(scores, -1), packed(prior, 0), packed(label, 0)


def _candidates(logits: Tensor, score_thresh: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `per_class` best priors of every class: scores (-1 up to the threshold), priors and classes, each [N, C].

    Falling by score.
    """
    if _may_look(logits):
        return _few_candidates(logits, score_thresh, per_class)
    scores = logits.float().softmax(2)[..., 1:]
    scores, prior = torch.where(scores > score_thresh, scores, -1).transpose(1, 2).topk(per_class, 2)
    scores, order = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    return scores, prior.flatten(1).gather(1, order), order // per_class


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
