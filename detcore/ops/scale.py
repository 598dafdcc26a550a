"""The second half of a loss that computed its gradient in the forward pass: multiplying it by what comes from above.

A float16 gradient is kept times a constant, so that its small values are not lost. Where a GradScaler's factor is that
constant, nothing is left to multiply.
"""

import torch
from torch import Tensor

from detcore.device import native

OP = "detcore::scale_"


def scale_reference_(gradient: Tensor, upstream: Tensor, constant: float) -> None:
    """`scale_` in plain PyTorch."""
    gradient.mul_(upstream / constant)


def scale_(gradient: Tensor, upstream: Tensor, constant: float) -> None:
    """gradient *= upstream / constant, in place; the native op returns at once where that factor is exactly 1.

    gradient: contiguous, of any shape. upstream: float32 scalar on the same device, which the host never reads.
    """
    if native.runs(OP, gradient, upstream):
        torch.ops.detcore.scale_(gradient, upstream, constant)
    else:
        scale_reference_(gradient, upstream, constant)


def kept(ctx, *gradients: Tensor) -> None:
    """In the forward pass: keeps gradients for `take`, outputs of the op that have no gradient of their own."""
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.taken = set()


def take(ctx, upstream: Tensor | None, float16_constant: float, which: int = 0) -> Tensor | None:
    """In the backward pass: the kept gradient number `which` times upstream.

    Raises RuntimeError the second time, since the kept tensor was handed out and multiplied in place.
    """
    if upstream is None:
        return None
    if which in ctx.taken:
        raise RuntimeError(
            "a second backward pass through this loss: its gradient was computed in the forward pass and handed out by "
            "the first backward pass; run the forward pass again, or use --ops reference"
        )
    ctx.taken.add(which)
    gradient = ctx.saved_tensors[which]
    scale_(gradient, upstream, float16_constant if gradient.dtype == torch.float16 else 1.0)
    return gradient


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(gradient: Tensor, upstream: Tensor, constant: float) -> None:
        return None
