"""What follows a convolution, in one pass: its bias, a residual and ReLU, with one bit a value for the gradient.

In PyTorch a convolution's bias is a pass over memory of its own on a GPU, and so are the addition and ReLU.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detcore.device import native
from detcore.ops.conv import conv2d, fused, layout_of

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
    if not _runs(x, bias, residual):
        return bias_relu_reference(x, bias, residual)
    x, residual = _alike(x, residual)
    return torch.ops.detcore.bias_relu(x, bias.float(), residual, _learns(x, bias, residual))[0]


def bias_relu_apart(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`bias_relu` three times the same, for an output with up to three uses: none of them may be changed in place.

    A use that takes one of its own has its gradient arrive apart. The native op adds the gradients in the kernel that
    masks them, where autograd would add each in a pass of its own, of two reads and a write. The sum is made in
    float32 and rounded once: of two gradients it is autograd's in every bit, of three it has one rounding less.
    """
    if not (_runs(x, bias, residual) and _learns(x, bias, residual)):
        out = bias_relu(x, bias, residual)
        return out, out, out
    x, residual = _alike(x, residual)
    return _Apart.apply(x, bias.float(), residual)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        out, mask = torch.ops.detcore.bias_relu(x, bias, residual, True)
        ctx.layout = layout_of(x)
        ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)  # a use may be without gradient, or there may be fewer
        return out, out.detach(), out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _input_gradients(ctx, *(grad for grad in grads if grad is not None))


def _runs(x: Tensor, bias: Tensor, residual: Tensor | None) -> bool:
    alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    return alike and native.runs(OP, *(t for t in (x, bias, residual) if t is not None))


def _learns(x: Tensor, bias: Tensor, residual: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual))


def _alike(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in one of the layouts that the native op knows."""
    layout = layout_of(x)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    return x.contiguous(memory_format=layout), residual


def leaves_bias(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a convolution of x runs without its bias, for bias_relu to add.

    Not on the CPU: oneDNN's convolutions add a bias for nothing, and ReLU in place is as fast as the op.
    """
    return x.device.type != "cpu" and native.runs(OP, x, conv.weight)


def conv_bias_relu_apart(
    x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`conv_bias_relu`, with the variant residual_gradient as `bias_relu_apart` gives it."""
    if native.variant("residual_gradient"):
        if (out := fused(x, conv, weight, bias, residual, apart=True)) is not None:
            return out
        if leaves_bias(x, conv):
            return bias_relu_apart(conv2d(x, conv, weight, None), bias, residual)
    return conv_bias_relu(x, conv, weight, bias, residual)


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


def _input_gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, bias and residual from those of the output's uses."""
    into_x, into_bias, into_residual = ctx.needs_input_grad[:3]
    if not grads:
        return None, None, None
    first, *more = (grad.contiguous(memory_format=ctx.layout) for grad in grads)
    dx, dbias = torch.ops.detcore.bias_relu_backward(first, *ctx.saved_tensors, into_bias, *more)
    return dx if into_x else None, dbias if into_bias else None, dx if into_residual else None


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(x: Tensor, bias: Tensor, residual: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty([(x.numel() + 7) // 8 if keep else 0], dtype=torch.uint8)

    @torch.library.register_fake(f"{OP}_backward")
    def _(
        grad: Tensor, mask: Tensor, sums: bool, second: Tensor | None = None, third: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), grad.new_empty([grad.shape[1] if sums else 0], dtype=torch.float32)

    def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.layout = layout_of(inputs[0])
        ctx.save_for_backward(output[1])

    def _backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        return *_input_gradients(ctx, grad), None

    torch.library.register_autograd(OP, _backward, setup_context=_setup)
