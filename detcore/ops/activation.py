"""Activations by name, as modules and kernels know them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(x). Never in place where gradients are wanted: they need x, and PyTorch would copy it before."""
    return F.silu(x, inplace=inplace and not torch.is_grad_enabled())


def none(x: Tensor, inplace: bool = False) -> Tensor:
    """x itself."""
    return x


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"none": none, "relu": F.relu, "relu6": F.relu6, "silu": silu}
"""In the order of csrc/activation.h."""


def index_of(activation: str) -> int:
    """What a kernel calls it."""
    return list(ACTIVATIONS).index(activation)
