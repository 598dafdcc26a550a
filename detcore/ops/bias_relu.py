"""What follows a convolution, in one pass: its bias, a residual and ReLU, with one bit a value for the gradient.

In PyTorch a convolution's bias is a pass over memory of its own on a GPU, and so are the addition and ReLU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore import native
from detcore.ops.conv import conv2d, fused

OP = "detcore::bias_relu"


def bias_relu_reference(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch. Computes in float32 (float64 for float64) and rounds to x's dtype before ReLU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) + bias.to(wide).view(-1, 1, 1)
    if residual is not None:
        out = out + residual.to(wide)
    return F.relu(out.to(x.dtype))


def bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(x + bias (+ residual)), of x's shape, dtype and layout. As in torch.relu, NaN stays NaN.

    x: float [N, C, H, W], fast in channels_last with C a multiple of 8; contiguous works too. bias: [C], float32 or
    x's dtype. residual: x's shape and dtype. All three have gradients; x and the residual share one tensor. For the
    backward the native op keeps uint8 [ceil(numel / 8)] and nothing else. A float64 x, or a residual of another
    dtype, takes the reference. No second derivatives from the native op.
    """
    alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    if not (alike and native.runs(OP, *(t for t in (x, bias, residual) if t is not None))):
        return bias_relu_reference(x, bias, residual)
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    inputs = (x, bias) if residual is None else (x, bias, residual)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return torch.ops.detcore.bias_relu(x, bias.float(), residual, keep)[0]


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def leaves_bias(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a convolution of x runs without its bias, for bias_relu to add.

    Not on the CPU: oneDNN's convolutions add a bias for nothing, and ReLU in place is as fast as the op.
    """
    return x.device.type != "cpu" and native.runs(OP, x, conv.weight)


def conv_bias_relu(
    x: Tensor, conv: nn.Conv2d, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """relu(conv(x) (+ residual)); weight and bias, if given, stand for the module's own."""
    weight = conv.weight if weight is None else weight
    bias = conv.bias if bias is None else bias
    if (out := fused(x, conv, weight, bias, residual)) is not None:
        return out
    if leaves_bias(x, conv):
        return bias_relu(conv2d(x, conv, weight, None), bias, residual)
    out = conv2d(x, conv, weight, bias)
    if residual is not None:
        out += residual
    return F.relu(out, inplace=True)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(x: Tensor, bias: Tensor, residual: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty([(x.numel() + 7) // 8 if keep else 0], dtype=torch.uint8)

    @torch.library.register_fake(f"{OP}_backward")
    def _(grad: Tensor, mask: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), grad.new_empty([grad.shape[1] if sums else 0], dtype=torch.float32)

    def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.layout = _layout(inputs[0])
        ctx.save_for_backward(output[1])

    def _backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        into_x, into_bias, into_residual, _ = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=ctx.layout)
        dx, dbias = torch.ops.detcore.bias_relu_backward(grad, *ctx.saved_tensors, into_bias)
        return dx if into_x else None, dbias if into_bias else None, dx if into_residual else None, None

    torch.library.register_autograd(OP, _backward, setup_context=_setup)
