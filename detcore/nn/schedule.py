"""Learning rate as a function of the step; nothing is stored, so nothing can get out of step.

base: the learning rate that the schedule starts from; parameter groups may each have their own. Steps and epochs count
from 0.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def warmup_then_constant(step: int, base: float, warmup_steps: float, factor: float) -> float:
    """Learning rate at a global step (from 0): linear from factor * base over warmup_steps, then base.

    The formula of the MLPerf RetinaNet reference: for x < W, base * (factor * (1 - x / W) + x / W). W may be
    fractional (part of an epoch); 0 turns warm-up off.
    """
    if step >= warmup_steps:
        return base
    done = step / warmup_steps
    return base * (factor * (1 - done) + done)


def warmup_then_decay(
    step: int, per_epoch: int, base: float, warmup_steps: int, decay_epochs: Sequence[int], factor: float,
    stays_below: bool = False,
) -> float:  # fmt: skip
    """Learning rate at a global step (from 0): base, times factor from each of decay_epochs (from 0) on.

    During the first warmup_steps steps it rises linearly from 0 instead: step / warmup_steps of that. stays_below:
    later it keeps the last value of the warm-up, (warmup_steps - 1) / warmup_steps of base, as where a program sets the
    rate during the warm-up alone and only multiplies it afterwards.
    """
    epoch = step // per_epoch
    rate = base * factor ** sum(epoch >= decay for decay in decay_epochs)
    if warmup_steps and (step < warmup_steps or stays_below):
        return rate * min(step, warmup_steps - stays_below) / warmup_steps
    return rate


WARMUPS = ("constant", "linear", "mlperf_linear")


def warmup_multistep(
    step: int, base: float, decay_steps: Sequence[int], gamma: float, method: str, warmup_steps: int, factor: float
) -> float:
    """Learning rate at a global step, as maskrcnn-benchmark has it: base, times gamma from each of decay_steps on.

    Before warmup_steps also, by method: "constant" times factor; "linear" times what rises from factor to 1;
    "mlperf_linear" less (warmup_steps - step) * factor, before gamma. decay_steps rise. Raises ValueError for another
    method.
    """
    if method not in WARMUPS:
        raise ValueError(f"warm-up {method!r} is none of {', '.join(WARMUPS)}")
    if step < warmup_steps:
        done = step / warmup_steps
        if method == "mlperf_linear":
            base -= (warmup_steps - step) * factor
        else:
            base *= factor if method == "constant" else factor * (1 - done) + done
    return base * gamma ** bisect_right(decay_steps, step)


@dataclass(frozen=True)
class Noise:
    """Random factors 1 + n of the learning rate in epochs first <= epoch < last, the same on all ranks.

    n is standard normal, drawn again until |n| < limit, from a generator seeded with seed + epoch, as timm does.
    """

    first: float
    last: float
    seed: int
    limit: float = 0.67

    def factor(self, epoch: int) -> float:
        if not self.first <= epoch < self.last:
            return 1.0
        generator = torch.Generator().manual_seed(self.seed + epoch)
        drawn = float(torch.randn(1, generator=generator))
        while abs(drawn) >= self.limit:
            drawn = float(torch.randn(1, generator=generator))
        return 1 + drawn


@dataclass(frozen=True)
class EpochSchedule:
    """timm's schedules, whose learning rate is one number an epoch, and what EfficientDet's recipe sets of them.

    For warmup_epochs it rises linearly from warmup_lr towards base. Then `cosine` or `step_decay` holds, both of which
    count their epochs from the very first, not from the end of the warm-up; noise multiplies either, and the warm-up.
    """

    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    noise: Noise | None = None

    def cosine(
        self, epoch: int, base: float, epochs: int, min_lr: float, cycle_factor: float = 1.0, cycles: int = 1
    ) -> float:
        """Half a cosine wave from base to min_lr over `epochs`, min_lr afterwards (the cool-down).

        cycles: so many waves, each cycle_factor (1 or more) times as long as the one before; 0: without end.
        """
        cycle, begin, length = 0, 0.0, float(epochs)
        while epoch >= begin + length:
            cycle, begin, length = cycle + 1, begin + length, length * cycle_factor
        rate = min_lr
        if not cycles or cycle < cycles:
            rate += 0.5 * (base - min_lr) * (1 + math.cos(math.pi * (epoch - begin) / length))
        return self._begun(epoch, base, rate)

    def step_decay(self, epoch: int, base: float, decay_epochs: int, factor: float) -> float:
        """base, times factor after every decay_epochs."""
        return self._begun(epoch, base, base * factor ** (epoch // decay_epochs))

    def _begun(self, epoch: int, base: float, rate: float) -> float:
        """The rate with warm-up and noise."""
        if epoch < self.warmup_epochs:
            rate = self.warmup_lr + epoch * (base - self.warmup_lr) / self.warmup_epochs
        return rate * self.noise.factor(epoch) if self.noise else rate


def cosine_epochs(epochs: int, cooldown: int, cycle_factor: float = 1.0, cycles: int = 1) -> int:
    """All epochs of a run by `EpochSchedule.cosine`: its cycles and the cool-down."""
    return math.floor(sum(epochs * cycle_factor**cycle for cycle in range(max(cycles, 1)))) + cooldown
