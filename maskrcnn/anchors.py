"""The fixed anchor boxes of the region proposal network, on a grid of any size, and the conventions of its boxes.

In this network boxes are half-open everywhere: x1, y1, x2, y2 with a width of x2 - x1, in pixels of the canvas. The
original counts pixels inclusively: its x2 is the last pixel, and its width x2 - x1 + 1. With x2 + 1 for x2 all its
widths, areas, overlaps, targets and decoded boxes come out the same, so that its convention (`legacy`) is left in few
places: which anchors there are, how boxes are clipped, and that regions are pooled from x1 to the original's x2.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def cell_anchors(
    stride: int, sizes: Sequence[float], ratios: Sequence[float] = (0.5, 1.0, 2.0), legacy: bool = True
) -> Tensor:
    """The anchors of the cell whose top left corner is (0, 0): float32 [len(ratios) * len(sizes), 4], half-open.

    ratios are height / width, the slow index. legacy: the original's, made from a square of the stride whose sides are
    rounded for each ratio and then scaled to the size, around the square's centre; else torchvision's, around (0, 0)
    with rounded corners.
    """
    ratio = np.asarray(ratios, dtype=np.float64)[:, None]
    size = np.asarray(sizes, dtype=np.float64)
    if legacy:
        width = np.round(np.sqrt(stride * stride / ratio))
        height = np.round(width * ratio)
        half_width, half_height = 0.5 * (width * (size / stride) - 1), 0.5 * (height * (size / stride) - 1)
        centre = 0.5 * (stride - 1)
        corners = centre - half_width, centre - half_height, centre + half_width + 1, centre + half_height + 1
        return torch.tensor(np.stack(corners, 2).reshape(-1, 4), dtype=torch.float32)
    scale = torch.sqrt(torch.tensor(ratios, dtype=torch.float32))[:, None]
    widths, heights = (1 / scale) * torch.tensor(sizes), scale * torch.tensor(sizes)
    return (torch.stack((-widths, -heights, widths, heights), 2) / 2).round().view(-1, 4).float()


def level_anchors(cell: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """The anchors of a feature map: [rows * columns * len(cell), 4]; order: row, column, `cell_anchors`.

    grid: (rows, columns). On the cell's device and of its dtype; nothing is copied from the host.
    """
    rows, columns = (torch.arange(n, dtype=cell.dtype, device=cell.device) * stride for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return (torch.stack((x, y, x, y), 2)[:, :, None] + cell).view(-1, 4)


def inside(anchors: Tensor, extent: Tensor, straddle: float, legacy: bool = True) -> Tensor:
    """bool [N, A]: whether an anchor reaches beyond the image by no more than `straddle` pixels; all if that is < 0.

    anchors: [A, 4]. extent: int64 [N, 2], height and width of the images on their canvas.
    """
    if straddle < 0:
        return torch.ones(len(extent), len(anchors), dtype=torch.bool, device=anchors.device)
    height, width = extent[:, :1] + straddle, extent[:, 1:] + straddle
    x1, y1, x2, y2 = anchors.unbind(1)
    if legacy:  # the last pixel lies below the limit, which for anchors on whole pixels is the same
        within = (x2 - 1 < width) & (y2 - 1 < height)
    else:
        within = (x2 <= width) & (y2 <= height)
    return within & (x1 >= -straddle) & (y1 >= -straddle)


def clip(boxes: Tensor, extent: Tensor, legacy: bool = True) -> Tensor:
    """Boxes [N, P, 4] cut to their images. legacy: to pixels, so that one that lies outside keeps a pixel of width.

    extent: int64 [N, 2], height and width of the images on their canvas.
    """
    size = extent.flip(1)[:, None].to(boxes.dtype)
    one = 1 if legacy else 0
    low = torch.minimum(boxes[..., :2].clamp(min=0), size - one)
    return torch.cat((low, torch.minimum(boxes[..., 2:].clamp(min=one), size)), 2)


def pooled(boxes: Tensor, legacy: bool = True) -> Tensor:
    """The corners [..., 4] between which a box's features and masks are sampled. legacy: to the original's x2, y2."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] - 1), -1) if legacy else boxes
