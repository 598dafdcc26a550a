"""The one batch contract: what every loader yields and every loss reads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch of fixed shapes, the same from every loader.

    images: uint8 [N, 3, H, W], RGB, on the canvas, in channels_last memory; normalised later on the device.
    boxes: float32 [N, M, 4], x1, y1, x2, y2 in pixels of the canvas; zeros where padded.
    labels: int64 [N, M], class index 0..K-1; -1 marks padding. Real boxes come first.
    image_id: int64 [N], the annotation file's own id; -1 marks a padding image (evaluation only).
    size: int64 [N, 2], height and width of the original image in pixels; 1, 1 for a padding image.
    extent: int64 [N, 2], height and width of what the image covers of the canvas, from its top left corner; the rest
        is fill. 1, 1 for a padding image.
    edges: float32 [N, E, 4], x1, y1, x2, y2 of the edges of the masks' outlines (`detcore.data.segmentations`) in
        pixels of the canvas, not clipped; those straight down are left out. E = 0 where nobody asks for masks.
    edge_of: int64 [N, E, 2], the edge's box and which part of the box's mask it belongs to; box after box and part
        after part, then -1, which marks padding.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    image_id: Tensor
    size: Tensor
    extent: Tensor
    edges: Tensor
    edge_of: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch whose tensors are what a function makes of these."""
        return Batch(*map(function, self))


def whole_images(images: Tensor, boxes: Tensor, labels: Tensor, image_id: Tensor, size: Tensor) -> Batch:
    """The `Batch` of images that cover their canvas, without masks."""
    count = len(images)
    extent = torch.tensor(list(images.shape[2:]) * count).view(count, 2)
    none = torch.zeros(count, 0, 4), torch.zeros(count, 0, 2, dtype=torch.int64)
    return Batch(images, boxes, labels, image_id, size, extent, *none)
