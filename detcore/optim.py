"""Optimizers as the benchmarks use them, and the exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0, *, fused: bool) -> torch.optim.Adam:
    """torch's Adam (betas 0.9 and 0.999, eps 1e-8) over the parameters that train."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


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
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - self.decay)
            else:
                self.average[name].copy_(value)

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
