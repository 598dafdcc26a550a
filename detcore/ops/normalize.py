"""Images to the network's input in one pass: values, type, layout, and mirroring where the loader leaves it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.device import native

OP = "detcore::normalize"


def normalize_reference(
    images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, flip: Tensor | None = None, channels: int = 3
) -> Tensor:
    """The same in plain PyTorch, computed in the type of scale."""
    if flip is not None:
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    images = images.contiguous(memory_format=torch.channels_last)  # while a value is one byte
    out = torch.addcmul(shift.view(3, 1, 1), images.to(scale.dtype), scale.view(3, 1, 1)).to(dtype)
    return F.pad(out, (0, 0, 0, 0, 0, channels - 3)) if channels > 3 else out


def normalize(
    images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, flip: Tensor | None = None, channels: int = 3
) -> Tensor:
    """scale * images + shift, as [N, channels, H, W] of dtype in channels_last.

    images: uint8 [N, 3, H, W], contiguous or channels_last. scale, shift: float [3], one value a colour; the native op
    takes float32. flip: bool [N]; where True the image is mirrored left to right. channels: 3, or 4 or 8 with zeros
    behind the colours, which a convolution then reads in whole words. No gradients.
    """
    given = (images, scale, shift) if flip is None else (images, scale, shift, flip)
    if dtype in native.FLOATING and native.runs(OP, *given, dtypes=(torch.float32,)):
        return torch.ops.detcore.normalize(images, scale, shift, dtype, flip, channels)
    return normalize_reference(images, scale, shift, dtype, flip, channels)


if native.loaded(OP):

    @torch.library.register_fake(OP)
    def _(
        images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, flip: Tensor | None = None, channels: int = 3
    ) -> Tensor:
        shape = (images.shape[0], channels, *images.shape[2:])
        return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
