"""Learning rate as a function of the step; nothing is stored, so nothing can get out of step."""


def warmup_then_constant(step: int, base: float, warmup_steps: float, factor: float) -> float:
    """Learning rate at a global step (from 0): linear from factor * base over warmup_steps, then base.

    The formula of the MLPerf RetinaNet reference: for x < W, base * (factor * (1 - x / W) + x / W). W may be
    fractional (part of an epoch); 0 turns warm-up off.
    """
    if step >= warmup_steps:
        return base
    done = step / warmup_steps
    return base * (factor * (1 - done) + done)
