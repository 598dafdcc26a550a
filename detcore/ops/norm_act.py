"""Batch normalisation in training and the activation after it, as one op.

PyTorch writes the normalised map for the activation to read, keeps it beside the convolution's output for the
gradients, and passes over it twice more there.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.activation import ACTIVATIONS, index_of
from detcore.ops.conv import layout_of

OP = "detcore::norm_act"


def norm_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, variance: Tensor | None, momentum: float, eps: float,
    activation: str,
) -> Tensor:  # fmt: skip
    """`norm_act` in plain PyTorch."""
    out = F.batch_norm(x, mean, variance, weight, bias, True, momentum, eps)
    return ACTIVATIONS[activation](out, inplace=True)


def norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, variance: Tensor | None, momentum: float, eps: float,
    activation: str,
) -> Tensor:  # fmt: skip
    """activation(batch_norm(x)) by the batch's own statistics, of x's shape, dtype and layout.

    x: float [N, C, H, W], of more than one value a channel; fast in channels_last with C a multiple of 8. weight, bias:
    float32 [C]. mean, variance: float32 [C], the running statistics, or None for both; they move by `momentum` towards
    the batch's, the variance towards the unbiased one, as torch's do. activation: one of `ACTIVATIONS`.

    The native op computes in float32, with statistics merged from those of parts in a fixed order (of a channel of
    values that are far from 0 no digit is lost), and rounds once; the reference rounds before the activation too. For
    the gradients it keeps x and two values a channel. Float64 and parameters of other types than float32 take the
    reference. No second derivatives from the native op.

    Raises ValueError, as torch does, where a channel has one value.
    """
    given = [t for t in (x, weight, bias, mean, variance) if t is not None]
    narrow = all(t.dtype == torch.float32 for t in given[1:])
    if not (narrow and x.numel() > x.shape[1] and native.runs(OP, *given)):
        return norm_act_reference(x, weight, bias, mean, variance, momentum, eps, activation)
    x = x.contiguous(memory_format=layout_of(x))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given[:3]):
        return _NormAct.apply(x, weight, bias, mean, variance, momentum, eps, index_of(activation))
    return torch.ops.detcore.norm_act(x, weight, bias, mean, variance, momentum, eps, index_of(activation))[0]


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, variance: Tensor | None, momentum: float,
        eps: float, activation: int,
    ) -> Tensor:  # fmt: skip
        out, *kept = torch.ops.detcore.norm_act(x, weight, bias, mean, variance, momentum, eps, activation)
        ctx.save_for_backward(x, weight, bias, *kept)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous(memory_format=layout_of(x))
        grads = torch.ops.detcore.norm_act_backward(grad, x, weight, bias, mean, inverse, ctx.activation)
        return *grads, None, None, None, None, None


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, variance: Tensor | None, momentum: float,
        eps: float, activation: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    @torch.library.register_fake(f"{OP}_backward")
    def _(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, activation: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
