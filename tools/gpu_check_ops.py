"""The parts `floor` and `ops` of tools/gpu_check.py: what this machine can do at best, and each op beside its
reference.

An op's floor is the time in which this machine copies the bytes that the op must read and write once, or does its
arithmetic, whichever is longer; both rates are those that the part `floor` measured.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_check_core import Context, Job, Row, Skip, Stopwatch, load
from torch import Tensor

from detcore import UserError
from detcore.data.synthetic import synthetic_batches
from detcore.device import native

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def floor(context: Context) -> Iterable[Job]:
    """copy: GB/s read and written together. bf16, fp16, tf32, fp32: TFLOP/s of a square matrix product."""
    watch = Stopwatch(context)

    def copy() -> Row:
        # On a GPU five times what its cache holds (50 MB on an H100, 60 on an H200) at least.
        count = (2**28 if context.quick else 2**30) if context.gpu else 2**24
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=context.device)
        target = torch.empty_like(source)
        row = watch.time(lambda: target.copy_(source), least=10)
        return row | {"mib": count / 2**20, "gb_s": 2 * count / row["ms"] / 1e6}

    def multiply(precision: str) -> Callable[[], Row]:
        def run() -> Row:
            side = (256 if context.quick else 1024) if not context.gpu else 8192
            dtype = PRECISIONS[precision]
            # Random values: constant ones draw less power and so multiply faster than a network's.
            a, b = (torch.randn(side, side, device=context.device).to(dtype) for _ in range(2))
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            try:
                row = watch.time(lambda: a @ b, least=5)
            finally:
                torch.backends.cuda.matmul.fp32_precision = before
            return row | {"side": side, "tflop_s": 2 * side**3 / row["ms"] / 1e9}

        return run

    yield "copy", copy
    for precision in ("bf16", "fp16", "tf32", "fp32") if context.gpu else ("fp32",):
        yield precision, multiply(precision)


def rates(context: Context) -> tuple[float | None, dict[str, float]]:
    """Copy GB/s (None if not measured) and TFLOP/s by precision, as the part `floor` found them."""
    rows = load(context.out)["parts"].get("floor", {}).get("rows", {})
    return rows.get("copy", {}).get("gb_s"), {k: r["tflop_s"] for k, r in rows.items() if "tflop_s" in r}


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


def ops(context: Context) -> Iterable[Job]:
    """Every native op at the size of a training step, forward and backward where it has both."""
    from gpu_check_ssd import ssd_cases  # which imports this file, as the next one does
    from gpu_check_variants import variant_cases

    watch = Stopwatch(context)
    groups = (normalize_cases, bias_relu_cases, match_cases, focal_cases, box_cases, loss_cases, candidate_cases)
    for group in (*groups, nms_cases, postprocess_cases, variant_cases, ssd_cases):
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


def work_dtype(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.gpu else torch.float32


def close(dtype: torch.dtype) -> float:
    """How far two correct results in a dtype may lie apart, relative to the largest value."""
    return {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-4)


def fresh(shape: tuple[int, ...], context: Context) -> Tensor:
    """Random values in the layout in which the network has its activations."""
    x = torch.randn(shape, device=context.device, dtype=work_dtype(context))
    return x.to(memory_format=torch.channels_last)


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


def truth(context: Context) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """anchors [A, 4], boxes [N, M, 4], labels [N, M], anchors a level, of a synthetic batch."""
    from single_stage_detector.anchors import anchors, grids

    s = context.sizes
    size = (s.image, s.image)
    batch = next(synthetic_batches(s.classes, size, s.batch, 32, seed=1))
    lengths = [rows * columns * 9 for rows, columns in grids(size)]
    place = anchors(size, grids(size)).to(context.device)
    return place, batch.boxes.to(context.device), batch.labels.to(context.device), lengths


def match_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.ops.match import match

    def case() -> Case:
        place, boxes, labels, _ = truth(context)
        pairs = int((labels >= 0).sum()) * len(place)
        moved = megabytes(place, boxes, labels) + labels.shape[0] * len(place) * 8 / 1e6
        return Case("single_stage_detector", lambda: lambda: match(place, boxes, labels), moved, gflop=14 * pairs / 1e9)

    yield "match", case


def outputs(context: Context, lengths: list[int], spread: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas of every level, as views of the convolutions' outputs, like the network's."""
    n, k, dtype = context.sizes.batch, context.sizes.classes, work_dtype(context)

    def level(length: int, width: int, mean: float) -> Tensor:
        return torch.randn(n, length, width, device=context.device).mul_(spread).add_(mean).to(dtype)

    return [level(a, k, -4.6) for a in lengths], [level(a, 4, 0.0) for a in lengths]


def matched_truth(context: Context) -> tuple[Tensor, ...]:
    """logits [N, A, K] and deltas [N, A, 4] of the first level, anchors, boxes, labels, matched, weight [N]."""
    from single_stage_detector.ops.match import match

    place, boxes, labels, lengths = truth(context)
    logits, deltas = outputs(context, lengths[:1])
    with native.using("reference"):
        matched = match(place, boxes, labels)
    weight = 1 / (matched >= 0).sum(1).clamp(min=1) / len(labels)
    return logits[0], deltas[0], place, boxes, labels, matched, weight


def focal_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.ops.focal import focal_loss

    def case() -> Case:
        logits, _, _, _, labels, matched, weight = matched_truth(context)
        return gradient_case(logits, lambda x: focal_loss(x, matched, labels, weight))

    yield "focal fwd+bwd, level P3", case


def box_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.ops.box import box_loss

    def case() -> Case:
        _, deltas, place, boxes, labels, matched, weight = matched_truth(context)
        return gradient_case(deltas, lambda x: box_loss(x, place, boxes, matched, labels, weight))

    yield "box fwd+bwd, level P3", case


def gradient_case(x: Tensor, loss: Callable[[Tensor], Tensor], *small: Tensor) -> Case:
    """The loss of x and its gradients, also of what is small: x must be read and its gradient written, once each."""
    x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        value = loss(x)
        return value, *torch.autograd.grad(value, (x, *small))

    return Case("single_stage_detector", lambda: run, 2 * megabytes(x), tolerance=close(x.dtype))


def candidate_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.ops.candidates import candidates

    def case() -> Case:
        logits, deltas = outputs(context, truth(context)[3])

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            return candidates(logits, deltas, 0.05, 1000)

        return Case("single_stage_detector", lambda: run, megabytes(*logits), tolerance=1e-5)

    yield "candidates", case


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


def loss_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.loss import losses

    def case(backward: bool) -> Case:
        place, boxes, labels, lengths = truth(context)
        logits, deltas = outputs(context, lengths)
        wide = [t.requires_grad_() for t in (*logits, *deltas)] if backward else []
        size = megabytes(*logits, *deltas)

        def forward() -> dict[str, Tensor]:
            return losses((logits, deltas), place, boxes, labels)

        if not backward:
            return Case("single_stage_detector", lambda: forward, size, tolerance=1e-3)

        def make() -> Callable[[], Any]:
            return lambda: torch.autograd.grad(sum(forward().values()), wide)

        # The logits must be read and their gradient written, once each.
        return Case("single_stage_detector", make, 2 * size, tolerance=close(logits[0].dtype))

    yield "losses fwd (match, focal, box)", lambda: case(False)
    yield "losses fwd+bwd", lambda: case(True)


def postprocess_cases(context: Context) -> Iterator[tuple[str, Callable[[], Case]]]:
    from single_stage_detector.postprocess import postprocess

    def case(spread: float) -> Case:
        place, _, _, lengths = truth(context)
        logits, deltas = outputs(context, lengths, spread)
        size = (context.sizes.image, context.sizes.image)

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor, Tensor]:
            return postprocess(logits, deltas, place, size)

        return Case("single_stage_detector", lambda: run, megabytes(*logits), tolerance=2e-3)

    yield "postprocess, few candidates", lambda: case(0.4)
    yield "postprocess, many candidates", lambda: case(1.5)
