"""A node of the feature pyramid in one pass: maps brought to its size, their weighted sum and the activation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.activation import ACTIVATIONS, index_of
from detcore.ops.conv import layout_of

OP = "efficientdet::fuse"
BACKWARD = "efficientdet::fuse_backward_"
MOST_MAPS = 3


def halve(x: Tensor, same: bool) -> Tensor:
    """Maximum of 3x3 cells at stride 2: [N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)].

    same: even sizes are padded at the end only, as TensorFlow pads.
    """
    padding = (x.shape[2] % 2, x.shape[3] % 2) if same else 1
    return F.max_pool2d(x, 3, 2, padding, ceil_mode=same)


def fuse_reference(
    maps: Sequence[Tensor], steps: Sequence[int], weights: Tensor | None, same: bool, activation: str = "none"
) -> Tensor:
    """`fuse` in plain PyTorch, each operation rounded to the maps' dtype, as the original computes it."""
    total = None
    for x, step, weight in zip(maps, steps, [None] * len(maps) if weights is None else weights.unbind(), strict=True):
        if step < 0:
            x = halve(x, same)
        if weight is not None:
            x = x * weight.to(x.dtype)  # while the map is small
        if step > 0:
            x = F.interpolate(x, size=maps[0].shape[2:], mode="nearest")
        total = x if total is None else total + x
    return ACTIVATIONS[activation](total)


def fuse(
    maps: Sequence[Tensor], steps: Sequence[int], weights: Tensor | None, same: bool, activation: str = "none"
) -> Tensor:
    """activation(sum of weights[m] * map m), of the first map's shape, dtype and layout.

    maps: up to three, float [N, C, H_m, W_m] of one dtype; fast in channels_last with C a multiple of 8. steps: for
    each, its level less the node's: 0, the node's size, which the first has; above 0, a coarser map, of which each
    place takes the nearest cell, as torch's `interpolate` does; below 0, a finer one of twice the size, `halve`d.
    weights: float32 [maps], or None for 1. same: see `halve`. activation: one of `ACTIVATIONS`.

    The native op computes in float32 and rounds once, so that narrower types have fewer roundings than the reference.
    Of float32 maps the sums, and without SiLU the output and the maps' gradients, are the reference's on a CPU in every
    bit. SiLU differs by some 1e-7, the weights' gradients by the order of their sums, which is always the same. For the
    backward pass nothing but the maps is kept. Float64, weights of another dtype than float32, and maps of different
    dtypes take the reference. No second derivatives from the native op.
    """
    if not _fits(maps, weights):
        return fuse_reference(maps, steps, weights, same, activation)
    layout = _layout(maps)
    how = [0 if step == 0 else 1 if step > 0 else 2 for step in steps]
    maps = [x.contiguous(memory_format=layout) for x in maps]
    return torch.ops.efficientdet.fuse(maps, weights, how, same, index_of(activation))


def _layout(maps: Sequence[Tensor]) -> torch.memory_format:
    last = any(layout_of(x) == torch.channels_last for x in maps)
    return torch.channels_last if last else torch.contiguous_format


def _fits(maps: Sequence[Tensor], weights: Tensor | None) -> bool:
    given = list(maps) if weights is None else [*maps, weights]
    alike = len({x.dtype for x in maps}) == 1 and (weights is None or weights.dtype == torch.float32)
    return alike and len(maps) <= MOST_MAPS and native.runs(OP, *given)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(maps: Sequence[Tensor], weights: Tensor | None, how: Sequence[int], same: bool, activation: int) -> Tensor:
        return torch.empty_like(maps[0])

    @torch.library.register_fake(BACKWARD)
    def _(
        grads: Sequence[Tensor],
        weight_grad: Tensor,
        grad: Tensor,
        maps: Sequence[Tensor],
        weights: Tensor | None,
        how: Sequence[int],
        same: bool,
        activation: int,
    ) -> None:
        return None

    def _setup(ctx, inputs: tuple, output: Tensor) -> None:
        maps, weights, *ctx.options = inputs
        ctx.layout = _layout(maps)
        ctx.save_for_backward(weights, *maps)

    def _backward(ctx, grad: Tensor) -> tuple[list[Tensor], Tensor | None, None, None, None]:
        weights, *maps = ctx.saved_tensors
        grads, learns = [torch.empty_like(x) for x in maps], ctx.needs_input_grad[1]
        weight_grad = grad.new_empty(len(maps) if learns else 0, dtype=torch.float32)
        grad = grad.contiguous(memory_format=ctx.layout)
        torch.ops.efficientdet.fuse_backward_(grads, weight_grad, grad, maps, weights, *ctx.options)
        return grads, weight_grad if learns else None, None, None, None

    torch.library.register_autograd(OP, _backward, setup_context=_setup)
