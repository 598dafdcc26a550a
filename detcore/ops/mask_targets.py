"""What a mask head learns: the mask of each region's box, cropped to the region and scaled to a square of pixels."""

import torch
from torch import Tensor

from detcore.device import native

OP = "detcore::mask_targets"

_FINE, _MIDDLE, _FARTHEST = 5, 2, 2**29  # as csrc/mask_targets.h has them


def mask_targets_reference(edges: Tensor, edge_of: Tensor, regions: Tensor, box_of: Tensor, resolution: int) -> Tensor:
    """`mask_targets` in plain PyTorch: a list of all passes of edges through the middles of pixel columns."""
    device, (images, count) = edges.device, box_of.shape
    own = (edge_of[:, None, :, 0] == box_of[:, :, None]) & (box_of[:, :, None] >= 0)
    image, region, edge = own.nonzero().unbind(1)
    window = regions[image, region].float()
    ratio = resolution / (window[:, 2:] - window[:, :2]).clamp(min=1)
    moved = (edges[image, edge].float().unflatten(1, (2, 2)) - window[:, None, :2]) * ratio[:, None]
    step = _FINE * moved.double() + 0.5
    nodes = torch.where(step > -_FARTHEST, step, -_FARTHEST).clamp(max=_FARTHEST).long()  # cut towards zero
    middles = _FINE * torch.arange(resolution, device=device) + _MIDDLE
    low, high = nodes[:, :, 0].aminmax(dim=1)
    line, column = ((low[:, None] <= middles) & (high[:, None] > middles)).nonzero().unbind(1)
    rows = _rows_below(nodes[line], middles[column], resolution)
    numbers = torch.stack([image * count + region, edge_of[image, edge, 1]], 1)
    parts, part = numbers.unique(dim=0, return_inverse=True)
    toggles = torch.zeros(len(parts), resolution, resolution + 1, dtype=torch.int32, device=device)
    toggles.index_put_((part[line], column, rows), toggles.new_ones(()), accumulate=True)
    inside = toggles.cumsum(2)[..., :-1] % 2
    covered = torch.zeros(images * count, resolution, resolution, dtype=inside.dtype, device=device)
    covered.index_add_(0, parts[:, 0], inside)
    return (covered > 0).transpose(1, 2).reshape(images, count, resolution, resolution)


def _rows_below(nodes: Tensor, middle: Tensor, rows: int) -> Tensor:
    """int64 [p]: the first row below each pass. nodes: int64 [p, 2, 2], an edge's ends (x, y) on the fine grid."""
    first, last = nodes.unbind(1)
    dx, dy = (last - first).abs().unbind(1)
    flat = dx >= dy
    turned = torch.where(flat, first[:, 0] > last[:, 0], first[:, 1] > last[:, 1])[:, None]
    first, last = torch.where(turned, last, first), torch.where(turned, first, last)
    (x1, y1), (x2, y2) = first.unbind(1), last.unbind(1)
    slope = (y2 - y1).double() / dx.clamp(min=1)
    step = middle - x1
    beside = torch.stack([(y1 + slope * at + 0.5).long() for at in (step, step + 1)])
    slope = (x2 - x1).double() / dy.clamp(min=1)

    def passed(step: Tensor) -> Tensor:
        return ((x1 + slope * step + 0.5).long() > middle) == (x2 > x1)

    step = ((middle + 0.5 - x1) / torch.where(flat, 1, slope)).long().clamp(min=1).minimum(dy)
    for _ in range(2):  # the division is right but for rounding
        step = torch.where((step > 1) & passed(step - 1), step - 1, step)
        step = torch.where((step < dy) & ~passed(step), step + 1, step)
    y = torch.where(flat, beside.amin(0), y1 + step - 1)
    return torch.div(y + _MIDDLE, _FINE, rounding_mode="trunc").clamp(0, rows)


@torch.no_grad()
def mask_targets(edges: Tensor, edge_of: Tensor, regions: Tensor, box_of: Tensor, resolution: int) -> Tensor:
    """The masks of regions: bool [N, S, resolution, resolution], row by row; all False where a region has no box.

    edges: float32 [N, E, 4] and edge_of: int64 [N, E, 2], as `Batch` has them, box after box and part after part.
    regions: float32 [N, S, 4], x1, y1, x2, y2 in pixels of the canvas. box_of: int64 [N, S], the box whose mask a
    region wants; negative for none. Any resolution, any number of edges, wherever they lie. No gradients.

    The parts are moved by the region's corner, scaled by resolution / (x2 - x1) and resolution / (y2 - y1) (of sides
    under one pixel, by resolution), in float32, and then rasterised as COCO does: the bits are those of pycocotools'
    frPyObjects, merge and decode. Source: crop, resize and convert of maskrcnn-benchmark's polygons, which do not add
    the pixel that its boxes count to x2 - x1: regions are the numbers that it has for a box.
    """
    if native.runs(OP, edges, edge_of, regions, box_of, dtypes=(torch.float32,)):
        given = (part.contiguous() for part in (edges, edge_of, regions, box_of))
        return torch.ops.detcore.mask_targets(*given, resolution)
    return mask_targets_reference(edges, edge_of, regions, box_of, resolution)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(edges: Tensor, edge_of: Tensor, regions: Tensor, box_of: Tensor, resolution: int) -> Tensor:
        return edges.new_empty((*box_of.shape, resolution, resolution), dtype=torch.bool)
