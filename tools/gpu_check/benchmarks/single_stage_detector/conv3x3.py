"""The heads' 3x3 convolutions three ways, for rows of the part `probe`: the library, kernels in 16 and in 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.ops import conv3x3 as ops

CUTS = (
    (128, 256, 128, 4, 8), (128, 256, 128, 3, 8), (256, 128, 128, 4, 8), (128, 128, 128, 3, 8), (128, 256, 64, 4, 8),
    (128, 128, 128, 4, 8, True), (64, 128, 128, 4, 4, True),
)  # fmt: skip
"""Tiles to try in 8 bits: rows, columns, depth, stages, warps, promoted (`detcore.ops.conv3x3_kernels.Tiles`)."""


def ways(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Callable[[], Any]]:
    """Name: what to time. "library forward", "16-bit forward", "8-bit forward", the same of "input gradient" and of
    "weight gradient", "quantise input" and "quantise gradient" (what 8 bits cost beside), and on a GPU
    "8-bit forward 128x256x128x4x8" and so on for CUTS.

    x: [N, C, H, W]; weight: [K, C, 3, 3]; grad: [N, K, H, W]; all in channels_last and of one 16-bit type (on a CPU
    float32 as well). The 8-bit numbers are made once, outside of what is timed.
    """
    turned = ops.flipped(weight, x.shape[1], len(weight))
    (small, scale), (small_weight, _) = ops.quantise(x, ops.FORWARD), ops.quantise(weight, ops.FORWARD)
    small_grad, _ = ops.quantise(grad, ops.BACKWARD)
    small_turned = ops.flipped(small_weight, x.shape[1], small_grad.shape[1])
    place = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1

    def library(*mask: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(grad, x, weight, *place, [*mask, False])

    bias = weight.new_zeros(len(weight), dtype=torch.float32)
    plain, scaled = (None, None, False, x.dtype), (scale, None, False, x.dtype)
    found: dict[str, Callable[[], Any]] = {
        "library forward": lambda: F.conv2d(x, weight, padding=1),
        "library input gradient": lambda: library(True, False)()[0],
        "library weight gradient": lambda: library(False, True)()[1],
        "16-bit forward": lambda: ops.convolve(x, weight, *plain),
        "16-bit forward, bias, ReLU": lambda: ops.convolve(x, weight, None, bias, True, x.dtype),
        "16-bit input gradient": lambda: ops.convolve(grad, turned, *plain),
        "16-bit weight gradient": lambda: ops.weight_gradient(grad, x, None),
        "8-bit forward": lambda: ops.convolve(small, small_weight, *scaled),
        "8-bit input gradient": lambda: ops.convolve(small_grad, small_turned, *scaled),
        "8-bit weight gradient": lambda: ops.weight_gradient(small_grad, small, scale),
        "quantise input": lambda: ops.quantise(x, ops.FORWARD),
        "quantise gradient": lambda: ops.quantise(grad, ops.BACKWARD),
    }
    if x.device.type == "cpu":
        return found
    from detcore.ops import conv3x3_kernels

    for cut in CUTS:
        words = "x".join(map(str, cut))
        for name, a, b in (("forward", small, small_weight), ("input gradient", small_grad, small_turned)):
            found[f"8-bit {name} {words}"] = lambda a=a, b=b, cut=cut: conv3x3_kernels.convolve(a, b, *scaled, cut)
    return found


def errors(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, float]:
    """Relative error (root of mean squares) of what 8-bit tensor cores sum, against float32 sums of the same numbers:
    {"forward": .., "input gradient": ..}, on a GPU also "input gradient, not promoted". Arguments as in `ways`."""
    small_weight, _ = ops.quantise(weight, ops.FORWARD)
    small_grad, _ = ops.quantise(grad, ops.BACKWARD)
    turned = ops.flipped(small_weight, x.shape[1], small_grad.shape[1])
    pairs = {"forward": (ops.quantise(x, ops.FORWARD)[0], small_weight), "input gradient": (small_grad, turned)}
    plain = None, None, False, torch.float32
    found = {name: _error(ops.convolve(*pair, *plain), pair) for name, pair in pairs.items()}
    if x.device.type != "cpu":
        from detcore.ops import conv3x3_kernels

        pair = pairs["input gradient"]
        found["input gradient, not promoted"] = _error(conv3x3_kernels.convolve(*pair, *plain, CUTS[0]), pair)
    return found


def _error(found: Tensor, pair: tuple[Tensor, Tensor]) -> float:
    expected = ops.convolve_reference(*pair, None, None, False, torch.float32)
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
