"""Warm-up and decay against their published formulas."""

import math

import pytest
import torch

from detcore.nn.schedule import (
    EpochSchedule,
    Noise,
    cosine_epochs,
    warmup_multistep,
    warmup_then_constant,
    warmup_then_decay,
)

NOISE_SEED = 12711


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


@pytest.mark.parametrize(
    ("method", "step", "expected"),
    [
        ("constant", 0, 0.12 / 3), ("constant", 799, 0.12 / 3), ("constant", 800, 0.12),
        ("linear", 0, 0.12 / 3), ("linear", 400, 0.12 * 2 / 3), ("linear", 800, 0.12),
        ("linear", 11999, 0.12), ("linear", 12000, 0.012), ("linear", 15999, 0.012), ("linear", 16000, 0.0012),
    ],
)  # fmt: skip
def test_warm_up_of_mask_r_cnn(method, step, expected):
    assert warmup_multistep(step, 0.12, (12000, 16000), 0.1, method, 800, 1 / 3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("base", "first", "middle"), [(0.12, 0.04, 0.08), (0.24, 0.16, 0.2)])
def test_warm_up_of_mlperf_subtracts_the_same_from_every_group(base, first, middle):
    rates = [warmup_multistep(step, base, (12000,), 0.1, "mlperf_linear", 800, 1e-4) for step in (0, 400, 799, 800)]
    assert rates == pytest.approx([first, middle, base - 1e-4, base], rel=1e-12)


def test_another_warm_up_is_refused():
    with pytest.raises(ValueError, match="'cubic' is none of constant, linear, mlperf_linear"):
        warmup_multistep(900, 0.1, (), 0.1, "cubic", 800, 0.1)


class TestEfficientDet:
    """train_AMP_8xA100-80G.sh: lr 1.63, 50 epochs of warm-up from 1e-4, 300 epochs, min-lr 1e-5, 10 of cool-down."""

    warm = EpochSchedule(50, 1e-4)

    def rate(self, epoch):
        return self.warm.cosine(epoch, 1.63, 300, 1e-5)

    def test_warm_up_is_linear_and_the_cosine_begins_in_its_middle(self):
        assert [self.rate(e) for e in (0, 1, 25)] == pytest.approx(
            [1e-4, 1e-4 + (1.63 - 1e-4) / 50, 1e-4 + (1.63 - 1e-4) / 2]
        )
        assert self.rate(50) / 1.63 == pytest.approx(0.933, abs=5e-4)  # the specification's number

    @pytest.mark.parametrize(("epoch", "part"), [(100, 0.75), (150, 0.5), (200, 0.25)])
    def test_cosine(self, epoch, part):
        assert self.rate(epoch) == pytest.approx(1e-5 + part * (1.63 - 1e-5))

    def test_cool_down_is_at_the_smallest_rate(self):
        assert cosine_epochs(300, 10) == 310 and [self.rate(e) for e in (300, 309)] == [1e-5, 1e-5]
        assert self.rate(299) > 1e-5

    def test_cycles(self):
        """Of 10, 20 and 40 epochs."""
        rates = [EpochSchedule().cosine(e, 1.0, 10, 0.0, cycle_factor=2, cycles=3) for e in (0, 5, 10, 20, 30, 50, 70)]
        assert rates == pytest.approx([1, 0.5, 1, 0.5, 1, 0.5, 0]) and cosine_epochs(10, 3, 2, 3) == 73
        assert EpochSchedule().cosine(105, 1.0, 10, 0.0, cycles=0) == pytest.approx(0.5)  # without end

    def test_steps(self):
        rates = [EpochSchedule(2, 0.1).step_decay(e, 1.0, 30, 0.1) for e in (0, 1, 2, 29, 30, 60)]
        assert rates == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.01])


def test_noise_is_timms():
    """By its own lines: torch's generator seeded with seed + epoch, drawn again until below the limit."""
    schedule = EpochSchedule(noise=Noise(0.4 * 310, 0.9 * 310, NOISE_SEED))
    redrawn = 0
    for epoch in range(310):
        plain = EpochSchedule().cosine(epoch, 1.63, 300, 1e-5)
        expected = plain
        if 124 <= epoch < 279:
            generator = torch.Generator()
            generator.manual_seed(NOISE_SEED + epoch)
            while True:
                noise = torch.randn(1, generator=generator).item()
                if abs(noise) < 0.67:
                    break
                redrawn += 1
            expected = plain + plain * noise
        assert schedule.cosine(epoch, 1.63, 300, 1e-5) == pytest.approx(expected, rel=1e-12)
    assert redrawn > 20 and math.isclose(
        schedule.cosine(123, 1.63, 300, 0.0), EpochSchedule().cosine(123, 1.63, 300, 0.0)
    )
