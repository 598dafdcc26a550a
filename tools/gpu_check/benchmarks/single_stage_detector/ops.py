"""RetinaNet's ops for the part `ops`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from detcore.data.synthetic import synthetic_batches
from detcore.device import native
from tools.gpu_check.cases import Case, close, gradient_case, megabytes, work_dtype
from tools.gpu_check.state import Context


def truth(context: Context) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """anchors [A, 4], boxes [N, M, 4], labels [N, M], anchors a level, of a synthetic batch."""
    from single_stage_detector.anchors import anchors, grids

    s = context.sizes
    size = (s.image, s.image)
    batch = next(synthetic_batches(s.classes, size, s.batch, 32, seed=1))
    lengths = [rows * columns * 9 for rows, columns in grids(size)]
    place = anchors(size, grids(size)).to(context.device)
    return place, batch.boxes.to(context.device), batch.labels.to(context.device), lengths


def match_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.ops.match import match
    from single_stage_detector.loss import MATCH

    def case() -> Case:
        place, boxes, labels, _ = truth(context)
        pairs = int((labels >= 0).sum()) * len(place)
        moved = megabytes(place, boxes, labels) + labels.shape[0] * len(place) * 8 / 1e6
        return Case("detcore", lambda: lambda: match(place, boxes, labels, **MATCH), moved, gflop=14 * pairs / 1e9)

    yield "match", case


def outputs(context: Context, lengths: list[int], spread: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas of every level, as views of the convolutions' outputs, like the network's."""
    n, k, dtype = context.sizes.batch, context.sizes.classes, work_dtype(context)

    def level(length: int, width: int, mean: float) -> Tensor:
        return torch.randn(n, length, width, device=context.device).mul_(spread).add_(mean).to(dtype)

    return [level(a, k, -4.6) for a in lengths], [level(a, 4, 0.0) for a in lengths]


def matched_truth(context: Context) -> tuple[Tensor, ...]:
    """logits [N, A, K] and deltas [N, A, 4] of the first level, anchors, boxes, labels, matched, weight [N]."""
    from detcore.ops.match import match
    from single_stage_detector.loss import MATCH

    place, boxes, labels, lengths = truth(context)
    logits, deltas = outputs(context, lengths[:1])
    with native.using("reference"):
        matched = match(place, boxes, labels, **MATCH)
    weight = 1 / (matched >= 0).sum(1).clamp(min=1) / len(labels)
    return logits[0], deltas[0], place, boxes, labels, matched, weight


def focal_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.ops.focal import focal_loss
    from single_stage_detector.loss import FOCAL

    def case() -> Case:
        logits, _, _, _, labels, matched, weight = matched_truth(context)
        return gradient_case("detcore", logits, lambda x: focal_loss(x, matched, labels, weight, **FOCAL))

    yield "focal fwd+bwd, level P3", case


def box_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.ops.box import box_loss

    def case() -> Case:
        _, deltas, place, boxes, labels, matched, weight = matched_truth(context)
        return gradient_case(PROGRAM, deltas, lambda x: box_loss(x, place, boxes, matched, labels, weight))

    yield "box fwd+bwd, level P3", case


def candidate_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.ops.candidates import candidates

    def case() -> Case:
        logits, deltas = outputs(context, truth(context)[3])

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            return candidates(logits, deltas, 0.05, 1000)

        return Case(PROGRAM, lambda: run, megabytes(*logits), tolerance=1e-5)

    yield "candidates", case


def loss_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.loss import losses

    def case(backward: bool) -> Case:
        place, boxes, labels, lengths = truth(context)
        logits, deltas = outputs(context, lengths)
        wide = [t.requires_grad_() for t in (*logits, *deltas)] if backward else []
        size = megabytes(*logits, *deltas)

        def forward() -> dict[str, Tensor]:
            return losses((logits, deltas), place, boxes, labels)

        if not backward:
            return Case(PROGRAM, lambda: forward, size, tolerance=1e-3)

        def make() -> Callable[[], Any]:
            return lambda: torch.autograd.grad(sum(forward().values()), wide)

        # The logits must be read and their gradient written, once each.
        return Case(PROGRAM, make, 2 * size, tolerance=close(logits[0].dtype))

    yield "losses fwd (match, focal, box)", lambda: case(False)
    yield "losses fwd+bwd", lambda: case(True)


def postprocess_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.postprocess import postprocess

    def case(spread: float) -> Case:
        place, _, _, lengths = truth(context)
        logits, deltas = outputs(context, lengths, spread)
        size = (context.sizes.image, context.sizes.image)

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor, Tensor]:
            return postprocess(logits, deltas, place, size)

        return Case(PROGRAM, lambda: run, megabytes(*logits), tolerance=2e-3)

    yield "postprocess, few candidates", lambda: case(0.4)
    yield "postprocess, many candidates", lambda: case(1.5)


def class_bias(context: Context) -> Tensor:
    return torch.randn(9 * context.sizes.classes, device=context.device) * 0.1


def biased_focal(context: Context) -> Case:
    from detcore.ops.focal import focal_loss
    from single_stage_detector.loss import FOCAL

    logits, _, _, _, labels, matched, weight = matched_truth(context)
    bias = class_bias(context).requires_grad_()
    return gradient_case("detcore", logits, lambda x: focal_loss(x, matched, labels, weight, 0, bias, **FOCAL), bias)


def biased_candidates(context: Context) -> Case:
    from single_stage_detector.ops.candidates import candidates

    logits, deltas = outputs(context, truth(context)[3])
    bias = class_bias(context)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        return candidates(logits, deltas, 0.05, 1000, bias)

    return Case(PROGRAM, lambda: run, megabytes(*logits), tolerance=1e-5)


def variant_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What only the variant class_bias uses."""
    yield "focal+bias fwd+bwd, level P3", lambda: biased_focal(context)
    yield "candidates+bias", lambda: biased_candidates(context)


PROGRAM = "single_stage_detector"
GROUPS = (match_cases, focal_cases, box_cases, loss_cases, candidate_cases, postprocess_cases, variant_cases)
