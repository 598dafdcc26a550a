"""An op on one input: what is compared and timed, and what results are told apart by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detcore.device import native
from tools.gpu_check.floor import rates
from tools.gpu_check.state import Context, Row, Skip
from tools.gpu_check.timing import Stopwatch


@dataclass(frozen=True)
class Case:
    """One op on one input.

    make() returns run(), which returns the tensors to compare; both are called under the policy (native or reference).
    megabytes: what must be read and written. tolerance: the largest difference, relative to the reference's largest
    value; for integers the largest share of unequal ones.
    """

    program: str
    make: Callable[[], Callable[[], Any]]
    megabytes: float
    gflop: float = 0.0
    tolerance: float = 0.0


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        value = value.values()
    return [t for part in value if part is not None for t in tensors(part)]


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two results: relative for floats, infinite where one is NaN; of integers the share
    of unequal values."""
    worst = 0.0
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
        if not a.numel():
            continue
        if a.is_floating_point():
            scale = max(float(b.abs().max()), 1e-30)
            apart = float((a.float() - b.float()).abs().where(a != b, 0.0).max())  # two infinities are not NaN apart
            worst = max(worst, math.inf if math.isnan(apart) else apart / scale)
        else:
            worst = max(worst, float((a != b).float().mean()))
    return worst


def megabytes(*values: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in values) / 1e6


def measure(case: Case, context: Context, watch: Stopwatch) -> Row:
    """Times of both, the difference, determinism and the share of the floor."""
    missing = native.load(case.program)
    if missing:
        raise Skip(missing)
    seconds = context.sizes.seconds / 4
    with native.using("reference"):
        run = case.make()
        want = [t.clone() for t in tensors(run())]
        theirs = watch.time(run, warmup=1, least=3, cold=True, seconds=seconds)
        del run
    with native.using("native"):
        run = case.make()
        got = [t.clone() for t in tensors(run())]
        again = tensors(run())
        same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        ours = watch.time(run, cold=True, seconds=seconds)
    off = difference(got, want)
    copy, rate = rates(context)
    row = {**ours, "reference_ms": theirs["ms"], "speedup": theirs["ms"] / ours["ms"], "mb": case.megabytes}
    row |= {"gflop": case.gflop, "difference": off, "tolerance": case.tolerance, "repeats_equal": same}
    if copy:
        floors = [case.megabytes / copy]
        if "fp32" in rate:
            floors.append(case.gflop / rate["fp32"])
        row |= {"floor_ms": max(floors), "percent_of_floor": 100 * max(floors) / ours["ms"]}
    if off > case.tolerance:
        row["error"] = f"differs from the reference by {off:.2g}, more than {case.tolerance:.2g}"
    elif not same:
        row["error"] = "two runs on the same input differ"
    return row


def work_dtype(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.gpu else torch.float32


def close(dtype: torch.dtype) -> float:
    """How far two correct results in a dtype may lie apart, relative to the largest value."""
    return {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-4)


def fresh(shape: tuple[int, ...], context: Context) -> Tensor:
    """Random values in the layout in which the network has its activations."""
    x = torch.randn(shape, device=context.device, dtype=work_dtype(context))
    return x.to(memory_format=torch.channels_last)


def gradient_case(program: str, x: Tensor, loss: Callable[[Tensor], Tensor], *small: Tensor) -> Case:
    """The loss of x and its gradients, also of what is small: x must be read and its gradient written, once each."""
    x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        value = loss(x)
        return value, *torch.autograd.grad(value, (x, *small))

    return Case(program, lambda: run, 2 * megabytes(x), tolerance=close(x.dtype))
