"""How long iterations took, in the numbers that every benchmark records."""

import statistics
from collections.abc import Sequence

import numpy as np


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and percentiles (linear between neighbours) of iterations, in milliseconds.

    seconds: of each, one at least.
    """
    p90, p95, p99 = (float(p) * 1e3 for p in np.percentile(seconds, (90, 95, 99)))
    mean, median = statistics.fmean(seconds) * 1e3, statistics.median(seconds) * 1e3
    return {"mean_ms": mean, "median_ms": median, "p90_ms": p90, "p95_ms": p95, "p99_ms": p99}


HEADER = "  mean ms   median      p90      p95      p99"


def row(found: dict[str, float]) -> str:
    """The numbers of `latencies` below HEADER."""
    return "".join(f"{found[key]:9.1f}" for key in ("mean_ms", "median_ms", "p90_ms", "p95_ms", "p99_ms"))
