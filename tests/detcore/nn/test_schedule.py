"""Warm-up and decay against their published formulas."""

import pytest
import torch

from detcore.nn.schedule import warmup_then_constant, warmup_then_decay


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 5000])
def test_warm_up_is_the_reference_formula(step):
    expected = 1e-4 * (1e-3 * (1 - step / 100) + step / 100) if step < 100 else 1e-4
    assert warmup_then_constant(step, 1e-4, 100, 1e-3) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up():
    assert warmup_then_constant(0, 8.5e-5, 0, 1e-3) == 8.5e-5


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0), (3, 0.3), (10, 1), (429, 1), (430, 0.1), (539, 0.1), (540, 0.01), (10**6, 0.01)]
)
def test_warm_up_from_nothing_and_decay_at_epochs(step, expected):
    assert warmup_then_decay(step, 10, 2.0, 10, (43, 54), 0.1) == pytest.approx(2 * expected)
    assert warmup_then_decay(0, 10, 2.0, 0, (), 0.1) == 2


@pytest.mark.parametrize(("warmup", "decays"), [(4, (2, 3)), (1, (1,)), (0, (2,))])
def test_a_rate_that_stays_below_its_base_after_the_warmup(warmup, decays):
    """As NVIDIA's SSD300: its loop sets the rate during the warm-up alone, MultiStepLR multiplies what is there."""
    base, per_epoch = 0.3, 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    epochs = torch.optim.lr_scheduler.MultiStepLR(optimizer, decays, 0.1)
    for step in range(4 * per_epoch):
        if step < warmup:
            optimizer.param_groups[0]["lr"] = base * step / warmup
        ours = warmup_then_decay(step, per_epoch, base, warmup, decays, 0.1, stays_below=True)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step()
        if step % per_epoch == per_epoch - 1:
            epochs.step()
