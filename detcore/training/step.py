"""The training step: what happens between two batches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from detcore.data.batch import Batch
from detcore.device.base import Backend
from detcore.training.config import RunConfig
from detcore.training.state import State
from detcore.training.task import Task


def make_train_step(task: Task, state: State, model: nn.Module, config: RunConfig, device: Backend) -> Callable:
    """The step: forward and backward of each micro-batch, clip, optimizer, moving average.

    Returns step(batches) -> {term: float32 scalar on the device}, the means over the micro-batches. Ranks exchange
    gradients once, with the last micro-batch. It reads no value on the host. Where the first steps would be
    slower, it is warmed up on the task's examples, and recorded if the device does so, anew for batches of other
    shapes; what that changes is put back.
    """
    trained = [p for group in task.optimizer.param_groups for p in group["params"]]
    loss = torch.compile(task.loss, dynamic=False) if config.compile else task.loss

    def train_step(batches: Sequence[Batch]) -> dict[str, Tensor]:
        task.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            device.flush() if i else None
            exchange = i == len(batches) - 1 or model is task.model
            with nullcontext() if exchange else model.no_sync():
                with device.autocast():
                    terms = loss(model, batch)
                state.scaler.scale(sum(terms.values()) / len(batches)).backward()
            for name, value in terms.items():
                share = value.detach().float() / len(batches)
                sums[name] = sums[name] + share if name in sums else share
        device.reduce_gradients(trained)
        if config.clip_norm:
            state.scaler.unscale_(task.optimizer)
            torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        state.scaler.step(task.optimizer)
        state.scaler.update()
        if state.ema:
            state.ema.update(state.model)
        device.flush()
        return sums

    if not task.examples or not (device.warms_up or config.compile):
        return device.prepare_eager_step(train_step, task.optimizer)

    def prepare(batches: Sequence[Batch]) -> Callable:
        model.train()
        with state.unchanged(device):
            return device.compile_step(train_step, batches)

    examples = task.examples()
    usual = [[example] * config.accumulate for example in examples]
    prepared = {_shapes(batches): prepare(batches) for batches in usual}
    if not device.records_steps:
        return device.prepare_eager_step(train_step, task.optimizer)
    known, first = set(_shapes(examples)), next(iter(prepared.values()))

    def replay(batches: Sequence[Batch]) -> dict[str, Tensor]:
        key = _shapes(batches)
        if key not in prepared and len(batches) <= config.accumulate and known.issuperset(key):
            prepared[key] = prepare(batches)  # an epoch's last step has fewer, or a step's canvases differ
        return prepared.get(key, first)(batches)  # the first says what is wrong with other shapes

    return replay


def _shapes(batches: Sequence[Batch]) -> tuple:
    """What a recording is fixed to: shapes and types of the tensors of each batch."""
    return tuple(tuple((tuple(tensor.shape), tensor.dtype) for tensor in batch) for batch in batches)
