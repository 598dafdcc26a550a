"""Percentiles of latency are percentiles, and not means of the fastest part as the originals have them."""

import numpy as np
import pytest

from detcore.detection import speed


def test_the_numbers_are_those_of_their_names():
    seconds = np.random.default_rng(3).permutation(np.arange(101)) / 1e3  # 0 to 100 ms, so that p90 is 90
    found = speed.latencies(seconds.tolist())
    expected = {"mean_ms": 50.0, "median_ms": 50.0, "p90_ms": 90.0, "p95_ms": 95.0, "p99_ms": 99.0}
    assert found == pytest.approx(expected)
    assert speed.latencies([0.25]) == pytest.approx(dict.fromkeys(expected, 250.0))


def test_the_numbers_stand_below_their_names():
    found = {"mean_ms": 1.0, "median_ms": 22.0, "p90_ms": 333.0, "p95_ms": 4444.0, "p99_ms": 55555.0}
    assert len(speed.row(found)) == len(speed.HEADER) and speed.row(found).split() == [
        "1.0", "22.0", "333.0", "4444.0", "55555.0",
    ]  # fmt: skip
