"""Parameter groups of the optimizers, and what a checkpoint changes of them."""

import pytest
import torch
from torch import nn

from detcore.nn import optim


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
