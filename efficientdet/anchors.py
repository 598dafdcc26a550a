"""The fixed anchor boxes of EfficientDet, as its authors lay them out."""

import torch
from torch import Tensor

ASPECTS = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
OCTAVES = 3
PER_CELL = OCTAVES * len(ASPECTS)


def grids(image_size: tuple[int, int], levels: int = 5) -> tuple[tuple[int, int], ...]:
    """Cells (rows, columns) of the feature maps P3, P4, ... for an image of (height, width) pixels."""
    height, width = image_size
    return tuple((-(-height // 2**k), -(-width // 2**k)) for k in range(3, 3 + levels))


def anchors(image_size: tuple[int, int], levels: int = 5, scale: float = 4.0) -> Tensor:
    """All anchors, float32 [A, 4], x1, y1, x2, y2 in pixels; order: level, row, column, octave, aspect.

    image_size: (height, width). A level's stride is the image's size over that of its grid: 8, 16, ... where the
    largest one divides it. A cell's anchors share its centre; octave o and aspect (rx, ry) make one of
    scale * stride * 2 ** (o / 3) * (rx, ry) pixels.
    """
    scales = torch.tensor([scale * 2 ** (o / OCTAVES) for o in range(OCTAVES)], dtype=torch.float64)
    half = (scales[:, None, None] * torch.tensor(ASPECTS, dtype=torch.float64)).view(PER_CELL, 2) / 2
    corners = torch.cat((-half, half), 1)  # in strides around the centre
    height, width = image_size
    boxes = []
    for rows, columns in grids(image_size, levels):
        y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (rows, columns))
        y, x = torch.meshgrid(y, x, indexing="ij")
        stride = torch.tensor([width / columns, height / rows] * 2, dtype=torch.float64)
        boxes.append(((torch.stack((x, y, x, y), -1).view(-1, 1, 4) + corners) * stride).view(-1, 4))
    return torch.cat(boxes).float()
