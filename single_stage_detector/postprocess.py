"""From RetinaNet's raw outputs to detections, for a whole batch at once and with fixed shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.boxes import clip, decode
from detcore.ops.nms import nms
from single_stage_detector.ops.candidates import candidates


@torch.no_grad()
def postprocess(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Tensor,
    image_size: tuple[int, int],
    score_thresh: float = 0.05,
    topk: int = 1000,
    nms_thresh: float = 0.5,
    detections: int = 300,
    class_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of a batch: boxes [N, D, 4], scores [N, D] and labels int64 [N, D], best first, D = detections.

    logits: [N, A_l, K] and deltas: [N, A_l, 4] of the levels P3..P7, any floating dtype; scores are computed in
    float32. anchors: [A, 4] of all levels, A = sum of A_l. image_size: (height, width). Boxes are x1, y1, x2, y2 in
    pixels of the resized image, clipped to it, of the anchors' dtype. Unused places have box 0, 0, 0, 0, score 0 and
    label -1. No shape depends on the values, and nothing waits for the device. class_bias: [9 * K], what the logits
    lack, as `single_stage_detector.loss.losses` has it.
    In each level the `topk` (anchor, class) pairs with the highest score above score_thresh are decoded; then, over
    all levels, a box is dropped if it overlaps a better one of its class by more than nms_thresh. As in torchvision's
    RetinaNet.postprocess_detections, but for two things. Among equal scores the lowest level, anchor and class comes
    first. And boxes of different classes never meet, where torchvision's batched_nms moves each class apart by an
    offset in float32, whose rounding costs or saves a detection now and then (one in 2 of 60 images). Anchors
    with a NaN among their logits are left out.
    """
    scores, anchor, labels, found = candidates(logits, deltas, score_thresh, topk, class_bias)
    boxes = clip(decode(found.to(anchors.dtype), anchors[anchor]), image_size)
    kept = nms(boxes, scores, labels, nms_thresh, detections)
    empty, at = kept < 0, kept.clamp(min=0)
    boxes = boxes.gather(1, at[..., None].expand(-1, -1, 4)).masked_fill(empty[..., None], 0)
    return boxes, scores.gather(1, at).masked_fill(empty, 0), labels.gather(1, at).masked_fill(empty, -1)
