"""Optimizers as the benchmarks use them, and the exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0, *, fused: bool) -> torch.optim.Adam:
    """torch's Adam (betas 0.9 and 0.999, eps 1e-8) over the parameters that train.

    fused: one kernel for all parameters, state and learning rate (a float32 tensor) on their device, so that a step
    reads nothing on the host and can be recorded; for GPUs.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = _rate(lr, parameters, fused)
    return torch.optim.Adam(parameters, lr=rate, weight_decay=weight_decay, fused=fused, capturable=fused)


def sgd(model: nn.Module, lr: float, momentum: float, weight_decay: float, *, fused: bool) -> torch.optim.SGD:
    """torch's SGD with momentum over the parameters that train; fused as in `adam`.

    Two groups: weight_decay for weights (more than one dimension), none for biases and normalisation.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=_rate(lr, trained, fused), momentum=momentum, fused=fused)


def _rate(lr: float, parameters: list[nn.Parameter], fused: bool) -> float | Tensor:
    return torch.tensor(lr, dtype=torch.float32, device=parameters[0].device) if fused else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group; one that is a tensor is filled, without waiting for it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as a checkpoint holds it: learning rates are numbers, wherever they lie."""
    state = optimizer.state_dict()
    return state | {"param_groups": [group | {"lr": float(group["lr"])} for group in state["param_groups"]]}


def load_state_dict(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Takes over the state that `state_dict` gave (moments, counters), and keeps the optimizer's own options.

    So a checkpoint goes on with a fused optimizer as with a plain one, with a learning rate in a tensor or a number.
    Raises what torch raises, or ValueError, where it is the state of another optimizer or model.
    """
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    groups = [{**mine, "params": group["params"]} for mine, group in zip(own, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update(mine)  # load_state_dict copied the options: the very tensor of the learning rate is to stay


def finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights that an optimizer trains are finite numbers. Waits for the device once."""
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return bool(torch.stack(torch._foreach_norm(weights, float("inf"))).isfinite().all())


class Ema:
    """Exponential moving average of a model's state: average = decay * average + (1 - decay) * value after each step.

    Floating-point parameters and buffers are averaged, the others (counters) copied. The average starts as a copy.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's current values into the average."""
        now = model.state_dict()
        averaged = [name for name, value in now.items() if value.is_floating_point()]
        copied = [name for name, value in now.items() if not value.is_floating_point()]
        if averaged:
            average, values = [self.average[name] for name in averaged], [now[name] for name in averaged]
            torch._foreach_lerp_(average, values, 1 - self.decay)
        if copied:
            torch._foreach_copy_([self.average[name] for name in copied], [now[name] for name in copied])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the average into the model for evaluation and the trained values back afterwards."""
        trained = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average)
        try:
            yield
        finally:
            model.load_state_dict(trained)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.average[name].copy_(value)
