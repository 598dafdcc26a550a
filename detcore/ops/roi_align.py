"""Features of one size for regions of any size, sampled from the levels of a pyramid (Mask R-CNN, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detcore import ops
from detcore.device import native
from detcore.ops.conv import layout_of

OP = "detcore::roi_align"
BACKWARD = "detcore::roi_align_backward_"


def _taps(
    low: Tensor, high: Tensor, size: Tensor, resolution: int, samples: int, adaptive: bool, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Cells int64 and weights, both [K, 2, resolution, samples]: what each sample of each bin reads along one axis.

    low, high: ends of the regions in cells. size: int64 [K], cells of their maps. The weights of a bin sum to 1, less
    what lies outside.
    """
    shift = 0.5 if aligned else 0.0
    start, extent = low - shift, high - low
    extent = extent if aligned else extent.clamp(min=1)
    width = extent / resolution
    count = torch.ceil(width).clamp(min=0) if adaptive else torch.full_like(width, samples)
    bins, number = (torch.arange(n, dtype=low.dtype, device=low.device) for n in (resolution, samples))
    inner = (number + 0.5) * (width / count.clamp(min=1))[:, None]  # [K, samples]
    at = (start[:, None] + bins * width[:, None])[:, :, None] + inner[:, None]
    last = size.to(low.dtype)[:, None, None] - 1
    used = (at >= -1) & (at <= last + 1) & (number < count[:, None])[:, None]
    at = torch.minimum(at.clamp(min=0), last)
    first = at.detach().floor()
    far = at - first
    weights = torch.stack((1 - far, far), 1) * (used / count.clamp(min=1)[:, None, None])[:, None]
    cells = torch.stack((first, torch.minimum(first + 1, last)), 1)
    return cells.nan_to_num(0).long(), torch.where(used[:, None], weights, 0)


def _most_samples(features: Sequence[Tensor], corners: Tensor, resolution: int) -> int:
    """Of a bin along an axis, where each has as many as it has cells: on a CPU those of the largest region."""
    if corners.device.type == "cpu" and len(corners):  # reading a value costs nothing here
        largest = (corners[:, 2:] - corners[:, :2]).nan_to_num(0).max() / resolution
        return int(torch.ceil(largest.clamp(1, 1024)))
    return -(-max(max(x.shape[2:]) for x in features) // resolution)


def roi_align_reference(
    features: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor,
    scales: Sequence[float],
    resolution: int,
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> Tensor:
    """`roi_align` in plain PyTorch, for any floating dtype; of the regions a few at a time.

    With sampling_ratio 0 a region may be larger than its map on a CPU only.
    """
    images, count = level.shape
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    channels, device = features[0].shape[1], features[0].device
    rows, columns = ([x.shape[axis] for x in features] for axis in (2, 3))
    # All maps as one list of cells: a region's map is then only where its cells begin.
    cells = torch.cat([x.permute(0, 2, 3, 1).reshape(images, -1, channels) for x in features], 1).to(dtype)
    begins, of_image = [0], cells.shape[1]
    for height, width in zip(rows, columns, strict=True):
        begins.append(begins[-1] + height * width)

    def of_level(values: Sequence[float], kind: torch.dtype) -> Tensor:
        """The level's value for each region; nothing is copied from the host."""
        return sum((level == i).to(kind) * value for i, value in enumerate(values)).flatten()

    begins, rows, columns = (of_level(values, torch.int64) for values in (begins[:-1], rows, columns))
    factors = of_level(scales, dtype)
    image = torch.arange(images, device=device).repeat_interleave(count)
    cells, corners = cells.reshape(-1, channels), boxes.to(dtype).reshape(-1, 4) * factors[:, None]
    samples = sampling_ratio or _most_samples(features, corners, resolution)
    outs = []
    chunk = max(1, ops.work_elements(device) // max(1, (resolution * samples) ** 2 * channels))
    for part in torch.arange(len(image), device=device).split(chunk):
        given = resolution, samples, not sampling_ratio, aligned
        x, x_weight = _taps(corners[part, 0], corners[part, 2], columns[part], *given)
        y, y_weight = _taps(corners[part, 1], corners[part, 3], rows[part], *given)
        base = (image[part] * of_image + begins[part])[:, None, None]
        out = 0
        for i in range(2):
            for j in range(2):
                lines = (base + y[:, i] * columns[part, None, None])[:, :, :, None, None]
                values = cells[(lines + x[:, j, None, None]).clamp(0, max(len(cells) - 1, 0))]
                weight = y_weight[:, i, :, :, None, None] * x_weight[:, j, None, None]
                out = out + (values * weight[..., None]).sum((2, 4))
        outs.append(out)
    out = torch.cat(outs) if outs else cells.new_zeros(0, resolution, resolution, channels)
    out = out.masked_fill((level < 0).view(-1, 1, 1, 1), 0).to(features[0].dtype)
    return out.permute(0, 3, 1, 2).contiguous(memory_format=layout_of(features[0])).unflatten(0, (images, count))


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor,
    scales: Sequence[float],
    resolution: int,
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> Tensor:
    """Features [N, S, C, resolution, resolution] of regions, as torchvision.ops.roi_align has them of one map.

    features: the maps [N, C, H_l, W_l] of the levels, one dtype, all contiguous or all channels_last, which the output
    is too and which is faster. boxes: [N, S, 4], x1, y1, x2, y2 in pixels, without gradient; level: int64 [N, S], whose
    map to read, -1 for none: zeros. scales: cells per pixel of each map.
    Each bin is the mean of sampling_ratio x sampling_ratio values, interpolated between the centres of cells; 0: along
    each axis as many as the bin has cells, rounded up. aligned: a pixel's centre is half a pixel from its corner, and a
    region may be smaller than a cell; without it, as the original has it, neither. Arithmetic is float32, the sums of
    the backward pass are in the order of the regions. A float64 map takes the reference. No second derivatives from the
    native op.
    """
    if boxes.dtype == torch.float32 and native.runs(OP, *features, boxes, level):
        layout = layout_of(features[0])
        maps = [x.contiguous(memory_format=layout) for x in features]
        options = tuple(scales), resolution, sampling_ratio, aligned
        return _RoIAlign.apply(boxes.contiguous(), level.contiguous(), *options, *maps).unflatten(0, level.shape)
    return roi_align_reference(features, boxes, level, scales, resolution, sampling_ratio, aligned)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boxes: Tensor, level: Tensor, *given) -> Tensor:
        options, features = given[:4], given[4:]
        ctx.save_for_backward(boxes, level)
        ctx.options, ctx.layout = options, layout_of(features[0])
        ctx.features = [(x.shape, x.dtype) for x in features]
        return torch.ops.detcore.roi_align(features, boxes, level, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes, level = ctx.saved_tensors
        grads = [
            torch.empty(shape, dtype=dtype, device=grad.device, memory_format=ctx.layout)
            for shape, dtype in ctx.features
        ]
        grad = grad.contiguous(memory_format=ctx.layout)
        torch.ops.detcore.roi_align_backward_(grads, grad, boxes, level, *ctx.options)
        return None, None, None, None, None, None, *grads


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(
        features: Sequence[Tensor],
        boxes: Tensor,
        level: Tensor,
        scales: Sequence[float],
        resolution: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        first = features[0]
        shape = (level.numel(), first.shape[1], resolution, resolution)
        return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout_of(first))

    @torch.library.register_fake(BACKWARD)
    def _(
        grads: Sequence[Tensor],
        grad: Tensor,
        boxes: Tensor,
        level: Tensor,
        scales: Sequence[float],
        resolution: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        return None
