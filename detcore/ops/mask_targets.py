"""What a mask head learns: the mask of each region's box, cropped to the region and scaled to a square of pixels."""

import torch
from torch import Tensor

from detcore import ops
from detcore.device import native

OP = "detcore::mask_targets"

_FINE, _MIDDLE, _FARTHEST = 5, 2, 2**29  # as csrc/mask_targets.h has them


def mask_targets_reference(edges: Tensor, edge_of: Tensor, regions: Tensor, box_of: Tensor, resolution: int) -> Tensor:
    """`mask_targets` in plain PyTorch: the edges of a region's box at every column of pixels, a few regions at a time.

    No shape depends on a value but on a CPU.
    """
    device, (images, count), most = edges.device, box_of.shape, edges.shape[1]
    own = (edge_of[:, None, :, 0] == box_of[:, :, None]) & (box_of >= 0)[:, :, None]  # [N, S, E]
    if not own.numel():
        return torch.zeros(images, count, resolution, resolution, dtype=torch.bool, device=device)
    number, first = own.sum(2).flatten(), own.int().argmax(2).flatten()  # a box's edges are neighbours
    # Reading a value costs nothing on a CPU, and few boxes have as many edges as an image has room for.
    slots = int(number.max()) if device.type == "cpu" else most
    slots += slots % 2
    place, image = torch.arange(slots, device=device), torch.arange(images, device=device).repeat_interleave(count)
    chunk = max(1, ops.work_elements(device) // max(1, slots * resolution))
    covered = []
    for part in torch.arange(images * count, device=device).split(chunk):
        at = image[part, None] * most + (first[part, None] + place).clamp(max=most - 1)  # [k, L]
        lines, parts = edges.reshape(-1, 4)[at].float(), edge_of.reshape(-1, 2)[at][..., 1]
        used, window = place < number[part, None], regions.reshape(-1, 4)[part].float()
        covered.append(_covered(lines, parts, used, window, resolution))
    return torch.cat(covered).unflatten(0, (images, count))


def _covered(edges: Tensor, parts: Tensor, used: Tensor, window: Tensor, resolution: int) -> Tensor:
    """bool [k, R, R]. edges: float32 [k, L, 4], L even; parts: int64 [k, L], what each belongs to, if it is used: bool
    [k, L]; window: float32 [k, 4]."""
    ratio = resolution / (window[:, 2:] - window[:, :2]).clamp(min=1)
    moved = (edges.unflatten(2, (2, 2)) - window[:, None, None, :2]) * ratio[:, None, None]
    step = _FINE * moved.double() + 0.5
    nodes = torch.where(step > -_FARTHEST, step, -_FARTHEST).clamp(max=_FARTHEST).long()  # cut towards zero
    middles = _FINE * torch.arange(resolution, device=edges.device) + _MIDDLE
    low, high = nodes[..., 0].aminmax(dim=2)
    passes = used[..., None] & (low[..., None] <= middles) & (high[..., None] > middles)  # [k, L, R]
    rows = _rows_below(nodes[:, :, :, None], middles, resolution)
    # A closed part passes a column an even number of times. In order of parts and rows, the pixels between the first
    # pass and the second are inside, those between the third and the fourth, ...; what is no pass comes last.
    last = (resolution + 1) * 2**40 + resolution
    order = torch.where(passes, parts[..., None] * (resolution + 1) + rows, last).sort(1).values
    rows = order % (resolution + 1)
    sign = 1 - 2 * (torch.arange(rows.shape[1], device=rows.device, dtype=torch.int32) % 2)
    change = sign.new_zeros(len(rows), resolution + 1, resolution)
    change.scatter_add_(1, rows, sign[:, None].expand_as(rows))
    return change.cumsum(1)[:, :resolution] > 0


def _rows_below(nodes: Tensor, middle: Tensor, rows: int) -> Tensor:
    """int64 [k, L, R]: the first row below each pass; any where there is none.

    nodes: int64 [k, L, 2, 1, 2], an edge's ends (x, y) on the fine grid; middle: int64 [R].
    """
    first, last = nodes.unbind(2)
    dx, dy = (last - first).abs().unbind(-1)  # [k, L, 1]
    flat = dx >= dy
    turned = torch.where(flat, first[..., 0] > last[..., 0], first[..., 1] > last[..., 1])[..., None]
    first, last = torch.where(turned, last, first), torch.where(turned, first, last)
    (x1, y1), (x2, y2) = first.unbind(-1), last.unbind(-1)
    slope = (y2 - y1).double() / dx.clamp(min=1)
    step = middle - x1
    beside = [(y1 + slope * at + 0.5).long() for at in (step, step + 1)]
    slope = (x2 - x1).double() / dy.clamp(min=1)

    def passed(step: Tensor) -> Tensor:
        return ((x1 + slope * step + 0.5).long() > middle) == (x2 > x1)

    step = ((middle + 0.5 - x1) / torch.where(flat | (dx == 0), 1, slope)).long().clamp(min=1).minimum(dy)
    for _ in range(2):  # the division is right but for rounding
        step = torch.where((step > 1) & passed(step - 1), step - 1, step)
        step = torch.where((step < dy) & ~passed(step), step + 1, step)
    y = torch.where(flat, torch.minimum(*beside), y1 + step - 1)
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
