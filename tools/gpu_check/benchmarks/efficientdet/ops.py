"""EfficientDet's ops for the part `ops`, at the sizes of D0: 49,104 anchors, 90 classes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.gpu_check.cases import Case, close, fresh, megabytes, work_dtype
from tools.gpu_check.state import Context

PLACES, CLASSES = 100, 90
"""Boxes of an image with padding; COCO's ids."""


def size_of(context: Context) -> tuple[int, int]:
    return (512, 512) if context.gpu and not context.quick else (128, 128)


def truth(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, boxes and labels of a batch with 1 to 14 boxes an image."""
    from efficientdet.anchors import anchors

    n, device, size = context.sizes.batch, context.device, size_of(context)
    low = torch.rand(n, PLACES, 2, device=device) * size[0] * 0.7
    boxes = torch.cat((low, low + size[0] * (0.02 + 0.28 * torch.rand(n, PLACES, 2, device=device))), 2)
    labels = torch.randint(CLASSES, (n, PLACES), device=device)
    used = torch.arange(PLACES, device=device) < torch.randint(1, 15, (n, 1), device=device)
    return anchors(size, 5, 4.0).to(device), boxes, labels.where(used, -1)


def outputs(context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas of the levels in the precision of training."""
    counts = [9 * (side // 2**level) ** 2 for level in range(3, 8) for side in size_of(context)[:1]]

    def levels(values: int, mean: float) -> list[Tensor]:
        shapes = [(context.sizes.batch, count, values) for count in counts]
        return [(torch.randn(shape, device=context.device) + mean).to(work_dtype(context)) for shape in shapes]

    return levels(CLASSES, -4.6), levels(4, 0.0)


def node_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The pyramid's node at P4 on the way up: two maps of its size and a finer one."""
    from efficientdet.ops.fuse import fuse

    side, steps = size_of(context)[0] // 16, (0, 0, -1)
    shapes = [(context.sizes.batch, 64, side * (1 + (step < 0)), side * (1 + (step < 0))) for step in steps]

    def case(backward: bool) -> Case:
        maps, weights = [fresh(shape, context) for shape in shapes], torch.rand(3, device=context.device)
        grad, read = fresh(shapes[0], context), megabytes(*maps)
        given = [t.requires_grad_(backward) for t in (weights, *maps)]

        def run() -> Any:
            out = fuse(maps, steps, weights, True, "silu")
            return (out, *torch.autograd.grad(out, given, grad)) if backward else out

        # The maps are read in each direction, the backward pass reads a gradient and writes those of the maps.
        moved = read + megabytes(grad) + (2 * read + megabytes(grad) if backward else 0)
        return Case("efficientdet", lambda: run, moved, tolerance=close(grad.dtype))

    yield "efficientdet node fwd", lambda: case(False)
    yield "efficientdet node fwd+bwd", lambda: case(True)


def norm_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Normalisation and SiLU of the backbone's widest map."""
    from detcore.ops.norm_act import norm_act

    side, channels = size_of(context)[0] // 2, 96

    def case(backward: bool) -> Case:
        x, grad = (fresh((context.sizes.batch, channels, side, side), context) for _ in range(2))
        weight, bias = torch.rand(2, channels, device=context.device) + 0.5
        given = [t.detach().requires_grad_(backward) for t in (x, weight, bias)]

        def run() -> Any:
            out = norm_act(*given, None, None, 0.01, 1e-3, "silu")
            return (out, *torch.autograd.grad(out, given, grad)) if backward else out

        # Read twice and written once; the backward pass reads x and the gradient twice.
        return Case("detcore", lambda: run, (8 if backward else 3) * megabytes(x), tolerance=close(x.dtype))

    yield "efficientdet norm+SiLU fwd", lambda: case(False)
    yield "efficientdet norm+SiLU fwd+bwd", lambda: case(True)


def efficientdet_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.nn.norm_folding import folded_norms, norm_pairs
    from detcore.ops.match import match
    from efficientdet.loss import MATCH, losses
    from efficientdet.model import EfficientDet
    from efficientdet.ops.wanted_deltas import wanted_deltas
    from efficientdet.postprocess import postprocess

    def match_case() -> Case:
        grid, boxes, labels = truth(context)
        moved = megabytes(grid, boxes, labels) + len(labels) * len(grid) * 8 / 1e6
        return Case("detcore", lambda: lambda: match(grid, boxes, labels, **MATCH), moved, tolerance=1e-3)

    def deltas_case() -> Case:
        grid, boxes, labels = truth(context)
        matched = match(grid, boxes, labels, **MATCH)
        moved = megabytes(matched) + matched.numel() * 16 / 1e6
        return Case("efficientdet", lambda: lambda: wanted_deltas(grid, boxes, matched), moved, tolerance=1e-5)

    def loss_case() -> Case:
        grid, boxes, labels = truth(context)
        logits, deltas = ([t.requires_grad_() for t in levels] for levels in outputs(context))

        def run() -> Any:
            return torch.autograd.grad(sum(losses((logits, deltas), grid, boxes, labels).values()), logits + deltas)

        # The outputs must be read and their gradients written, once each.
        return Case("detcore", lambda: run, 2 * megabytes(*logits, *deltas), tolerance=close(logits[0].dtype))

    def postprocess_case() -> Case:
        grid, _, _ = truth(context)
        logits, deltas = outputs(context)
        extent = torch.tensor([size_of(context)] * context.sizes.batch, device=context.device)
        # Scores alone: where two are equal but for their rounding, their boxes may change places.
        return Case(
            "detcore", lambda: lambda: postprocess(logits, deltas, grid, extent)[1], megabytes(*logits, *deltas),
            tolerance=2e-3,
        )  # fmt: skip

    def fold_case() -> Case:
        model = EfficientDet(image_size=(128, 128)).to(context.device).eval()
        pairs = norm_pairs(model)

        def run() -> list[Tensor]:
            with torch.no_grad(), folded_norms(pairs, work_dtype(context)):
                return [part for _, norm in pairs for part in norm.folded]

        values = sum(conv.weight.numel() + 5 * conv.out_channels for conv, _ in pairs)
        return Case("detcore", lambda: run, values * (4 + work_dtype(context).itemsize) / 1e6, tolerance=1e-6)

    yield "efficientdet match", match_case
    yield "efficientdet deltas", deltas_case
    yield from node_cases(context)
    yield from norm_cases(context)
    yield "efficientdet losses fwd+bwd", loss_case
    yield "efficientdet postprocess", postprocess_case
    yield "efficientdet norms folded", fold_case


GROUPS = (efficientdet_cases,)
