"""The best (anchor, class) pairs of every level, from the logits as the network writes them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.device import native
from detcore.ops.largest import largest_places

OP = "single_stage_detector::candidates"


def candidates_reference(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], topk: int, floor: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The native op in plain PyTorch: logits float32, anchors and labels int64, each [N, P], and deltas [N, P, 4].

    In each level the topk pairs with the largest logits from floor on, of equal ones those with the lowest indices;
    level after level, and in a level in the order of anchor and class. A level's unused places come last and hold
    minus infinity and zeros. An anchor with a NaN among its logits has no pair.
    """
    if bias is not None:
        rows = bias.unflatten(0, (-1, logits[0].shape[2]))
        logits = [(x.float().unflatten(1, (-1, len(rows))) + rows).flatten(1, 2) for x in logits]
    parts, first = [], 0
    for wide, narrow in zip(logits, deltas, strict=True):
        values, anchors, labels = _level(wide, topk, floor)
        none = values.isneginf()
        here = narrow.gather(1, anchors[..., None].expand(-1, -1, 4)).masked_fill(none[..., None], 0)
        parts.append((values, (anchors + first).masked_fill(none, 0), labels, here))
        first += wide.shape[1]
    values, anchors, labels, found = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return values, anchors, labels, found


def _level(logits: Tensor, topk: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values, anchors and labels [N, slots] of one level: logits [N, A, K].

    Only the topk anchors by their best class can hold a pair of the topk, so the wide tensor is read once.
    """
    classes = logits.shape[2]
    best, anchors = _largest(_from_floor(logits.amax(2), floor), topk)
    rows = _from_floor(logits.gather(1, anchors[..., None].expand(-1, -1, classes)), floor)
    values, pair = _largest(rows.masked_fill(best.isneginf()[..., None], -torch.inf).flatten(1), topk)
    anchors, labels = anchors.gather(1, pair // classes), pair % classes
    missing = min(topk, logits.shape[1] * classes) - values.shape[1]
    pad = torch.nn.functional.pad
    return pad(values, (0, missing), value=-torch.inf), pad(anchors, (0, missing)), pad(labels, (0, missing))


def _from_floor(logits: Tensor, floor: float) -> Tensor:
    """In float32, and minus infinity for what is below the floor or NaN."""
    values = logits.float()
    return values.masked_fill(~(values >= floor), -torch.inf)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row [N, M] and their places, in the order of the places; of equal ones the first.

    Minus infinity is no value: it comes last, with place 0. Fewer columns if no row needs so many and `_fullest` sees
    it.
    """
    length = values.shape[1]
    count = min(count, _fullest(values > -torch.inf))
    at = largest_places(values, count, sorted=False)
    at = at.masked_fill(values.gather(1, at).isneginf(), length).sort(1).values
    none = at == length
    at = at.masked_fill(none, 0)
    return values.gather(1, at).masked_fill(none, -torch.inf), at


def _fullest(alive: Tensor) -> int:
    """The most True in a row of [N, M], at least 1; M where only waiting for the device would tell."""
    return max(1, 1, *alive.sum(1).tolist()) if alive.device.type == "cpu" else alive.shape[1]


def _floor(score_thresh: float) -> float:
    """A logit below which no float32 score is above the threshold, but little lower than need be."""
    if score_thresh <= 0:
        return -math.inf
    low = min(score_thresh, 1) * (1 - 1e-5)  # the rounding of sigmoid is 3e-7 at most
    return math.log(low / (1 - low))


def candidates(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    score_thresh: float,
    topk: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores float32, anchors int64 and labels int64, each [N, P], and deltas [N, P, 4] of the pairs to suppress among.

    logits: over the levels, [N, A_l, K], of one floating dtype. deltas: over the levels, [N, A_l, 4]; returned in their
    dtype. Of each level come the topk pairs with the highest scores above score_thresh; P = sum over the levels of
    min(topk, A_l * K), whatever the values. All are sorted by falling score; unused places come last and have score
    -1. anchors count through all levels.
    Of equal logits at the limit of a level, and of equal scores in the result, the lowest level, anchor and class comes
    first. An anchor with a NaN among its logits has no pair. No gradients.
    bias: [C * K], float32, is added to the logits in float32, as `detcore.ops.focal.focal_loss` has it.
    """
    floor = _floor(score_thresh)
    if native.runs(OP, *logits, *deltas, *([] if bias is None else [bias])):
        logits, deltas = [x.contiguous() for x in logits], [x.contiguous() for x in deltas]
        bias = None if bias is None else bias.float().contiguous()
        found = torch.ops.single_stage_detector.candidates(logits, deltas, topk, floor, bias)
    else:
        found = candidates_reference(logits, deltas, topk, floor, bias)
    best, anchors, labels, here = found
    scores = torch.sigmoid(best)
    # masked_fill: torch.where would copy its number to the device, which a graph can't capture
    scores = scores.masked_fill(~(scores > score_thresh) | best.isneginf(), -1)
    scores, order = scores.sort(stable=True, dim=1, descending=True)
    here = here.gather(1, order[..., None].expand(-1, -1, 4))
    return scores, anchors.gather(1, order), labels.gather(1, order), here


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(
        logits: Sequence[Tensor], deltas: Sequence[Tensor], topk: int, floor: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        places = sum(min(topk, wide.shape[1] * wide.shape[2]) for wide in logits)
        shape = (logits[0].shape[0], places)
        values = logits[0].new_empty(shape, dtype=torch.float32)
        anchors, labels = (values.new_empty(shape, dtype=torch.int64) for _ in range(2))
        return values, anchors, labels, deltas[0].new_empty((*shape, 4))
