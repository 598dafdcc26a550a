"""Warm-up and decay against their published formulas."""

import pytest

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
