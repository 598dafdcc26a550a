"""Weights as a step's convolutions want them, folded with a scale or only narrower, many of them in one pass.

One by one they are small: on a GPU each costs two kernels in the forward pass and two in the backward pass, whose
starts take longer than their work. A pass has its gradients when the last of its weights has its own, so that a model
takes one for each of its parts: then an exchange of gradients between processes begins while earlier parts are still at
work.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detcore.device import native

OP = "detcore::fold_"


def fold_reference(values: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`fold` in plain PyTorch."""
    if not scales:
        return [value.to(dtype) for value in values]
    return [(v * s.view(-1, *[1] * (v.dim() - 1))).to(dtype) for v, s in zip(values, scales, strict=True)]


def fold(values: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The values, each row times the value's scale where scales are given, rounded to dtype. Layouts stay.

    values: any shapes, one dtype; 4-D ones contiguous or channels_last. scales: none, or for each value float32 [rows]
    without gradient. The native op wants float32 values, or float32 as dtype. Its numbers are the reference's in every
    bit, also those of the gradients. No second derivatives from it.
    """
    if values and native.runs(OP, *values, *scales) and dtype in native.FLOATING:
        return list(_Fold.apply(dtype, len(values), *values, *scales))
    return fold_reference(values, scales, dtype)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        values, scales = given[:count], given[count:]
        ctx.count = count
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        outs = tuple(torch.empty_like(value, dtype=dtype) for value in values)
        torch.ops.detcore.fold_(outs, values, scales)
        learns = ctx.needs_input_grad[2 : 2 + count]
        ctx.mark_non_differentiable(*(out for out, needs in zip(outs, learns, strict=True) if not needs))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, scales = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        outs: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        wanted = [i for i, grad in enumerate(grads) if grad is not None]
        for i in wanted:
            outs[i] = torch.empty_like(values[i])
        if wanted:
            arrived = [grads[i].contiguous(memory_format=_layout(values[i])) for i in wanted]
            torch.ops.detcore.fold_([outs[i] for i in wanted], arrived, [scales[i] for i in wanted if scales])
        return None, None, *outs


def _layout(value: Tensor) -> torch.memory_format:
    last = value.dim() == 4 and not value.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def autocast_dtype(like: Tensor) -> torch.dtype:
    """What autocast computes in on the tensor's device, or the tensor's own dtype."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def narrow_copies(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """parameter: its copy as autocast wants it, all made in one pass; none where they are of that type already."""
    wide = [p for p in parameters if p.dtype != autocast_dtype(p)]
    return dict(zip(wide, fold(wide, (), autocast_dtype(wide[0])), strict=True)) if wide else {}


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(out: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        return None
