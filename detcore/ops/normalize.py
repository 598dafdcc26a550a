"""Images to the network's input in one pass."""

import torch
from torch import Tensor

from detcore import native

OP = "detcore::normalize"


def normalize_reference(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain PyTorch, in the layout of the images."""
    return torch.addcmul(shift.view(3, 1, 1), images.to(scale.dtype), scale.view(3, 1, 1)).to(dtype)


def normalize(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * images + shift, [N, 3, H, W] of dtype; the native op returns it in channels_last.

    images: uint8 [N, 3, H, W], contiguous or channels_last. scale, shift: float32 [3]. No gradients.
    """
    if native.runs(OP, images, scale, shift) and dtype in native.FLOATING:
        return torch.ops.detcore.normalize(images, scale, shift, dtype)
    return normalize_reference(images, scale, shift, dtype)


if not native.load("detcore"):

    @torch.library.register_fake(OP)
    def _(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
