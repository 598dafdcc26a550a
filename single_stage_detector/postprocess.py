"""From RetinaNet's raw outputs to detections, for a whole batch at once and with fixed shapes."""

import torch
from torch import Tensor

from detcore.boxes import areas, clip, decode
from single_stage_detector.anchors import grids


def _needed(alive: Tensor) -> int:
    """How many of the first places of a sorted dimension (the last) are worth keeping.

    All of them, so that shapes stay fixed; but on a CPU, where reading a value costs nothing, the fullest row's count.
    """
    return max(1, int(alive.sum(-1).max())) if alive.device.type == "cpu" else alive.shape[-1]


def _level_candidates(
    cls_logits: Tensor, image_size: tuple[int, int], score_thresh: float, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The topk (anchor, class) pairs of every level: scores (-1 up to the threshold), anchors and classes, each [N, P].

    Only the topk anchors of a level by their best class can hold a pair of its topk, so that the wide tensor
    is read once.
    """
    n, total, k = cls_logits.shape
    cells = [rows * columns for rows, columns in grids(image_size)]
    per_cell = total // sum(cells)
    lengths = torch.tensor(cells, device=cls_logits.device)[:, None] * per_cell
    place = torch.arange(max(cells) * per_cell, device=cls_logits.device)
    inside = place < lengths  # levels side by side, padded to the longest: [L, longest]
    index = torch.where(inside, lengths.cumsum(0) - lengths + place, 0)
    best = cls_logits.amax(2).index_select(1, index.flatten()).reshape(n, *index.shape)
    best, at = best.float().masked_fill_(~inside, -torch.inf).topk(min(topk, index.shape[1]), 2)
    width = _needed(torch.sigmoid(best) > score_thresh)
    best, at = best[..., :width], at[..., :width]
    anchor = index.expand(n, -1, -1).gather(2, at)
    logits = cls_logits.gather(1, anchor.reshape(n, -1, 1).expand(-1, -1, k)).float().reshape(*anchor.shape, k)
    logits, pair = logits.masked_fill_(best.isneginf()[..., None], -torch.inf).flatten(2).topk(min(topk, width * k), 2)
    anchor, label = anchor.gather(2, pair // k).flatten(1), pair.flatten(1) % k
    scores = torch.sigmoid(logits.flatten(1))
    scores = torch.where(scores > score_thresh, scores, -1)
    scores, order = scores.sort(stable=True, dim=1, descending=True)
    order = order[:, : _needed(scores >= 0)]
    return scores[:, : order.shape[1]], anchor.gather(1, order), label.gather(1, order)


def _greedy_nms(boxes: Tensor, live: Tensor, labels: Tensor, nms_thresh: float, detections: int) -> Tensor:
    """Positions int64 [N, detections] of the boxes that class-wise greedy suppression keeps, best first; -1 for none.

    boxes: [N, P, 4]. live: [N, P], the score, negative for what is no candidate; overwritten. labels: [N, P].
    One step for each output slot, and no list of survivors: shapes never depend on the data.
    """
    planes = boxes.permute(2, 0, 1).contiguous()  # [4, N, P]
    low, high = planes[:2], planes[2:]
    area = areas(boxes)
    kept = []
    for _ in range(detections):
        score, at = live.max(1, keepdim=True)
        alive = score >= 0
        if live.device.type == "cpu" and not alive.any():  # reading a value costs nothing here
            break
        kept.append(torch.where(alive, at, -1))
        own = at.expand(2, -1, -1)
        inter = torch.minimum(high, high.gather(2, own)).sub_(torch.maximum(low, low.gather(2, own))).clamp_(min=0)
        inter = inter[0] * inter[1]
        overlap = inter / (area.gather(1, at) + area - inter)
        live.masked_fill_((overlap > nms_thresh) & (labels == labels.gather(1, at)), -1)
        live.scatter_(1, at, -1)
    kept = torch.cat(kept, 1) if kept else labels.new_zeros(len(labels), 0)
    return torch.nn.functional.pad(kept, (0, detections - kept.shape[1]), value=-1)


def _widths(scores: Tensor, detections: int) -> list[int]:
    """How many of the best candidates to suppress among, in the order of trying; the last is all of them.

    Where the best ones fill every output slot, worse ones cannot change the result. Only a CPU can look whether
    they did without waiting, so other devices go through all of them at once.
    """
    few = 6 * detections
    return [few, scores.shape[1]] if scores.device.type == "cpu" and few < scores.shape[1] else [scores.shape[1]]


@torch.no_grad()
def postprocess(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_size: tuple[int, int],
    score_thresh: float = 0.05,
    topk: int = 1000,
    nms_thresh: float = 0.5,
    detections: int = 300,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of a batch: boxes [N, D, 4], scores [N, D] and labels int64 [N, D], best first, D = detections.

    cls_logits: [N, A, K] and box_deltas: [N, A, 4], any floating dtype. anchors: [A, 4], for the levels P3..P7 of
    image_size (height, width). Boxes are x1, y1, x2, y2 in pixels of the resized image, clipped to it. Unused
    places have box 0, 0, 0, 0, score 0 and label -1.
    In each level the `topk` (anchor, class) pairs with the highest score above score_thresh are decoded; then, over
    all levels, a box is dropped if it overlaps a better one of its class by more than nms_thresh. Equal to
    torchvision's RetinaNet.postprocess_detections, except for the order among equal scores.
    """
    if not isinstance(cls_logits, Tensor):
        cls_logits, box_deltas = torch.cat(tuple(cls_logits), 1).float(), torch.cat(tuple(box_deltas), 1).float()
    scores, anchor, labels = _level_candidates(cls_logits, image_size, score_thresh, topk)
    deltas = box_deltas.to(anchors.dtype).gather(1, anchor[..., None].expand(-1, -1, 4))
    boxes = clip(decode(deltas, anchors[anchor]), image_size)
    for width in _widths(scores, detections):
        kept = _greedy_nms(boxes[:, :width], scores[:, :width].clone(), labels[:, :width], nms_thresh, detections)
        if width == scores.shape[1] or ((kept[:, -1] >= 0) | (scores[:, width] < 0)).all():
            break
    empty, at = kept < 0, kept.clamp(min=0)
    boxes = boxes.gather(1, at[..., None].expand(-1, -1, 4)).masked_fill(empty[..., None], 0)
    return boxes, scores.gather(1, at).masked_fill(empty, 0), labels.gather(1, at).masked_fill(empty, -1)
