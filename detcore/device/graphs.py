"""Work that is recorded once and then replayed as a whole: the training step and inference.

A recording reads its inputs from buffers that are filled before each replay, and leaves its outputs in buffers that the
next replay overwrites; so `recorded` copies batches in and clones what comes out. The function that is recorded is the
one that runs where nothing is recorded. What it must keep to: fixed shapes, no value read on the host, no copy from the
host, no random number from the host's generator, and all that outlives it changed in place. A learning rate is a tensor
(`optim.set_lr` fills it). How a device records is a `Recorder`; this file knows no device.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from detcore import UserError
from detcore.data.batch import Batch

T = TypeVar("T")  # what a recorded function returns: a tensor, or a dictionary of them

STEP_WARM_UPS = 11
"""Runs before a training step is recorded: libraries choose their algorithms, optimizers create their state, and
DistributedDataParallel builds its buckets, for which PyTorch's documentation asks for 11."""
WARM_UPS = 3
"""Runs before inference is recorded, and of a step that is not."""


class Recorder(Protocol):
    """What a device offers for recording."""

    def side_stream(self) -> AbstractContextManager:
        """The stream to warm up on, and to make hooks of the backward pass on. It waits for the current stream, which
        waits for it when the context ends."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Records what `work` asks of the device, without doing it; the result does it and returns the same tensors
        each time, with new values."""

    def close(self) -> None:
        """Frees the recordings; none may be replayed afterwards."""


def recorded(
    function: Callable[[Sequence[Batch]], T], recorder: Recorder, example: Sequence[Batch], warm_ups: int
) -> Callable[[Sequence[Batch]], T]:
    """`function`, warmed up on `example` and recorded for batches of its shapes.

    The warm-up has the function's effects: the caller undoes those that must not stay (`State.unchanged`).
    example: batches on the device. The result raises UserError for batches of other shapes or another number of them.
    """
    # Inference and training share this: buffers of inference mode could not be filled outside of it.
    with torch.inference_mode(False):
        inputs = [batch.map(torch.empty_like) for batch in example]
    _fill(inputs, example)
    with recorder.side_stream():
        for _ in range(warm_ups):
            function(inputs)
    replay = recorder.record(lambda: function(inputs))
    expected = shapes(inputs)

    def run(batches: Sequence[Batch]) -> T:
        if shapes(batches) != expected:
            raise UserError(
                f"batches of {_summary(batches)} came to a step recorded for {_summary(inputs)}: a recorded step wants "
                "batches of one shape. --graphs off takes any"
            )
        _fill(inputs, batches)
        return _clone(replay())

    return run


def recorded_by_shape(function: Callable[[Batch], T], recorder: Recorder) -> Callable[[Batch], T]:
    """A function of one batch that changes nothing, such as inference: recorded at first use for each shape.

    It reads the weights where they lie, so a recording stays valid while training changes them in place.
    """
    recordings: dict[Any, Callable[[Sequence[Batch]], T]] = {}

    def run(batch: Batch) -> T:
        key = shapes([batch])
        if key not in recordings:
            recordings[key] = recorded(lambda batches: function(batches[0]), recorder, [batch], WARM_UPS)
        return recordings[key]([batch])

    return run


def shapes(batches: Sequence[Batch]) -> tuple:
    """What a recording is fixed to: shape, dtype and device of every tensor."""
    return tuple(tuple((tuple(t.shape), t.dtype, t.device) for t in batch) for batch in batches)


def _fill(inputs: Sequence[Batch], batches: Sequence[Batch]) -> None:
    for buffers, batch in zip(inputs, batches, strict=True):
        for buffer, tensor in zip(buffers, batch, strict=True):
            buffer.copy_(tensor, non_blocking=True)


def _clone(outputs: T) -> T:
    if isinstance(outputs, Tensor):
        return outputs.clone()
    return {name: value.clone() for name, value in outputs.items()}


def _summary(batches: Sequence[Batch]) -> str:
    first = batches[0]
    images, boxes = "x".join(map(str, first.images.shape)), first.boxes.shape[1]
    return f"{len(batches)} x (images {images} {str(first.images.dtype).removeprefix('torch.')}, {boxes} boxes)"
