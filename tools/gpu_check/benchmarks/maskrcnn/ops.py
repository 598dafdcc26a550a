"""Mask R-CNN's ops for the part `ops`, at the sizes of R-50-FPN: 512 regions an image, 128 of them with masks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.gpu_check.cases import Case, close, megabytes, work_dtype
from tools.gpu_check.state import Context

CHANNELS, SCALES, BINS, SAMPLES, MASK = 256, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 7, 2, 28


def size_of(context: Context) -> tuple[int, int]:
    return (800, 1088) if context.gpu and not context.quick else (64, 96)


def images_of(context: Context) -> int:
    return min(context.sizes.batch, 8)


def regions(context: Context, most: int) -> Tensor:
    """float32 [N, most, 4], of a pyramid's usual sizes."""
    height, width = size_of(context)
    least = torch.tensor([width, height], device=context.device)
    corners = torch.rand(images_of(context), most, 2, device=context.device) * 0.7 * least
    extent = 4 + torch.rand(images_of(context), most, 2, device=context.device) ** 2 * 0.3 * least
    return torch.cat((corners, corners + extent), 2)


def maskrcnn_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.data.synthetic import synthetic_batches
    from detcore.ops.mask_targets import mask_targets
    from detcore.ops.match import match
    from detcore.ops.roi_align import roi_align
    from maskrcnn.roi_heads import levels_of

    most = 512 if context.gpu and not context.quick else 16

    def roi_case() -> Case:
        sides = [[round(side * scale) for side in size_of(context)] for scale in SCALES]
        maps = [
            torch.randn(images_of(context), CHANNELS, *side, device=context.device, dtype=work_dtype(context))
            .to(memory_format=torch.channels_last)
            .requires_grad_()
            for side in sides
        ]
        boxes = regions(context, most)
        level = levels_of(boxes, 2, 5)

        def run() -> Any:
            return torch.autograd.grad(roi_align(maps, boxes, level, SCALES, BINS, SAMPLES).float().sum(), maps)

        # The maps must be read and their gradients written; regions have as many values as are read of them.
        moved = 2 * megabytes(*maps) + 2 * boxes.shape[0] * most * CHANNELS * BINS**2 * maps[0].element_size() / 1e6
        return Case("detcore", lambda: run, moved, tolerance=close(maps[0].dtype))

    def mask_case() -> Case:
        batch = next(synthetic_batches(80, size_of(context), images_of(context), 20, 1, 1024))
        edges, edge_of, boxes, labels = (
            part.to(context.device) for part in (batch.edges, batch.edge_of, batch.boxes, batch.labels)
        )
        places = torch.arange(most // 4, device=context.device) % boxes.shape[1]
        box_of = places.expand(len(boxes), -1).where(labels[:, places] >= 0, -1)
        where = boxes[:, places]
        moved = megabytes(edges, where) + len(boxes) * len(places) * MASK**2 / 1e6
        return Case("detcore", lambda: lambda: mask_targets(edges, edge_of, where, box_of, MASK), moved, tolerance=0.0)

    def match_case() -> Case:
        own, truth = regions(context, 4 * most), regions(context, 20)
        labels = torch.randint(80, truth.shape[:2], device=context.device)
        moved = megabytes(own, truth, labels) + own.shape[0] * own.shape[1] * 8 / 1e6
        return Case("detcore", lambda: lambda: match(own, truth, labels, 0.5, 0.5), moved, tolerance=1e-3)

    yield "maskrcnn roi_align fwd+bwd", roi_case
    yield "maskrcnn mask_targets", mask_case
    yield "maskrcnn match", match_case


GROUPS = (maskrcnn_cases,)
