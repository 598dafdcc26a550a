"""Batch normalisation over all processes on processors; torch's own does it on GPUs alone."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; of its gradients too, for the sum lies in every process's loss."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics, in training, are those of the images of all processes.

    Mean and variance are summed one after the other, in float32 at least, so that nothing cancels: four exchanges a
    layer and step. Processes may have different numbers of images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = wide.new_tensor([x.numel() / x.shape[1]])
        sums = _Sum.apply(torch.cat([wide.sum((0, 2, 3)), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronised(model: nn.Module) -> nn.Module:
    """The model with a SyncBatchNorm, of the same parameters and buffers, for each BatchNorm2d; in place."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            norm.__dict__.update(training=child.training, _parameters=child._parameters, _buffers=child._buffers)
            setattr(model, name, norm)
        else:
            synchronised(child)
    return model
