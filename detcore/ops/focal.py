"""Sigmoid focal loss of one level's logits, with its gradient in the same pass."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detcore import ops
from detcore.device import native
from detcore.ops.match import IGNORED, UNMATCHED
from detcore.ops.scale import kept, take

OP = "detcore::focal"


def kept_in_float16(alpha: float, gamma: float) -> float:
    """What a float16 gradient is multiplied by while it is kept, without overflow; as focal.h."""
    return 65536.0 if gamma <= 2 and 0.1 <= alpha <= 0.9 else 16384.0


def _rows(logits: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Pieces of flat logits [R, K] in at least float32, with their weights [R, 1]."""
    step = max(1, ops.work_elements(logits.device) // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield logits[rows].to(weights.dtype), weights[rows, None], rows


class _Recipe(NamedTuple):
    alpha: float
    gamma: float
    smoothing: float

    def power(self, x: Tensor) -> Tensor:
        """sigmoid(x)^gamma"""
        return torch.sigmoid(x).square_() if self.gamma == 2 else F.logsigmoid(x).mul_(self.gamma).exp_()

    def entropy(self, x: Tensor) -> Tensor:
        """Cross-entropy of logits whose target is 0, smoothed to smoothing / 2."""
        return F.softplus(x).sub_(x, alpha=self.smoothing / 2) if self.smoothing else F.softplus(x)

    def negative(self, x: Tensor) -> Tensor:
        """Focal loss of logits whose target is 0."""
        return self.power(x).mul_(self.entropy(x)).mul_(1 - self.alpha)

    def negative_gradient(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(x)
        # d/dx p^g c(x) = p^g (g (1 - p) c(x) + p - s / 2)
        gradient = self.entropy(x).mul_(torch.sub(1, p)).mul_(self.gamma).add_(p)
        if self.smoothing:
            gradient.sub_(self.smoothing / 2)
        return gradient.mul_(self.power(x)).mul_(1 - self.alpha)


class _WeightedFocal(torch.autograd.Function):
    """sum over rows of weight * focal loss of the row; nothing but the logits is kept for the backward pass.

    Every class of every row counts as a negative first; then the one positive entry of a foreground row is
    corrected. This needs no one-hot targets, and the wide tensors are walked in pieces.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, weights: Tensor, recipe: _Recipe) -> Tensor:
        ctx.save_for_backward(logits, target, weights)
        ctx.recipe = recipe
        total = weights.new_zeros(())
        for x, weight, _ in _rows(logits, weights):
            total += (recipe.negative(x).sum(1, keepdim=True) * weight).sum()
        x = logits.gather(1, target.clamp(min=0)[:, None])[:, 0].to(weights.dtype)
        # With target 1 the focal loss is the negative one of -x, with alpha in place of 1 - alpha.
        correction = recipe.negative(-x) * (recipe.alpha / (1 - recipe.alpha)) - recipe.negative(x)
        return total + torch.where(target >= 0, correction * weights, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (logits, target, weights), recipe = ctx.saved_tensors, ctx.recipe
        weights = weights * upstream
        gradient = torch.empty_like(logits)
        for x, weight, rows in _rows(logits, weights):
            torch.mul(recipe.negative_gradient(x), weight, out=gradient[rows])
        at = target.clamp(min=0)[:, None]
        x = logits.gather(1, at)[:, 0].to(weights.dtype)
        positive = recipe.negative_gradient(-x) * (-recipe.alpha / (1 - recipe.alpha)) * weights
        value = torch.where(target >= 0, positive.to(gradient.dtype), gradient.gather(1, at)[:, 0])
        return gradient.scatter_(1, at, value[:, None]), None, None, None


def focal_reference(
    logits: Tensor, matched: Tensor, labels: Tensor, weight: Tensor, first: int = 0, bias: Tensor | None = None,
    *, alpha: float, gamma: float, smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`focal_loss` in plain PyTorch, for any floating dtype; the dtype of weight is that of the arithmetic."""
    if bias is not None:
        bias = bias.to(weight.dtype).unflatten(0, (-1, logits.shape[2]))
        logits = (logits.to(weight.dtype).unflatten(1, (-1, len(bias))) + bias).flatten(1, 2)
    matched = matched[:, first : first + logits.shape[1]]
    target = torch.full_like(matched, UNMATCHED)
    if labels.shape[1]:
        target = torch.where(matched >= 0, labels.gather(1, matched.clamp(min=0)), UNMATCHED)
    weights = weight[:, None] * (matched != IGNORED)
    return _WeightedFocal.apply(
        logits.flatten(0, 1), target.flatten(), weights.flatten(), _Recipe(alpha, gamma, smoothing)
    )


def focal_loss(
    logits: Tensor, matched: Tensor, labels: Tensor, weight: Tensor, first: int = 0, bias: Tensor | None = None,
    *, alpha: float, gamma: float, smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Sum of weighted sigmoid focal losses (Lin et al. 2017) of a level: a scalar in the dtype of weight.

    logits: [N, R, K], the rows of the anchors first..first + R. matched: int64 [N, A], what `match` gave for all
    anchors; rows that are IGNORED are left out. labels: int64 [N, M], classes 0..K-1 where matched points to.
    weight: [N], float32 at least, the factor of all terms of an image; 0..1, no gradient.
    alpha: the factor of a class that is there, 1 - alpha of one that is not; between 0 and 1. gamma: the exponent of
    1 - p of the true answer, 0 to 16. smoothing: targets are smoothing / 2 and 1 - smoothing / 2 in the cross-entropy,
    and 0 and 1 in the exponent's base (as in EfficientDet's own).
    bias: [C * K], float32, what logits of a convolution without it lack: rows are cells of C anchors, and row r takes
    the K values of anchor r % C. It is added in float32, where a convolution's own would round the sum to the dtype of
    logits: so the loss is nearer to the exact one, and differs by up to half a unit in the last place of each logit.
    Its gradient is the sum of the logits' gradients before they are rounded.
    The native op computes the gradient in the forward pass and keeps it instead of the logits, in their dtype and in
    float16 times `kept_in_float16`. It allows one backward pass for each forward pass; a second raises RuntimeError.
    """
    given = (logits, matched, labels, weight) if bias is None else (logits, matched, labels, weight, bias)
    if native.runs(OP, *given):
        arguments = (x.contiguous() for x in given[:4])
        bias = None if bias is None else bias.float()
        return torch.ops.detcore.focal(*arguments, first, alpha, gamma, smoothing, bias)[0]
    recipe = {"alpha": alpha, "gamma": gamma, "smoothing": smoothing}
    return focal_reference(logits, matched, labels, weight, first, bias, **recipe)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.biased, ctx.constant = inputs[-1] is not None, kept_in_float16(*inputs[5:7])
    kept(ctx, *output[1:])


def _backward(ctx, upstream: Tensor | None, *_: None) -> tuple:
    gradient = take(ctx, upstream, ctx.constant)
    return gradient, *(None,) * 7, take(ctx, upstream, ctx.constant, 1) if ctx.biased else None


if native.loaded(OP):
    torch.library.register_autograd(OP, _backward, setup_context=_setup_context)

    @torch.library.register_fake(OP)
    def _(
        logits: Tensor,
        matched: Tensor,
        labels: Tensor,
        weight: Tensor,
        first: int,
        alpha: float,
        gamma: float,
        smoothing: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return weight.new_empty(()), torch.empty_like(logits), weight.new_empty(0 if bias is None else bias.numel())
