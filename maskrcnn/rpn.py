"""The region proposal network: its head, its proposals of a fixed shape, and the anchors that train it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore.boxes import decode, encode
from detcore.ops.largest import largest, largest_places
from detcore.ops.match import match
from detcore.ops.nms import nms
from maskrcnn.anchors import clip
from maskrcnn.bodies import initialise

Draws = Callable[[Tensor], Tensor]
"""Gives float32 of 0..1 in the shape of what it is given, by which the samplers choose; `torch.rand_like` is one."""


class RPNHead(nn.Module):
    """[P2, ...] -> (objectness logits [N, A_l], box deltas [N, A_l, 4]), lists over the levels.

    One convolution shared by the levels. A_l = rows * columns * A, in the order row, column, anchor of the cell.
    """

    def __init__(self, channels: int, per_cell: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(channels, per_cell, 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * per_cell, 1)
        initialise(self, partial(nn.init.normal_, std=0.01))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = [], []
        for x in features:
            x = F.relu(self.conv(x), inplace=True)
            logits.append(self.cls_logits(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.bbox_pred(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return logits, deltas


class Proposals(NamedTuple):
    """boxes: [N, P, 4], half-open pixels of the canvas, without gradient. scores: [N, P], -1 where there is none."""

    boxes: Tensor
    scores: Tensor


class Selection(NamedTuple):
    """How proposals are chosen.

    before: of each level and image, by score. after: those of them that suppression at `nms_thresh` may keep.
    together: those that stay of all levels of an image, or of all images of the batch with `over_batch`; None: all.
    min_size: least width and height in pixels.
    """

    before: int
    after: int
    together: int | None
    over_batch: bool = False
    nms_thresh: float = 0.7
    min_size: float = 0


@torch.no_grad()
def propose(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    grids: Sequence[tuple[int, int]],
    extent: Tensor,
    selection: Selection,
    legacy: bool = True,
) -> Proposals:
    """The proposals of a batch, [N, P, 4], with P fixed by the selection and the shapes alone.

    logits, deltas: as `RPNHead` gives them, any floating dtype; anchors [A_l, 4], strides and grids (rows, columns) of
    the levels. extent: int64 [N, 2], height and width of the images; cells that begin beyond them propose nothing, so
    that a larger canvas changes nothing. Logits that are NaN propose nothing either.
    """
    images, most = len(extent), max(min(selection.before, level.shape[1]) for level in logits)
    boxes, scores = [], []
    for level in range(len(logits)):
        score = _scores(logits[level], strides[level], grids[level], extent)
        count = min(selection.before, score.shape[1])
        score, at = largest(score, count)
        found = deltas[level].gather(1, at[..., None].expand(-1, -1, 4)).to(anchors[level].dtype)
        box = clip(decode(found, anchors[level][at]), extent, legacy)
        large = ((box[..., 2:] - box[..., :2]) >= selection.min_size).all(2)
        boxes.append(F.pad(box, (0, 0, 0, most - count)))
        scores.append(F.pad(score.sigmoid().where(large & ~score.isneginf(), -1), (0, most - count), value=-1))
    # A row for each level of each image, so that they are suppressed side by side.
    boxes, scores = torch.stack(boxes, 1).flatten(0, 1), torch.stack(scores, 1).flatten(0, 1)
    scores, at = largest(scores, most)
    boxes = boxes.gather(1, at[..., None].expand(-1, -1, 4))
    kept = nms(boxes, scores, torch.zeros_like(at), selection.nms_thresh, min(selection.after, most))
    places = kept.clamp(min=0)
    scores = scores.gather(1, places).masked_fill(kept < 0, -1).view(images, -1)
    boxes = boxes.gather(1, places[..., None].expand(-1, -1, 4)).view(images, -1, 4)
    if selection.together is None:
        return Proposals(boxes, scores)
    return _together(boxes, scores, selection.together, selection.over_batch)


def _scores(logits: Tensor, stride: int, grid: tuple[int, int], extent: Tensor) -> Tensor:
    """Logits [N, A_l] float32, minus infinity where the image doesn't reach or the logit is not a number."""
    rows, columns = (
        torch.arange(count, device=extent.device) * stride < extent[:, axis : axis + 1]
        for axis, count in enumerate(grid)
    )
    reached = (rows[:, :, None] & columns[:, None]).flatten(1)  # [N, cells]
    logits = logits.float().unflatten(1, (reached.shape[1], -1))
    return logits.masked_fill(~reached[..., None] | logits.isnan(), -torch.inf).flatten(1)


def _together(boxes: Tensor, scores: Tensor, count: int, over_batch: bool) -> Proposals:
    """The `count` best of each image, or of all images."""
    if over_batch and count < scores.numel():
        places = largest_places(scores.view(1, -1), count, sorted=False)[0]
        chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).scatter_(0, places, True)
        scores = scores.masked_fill(~chosen.view(scores.shape), -1)
    scores, at = largest(scores, min(count, scores.shape[1]))
    return Proposals(boxes.gather(1, at[..., None].expand(-1, -1, 4)), scores)


class Sample(NamedTuple):
    """Which of a row's places train: at int64 [N, S], valid and positive bool [N, S]; positives come first."""

    at: Tensor
    valid: Tensor
    positive: Tensor


@torch.no_grad()
def sample(positive: Tensor, negative: Tensor, count: int, fraction: float, draws: Draws = torch.rand_like) -> Sample:
    """At most `count` places of each row [N, A] at random: at most fraction of them positive, the rest negative.

    Where there are fewer of both, the last places of the sample are not valid.
    """
    most, count = min(int(count * fraction), positive.shape[1]), min(count, positive.shape[1])
    chance = draws(torch.empty(positive.shape, dtype=torch.float32, device=positive.device))
    first, then = (
        largest_places(chance.masked_fill(~wanted, -1), number)
        for wanted, number in ((positive, most), (negative, count))
    )
    positives = positive.sum(1, keepdim=True).clamp(max=most)
    places = torch.arange(count, device=positive.device)
    chosen = places < positives
    valid = places < positives + negative.sum(1, keepdim=True)
    at = then.gather(1, (places - positives).clamp(min=0))
    at = torch.where(chosen, F.pad(first, (0, count - most)), at)
    return Sample(at.masked_fill(~valid, 0), valid, chosen)


class Matching(NamedTuple):
    """Overlaps from which on an anchor is foreground, and below which it is background; as rpn_* of the config."""

    high: float = 0.7
    low: float = 0.3
    count: int = 256
    fraction: float = 0.5


def rpn_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    within: Tensor,
    boxes: Tensor,
    labels: Tensor,
    matching: Matching,
    draws: Draws = torch.rand_like,
) -> tuple[Tensor, Tensor]:
    """Losses of objectness and boxes, scalars of the anchors' dtype.

    logits [N, A], deltas [N, A, 4] and anchors [A, 4] of all levels. within: bool [N, A], the anchors that may be
    sampled. boxes [N, M, 4] half-open; labels int64 [N, M], negative where padded.
    Objectness: binary cross-entropy, mean over the sampled anchors of the batch. Boxes: smooth L1 with beta 1/9, summed
    over the positive ones and divided by the number of all sampled ones.
    """
    matched = match(anchors, boxes, labels, matching.high, matching.low, "ties")
    chosen = sample(within & (matched >= 0), within & (matched == -1), matching.count, matching.fraction, draws)
    counted = chosen.valid.sum().clamp(min=1)
    picked = logits.gather(1, chosen.at).to(anchors.dtype)
    entropy = F.binary_cross_entropy_with_logits(picked, chosen.positive.to(anchors.dtype), reduction="none")
    found = deltas.gather(1, chosen.at[..., None].expand(-1, -1, 4)).to(anchors.dtype)
    own = anchors[chosen.at]
    wanted = encode(chosen_boxes(boxes, matched.gather(1, chosen.at), own, chosen.positive), own)
    error = F.smooth_l1_loss(found, wanted, reduction="none", beta=1 / 9).masked_fill(~chosen.positive[..., None], 0)
    return entropy.masked_fill(~chosen.valid, 0).sum() / counted, error.sum() / counted


def chosen_boxes(boxes: Tensor, matched: Tensor, own: Tensor, positive: Tensor) -> Tensor:
    """[N, S, 4]: the ground truth `matched` [N, S] of the positive ones, and `own` for the others, whose targets are
    then zeros and finite."""
    if not boxes.shape[1]:  # for the rows without a match to point to
        return own
    truth = boxes.to(own.dtype).gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4))
    return torch.where(positive[..., None], truth, own)
