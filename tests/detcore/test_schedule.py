"""The warm-up against its published formula."""

import pytest

from detcore.schedule import warmup_then_constant


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 5000])
def test_warm_up_is_the_reference_formula(step):
    expected = 1e-4 * (1e-3 * (1 - step / 100) + step / 100) if step < 100 else 1e-4
    assert warmup_then_constant(step, 1e-4, 100, 1e-3) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up():
    assert warmup_then_constant(0, 8.5e-5, 0, 1e-3) == 8.5e-5
