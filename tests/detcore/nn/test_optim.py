"""The moving average, parameter groups and their learning rates, and what a checkpoint changes of them."""

import pytest
import torch
from torch import nn

from detcore.nn import optim


def test_ema_restores_the_trained_values_after_an_error():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = optim.Ema(model, 0.9)
    nn.init.constant_(model.weight, 3.0)
    with pytest.raises(RuntimeError), ema.applied(model):
        assert model.weight.item() == 1.0
        raise RuntimeError
    assert model.weight.item() == 3.0 and list(ema.state_dict()) == ["weight"]


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_a_warm_average_forgets_its_beginning(decay):
    """By the formula, in float64, with buffers and counters; and from the middle on."""
    torch.manual_seed(0)
    model = nn.BatchNorm1d(4).double()
    ema, whole = optim.Ema(model, decay, warm_up=True), model.weight.detach().clone()
    for step in range(20):
        if step == 10:
            again = optim.Ema(model, decay, warm_up=True)
            again.load_state_dict(ema.state_dict())
            again.resume(step)
            ema = again
        with torch.no_grad():
            model.weight.normal_()
            model.num_batches_tracked += 1
        now = min(decay, (1 + step) / (10 + step))
        whole = now * whole + (1 - now) * model.weight.detach()
        ema.update(model)
    assert torch.allclose(ema.average["weight"], whole, rtol=0, atol=1e-14)
    assert ema.average["num_batches_tracked"] == 20 and len(ema.tensors()) == len(ema.average) + 1


@pytest.mark.parametrize("fused", [False, True])
def test_each_group_keeps_its_base(fused):
    """A rate in a float32 tensor does not round the base that schedules start from."""
    model = nn.Linear(2, 2)
    optimizer = optim.sgd(model, 0.1, 0.9, 1e-4, fused=fused)
    optimizer.param_groups[1]["initial_lr"] = 0.2
    optim.remember_base_lr(optimizer)
    seen = []
    assert optim.schedule_lr(optimizer, lambda base: seen.append(base) or base / 2) == 0.05 and seen == [0.1, 0.2]
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == fused
    other = optim.sgd(nn.Linear(2, 2), 0.3, 0.9, 1e-4, fused=not fused)
    optim.load_state_dict(other, optim.state_dict(optimizer))
    assert [group["initial_lr"] for group in other.param_groups] == [0.3, 0.3]


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    names = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten(), "out": nn.Linear(4, 3)}
    model = nn.Sequential()
    for name, module in names.items():
        model.add_module(name, module)
    return model


def test_options_of_the_optimizer_are_not_those_of_the_checkpoint():
    model = model_of()
    theirs = torch.optim.Adam(model.parameters(), lr=0.5)
    model(torch.rand(2, 3, 3, 3)).sum().backward()
    theirs.step()
    saved = optim.state_dict(theirs)
    ours = optim.adam(model_of(), 1e-2, 1e-3, fused=True)
    rate = ours.param_groups[0]["lr"]
    optim.load_state_dict(ours, saved)
    group = ours.param_groups[0]
    assert group["lr"] is rate and float(rate) == pytest.approx(1e-2) and group["fused"] and group["capturable"]
    moments = [values["exp_avg"] for values in ours.state.values()]
    assert all(torch.equal(m, saved["state"][i]["exp_avg"]) for i, m in enumerate(moments)) and len(moments) == 6
    with pytest.raises(ValueError):
        optim.load_state_dict(optim.sgd(model_of(), 1e-3, 0.9, 1e-2, fused=True), saved)  # two groups


def test_sgd_decays_weights_and_not_biases_and_norms():
    model = model_of()
    groups = optim.sgd(model, 0.1, 0.9, 0.01, fused=False).param_groups
    named = {p: name for name, p in model.named_parameters()}
    sorts = {g["weight_decay"]: {named[p] for p in g["params"]} for g in groups}
    assert sorts == {0.01: {"conv.weight", "out.weight"}, 0.0: {"conv.bias", "norm.weight", "norm.bias", "out.bias"}}
    assert all(type(g["lr"]) is float and g["momentum"] == 0.9 for g in groups)
