"""The best priors of every class by their softmax, from the logits as the network writes them."""

import math

import torch
from torch import Tensor

from detcore.device import native

OP = "ssd300::candidates"


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


def _falling(scores: Tensor, group: Tensor) -> Tensor:
    """The order group by group, in each by falling score; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)
    return order[group[order].argsort(stable=True)]


def _packed(images: int, scores: Tensor, image: Tensor, prior: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of pairs, in the order of classes and priors, as scores (-1 for none), priors and labels, each [N, C]."""
    order = _falling(scores, image)
    image = image[order]
    column = _place(image, images)
    shape = images, int(column.max()) + 1 if len(column) else 1

    def table(values: Tensor, empty: int) -> Tensor:
        return values.new_full(shape, empty).index_put_((image, column), values[order])

    return table(scores, -1), table(prior, 0), table(label, 0)


def _few_candidates(logits: Tensor, score_thresh: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """`candidates` from the pairs above the threshold alone."""
    n, _, classes = logits.shape
    margin = logits[..., 1:].amax(2).float() - logits[..., 0].float()
    image, prior = (margin > _least_margin(score_thresh)).nonzero(as_tuple=True)
    scores = logits[image, prior].float().softmax(1)[:, 1:]
    row, label = (scores > score_thresh).nonzero(as_tuple=True)
    scores, image, prior = scores[row, label], image[row], prior[row]
    group = image * classes + label
    order = _falling(scores, group)
    order = order[_place(group[order], n * classes) < per_class]
    return _packed(n, scores[order], image[order], prior[order], label[order])


def candidates_reference(logits: Tensor, score_thresh: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """`candidates` in plain PyTorch, for any floating dtype."""
    if _may_look(logits):
        return _few_candidates(logits, score_thresh, per_class)
    scores = logits.float().softmax(2)[..., 1:]
    scores, prior = torch.where(scores > score_thresh, scores, -1).transpose(1, 2).topk(per_class, 2)
    return _sorted(scores, prior)


def _sorted(scores: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All places [N, K, per_class] by falling score, with their labels: each [N, K * per_class]."""
    per_class = scores.shape[2]
    scores, order = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    return scores, prior.flatten(1).gather(1, order), order // per_class


def candidates(logits: Tensor, score_thresh: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores float32, priors and labels int64, each [N, C], of the pairs to suppress among, by falling score.

    logits: [N, P, K + 1], any floating dtype, the background first. Of each class come the per_class (1..P) priors with
    the largest softmax, computed in float32, above score_thresh; labels are 0..K - 1. Of equal scores the lowest class
    and prior comes first. C = K * per_class, on a CPU that of the fullest image, at least 1; unused places come last,
    with score -1. A prior with a NaN among its logits has no pair. No gradients.
    """
    if not native.runs(OP, logits):
        return candidates_reference(logits, score_thresh, per_class)
    scores, prior = torch.ops.ssd300.candidates(logits.contiguous(), score_thresh, per_class)
    if not _may_look(scores):
        return _sorted(scores, prior)
    image, label, place = (scores >= 0).nonzero(as_tuple=True)
    return _packed(len(scores), scores[image, label, place], image, prior[image, label, place], label)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(logits: Tensor, threshold: float, per_class: int) -> tuple[Tensor, Tensor]:
        shape = logits.shape[0], logits.shape[2] - 1, per_class
        return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)
