"""SSD300's ops for the part `ops`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.gpu_check.cases import Case, close, megabytes, work_dtype
from tools.gpu_check.state import Context

PLACES = 100
"""Boxes of an image with padding."""


def truth(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Priors, boxes and labels of a batch with 1 to 14 boxes an image."""
    from ssd300.anchors import priors

    n, device = context.sizes.batch, context.device
    low, size = torch.rand(n, PLACES, 2, device=device) * 200, 10 + 90 * torch.rand(n, PLACES, 2, device=device)
    labels = torch.randint(80, (n, PLACES), device=device)
    used = torch.arange(PLACES, device=device) < torch.randint(1, 15, (n, 1), device=device)
    return priors().to(device), torch.cat((low, low + size), 2), labels.where(used, -1)


def outputs(context: Context, background: float) -> tuple[Tensor, Tensor]:
    """(deltas, logits) in the precision of training."""
    shape = context.sizes.batch, 8732
    logits = torch.randn(*shape, 81, device=context.device)
    logits[..., 0] += background
    deltas = torch.randn(*shape, 4, device=context.device)
    return deltas.to(work_dtype(context)), logits.to(work_dtype(context))


def ssd_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from ssd300.loss import losses, match
    from ssd300.postprocess import postprocess

    def match_case() -> Case:
        place, boxes, labels = truth(context)
        moved = megabytes(place, boxes, labels) + len(labels) * len(place) * 8 / 1e6
        # On a GPU torch divides by 300 as it multiplies by 1 / 300: now and then the reference rounds otherwise.
        return Case("ssd300", lambda: lambda: match(place, boxes, labels), moved, tolerance=1e-3)

    def loss_case() -> Case:
        place, boxes, labels = truth(context)
        made = [t.requires_grad_() for t in outputs(context, 3)]

        def make() -> Callable[[], Any]:
            return lambda: torch.autograd.grad(sum(losses(made, place, boxes, labels).values()), made)

        # The logits must be read and their gradient written, once each.
        return Case("ssd300", make, 2 * megabytes(*made), tolerance=close(made[1].dtype))

    def postprocess_case(background: float) -> Case:
        place, _, _ = truth(context)
        made = outputs(context, background)
        # Scores alone: where two are equal but for their rounding, their boxes may change places.
        return Case("ssd300", lambda: lambda: postprocess(made, place)[1], megabytes(made[1]), tolerance=2e-3)

    yield "ssd300 match", match_case
    yield "ssd300 losses fwd+bwd", loss_case
    yield "ssd300 postprocess, few", lambda: postprocess_case(8)
    if context.gpu:  # the reference takes seconds on a CPU
        yield "ssd300 postprocess, many", lambda: postprocess_case(3)


GROUPS = (ssd_cases,)
