"""The cases of the part `ops` of tools/gpu_check.py for the ops that only variants of `detcore.device.native` use."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_check_core import Context
from gpu_check_ops import Case, close, fresh, gradient_case, matched_truth, megabytes, outputs, truth, work_dtype


def variant_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    """stem: normalize to 4 channels, pool_bias_relu. conv_epilogues and residual_gradient: the masks of bias_relu.
    multi_cast: fold. class_bias: focal and candidates with a bias."""
    yield "normalize to 4 channels", lambda: normalized(context)
    yield "pool_bias_relu", lambda: pooled(context)
    yield "bias_relu bwd, mask from output", lambda: masked(context, 1, from_output=True)
    yield "bias_relu bwd, two gradients", lambda: masked(context, 2, from_output=False)
    yield "fold of 16 weights", lambda: folded(context)
    yield "focal+bias fwd+bwd, level P3", lambda: biased_focal(context)
    yield "candidates+bias", lambda: biased_candidates(context)


def normalized(context: Context) -> Case:
    from detcore.ops.normalize import normalize

    s, dtype = context.sizes, work_dtype(context)
    shape = (s.batch, s.image, s.image, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=context.device).permute(0, 3, 1, 2)
    scale, shift = torch.rand(2, 3, device=context.device).unbind()
    moved = images.numel() * (1 + dtype.itemsize * 4 / 3) / 1e6
    return Case(
        "detcore", lambda: lambda: normalize(images, scale, shift, dtype, None, 4), moved, tolerance=close(dtype)
    )


def pooled(context: Context) -> Case:
    from detcore.ops.pool_bias_relu import pool_bias_relu

    side = -(-context.sizes.image // 2)
    x, bias = fresh((context.sizes.batch, 64, side, side), context), torch.randn(64, device=context.device)
    return Case("detcore", lambda: lambda: pool_bias_relu(x, bias), 1.25 * megabytes(x), tolerance=close(x.dtype))


def masked(context: Context, gradients: int, from_output: bool) -> Case:
    """The gradient of a ReLU's input from those of its uses; from_output: by the output's sign, with the bias's."""
    from detcore.ops.bias_relu import bias_relu_apart
    from detcore.ops.conv import masked_sum

    s = context.sizes
    shape = (s.batch, s.channels, -(-s.image // 8), -(-s.image // 8))
    x, grads = fresh(shape, context), [fresh(shape, context) for _ in range(gradients)]
    moved = (gradients + 1) * megabytes(x)
    if from_output:
        out = torch.relu(x)
        return Case(
            "detcore", lambda: lambda: masked_sum(out, True, grads), moved + megabytes(x), tolerance=close(x.dtype)
        )

    def make() -> Callable[[], Any]:
        wide, bias = x.detach().requires_grad_(), torch.zeros(shape[1], device=x.device)
        uses = bias_relu_apart(wide, bias)[:gradients]
        return lambda: torch.autograd.grad(uses, wide, grads, retain_graph=True)

    return Case("detcore", make, moved + x.numel() / 8e6, tolerance=close(x.dtype))


def folded(context: Context) -> Case:
    from detcore.ops.fold import fold

    width = 4 * context.sizes.channels
    weights = [torch.randn(width, width // 4, 1, 1, device=context.device) for _ in range(16)]
    scales = [torch.rand(width, device=context.device) for _ in weights]
    dtype = work_dtype(context)
    moved = sum(weight.numel() for weight in weights) * (4 + dtype.itemsize) / 1e6
    return Case("detcore", lambda: lambda: fold(weights, scales, dtype), moved)


def class_bias(context: Context) -> torch.Tensor:
    return torch.randn(9 * context.sizes.classes, device=context.device) * 0.1


def biased_focal(context: Context) -> Case:
    from single_stage_detector.ops.focal import focal_loss

    logits, _, _, _, labels, matched, weight = matched_truth(context)
    bias = class_bias(context).requires_grad_()
    return gradient_case(logits, lambda x: focal_loss(x, matched, labels, weight, 0, bias), bias)


def biased_candidates(context: Context) -> Case:
    from single_stage_detector.ops.candidates import candidates

    logits, deltas = outputs(context, truth(context)[3])
    bias = class_bias(context)

    @torch.no_grad()
    def run() -> tuple[torch.Tensor, ...]:
        return candidates(logits, deltas, 0.05, 1000, bias)

    return Case("single_stage_detector", lambda: run, megabytes(*logits), tolerance=1e-5)
