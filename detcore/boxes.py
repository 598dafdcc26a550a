"""Boxes as corner coordinates x1, y1, x2, y2 in pixels: overlap, regression deltas, clipping.

Continuous coordinates, no "+ 1": the width of a box is x2 - x1. All functions broadcast, keep the
dtype and device of their inputs and give gradients. The arithmetic and its order are those of the
MLCommons RetinaNet reference, so that exactly tied overlaps stay tied.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""Largest dw or dh that `decode` takes at its word: a box grows at most 62.5-fold."""


def areas(boxes: Tensor) -> Tensor:
    """Areas [...] in square pixels of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap [..., A, B] in 0..1 of every box of a [..., A, 4] with every box of b [..., B, 4].

    Two boxes of no area give 0, not NaN.
    """
    x1, y1, x2, y2 = a.unsqueeze(-2).unbind(-1)
    u1, v1, u2, v2 = b.unsqueeze(-3).unbind(-1)
    inter = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    inter = inter * (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    union = areas(a).unsqueeze(-1) + areas(b).unsqueeze(-2) - inter
    return torch.where(inter > 0, inter / union, torch.zeros_like(inter))


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


Weights = tuple[float, float, float, float]
"""By what the deltas dx, dy, dw, dh are multiplied, so that their spread suits a network."""


def _of_weights(values: Sequence[Tensor], weights: Weights, inverse: bool = False) -> Sequence[Tensor]:
    if tuple(weights) == (1, 1, 1, 1):
        return values
    return [v / w if inverse else v * w for v, w in zip(values, weights, strict=True)]


def encode(boxes: Tensor, anchors: Tensor, weights: Weights = (1, 1, 1, 1)) -> Tensor:
    """Deltas dx, dy, dw, dh [..., 4] that lead from anchors [..., 4] to boxes [..., 4], times their weights.

    dx is in anchor widths, dw the logarithm of the growth. Both need a positive width and height; otherwise the
    logarithm is not finite.
    """
    gx, gy, gw, gh = _centre_and_size(boxes)
    ax, ay, aw, ah = _centre_and_size(anchors)
    deltas = (gx - ax) / aw, (gy - ay) / ah, torch.log(gw / aw), torch.log(gh / ah)
    return torch.stack(_of_weights(deltas, weights), -1)


def decode(deltas: Tensor, anchors: Tensor, weights: Weights = (1, 1, 1, 1)) -> Tensor:
    """Boxes [..., 4] that the deltas [..., 4] of `encode` describe; dw and dh are cut at `MAX_LOG_SCALE`."""
    dx, dy, dw, dh = _of_weights(deltas.unbind(-1), weights, inverse=True)
    ax, ay, aw, ah = _centre_and_size(anchors)
    x, y = dx * aw + ax, dy * ah + ay
    half_w = 0.5 * (torch.exp(dw.clamp(max=MAX_LOG_SCALE)) * aw)
    half_h = 0.5 * (torch.exp(dh.clamp(max=MAX_LOG_SCALE)) * ah)
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), -1)


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] cut to an image of (height, width) pixels."""
    height, width = image_size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)
