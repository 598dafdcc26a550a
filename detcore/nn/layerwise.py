"""Optimizers whose step is scaled by norms of each layer: LAMB (You et al. 2019) and NovoGrad (Ginsburg et al. 2019).

Both compute as apex's fused ones. Libraries have them too, but read the learning rate or a condition on the host in
each step, so that a GPU can't record it. Here the learning rate may be a tensor, the counters lie beside the
parameters, and nothing waits for the device. Neither takes part in the loss scaling of fp16.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Layerwise(torch.optim.Optimizer):
    """step: `_prepare` of all gradients, then `_update` of each group. The state begins with zeros."""

    def __init__(self, params: Iterable, lr: float | Tensor, capturable: bool, **defaults: Any):
        super().__init__(params, {"lr": lr, "capturable": capturable, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        scale = self._scale([p.grad for _, params in groups for p in params])
        for group, params in groups:
            if params:
                for p in params:
                    if not self.state[p]:
                        self.state[p] = {"step": torch.zeros((), device=p.device), **self._start(p)}
                torch._foreach_add_(self._slot(params, "step"), 1)
                grads = [p.grad for p in params]
                self._update(group, params, grads if scale is None else torch._foreach_mul(grads, scale))
        return loss

    def _slot(self, params: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[p][name] for p in params]

    def _corrections(self, group: dict[str, Any], params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the first moment and the root of the second lack, scalars; all parameters count the same steps."""
        step = self.state[params[0]]["step"].double()  # in float32 the first steps' 1 - 0.999 would lose digits
        beta1, beta2 = group["betas"]
        return (1 - beta1**step).to(params[0].dtype), (1 - beta2**step).sqrt().to(params[0].dtype)

    def _scale(self, grads: list[Tensor]) -> Tensor | None:
        """A factor of all gradients."""
        return None

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError


def _move(params: list[Tensor], update: list[Tensor], lr: float | Tensor) -> None:
    torch._foreach_mul_(update, lr)
    torch._foreach_sub_(params, update)


class Lamb(_Layerwise):
    """Adam's update plus weight_decay * parameter, scaled to the length of the parameter's tensor.

    A tensor without weight decay, and one of length 0, takes the update as it is. The gradients are first scaled down
    to a common L2 norm of at most max_grad_norm. lr: float or scalar tensor. capturable: the counters of a checkpoint
    go to the parameters' device.
    """

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.01, max_grad_norm: float = 1.0, capturable: bool = False,
    ):  # fmt: skip
        super().__init__(params, lr, capturable, betas=betas, eps=eps, weight_decay=weight_decay)
        self.max_grad_norm = max_grad_norm

    def _scale(self, grads: list[Tensor]) -> Tensor | None:
        if not grads:
            return None
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        return 1 / (norm / self.max_grad_norm).clamp(min=1)

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        first, second = self._slot(params, "exp_avg"), self._slot(params, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        correction, root = self._corrections(group, params)
        width = torch._foreach_sqrt(second)
        torch._foreach_div_(width, root)
        torch._foreach_add_(width, group["eps"])
        update = torch._foreach_div(first, correction)
        torch._foreach_div_(update, width)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            lengths, steps = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, update))
            ratio = torch.where((lengths > 0) & (steps > 0), lengths / steps, 1.0)
            torch._foreach_mul_(update, ratio.unbind())
        _move(params, update, group["lr"])


class NovoGrad(_Layerwise):
    """Momentum of gradients that are divided by a running mean of their tensor's norm.

    decoupled: as apex's FusedNovoGrad by default, the mean of the gradients is divided and weight_decay * parameter
    added to the update, both means corrected for their beginning. Otherwise as in the paper and timm: each gradient
    is divided and weight_decay * parameter added before it enters a sum of momentum, without corrections.
    The running mean begins with the first norm. lr and capturable as for `Lamb`.
    """

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = True, capturable: bool = False,
    ):  # fmt: skip
        super().__init__(params, lr, capturable, betas=betas, eps=eps, weight_decay=weight_decay)
        self.decoupled = decoupled

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros((), dtype=p.dtype, device=p.device)}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        moments, means = self._slot(params, "exp_avg"), self._slot(params, "exp_avg_sq")
        squares, before = torch.stack(torch._foreach_norm(grads)).square(), torch.stack(means)
        first = self.state[params[0]]["step"] == 1
        mean = torch.where(first, squares, before.lerp(squares, 1 - beta2))
        torch._foreach_copy_(means, mean.unbind())
        if self.decoupled:
            correction, root = self._corrections(group, params)
            torch._foreach_lerp_(moments, grads, 1 - beta1)
            update = torch._foreach_div(moments, ((mean.sqrt() / root + group["eps"]) * correction).unbind())
            if group["weight_decay"]:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
        else:
            entering = torch._foreach_div(grads, (mean.sqrt() + group["eps"]).unbind())
            if group["weight_decay"]:
                torch._foreach_add_(entering, params, alpha=group["weight_decay"])
            torch._foreach_mul_(moments, beta1)
            torch._foreach_add_(moments, entering)
            update = [moment.clone() for moment in moments]
        _move(params, update, group["lr"])
