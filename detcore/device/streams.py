"""Work on a second stream of a device, beside the current one: small kernels fill what large ones leave idle."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, get_device_module
from torch.utils._pytree import tree_leaves

A, B = TypeVar("A"), TypeVar("B")


def side_by_side(large: Callable[[], A], small: Callable[[], B], inputs: Sequence[Tensor]) -> tuple[A, B]:
    """(large(), small()), the second on a side stream that waits for the work launched before this call.

    inputs: the tensors that `small` reads, also in its backward pass, and that do not outlive the step; at least one.
    What it returns belongs to the current stream, which waits for it. The backward pass of `small` runs on the side
    stream too, since autograd runs each node on the stream of its forward pass and synchronises them. All this is done
    with events, which a CUDA graph captures. What both read must exist before the call: so autocast must not make its
    copies of shared weights in either. On the CPU, which has one stream, the two follow each other.
    """
    device = inputs[0].device
    streams = get_device_module(device)
    main, side = streams.current_stream(), _side_stream(device)
    side.wait_stream(main)
    _record_use(side, inputs)
    first = large()
    with streams.stream(side):
        second = small()
    main.wait_stream(side)
    _record_use(main, (leaf for leaf in tree_leaves(second) if isinstance(leaf, Tensor)))
    return first, second


@lru_cache
def _side_stream(device: torch.device) -> Any:
    """The same stream in every step: a recording's warm-up and the recording must use one."""
    # What both read, such as a bias, has gradients from both streams: autograd waits for them, and would warn.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    return get_device_module(device).Stream()


def _record_use(stream: Any, tensors: Iterable[Tensor]) -> None:
    """Keeps memory that one stream allocated and another reads from being given out again before both are done."""
    for tensor in tensors:
        if tensor.device.type != "cpu":  # the CPU's memory knows no streams
            tensor.record_stream(stream)
