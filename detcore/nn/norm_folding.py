"""Batch normalisation in evaluation as a part of the convolution before it: one pass over the map less for each.

The weights are folded anew in each forward pass, a few kernels for all of them together, so that nothing can be out of
date: neither the average that is evaluated, nor what a recorded pass reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.activation import ACTIVATIONS
from detcore.ops.fold import fold
from detcore.ops.norm_act import norm_act

Pairs = Sequence[tuple[nn.Conv2d, nn.modules.batchnorm._BatchNorm]]


def normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); inside of `folded_norms` as one convolution."""
    both = norm.__dict__.get("folded")
    if both is None:
        return norm(conv(x))
    padded = conv.pad(x) if hasattr(conv, "pad") else x
    return F.conv2d(padded, *both, conv.stride, conv.padding, conv.dilation, conv.groups)


def normed_act(conv: nn.Conv2d, norm: nn.Module, x: Tensor, activation: str) -> Tensor:
    """The activation, one of `detcore.ops.activation.ACTIVATIONS`, of `normed`; in training one op as a variant."""
    if not _in_one_op(norm):
        return ACTIVATIONS[activation](normed(conv, norm, x), inplace=True)
    norm.num_batches_tracked.add_(1)
    running = norm.running_mean, norm.running_var, norm.momentum
    return norm_act(conv(x), norm.weight, norm.bias, *running, norm.eps, activation)


def _in_one_op(norm: nn.Module) -> bool:
    """Whether the variant is on, and a norm only does what `norm_act` does: not over processes, nor with hooks."""
    if not native.variant("norm_activations") or type(norm) is not nn.BatchNorm2d or not norm.training:
        return False
    hooked = norm._forward_pre_hooks or norm._forward_hooks
    return not hooked and norm.affine and norm.track_running_stats and norm.momentum is not None


def norm_pairs(model: nn.Module) -> Pairs:
    """The convolutions and their norms, of all parts of a model that list theirs in a method `norm_pairs`.

    A convolution may have several norms; a norm belongs to one convolution.
    """
    return [pair for part in model.modules() if hasattr(part, "norm_pairs") for pair in part.norm_pairs()]


@contextmanager
@torch.no_grad()
def folded_norms(pairs: Pairs, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `normed` computes each pair as one convolution, with weights of dtype. For evaluation, without gradients.

    Equal to the two one after the other but for rounding.
    """
    convs, norms = [conv for conv, _ in pairs], [norm for _, norm in pairs]
    scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [norm.weight for norm in norms])
    means = [
        norm.running_mean if conv.bias is None else norm.running_mean - conv.bias for conv, norm in pairs
    ]  # fmt: skip
    shifts = torch._foreach_sub([norm.bias for norm in norms], torch._foreach_mul(means, scales))
    weights = fold([conv.weight for conv in convs], scales, dtype)
    shifts = shifts if shifts[0].dtype == dtype else fold(shifts, (), dtype)
    for norm, both in zip(norms, zip(weights, shifts, strict=True), strict=True):
        norm.__dict__["folded"] = both
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["folded"]
