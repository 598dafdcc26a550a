"""Optimizers as the benchmarks use them, and the exponential moving average of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BASE_LR = "initial_lr"  # of a parameter group; torch's own schedulers call it so


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0, *, fused: bool) -> torch.optim.Adam:
    """torch's Adam (betas 0.9 and 0.999, eps 1e-8) over the parameters that train.

    fused: one kernel for all parameters, state and learning rate (a float32 tensor) on their device, so that a step
    reads nothing on the host and can be recorded; for GPUs.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = _rate(lr, parameters, fused)
    groups = [{"params": parameters, BASE_LR: lr}]
    return torch.optim.Adam(groups, lr=rate, weight_decay=weight_decay, fused=fused, capturable=fused)


def sgd(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, *, fused: bool, nesterov: bool = False
) -> torch.optim.SGD:
    """torch's SGD with momentum over `decayed_groups`; fused as in `adam`."""
    groups = decayed_groups(model, lr, weight_decay, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


def decayed_groups(model: nn.Module, lr: float, weight_decay: float, *, fused: bool) -> list[dict[str, Any]]:
    """The parameters that train in two groups, each with its learning rate; fused as in `adam`.

    weight_decay for weights (more than one dimension), none for biases and normalisation. An empty group is left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    many, few = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [
        {"params": params, "weight_decay": decay, "lr": _rate(lr, trained, fused), BASE_LR: lr}  # a tensor for each
        for params, decay in ((many, weight_decay), (few, 0.0))
        if params
    ]


def bias_groups(
    model: nn.Module, lr: float, weight_decay: float, bias_lr: float, bias_weight_decay: float, *, fused: bool
) -> list[dict[str, Any]]:
    """The parameters that train in two groups, as Detectron has them: those that are called bias have a learning rate
    and a weight decay of their own. fused as in `adam`. An empty group is left out."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = [p for name, p in trained.items() if name.endswith("bias")]
    others = [p for name, p in trained.items() if not name.endswith("bias")]
    return [
        {"params": params, "weight_decay": decay, "lr": _rate(rate, params, fused), BASE_LR: rate}
        for params, rate, decay in ((others, lr, weight_decay), (own, bias_lr, bias_weight_decay))
        if params
    ]


def _rate(lr: float, parameters: list[nn.Parameter], fused: bool) -> float | Tensor:
    return torch.tensor(lr, dtype=torch.float32, device=parameters[0].device) if fused else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group; one that is a tensor is filled, without waiting for it."""
    for group in optimizer.param_groups:
        _fill_lr(group, lr)


def remember_base_lr(optimizer: torch.optim.Optimizer) -> None:
    """Notes the present learning rate of each group that has no base yet as its base (torch's "initial_lr")."""
    for group in optimizer.param_groups:
        group.setdefault(BASE_LR, float(group["lr"]))


def schedule_lr(optimizer: torch.optim.Optimizer, rate: Callable[[float], float]) -> float:
    """Sets the learning rate of each group to rate(the group's base), as `set_lr` does; returns the first group's."""
    rates = [rate(group[BASE_LR]) for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        _fill_lr(group, lr)
    return rates[0]


def _fill_lr(group: dict[str, Any], lr: float) -> None:
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
    warm_up: the decay of the n-th update (from 0) is at most (1 + n) / (10 + n), as in TensorFlow, so that the random
    weights of the beginning are soon forgotten. `updates`, float64 on the model's device, then counts them there.
    """

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = False):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        device = next(iter(self.average.values())).device
        self.updates = torch.zeros((), dtype=torch.float64, device=device) if warm_up else None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's current values into the average."""
        now = model.state_dict()
        averaged = [name for name, value in now.items() if value.is_floating_point()]
        copied = [name for name, value in now.items() if not value.is_floating_point()]
        if averaged:
            self._mix([self.average[name] for name in averaged], [now[name] for name in averaged])
        if copied:
            torch._foreach_copy_([self.average[name] for name in copied], [now[name] for name in copied])

    def _mix(self, average: list[Tensor], values: list[Tensor]) -> None:
        if self.updates is None:
            torch._foreach_lerp_(average, values, 1 - self.decay)
            return
        share = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        self.updates += 1
        change = torch._foreach_sub(values, average)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(average, change)

    def tensors(self) -> list[Tensor]:
        """All that an update changes."""
        return [*self.average.values(), *([] if self.updates is None else [self.updates])]

    def resume(self, updates: int) -> None:
        """Goes on as after so many updates."""
        if self.updates is not None:
            self.updates.fill_(updates)

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
