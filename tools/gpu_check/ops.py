"""The part `ops`: each native op beside its reference. Here are those of detcore; a benchmark brings its own.

An op's floor is the time in which this machine copies the bytes that the op must read and write once, or does its
arithmetic, whichever is longer; both rates are those that the part `floor` measured.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import torch

from detcore import UserError
from tools.gpu_check.benchmarks import benchmarks
from tools.gpu_check.cases import Case, close, fresh, measure, megabytes, work_dtype
from tools.gpu_check.state import Context, Job, Row, Skip
from tools.gpu_check.timing import Stopwatch


def ops(context: Context) -> Iterable[Job]:
    """Every native op at the size of a training step, forward and backward where it has both."""
    watch = Stopwatch(context)
    yield from jobs_of(GROUPS, context, watch)
    for name, benchmark in benchmarks().items():
        if benchmark.ops:
            try:
                groups = import_module(benchmark.ops).GROUPS
            except Exception as error:
                yield name, failing(error)
                continue
            yield from jobs_of(groups, context, watch)


def jobs_of(groups: Iterable[Callable], context: Context, watch: Stopwatch) -> Iterable[Job]:
    for group in groups:
        try:
            cases = list(group(context))
        except Exception as error:  # the op's module can't be imported: that is this op's failure alone
            yield group.__name__.removesuffix("_cases"), failing(error)
            continue
        for name, case in cases:
            yield name, lambda case=case: run_case(case, context, watch)


def failing(error: Exception) -> Callable[[], Row]:
    def run() -> Row:
        raise error

    return run


def run_case(make_case: Callable[[], Case], context: Context, watch: Stopwatch) -> Row:
    torch.manual_seed(0)
    try:
        return measure(make_case(), context, watch)
    except UserError as error:  # ops=native says what it lacks, such as code for this device
        if context.gpu:
            raise
        raise Skip(str(error)) from error


def normalize_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.ops.normalize import normalize

    s, dtype = context.sizes, work_dtype(context)

    def case() -> Case:
        shape = (s.batch, s.image, s.image, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=context.device).permute(0, 3, 1, 2)
        scale, shift = torch.rand(2, 3, device=context.device).unbind()
        moved = images.numel() * (1 + dtype.itemsize) / 1e6
        return Case("detcore", lambda: lambda: normalize(images, scale, shift, dtype), moved, tolerance=close(dtype))

    yield "normalize", case


def bias_relu_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.ops.bias_relu import bias_relu

    s, dtype = context.sizes, work_dtype(context)
    shape = (s.batch, s.channels, -(-s.image // 8), -(-s.image // 8))

    def case(residual: bool, backward: bool) -> Case:
        x, grad = fresh(shape, context), fresh(shape, context)
        bias = torch.randn(shape[1], device=context.device)
        more = fresh(shape, context) if residual else None
        size = megabytes(x)
        if not backward:
            return Case(
                "detcore", lambda: lambda: bias_relu(x, bias, more), (2 + residual) * size, tolerance=close(dtype)
            )

        def make() -> Callable[[], Any]:
            inputs = [t.detach().requires_grad_() for t in (x, bias, more) if t is not None]
            y = bias_relu(*inputs)
            return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

        # One bit an element says where the ReLU was open; residual and x have one and the same gradient.
        return Case("detcore", make, 2 * size + x.numel() / 8e6, tolerance=close(dtype))

    for backward in (False, True):
        for residual in (False, True):
            name = f"bias_relu{'+residual' if residual else ''} {'bwd' if backward else 'fwd'}"
            yield name, lambda residual=residual, backward=backward: case(residual, backward)


def nms_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from detcore.ops.nms import nms

    def case() -> Case:
        n, count, side = context.sizes.batch, 200 if context.quick and not context.gpu else 5000, context.sizes.image
        corner = torch.rand(n, count, 2, device=context.device) * side * 0.9
        boxes = torch.cat((corner, corner + torch.rand(n, count, 2, device=context.device) * side * 0.1), 2)
        scores = torch.rand(n, count, device=context.device).sort(1, descending=True).values
        labels = torch.randint(context.sizes.classes, (n, count), device=context.device)
        moved = megabytes(boxes, scores, labels)
        return Case("detcore", lambda: lambda: nms(boxes, scores, labels, 0.5, 300), moved)

    yield "nms of 5 x 1000 candidates", case


def variant_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What only variants of detcore.device.native use. stem: normalize to 4 channels, pool_bias_relu. conv_epilogues
    and residual_gradient: the masks of bias_relu. multi_cast: fold."""
    yield "normalize to 4 channels", lambda: normalized(context)
    yield "pool_bias_relu", lambda: pooled(context)
    yield "bias_relu bwd, mask from output", lambda: masked(context, 1, from_output=True)
    yield "bias_relu bwd, two gradients", lambda: masked(context, 2, from_output=False)
    yield "fold of 16 weights", lambda: folded(context)


def normalized(context: Context) -> Case:
    from detcore.ops.normalize import normalize

    s, dtype = context.sizes, work_dtype(context)
    shape = (s.batch, s.image, s.image, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=context.device).permute(0, 3, 1, 2)
    scale, shift = torch.rand(2, 3, device=context.device).unbind()
    moved = images.numel() * (1 + dtype.itemsize * 4 / 3) / 1e6
    return Case(
        "detcore", lambda: lambda: normalize(images, scale, shift, dtype, None, 4), moved, tolerance=close(dtype)
    )


def pooled(context: Context) -> Case:
    from detcore.ops.pool_bias_relu import pool_bias_relu

    side = -(-context.sizes.image // 2)
    x, bias = fresh((context.sizes.batch, 64, side, side), context), torch.randn(64, device=context.device)
    return Case("detcore", lambda: lambda: pool_bias_relu(x, bias), 1.25 * megabytes(x), tolerance=close(x.dtype))


def masked(context: Context, gradients: int, from_output: bool) -> Case:
    """The gradient of a ReLU's input from those of its uses; from_output: by the output's sign, with the bias's."""
    from detcore.ops.bias_relu import bias_relu_apart
    from detcore.ops.conv import masked_sum

    s = context.sizes
    shape = (s.batch, s.channels, -(-s.image // 8), -(-s.image // 8))
    x, grads = fresh(shape, context), [fresh(shape, context) for _ in range(gradients)]
    moved = (gradients + 1) * megabytes(x)
    if from_output:
        out = torch.relu(x)
        return Case(
            "detcore", lambda: lambda: masked_sum(out, True, grads), moved + megabytes(x), tolerance=close(x.dtype)
        )

    def make() -> Callable[[], Any]:
        wide, bias = x.detach().requires_grad_(), torch.zeros(shape[1], device=x.device)
        uses = bias_relu_apart(wide, bias)[:gradients]
        return lambda: torch.autograd.grad(uses, wide, grads, retain_graph=True)

    return Case("detcore", make, moved + x.numel() / 8e6, tolerance=close(x.dtype))


def folded(context: Context) -> Case:
    from detcore.ops.fold import fold

    width = 4 * context.sizes.channels
    weights = [torch.randn(width, width // 4, 1, 1, device=context.device) for _ in range(16)]
    scales = [torch.rand(width, device=context.device) for _ in weights]
    dtype = work_dtype(context)
    moved = sum(weight.numel() for weight in weights) * (4 + dtype.itemsize) / 1e6
    return Case("detcore", lambda: lambda: fold(weights, scales, dtype), moved)


GROUPS = (normalize_cases, bias_relu_cases, nms_cases, variant_cases)
