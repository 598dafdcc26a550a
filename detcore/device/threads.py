"""How many threads share one operation of the CPU: as many as other programs leave room for.

The threads of an operation wait for the slowest of them. Where another program runs on one of the cores, that thread
waits for a time slice in every operation, and training is slower than with fewer threads by far.
"""

import time
from collections.abc import Callable, Mapping

import torch

SPEED_WORTH_IT = 1.25  # times faster that fewer threads must be: their sums are rounded in another order
FREE = 0.7  # of the speed of so many single threads: then nothing else takes processor time
RETRY_S = 120.0  # after which fewer threads than there could be are measured again
_SAMPLE_S, _ROUNDS, _ELEMENTS = 0.05, 3, 1 << 18  # about 0.5 ms of work a thread and operation


class Threads:
    """Chooses the number of threads by measuring the speed of several numbers in turn.

    At the first call of `adapt`, again when images per second have halved, and every RETRY_S while it is reduced.
    most: the number to use where all cores are free. speed(threads): work done a second, in any unit; it may change the
    process's number of threads, which use(threads) sets in the end. clock: seconds.
    """

    def __init__(
        self, most: int, speed: Callable[[int], float], use: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.most, self.count = most, most
        self._speed, self._use, self._clock = speed, use, clock
        self._best_rate = 0.0  # images per second, the highest since the last measurement
        self._measured_at: float | None = None

    def adapt(self, images_per_s: float = 0.0) -> str:
        """Measures if it is time to; what was found, for the progress line: "" where all threads are in use."""
        self._best_rate = max(self._best_rate, images_per_s)
        halved = images_per_s and images_per_s < self._best_rate / 2
        retry = self.count < self.most and self._clock() - self._measured_at >= RETRY_S
        if self._measured_at is None or halved or retry:
            self.count = self._fastest()
            self._use(self.count)
            self._measured_at, self._best_rate = self._clock(), images_per_s if halved else 0.0
        if self.count == self.most:
            return ""
        return f"{self.count} of {self.most} threads, other programs use the processors"

    def _fastest(self) -> int:
        """The number of threads that computes fastest; `most` where others are hardly faster."""
        ends = {n: self._speed(n) for n in (self.most, 1)}
        if ends[self.most] >= FREE * self.most * ends[1]:
            return self.most
        powers = [2**k for k in range(self.most.bit_length())]
        tried = {self.most, *powers, *(self.most - power for power in powers), *(3 * power for power in powers)}
        counts = sorted((count for count in tried if 0 < count <= self.most), reverse=True)
        totals = dict.fromkeys(counts, 0.0)
        for _ in range(_ROUNDS):  # in turn, since the load changes
            for count in counts:
                totals[count] += self._speed(count)
        best = max(counts, key=totals.__getitem__)
        return best if totals[best] > SPEED_WORTH_IT * totals[self.most] else self.most


def adaptive_threads(environ: Mapping[str, str], local_size: int) -> Threads | None:
    """What adapts the threads of this process; None where their number is given or there is nothing to choose.

    It is given by OMP_NUM_THREADS or MKL_NUM_THREADS. Several processes on a machine (local_size) do not adapt either:
    they would measure each other.
    """
    given = environ.get("OMP_NUM_THREADS") or environ.get("MKL_NUM_THREADS")
    most = torch.get_num_threads()
    return None if given or local_size > 1 or most == 1 else Threads(most, measured_speed, torch.set_num_threads)


def measured_speed(threads: int) -> float:
    """Operations a second times threads, of operations that give each thread the same work. Leaves `threads` set."""
    torch.set_num_threads(threads)
    values = torch.full((threads * _ELEMENTS,), 0.5)
    result = torch.tanh(values)  # starts the threads
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _SAMPLE_S:
        torch.tanh(values, out=result)
        done += 1
    return done * threads / passed
