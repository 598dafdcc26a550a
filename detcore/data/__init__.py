"""The one batch contract: what every loader yields and every loss reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the tools for data sets start without torch
    from torch import Tensor


class Batch(NamedTuple):
    """A batch of fixed shapes, the same from the torch, DALI and synthetic loaders.

    images: uint8 [N, 3, H, W], RGB, resized, in channels_last memory; normalised later on the device.
    boxes: float32 [N, M, 4], x1, y1, x2, y2 in pixels of the resized image; zeros where padded.
    labels: int64 [N, M], class index 0..K-1; -1 marks padding. Real boxes come first.
    image_id: int64 [N], the annotation file's own id; -1 marks a padding image (evaluation only).
    size: int64 [N, 2], height and width of the original image in pixels; 1, 1 for a padding image.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    image_id: Tensor
    size: Tensor
