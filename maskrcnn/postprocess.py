"""From images to detections, for a whole batch at once and with fixed shapes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.boxes import decode
from detcore.ops.largest import largest
from detcore.ops.nms import nms
from maskrcnn.anchors import clip, pooled
from maskrcnn.model import MaskRCNN

SMALLEST = 0.01
"""Pixels: narrower boxes are dropped in the half-open convention, as torchvision does; others are never narrower."""


class Detections(NamedTuple):
    """Detections of a batch, best first; unused places have box 0, 0, 0, 0, score 0 and label -1.

    boxes: [N, D, 4], x1, y1, x2, y2, half-open pixels of the canvas. scores: [N, D]. labels: int64 [N, D], 0..K-1.
    masks: [N, D, M, M], for each bin of the box the probability that the object covers it; places: [N, D, 4], the
    corners between which the bins lie (in the original's convention its x2, y2). Both None without a mask head.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    places: Tensor | None = None


@torch.no_grad()
def postprocess(model: MaskRCNN, images: Tensor, extent: Tensor) -> Detections:
    """What the network sees in a batch. A network that only proposes gives its proposals, as label 0.

    images: uint8 [N, 3, H, W], or floats that `MaskRCNN.normalized` made. extent: int64 [N, 2], height and width of
    what the images cover of the canvas, to which boxes are clipped.
    """
    features = model(images, extent)
    proposals = model.propose(model.find(features), extent, training=False)
    if model.roi_heads is None:
        none = proposals.scores < 0
        boxes = proposals.boxes.masked_fill(none[..., None], 0)
        return Detections(boxes, proposals.scores.masked_fill(none, 0), torch.where(none, -1, 0))
    logits, deltas, _ = model.roi_heads["box"](features, proposals.boxes)
    boxes, scores, labels = detect(
        logits, deltas, proposals.boxes, proposals.scores >= 0, extent, model.score_thresh, model.nms_thresh,
        model.detections, model.box_weights, model.legacy,
    )  # fmt: skip
    if not model.makes_masks:
        return Detections(boxes, scores, labels)
    return Detections(boxes, scores, labels, _masks(model, features, boxes, labels), pooled(boxes, model.legacy))


def _masks(model: MaskRCNN, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    """The probabilities [N, D, M, M] of detections, 0 for unused places."""
    slots = labels.shape[1]
    if labels.device.type == "cpu":  # reading a value costs nothing here, and used places come first
        slots = int((labels >= 0).sum(1).max())
    boxes, few = boxes[:, :slots], labels[:, :slots]
    shared = None
    if model.roi_heads["mask"].shares:
        box = model.roi_heads["box"]
        shared = box.feature_extractor(box.pooler(features, boxes)).unflatten(0, few.shape)
    masks = model.roi_heads["mask"](features, boxes, (few + 1).clamp(min=1), shared).float().sigmoid()
    masks = masks.masked_fill((few < 0)[..., None, None], 0)
    return F.pad(masks, (0, 0, 0, 0, 0, labels.shape[1] - slots))


def detect(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    valid: Tensor,
    extent: Tensor,
    score_thresh: float = 0.05,
    nms_thresh: float = 0.5,
    detections: int = 100,
    weights: tuple[float, float, float, float] = (10, 10, 5, 5),
    legacy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """boxes [N, D, 4], scores [N, D], labels int64 [N, D] as in `Detections`, D = detections.

    logits: [N, P, K + 1], class 0 the background; deltas: [N, P, K + 1, 4]; proposals: [N, P, 4]; valid: bool [N, P].
    The (proposal, class) pairs with a score above score_thresh are decoded; then a box is dropped if it overlaps a
    better one of its class by more than nms_thresh. Of equal scores the first proposal and class comes first.
    """
    classes = logits.shape[2] - 1
    scores = logits.float().softmax(2)[..., 1:]
    scores = torch.where(valid[..., None] & (scores > score_thresh), scores, -1).flatten(1)
    # The scores of a proposal sum to at most 1, so that no more pairs than these can be above the threshold.
    each = classes if score_thresh <= 0 else min(classes, max(1, int(1 / score_thresh)))
    scores, pair = largest(scores, logits.shape[1] * each)
    labels = pair % classes
    at = pair // classes * (classes + 1) + labels + 1
    found = deltas.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, 4)).to(proposals.dtype)
    own = proposals.gather(1, (pair // classes)[..., None].expand(-1, -1, 4))
    boxes = clip(decode(found, own, weights), extent, legacy)
    if not legacy:
        large = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST).all(2)
        scores, order = largest(scores.where(large, -1), scores.shape[1])
        boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
    kept = nms(boxes, scores, labels, nms_thresh, detections)
    empty, at = kept < 0, kept.clamp(min=0)
    boxes = boxes.gather(1, at[..., None].expand(-1, -1, 4)).masked_fill(empty[..., None], 0)
    return boxes, scores.gather(1, at).masked_fill(empty, 0), labels.gather(1, at).masked_fill(empty, -1)
