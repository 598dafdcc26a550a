"""Sigmoid focal loss with any alpha, gamma and label smoothing, and its gradient without what autograd would keep."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detcore.ops.match import IGNORED
from detcore.ops.pieces import work_elements


def _rows(logits: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Pieces of flat logits [R, K] in at least float32, with their weights [R, 1]."""
    step = max(1, work_elements(logits.device) // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield logits[rows].to(weights.dtype), weights[rows, None], rows


def _negative(x: Tensor, gamma: float, smoothing: float) -> Tensor:
    """p^gamma * cross entropy of logits x whose target is 0, smoothed to smoothing / 2; p = sigmoid(x)."""
    entropy = F.softplus(x)
    modulator = torch.sub(x, entropy).mul_(gamma).exp_()  # x - softplus(x) is the logarithm of p
    if smoothing:
        entropy = entropy.sub_(x, alpha=smoothing / 2)
    return modulator.mul_(entropy)


def _negative_gradient(x: Tensor, gamma: float, smoothing: float) -> Tensor:
    """p^gamma * (gamma * (1 - p) * cross entropy + p - smoothing / 2)."""
    entropy = F.softplus(x)
    log_p = torch.sub(x, entropy)
    if smoothing:
        entropy = entropy.sub_(x, alpha=smoothing / 2)
    p = log_p.exp()
    inner = entropy.mul_(1 - p).mul_(gamma).add_(p)
    if smoothing:
        inner.sub_(smoothing / 2)
    return inner.mul_(log_p.mul_(gamma).exp_())


class _WeightedFocal(torch.autograd.Function):
    """The sum over rows of weight * focal loss of the row; only the logits are kept for the backward pass.

    Every class of every row counts as a negative first, then the one positive entry of a foreground row is corrected,
    so that no one-hot targets are needed: with target 1 the loss is the negative one of -x, with alpha in place of
    1 - alpha.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, weights: Tensor, alpha: float, gamma: float, smoothing: float):
        ctx.save_for_backward(logits, target, weights)
        ctx.constants = alpha, gamma, smoothing
        total = weights.new_zeros(())
        for x, weight, _ in _rows(logits, weights):
            total += (_negative(x, gamma, smoothing).sum(1, keepdim=True) * weight).sum()
        x = logits.gather(1, target.clamp(min=0)[:, None])[:, 0].to(weights.dtype)
        own = alpha * _negative(-x, gamma, smoothing) - (1 - alpha) * _negative(x, gamma, smoothing)
        return total * (1 - alpha) + torch.where(target >= 0, own * weights, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, target, weights = ctx.saved_tensors
        alpha, gamma, smoothing = ctx.constants
        weights = weights * upstream
        gradient = torch.empty_like(logits)
        for x, weight, rows in _rows(logits, weights * (1 - alpha)):
            torch.mul(_negative_gradient(x, gamma, smoothing), weight, out=gradient[rows])
        at = target.clamp(min=0)[:, None]
        x = logits.gather(1, at)[:, 0].to(weights.dtype)
        positive = (_negative_gradient(-x, gamma, smoothing) * (-alpha * weights)).to(gradient.dtype)
        value = torch.where(target >= 0, positive, gradient.gather(1, at)[:, 0])
        return gradient.scatter_(1, at, value[:, None]), None, None, None, None, None


def focal_reference(
    logits: Tensor, target: Tensor, weight: Tensor, alpha: float, gamma: float, smoothing: float = 0.0
) -> Tensor:
    """Sum of weighted sigmoid focal losses: a scalar in the dtype of weight, which is that of the arithmetic.

    logits: [N, R, K], any floating dtype. target: int64 [N, R], class 0..K-1, UNMATCHED where every class is a
    negative, or IGNORED where the row does not count. weight: [N], float32 at least, the factor of all terms of an
    image; no gradient. smoothing: the cross entropy's labels are smoothing / 2 and 1 - smoothing / 2; the modulating
    factor and alpha follow the labels as they were.
    """
    weights = weight[:, None] * (target != IGNORED)
    return _WeightedFocal.apply(logits.flatten(0, 1), target.flatten(), weights.flatten(), alpha, gamma, smoothing)
