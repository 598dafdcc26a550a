"""Medians of many runs of one thing."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tools.gpu_check.state import Context, Row


class Stopwatch:
    """Medians of many iterations: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, context: Context):
        self.gpu, self.seconds = context.gpu, context.sizes.seconds
        self.tries_code = context.quick and not context.gpu  # whose times nobody reads
        self.sweep: torch.Tensor | None = None

    def time(self, run: Callable[[], Any], *, warmup: int = 3, least: int = 5, most: int = 500, cold: bool = False,
             seconds: float | None = None) -> Row:  # fmt: skip
        """{ms, p10_ms, p90_ms, n} of run().

        cold: empty the GPU's cache between iterations by writing 256 MiB; that also keeps the host ahead of the GPU,
        so that a kernel shorter than its launch is timed by itself.
        """
        if self.tries_code:
            warmup, least = min(warmup, 1), min(least, 2)
        for _ in range(warmup):
            run()
        limit = time.perf_counter() + (self.seconds if seconds is None else seconds)
        times = self._gpu_times(run, limit, least, most, cold) if self.gpu else _cpu_times(run, limit, least, most)
        return spread(times)

    def _gpu_times(self, run: Callable, limit: float, least: int, most: int, cold: bool) -> list[float]:
        if cold and self.sweep is None:
            self.sweep = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        times: list[float] = []
        while len(times) < least or (len(times) < most and time.perf_counter() < limit):
            events = []
            for _ in range(least):
                if cold:
                    self.sweep.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            times += [start.elapsed_time(end) for start, end in events]
        return times


def _cpu_times(run: Callable, limit: float, least: int, most: int) -> list[float]:
    times: list[float] = []
    while len(times) < least or (len(times) < most and time.perf_counter() < limit):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def spread(times: list[float]) -> Row:
    """Median and tenths of times in ms."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {"ms": statistics.median(ordered), "p10_ms": ordered[tenth], "p90_ms": ordered[-1 - tenth], "n": len(times)}
