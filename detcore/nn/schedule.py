"""Learning rate as a function of the step; nothing is stored, so nothing can get out of step."""

from collections.abc import Sequence


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
    step: int, per_epoch: int, base: float, warmup_steps: int, decay_epochs: Sequence[int], factor: float
) -> float:
    """Learning rate at a global step (from 0): base, times factor from each of decay_epochs (from 0) on.

    During the first warmup_steps steps it rises linearly from 0 instead: step / warmup_steps of that.
    """
    epoch = step // per_epoch
    rate = base * factor ** sum(epoch >= decay for decay in decay_epochs)
    return rate * step / warmup_steps if step < warmup_steps else rate
