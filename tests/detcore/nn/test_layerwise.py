"""LAMB and NovoGrad against their formulas, element by element in float64, and as a recorded step needs them.

Against timm: tests/efficientdet/test_effdet.py.
"""

import copy
import math

import pytest
import torch
from torch import nn

from detcore.nn import optim
from detcore.nn.layerwise import Lamb, NovoGrad

LR, BETAS, EPS, DECAY, STEPS = 0.05, (0.8, 0.9), 1e-3, 0.1, 6


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    nn.init.zeros_(model[1].weight)  # a tensor of length 0
    return model


def gradients(model: nn.Module) -> list[list[torch.Tensor]]:
    torch.manual_seed(1)
    return [[torch.randn_like(p) * 2 for p in model.parameters()] for _ in range(STEPS)]


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: list[list[torch.Tensor]]) -> list[float]:
    for grads in steps:
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [x for p in model.parameters() for x in p.flatten().tolist()]


def groups(model: nn.Module, fused: bool = False) -> list[dict]:
    return optim.decayed_groups(model, LR, DECAY, fused=fused)


def norm(values: list[float]) -> float:
    return math.sqrt(sum(x * x for x in values))


def lamb_by_hand(tensors: list[list[float]], decays: list[float], steps: list[list[list[float]]]) -> list[float]:
    first, second = ([[0.0] * len(t) for t in tensors] for _ in range(2))
    b1, b2 = BETAS
    for n, grads in enumerate(steps, 1):
        scale = max(1.0, norm([g for grad in grads for g in grad]))
        for p, grad, m, v, decay in zip(tensors, grads, first, second, decays, strict=True):
            for i, g in enumerate(grad):
                m[i] = b1 * m[i] + (1 - b1) * g / scale
                v[i] = b2 * v[i] + (1 - b2) * (g / scale) ** 2
            update = [m[i] / (1 - b1**n) / (math.sqrt(v[i] / (1 - b2**n)) + EPS) + decay * p[i] for i in range(len(p))]
            ratio = norm(p) / norm(update) if decay and norm(p) else 1.0
            p[:] = [x - LR * ratio * u for x, u in zip(p, update, strict=True)]
    return [x for t in tensors for x in t]


def novograd_by_hand(
    tensors: list[list[float]], decays: list[float], steps: list[list[list[float]]], decoupled: bool
) -> list[float]:
    moments, means = [[0.0] * len(t) for t in tensors], [0.0] * len(tensors)
    b1, b2 = BETAS
    for n, grads in enumerate(steps, 1):
        for k, (p, grad, m, decay) in enumerate(zip(tensors, grads, moments, decays, strict=True)):
            means[k] = norm(grad) ** 2 if n == 1 else b2 * means[k] + (1 - b2) * norm(grad) ** 2
            for i, g in enumerate(grad):
                if decoupled:
                    m[i] = b1 * m[i] + (1 - b1) * g
                    p[i] -= LR * (m[i] / (1 - b1**n) / (math.sqrt(means[k] / (1 - b2**n)) + EPS) + decay * p[i])
                else:
                    m[i] = b1 * m[i] + g / (math.sqrt(means[k]) + EPS) + decay * p[i]
                    p[i] -= LR * m[i]
    return [x for t in tensors for x in t]


def flat(tensors) -> list[list[float]]:
    return [t.flatten().tolist() for t in tensors]


def test_lamb_by_its_formula():
    model = network()
    steps, start = gradients(model), flat(model.parameters())
    want = lamb_by_hand(start, [DECAY, 0, DECAY, 0], [flat(grads) for grads in steps])
    got = trained(Lamb(groups(model), LR, BETAS, EPS), model, steps)
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("decoupled", [True, False])
def test_novograd_by_its_formula(decoupled):
    model = network()
    steps, start = gradients(model), flat(model.parameters())
    want = novograd_by_hand(start, [DECAY, 0, DECAY, 0], [flat(grads) for grads in steps], decoupled)
    got = trained(NovoGrad(groups(model), LR, BETAS, EPS, decoupled=decoupled), model, steps)
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", [Lamb, NovoGrad])
def test_a_resumed_optimizer_goes_on_to_the_same_bits(kind):
    model = network(torch.float32)
    steps = gradients(model)
    other = copy.deepcopy(model)
    whole = trained(kind(groups(model), LR, BETAS, EPS), model, steps)
    first = kind(groups(other), LR, BETAS, EPS)
    trained(first, other, steps[:2])
    second = kind(groups(other), LR, BETAS, EPS)
    optim.load_state_dict(second, copy.deepcopy(optim.state_dict(first)))
    assert trained(second, other, steps[2:]) == whole


@pytest.mark.parametrize("kind", [Lamb, NovoGrad])
def test_a_step_with_a_rate_in_a_tensor_can_begin_again_from_zeros(kind):
    """As a recorded step is warmed up: all that the first steps made is zeroed in place, the weights are put back."""
    model = network(torch.float32)
    steps, before = gradients(model), copy.deepcopy(model.state_dict())
    plain = trained(kind(groups(model), LR, BETAS, EPS), model, steps)
    model.load_state_dict(before)
    optimizer = kind(groups(model, fused=True), LR, BETAS, EPS, capturable=True)
    trained(optimizer, model, steps[:3])
    model.load_state_dict(before)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    assert trained(optimizer, model, steps) == pytest.approx(plain, rel=1e-6)
