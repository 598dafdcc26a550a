"""The 8,732 prior boxes of SSD300 in NVIDIA's order, and their regression code."""

import math

import torch
from torch import Tensor

IMAGE_SIZE = 300
GRIDS = (38, 19, 10, 5, 3, 1)
"""Rows (and columns) of the feature maps."""
STEPS = (8, 16, 32, 64, 100, 300)
SCALES = (21, 45, 99, 153, 207, 261, 315)
"""Side of a level's smallest prior in pixels; the last closes the sixth level."""
RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
"""Aspect ratios of a level beside 1; each stands for itself and its inverse."""
PER_CELL = tuple(2 + 2 * len(ratios) for ratios in RATIOS)
CENTRE_SCALE, SIZE_SCALE = 0.1, 0.2
"""Deltas are measured in these units, so that they are of order 1."""


def cell_sizes(level: int) -> list[tuple[float, float]]:
    """Widths and heights, of 0..1, of the priors of one cell of a level, in their order."""
    side, after = SCALES[level] / IMAGE_SIZE, SCALES[level + 1] / IMAGE_SIZE
    between = math.sqrt(side * after)
    sizes = [(side, side), (between, between)]
    for ratio in RATIOS[level]:
        long, short = side * math.sqrt(ratio), side / math.sqrt(ratio)
        sizes += [(long, short), (short, long)]
    return sizes


def priors() -> Tensor:
    """All priors, float32 [8732, 4]: cx, cy, w, h of 0..1; order: level, `cell_sizes`, row, column.

    A cell is STEPS[level] pixels wide, which is not 300 / GRIDS[level]: the last centres of the first level lie at
    1.0. Values are cut to 0..1, as in the original.
    """
    levels = []
    for level, (cells, step) in enumerate(zip(GRIDS, STEPS, strict=True)):
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * (step / IMAGE_SIZE)
        sizes = torch.tensor(cell_sizes(level), dtype=torch.float64)
        cy, cx = torch.meshgrid(centres, centres, indexing="ij")
        middle = torch.stack((cx, cy), -1).expand(len(sizes), -1, -1, -1)
        levels.append(torch.cat((middle, sizes[:, None, None].expand_as(middle)), -1).reshape(-1, 4))
    return torch.cat(levels).float().clamp_(0, 1)


def corners(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 [..., 4] of boxes cx, cy, w, h [..., 4]. Priors at the border reach over it: nothing is cut."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat((centre - half, centre + half), -1)


def centres(boxes: Tensor) -> Tensor:
    """cx, cy, w, h [..., 4] of boxes x1, y1, x2, y2 [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((0.5 * (low + high), high - low), -1)


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """Deltas [..., 4] that lead from priors to boxes, both cx, cy, w, h [..., 4]; w and h must be positive.

    10 (c - c_prior) / size_prior for the centre, 5 ln(size / size_prior) for the size.
    """
    centre = (boxes[..., :2] - priors[..., :2]) / priors[..., 2:] / CENTRE_SCALE
    return torch.cat((centre, torch.log(boxes[..., 2:] / priors[..., 2:]) / SIZE_SCALE), -1)


def decode(deltas: Tensor, priors: Tensor) -> Tensor:
    """Boxes cx, cy, w, h [..., 4] that the deltas [..., 4] of `encode` describe; nothing is cut."""
    centre = CENTRE_SCALE * deltas[..., :2] * priors[..., 2:] + priors[..., :2]
    return torch.cat((centre, torch.exp(SIZE_SCALE * deltas[..., 2:]) * priors[..., 2:]), -1)
