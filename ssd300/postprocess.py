"""From SSD300's raw outputs to detections, for a whole batch at once and with fixed shapes."""

import torch
from torch import Tensor

from detcore.ops.nms import nms
from ssd300.anchors import IMAGE_SIZE, corners, decode
from ssd300.ops.candidates import candidates


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
    if its IoU with a better one of its class is nms_thresh or more; the best `detections` of all classes remain. What
    remains with a box that is not finite, as of NaN or huge deltas, leaves its place unused.
    """
    deltas, logits = model_outputs
    scores, prior, labels = candidates(logits, score_thresh, min(per_class, len(priors)))
    deltas = deltas.gather(1, prior.unsqueeze(2).expand(-1, -1, 4)).to(priors.dtype)
    boxes = corners(decode(deltas, priors[prior]))
    kept = nms(boxes, scores, labels, _below(nms_thresh), detections)
    at = kept.clamp(min=0)
    boxes = (boxes * IMAGE_SIZE).gather(1, at.unsqueeze(2).expand(-1, -1, 4))
    empty = (kept < 0) | ~boxes.isfinite().all(2)
    boxes = boxes.masked_fill(empty.unsqueeze(2), 0)
    return boxes, scores.gather(1, at).masked_fill(empty, 0), labels.gather(1, at).masked_fill(empty, -1)
