"""The fixed anchor boxes of RetinaNet, as the MLCommons reference lays them out."""

from collections.abc import Sequence

import torch
from torch import Tensor

SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
OCTAVE_STEPS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


def grids(image_size: tuple[int, int], levels: int = len(SIZES)) -> tuple[tuple[int, int], ...]:
    """Cells (rows, columns) of the feature maps P3, P4, ... for an image of (height, width) pixels."""
    height, width = image_size
    return tuple((-(-height // 2**k), -(-width // 2**k)) for k in range(3, 3 + levels))


def cell_anchors(size: float, ratios: Sequence[float] = RATIOS) -> Tensor:
    """The anchors of one cell around (0, 0): float32 [3 * len(ratios), 4].

    ratios are height / width. Three sizes to a ratio, a third of an octave apart and cut to whole pixels; the
    ratio is the slow index. Corners are rounded to whole pixels, half to even.
    """
    sizes = torch.tensor([int(size * step) for step in OCTAVE_STEPS], dtype=torch.float32)
    h_scale = torch.sqrt(torch.tensor(ratios, dtype=torch.float32))
    widths = ((1 / h_scale)[:, None] * sizes).flatten()
    heights = (h_scale[:, None] * sizes).flatten()
    return (torch.stack((-widths, -heights, widths, heights), 1) / 2).round()


def anchors(
    image_size: tuple[int, int],
    grids: Sequence[tuple[int, int]],
    sizes: Sequence[float] = SIZES,
    ratios: Sequence[float] = RATIOS,
) -> Tensor:
    """All anchors, float32 [A, 4], x1, y1, x2, y2 in pixels; order: level, row, column, `cell_anchors`.

    image_size: (height, width). grids: (rows, columns) of each level, as `grids` gives them. sizes: the smallest
    anchor size of each level. The stride is image size // grid (8, 16, 32, 61, 114 at 800 pixels) and a cell's
    anchors are centred on its corner at (column * stride, row * stride), without an offset of half a stride.
    """
    levels = []
    for (rows, columns), size in zip(grids, sizes, strict=True):
        y = torch.arange(rows, dtype=torch.float32) * (image_size[0] // rows)
        x = torch.arange(columns, dtype=torch.float32) * (image_size[1] // columns)
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
        levels.append((shifts + cell_anchors(size, ratios)).reshape(-1, 4))
    return torch.cat(levels)
