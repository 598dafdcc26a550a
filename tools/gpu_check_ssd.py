"""The part `ssd300` of tools/gpu_check.py, and the ops of SSD300 for the part `ops`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from gpu_check_core import Context, Job, Stopwatch
from gpu_check_infer import infer
from gpu_check_ops import Case, close, megabytes, work_dtype
from gpu_check_train import ALL_BUT_FP8, run_options, train_row
from torch import Tensor

GFLOP_PER_IMAGE = 120.9
"""Of a training step with ResNet-50 and 81 classes, by torch.utils.flop_counter (2 per multiplication and addition)."""

# Mode, ops, precision, batch as a multiple of the main one; the most telling ones first.
TRAINING = (
    ("graph", "native", "bf16", 1), ("eager", "native", "bf16", 1), ("eager", "reference", "bf16", 1),
    ("graph", "native", "fp16", 1), ("graph", "native", "tf32", 1), ("graph", "native", "bf16", 2),
    ("compiled+graph", "native", "bf16", 1),
)  # fmt: skip
INFERENCE = (("graph", "native", 1), ("eager", "native", 1), ("eager", "reference", 1), ("graph", "native", 1 / 4))


def ssd300(context: Context) -> Iterable[Job]:
    """images/s of training steps and of inference with post-processing, the batch being on the device.

    128 images with ResNet-50 on a GPU, as in the published figures. The weights are random: such a model finds more
    than a trained one, so the rate of inference is a cautious one.
    """
    from ssd300.config import Config

    watch = Stopwatch(context)
    main = context.sizes.batch * 4 if context.gpu else context.sizes.batch
    backbone = "resnet50" if context.gpu else "resnet18"
    training, inference = TRAINING[: 3 if context.quick else None], INFERENCE[: 3 if context.quick else None]
    if not context.gpu:
        training = tuple(("eager", ops, "fp32", 1) for ops in ("native", "reference"))
        inference = tuple(("eager", ops, 1) for ops in ("native", "reference"))
    for number, (mode, ops, precision, times) in enumerate(training):
        options = run_options(context, main * times, precision, mode, ops)
        key = f"training {precision} b{main * times} {mode} {ops}"
        chosen = Config(backbone=backbone, **options), mode, context, watch, GFLOP_PER_IMAGE
        yield key, lambda chosen=(*chosen, context.gpu and not number): train_row(*chosen)
        if not number:  # the backbone's variants, which it shares with RetinaNet
            varied = Config(backbone=backbone, **options, variants=ALL_BUT_FP8["variants"]), *chosen[1:]
            yield f"{key} {ALL_BUT_FP8['what']}", lambda varied=varied: train_row(*varied)
    for mode, ops, times in inference:
        precision, batch = "bf16" if context.gpu else "fp32", int(main * times)
        config = Config(backbone=backbone, **run_options(context, batch, precision, "eager", ops))
        yield (
            f"inference {precision} b{batch} {mode} {ops}",
            lambda a=(config, mode): infer(a[0], "forward+postprocess", a[1], context, watch),
        )


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
