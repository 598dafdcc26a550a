"""How the part `probe` asks for an operation, and judges what it gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.ops.conv import merged
from tools.gpu_check.cases import close, difference, tensors
from tools.gpu_check.jobs import lost_context
from tools.gpu_check.state import Row, Skip, words

REFUSED = "not offered here"
GRADIENTS = "gradients"
"""Of input and weight, and of the bias where there is one, as a step asks for them."""


def attempt(run: Callable[[], Any]) -> Any:
    """run(), for what a library may not offer here: then Skip."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if lost_context(f"{type(error).__name__}: {error}", torch.cuda.is_initialized()):
            raise
        raise Skip(f"{REFUSED}: {words(error).partition('. ')[0]}") from error


def judged(row: Row, found: Any, wanted: Any) -> Row:
    """The row with "difference", and with "error" where that is more than rounding, or a value is not finite."""
    if not all(bool(t.isfinite().all()) for t in tensors(found)):
        return row | {"error": "a value is not finite"}
    off, limit = difference(found, wanted), close(next(iter(tensors(wanted))).dtype)
    row["difference"] = off
    return row | ({"error": f"differs by {off:.2g} from the slow way, allowed are {limit:.2g}"} if off > limit else {})


def narrowed(found: Any, weight: Tensor, groups: int) -> Any:
    """What a convolution of merged groups gives, a weight's gradient as that of `weight`."""
    if isinstance(found, Tensor) or found[1] is None:
        return found
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        return found[0], torch.autograd.grad(merged(leaf, groups)[0], leaf, found[1])[0], found[2]


def gflop(weight: Tensor, out: Tensor) -> float:
    """Of a convolution's forward pass, or of one of its gradients (2 per multiplication and addition)."""
    return 2 * out.numel() * weight[0].numel() / 1e9


def convolution(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], conv: Any, groups: int, direction: str
) -> Callable[[], Any]:
    """tensors: input, weight, bias, gradient of the output. conv: its stride and kernel, padded by half of it."""
    x, weight, bias, grad = tensors
    stride, padding, one = [conv.stride] * 2, [conv.kernel // 2] * 2, [1, 1]
    if direction == "forward":
        return lambda: F.conv2d(x, weight, bias, stride, padding, one, groups)
    both = direction == GRADIENTS
    mask = [both or direction == "input gradient", both or direction == "weight gradient", bias is not None]
    sizes = None if bias is None else [len(bias)]
    place = sizes, stride, padding, one, False, [0, 0], groups, mask
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, *place)


@contextmanager
def tried(benchmark: bool, limit: int) -> Iterator[None]:
    """How many algorithms cuDNN tries for a convolution that it sees for the first time."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark, cudnn.benchmark_limit = benchmark, limit
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before
