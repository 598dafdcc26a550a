"""Convolutions of modules, by faster ways that compute the same where VARIANTS of `detcore.device.native` ask for them.

merged_groups: a grouped convolution with groups narrower than the tiles of a tensor core, as one of wider groups whose
weight is zero between them. conv_epilogues, frozen_stage: bias, residual and ReLU inside cuDNN's own kernel.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.fold import autocast_dtype

BACKWARD = "detcore::bias_relu_backward"
MERGED = 64
"""Channels of a merged group."""


def conv2d(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of a module with another weight and bias."""
    groups = conv.groups
    if native.variant("merged_groups"):
        weight, groups = merged(narrow(weight, x), groups)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous: the layout in which the native ops take x."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def narrow(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor in the type in which autocast convolves x; as it is where autocast is off, and in float64."""
    mixed = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return tensor.to(autocast_dtype(x)) if mixed else tensor


def merged(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """Weight and number of groups of a convolution that computes the same by groups of 64 channels.

    weight: [C, c, kh, kw], c channels a group -> [C, 64, kh, kw] in channels_last, block-diagonal: between what were
    different groups it is 0, and no gradient comes from there. As they are: a single group, groups of 64 channels or
    more, and where 64 is no multiple of c, or whole groups do not fill 64.
    """
    width = weight.shape[1]
    together = MERGED // width
    if groups == 1 or together < 2 or MERGED % width or groups % together:
        return weight, groups
    # In the memory's order of channels_last, so that nothing is copied but into the zeros.
    blocks = weight.permute(0, 2, 3, 1).unflatten(0, (groups // together, together, -1))
    blocks = torch.diag_embed(blocks.movedim(1, -1), dim1=1, dim2=-2)  # [groups, from, C / groups, kh, kw, to, c]
    return blocks.flatten(5).flatten(0, 2).permute(0, 3, 1, 2), groups // together


_refused: set[tuple] = set()
"""Convolutions that cuDNN has no kernel for, as `_key` has them."""


def _key(x: Tensor, weight: Tensor, residual: Tensor | None, geometry: tuple) -> tuple:
    return x.dtype, x.shape, weight.shape, residual is None, geometry


def epilogue_exists(x: Tensor) -> bool:
    """Whether a convolution of x can take bias, residual and ReLU into its kernel; cuDNN may still refuse a shape.

    torch has cudnn_convolution_relu and _add_relu for GPUs alone; they compute float64 in float32, and let cuDNN choose
    kernels whose sums have no fixed order, so they are left where deterministic ones are asked for. On the CPU plain
    operations stand in, which test what surrounds them. torch.compile makes its own epilogues.
    """
    if torch.compiler.is_compiling():
        return False
    if x.device.type == "cpu":
        return True
    exact = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    there = torch.backends.cudnn.enabled and native.has("aten::cudnn_convolution_relu", x.device.type)
    return there and not exact and x.numel() > 0 and narrow(x[:0], x).dtype in native.FLOATING


def fused(
    x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor, residual: Tensor | None = None, apart: bool = False
) -> Tensor | tuple[Tensor, Tensor, Tensor] | None:
    """relu(conv(x) + bias (+ residual)) in one kernel of cuDNN; None where neither variant nor cuDNN has it.

    Sums are in float32 and rounded once, after a bias in x's type. The output's sign is the gradient's mask; x, weight
    and output are kept, where gradients flow. Whether cuDNN's ReLU keeps NaN is cuDNN's choice. apart: where gradients
    flow, the output three times, as from `bias_relu_apart`.
    """
    given = [t for t in (x, weight, bias, residual) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    wanted = native.variant("conv_epilogues") or (native.variant("frozen_stage") and not learns)
    if not (wanted and epilogue_exists(x)):
        return None
    x, weight, groups = narrow(x, x), narrow(weight, x), conv.groups
    residual = None if residual is None else narrow(residual, x)
    if residual is not None and residual.dtype != x.dtype:
        return None
    if native.variant("merged_groups"):
        weight, groups = merged(weight, groups)
    geometry = (*map(tuple, (conv.stride, conv.padding, conv.dilation)), groups)
    if (key := _key(x, weight, residual, geometry)) in _refused:
        return None
    try:
        if learns:
            return _ConvBiasReLU.apply(x, weight, bias, residual, geometry, apart)
        return _forward(x, weight, bias, residual, geometry)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        if x.device.type == "cpu":
            raise
        _refused.add(key)
        what = f"{list(x.shape)} with weight {list(weight.shape)}, {groups} groups, {x.dtype}"
        warnings.warn(f"cuDNN fuses no ReLU into the convolution of {what}: {error}", stacklevel=2)
        return None


def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, geometry: tuple) -> Tensor:
    bias = bias.to(x.dtype)
    if x.device.type == "cpu":
        out = F.conv2d(x, weight, bias, *geometry)
        return F.relu_(out if residual is None else out.add_(residual))
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


class _ConvBiasReLU(torch.autograd.Function):
    """`_forward` with gradients of all four tensors; those of the sum and of the residual share one."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, geometry: tuple, apart: bool
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        out = _forward(x, weight, bias, residual, geometry)
        ctx.geometry, ctx.bias_dtype = geometry, bias.dtype
        ctx.save_for_backward(x, weight, out)
        ctx.set_materialize_grads(False)  # a use may be without gradient, or there may be fewer
        return (out, out.detach(), out.detach()) if apart else out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arrived = [grad for grad in grads if grad is not None]
        if not arrived:
            return (None,) * 6
        x, weight, out = ctx.saved_tensors
        into_x, into_weight, into_bias, into_residual, *_ = ctx.needs_input_grad
        stride, padding, dilation, groups = ctx.geometry
        grad, dbias = masked_sum(out, into_bias, arrived)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (into_x, into_weight, False)
        )
        dbias = dbias.to(ctx.bias_dtype) if into_bias else None
        return dx, dweight, dbias, grad if into_residual else None, None, None


def masked_sum(out: Tensor, sums: bool, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The sum of the gradients where the output lets it pass, and its sums over the channels.

    Where the output is NaN they pass, where it is 0 they do not, as in bias_relu.
    """
    first, *more = (grad.contiguous(memory_format=layout_of(out)) for grad in grads)
    if native.runs(BACKWARD, out, first, *more):
        return torch.ops.detcore.bias_relu_backward(first, out, sums, *more)
    grad = torch.ops.aten.threshold_backward(sum(more, first), out, 0)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad, grad.sum((0, 2, 3), dtype=wide) if sums else None
