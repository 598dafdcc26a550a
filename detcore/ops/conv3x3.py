"""3x3 convolutions with stride 1 and padding 1 as one matrix product: in 8-bit floating point, or in 16 bits.

In 8 bits tensor cores compute twice as fast as in 16. Numbers forward have 3 bits of mantissa (float8_e4m3fn, up to
448), gradients 2 bits and a wider range (float8_e5m2, up to 57344): formats that MLPerf's rules allow. A tensor is
stored as x / scale, its scale a power of two, so that scaling rounds nothing, just large enough for the tensor's own
largest value, so that nothing overflows. That largest value costs one more pass over the tensor; the usual way out, the
largest value of steps before, would be state beside the weights, wrong in the first step, after a jump of the loss and
after a resumed checkpoint. Infinity or NaN anywhere makes the scale NaN and so all that is computed from it: the loss
shows it, as in 16 bits.

`conv3x3` multiplies 8-bit numbers forward and for the input gradient. The weight gradient stays what it is, the
library's in 16 bits: it sums over pixels, and of 8-bit numbers tensor cores want those of a sum side by side in memory;
to turn both tensors over, one of them three times for the three columns of taps, costs about what it wins. On the CPU
8 bits are emulated: the same numbers, but for the order of the sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore.ops.bias_relu import bias_relu

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {FORWARD: 8, BACKWARD: 15}
"""The exponent of each format's largest value."""
ALIGNMENT = 16
"""Channels of 8-bit tensors are a multiple of it, zeros at the end, so that kernels read 16 bytes at once."""


def padded(channels: int) -> int:
    """The number of channels of an 8-bit tensor."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


def quantise_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantise` in plain PyTorch."""
    largest = torch.linalg.vector_norm(x.float(), float("inf"))
    # In bits, exactly: its exponent, one more if its mantissa is over the 1.75 of both formats' largest values.
    exponent = (((largest.view(torch.int32) + 0x1FFFFF) >> 23) - TOP[dtype]).clamp(min=1)
    scale = torch.where(largest.isfinite(), (exponent << 23).view(torch.float32), torch.nan)
    narrow = (x.float() / scale).to(dtype).contiguous(memory_format=torch.channels_last)
    extra = padded(x.shape[1]) - x.shape[1]
    if extra:
        last = F.pad(narrow.permute(0, 2, 3, 1).contiguous().view(torch.uint8), (0, extra)).view(dtype)
        narrow = last.permute(0, 3, 1, 2)
    return narrow, scale.view(1)


@torch.library.custom_op("detcore_conv3x3::quantise", mutates_args=())
def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale rounded to dtype, to the nearest and ties to even; scale, float32 [1]). No gradients.

    x: float [N, C, H, W] with at least one value. dtype: FORWARD or BACKWARD. The result has `padded(C)` channels and
    is in channels_last. scale: the smallest power of two, from 2^-126 up, with which no value passes dtype's largest.
    """
    if x.device.type == "cpu":
        return quantise_reference(x, dtype)
    from detcore.ops import conv3x3_kernels

    return conv3x3_kernels.quantise(x, dtype, padded(x.shape[1]), TOP[dtype])


@quantise.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, channels, height, width = x.shape
    last = x.new_empty((n, height, width, padded(channels)), dtype=dtype)
    return last.permute(0, 3, 1, 2), x.new_empty((1,), dtype=torch.float32)


def convolve_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, relu: bool, dtype: torch.dtype
) -> Tensor:
    """`convolve` in plain PyTorch, summed in float32; also of float64."""
    wide = torch.promote_types(x.dtype, torch.float32) if x.dtype.itemsize > 1 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(x.to(wide), weight.to(wide), padding=1)
    if scale is not None:
        out = out * scale
    if bias is not None:
        out = out + bias.view(-1, 1, 1)
    out = (F.relu(out) if relu else out).to(dtype)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("detcore_conv3x3::convolve", mutates_args=())
def convolve(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, relu: bool, dtype: torch.dtype
) -> Tensor:
    """scale * the convolution of x with weight (+ bias), (ReLU), rounded to dtype: [N, K, H, W] in channels_last.

    x: [N, C, H, W]; weight: [K, C, 3, 3]; both of 8 bits, or both of one 16-bit type; copied if not in channels_last.
    scale: float32 [1]. bias: float32 [K]. Its input gradient is the same with `flipped` weights. Has no gradients.
    """
    if x.device.type == "cpu":
        return convolve_reference(x, weight, scale, bias, relu, dtype)
    from detcore.ops import conv3x3_kernels

    return conv3x3_kernels.convolve(x, weight, scale, bias, relu, dtype)


@convolve.register_fake
def _(x, weight, scale, bias, relu, dtype) -> Tensor:
    n, _, height, width = x.shape
    return x.new_empty((n, height, width, len(weight)), dtype=dtype).permute(0, 3, 1, 2)


def weight_gradient_reference(grad: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """`weight_gradient` in plain PyTorch, summed in float32."""
    shape = (grad.shape[1], x.shape[1], 3, 3)
    with torch.autocast(x.device.type, enabled=False):
        found = torch.nn.grad.conv2d_weight(x.float(), shape, grad.float(), padding=1)
    return (found if scale is None else found * scale).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("detcore_conv3x3::weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """scale * the gradient of a convolution's weight, float32 [K, C, 3, 3] in channels_last.

    grad: that of the output, [N, K, H, W]; x: the input, [N, C, H, W]; both of 8 bits, or both of one 16-bit type;
    copied if not in channels_last. scale: float32 [1].
    """
    if x.device.type == "cpu":
        return weight_gradient_reference(grad, x, scale)
    from detcore.ops import conv3x3_kernels

    return conv3x3_kernels.weight_gradient(grad, x, scale)


@weight_gradient.register_fake
def _(grad, x, scale) -> Tensor:
    return x.new_empty((grad.shape[1], 3, 3, x.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


def flipped(weight: Tensor, inputs: int, outputs: int) -> Tensor:
    """The weight of a convolution's input gradient, [inputs, outputs, 3, 3], in channels_last: taps reversed, inputs
    and outputs exchanged. weight: [K, C, 3, 3] with C >= inputs; outputs: K or more, the rest being zeros."""
    raw = weight.view(torch.uint8) if weight.dtype.itemsize == 1 else weight  # not every operation takes 8-bit floats
    turned = raw.new_zeros((inputs, 3, 3, outputs))
    turned[..., : len(raw)] = raw[:, :inputs].flip(2, 3).permute(1, 2, 3, 0)
    return turned.view(weight.dtype).permute(0, 3, 1, 2)


class EightBits(NamedTuple):
    """A layer's weight in 8 bits: for the convolution, for its input gradient, and their scale."""

    forward: Tensor
    backward: Tensor
    scale: Tensor


def in_8_bits(conv: nn.Conv2d) -> EightBits:
    """A layer's weight in 8 bits, made once a step and used for every level of a pyramid."""
    outputs, inputs = conv.weight.shape[:2]
    weight, scale = quantise(conv.weight.detach(), FORWARD)
    return EightBits(weight, flipped(weight, inputs, padded(outputs)), scale)


class _Conv3x3(torch.autograd.Function):
    """x in 8 bits times a weight in 8 bits; see the head of this file for the gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, forward, backward, scale, dtype):
        small, x_scale = quantise(x, FORWARD)
        ctx.save_for_backward(x.to(dtype), backward, scale)
        ctx.x_dtype, ctx.weight_dtype, ctx.weight_shape = x.dtype, weight.dtype, weight.shape
        return convolve(small, forward, x_scale * scale, bias, False, dtype)

    @staticmethod
    def backward(ctx, grad):
        into_x, into_weight, into_bias, *_ = ctx.needs_input_grad
        x, backward, scale = ctx.saved_tensors
        dx = dweight = dbias = None
        if into_x:
            small, grad_scale = quantise(grad, BACKWARD)
            dx = convolve(small, backward, grad_scale * scale, None, False, ctx.x_dtype)
        if into_weight:
            dweight = torch.nn.grad.conv2d_weight(x, ctx.weight_shape, grad, padding=1).to(ctx.weight_dtype)
        if into_bias:
            dbias = grad.sum((0, 2, 3), dtype=torch.float32)
        return dx, dweight, dbias, None, None, None, None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, small: EightBits, relu: bool = False) -> Tensor:
    """The 3x3 convolution of x in 8 bits (+ bias), (ReLU): [N, K, H, W] of x's dtype, or autocast's, in channels_last.

    x: float [N, C, H, W]. weight: [K, C, 3, 3], which gets the gradient; small: the same by `in_8_bits`, which is
    multiplied. bias: float [K]; relu wants one.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    wide = None if bias is None else bias.float()
    out = _Conv3x3.apply(x, weight, None if relu else wide, *small, dtype)
    return bias_relu(out, bias) if relu else out
