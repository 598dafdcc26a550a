"""The part `probe`: single operations of RetinaNet's training step at its batch.

Which convolutions the library does badly, and what another way to ask for the same would win: the figures that decide
on the variants of detcore/device/native.py. Rows "step: ..." add up what one way wins over another in a whole step, in
ms, beside what was predicted.

A row holds, beside its times: gflop, mb (computed; read and written once), tflop_s, percent_of_matmul (of the rate of
the part `floor`; for 8 bits of that of bf16), gb_s where the bytes take longer than the arithmetic, first_s (the first
call, with the library's trials), kernels (names, longest time first), layout (those that only change the order in
memory); the last two where the kernels are not those of a row before. difference: from the slow way, relative to its
largest value; a row whose difference is more than rounding has "error". On a CPU the sizes are tiny: there it is the
code that is tried.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detcore import UserError
from detcore.device import native
from detcore.ops.bias_relu import bias_relu
from detcore.ops.conv import merged
from detcore.ops.pool_bias_relu import pool_bias_relu
from tools.gpu_check.benchmarks.single_stage_detector import conv3x3
from tools.gpu_check.benchmarks.single_stage_detector.calls import (
    GRADIENTS,
    REFUSED,
    attempt,
    convolution,
    gflop,
    judged,
    narrowed,
    tried,
)
from tools.gpu_check.benchmarks.single_stage_detector.train import PREDICTED_GAIN_MS
from tools.gpu_check.cases import megabytes
from tools.gpu_check.floor import PRECISIONS, rates
from tools.gpu_check.kernels import layout_kernels, traced
from tools.gpu_check.state import Context, Job, Row, Skip, load
from tools.gpu_check.timing import Stopwatch

HEADS = (
    *(f"{how} {what}" for what in ("forward", "input gradient", "weight gradient") for how in ("16-bit", "8-bit")),
    "quantise input", "quantise gradient",
)  # fmt: skip
"""Those of the ways of conv3x3.py that are not the library's, whose rows are there already."""
BOTH = ("input gradient", "weight gradient")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Conv:
    """A convolution of the network. side: of its input; calls: how many like it a step has; frozen: the benchmark
    trains without its gradients."""

    name: str
    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    calls: int = 1
    frozen: bool = False


def grouped_conv(name: str, channels: int, side: int, **more: Any) -> Conv:
    return Conv(f"{name} {channels}x{side}", channels, channels, side, groups=32, **more)


GROUPED = (
    grouped_conv("layer2", 256, 100, calls=3), grouped_conv("layer3", 512, 50, calls=5),
    grouped_conv("layer4", 1024, 25, calls=2), grouped_conv("layer2.0", 256, 200, stride=2),
    grouped_conv("layer3.0", 512, 100, stride=2), grouped_conv("layer4.0", 1024, 50, stride=2),
    grouped_conv("layer1", 128, 200, calls=3, frozen=True),
)  # fmt: skip
CONV1 = tuple(Conv(f"conv1 of {c} channels", c, 64, 800, kernel=7, stride=2) for c in (3, 4, 8))
LEVELS = {"P3": 100, "P4": 50, "P5": 25, "P6": 13, "P7": 7}
TOWER = tuple(Conv(f"tower {level}", 256, 256, side, calls=8) for level, side in LEVELS.items())
CLASSES = tuple(Conv(f"class {level}", 256, 2376, side) for level, side in LEVELS.items())
FROZEN = (
    Conv("layer1.0 conv1", 64, 128, 200, kernel=1), Conv("layer1 conv1", 256, 128, 200, kernel=1, calls=2),
    GROUPED[-1], Conv("layer1 conv3 + residual", 128, 256, 200, kernel=1, calls=3),
)  # fmt: skip
"""Convolutions of the stage that is not trained, after which come a bias and ReLU."""
FOLLOWED = (*FROZEN, Conv("layer3 conv3 + residual", 512, 1024, 50, kernel=1, calls=6), TOWER[0])
TRIED = (
    (GROUPED[1], "weight gradient"), (GROUPED[0], "forward"), (TOWER[0], "forward"), (CLASSES[0], "weight gradient"),
)  # fmt: skip
TRIALS = {"no trials": (False, 10), "limit 10": (True, 10), "limit 0": (True, 0)}
"""cudnn.benchmark and its limit; 0: all algorithms. Training's default is limit 10."""
NOT_TRACED = ("bias", "limit 10")
"""Ways whose convolutions other rows have already, so that their kernels are not asked for again."""
OPTIONAL_SECONDS = 8.0
"""With less time left no further row is begun of those that decide nothing."""


def probe(context: Context) -> Iterator[Job]:
    """What decides most comes first, since a part may be cut; each group's sum follows it."""
    bench = Bench(context)
    precisions = ("bf16", "fp16") if context.gpu else ("fp32",)
    trained = [(conv, d) for conv in GROUPED for d in (("forward",) if conv.frozen else ("forward", *BOTH))]
    frozen = [(conv, d) for conv in GROUPED if conv.frozen for d in BOTH]
    biased = [[(conv, d) for conv in convs for d in ("forward", GRADIENTS)] for convs in (CLASSES, TOWER)]
    yield from bench.convs(trained, ("32 groups", "merged"))
    yield bench.step("merged groups", trained, ("32 groups", "merged"), "merged_groups")
    yield from bench.stem()
    yield from bench.convs(biased[0], ("bias", "no bias"))
    yield bench.step("class bias", biased[0], ("bias", "no bias"), "class_bias")
    for conv in FOLLOWED:
        yield from bench.followed(conv)
    yield bench.step("frozen stage", [(c, "forward") for c in FROZEN], ("bias_relu", "fused"), "frozen_stage")
    yield from bench.products()
    yield from bench.heads()
    yield from bench.convs(biased[1], ("bias", "no bias"))
    yield from bench.convs(frozen, ("32 groups", "merged"))
    yield from optional([*bench.convs(TRIED, tuple(TRIALS)), *(
        job for other in precisions[1:] for job in bench.convs(trained + frozen, ("32 groups", "merged"), other)
    )], context)  # fmt: skip


def optional(jobs: list[Job], context: Context) -> Iterator[Job]:
    """Jobs whose lack is no fault: a row says how many there was no time for."""
    for number, job in enumerate(jobs):
        if context.left() < OPTIONAL_SECONDS:
            yield "optional rows", partial(no_time, len(jobs) - number)
            return
        yield job


def no_time(left: int) -> Row:
    raise Skip(f"no time for {left} rows that decide nothing")


class Bench:
    """Makes the jobs of the part."""

    def __init__(self, context: Context):
        self.context, self.watch = context, Stopwatch(context)
        self.batch, self.device = context.sizes.batch, context.device
        self.precision = "bf16" if context.gpu else "fp32"

    def key(self, conv: Conv, direction: str, way: str, precision: str = "") -> str:
        return " ".join(filter(None, (conv.name, precision or self.precision, way, direction)))

    def side(self, side: int) -> int:
        return side if self.context.gpu else max(2, side // 25)

    def fitted(self, conv: Conv) -> Conv:
        """The convolution as it is measured here."""
        outputs = conv.outputs if self.context.gpu else min(conv.outputs, 1024)
        return replace(conv, side=self.side(conv.side), outputs=outputs)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random values, in channels_last where there are four dimensions."""
        last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        dtype = dtype or PRECISIONS[self.precision]
        return torch.empty(shape, device=self.device, dtype=dtype, memory_format=last).normal_()

    def tensors(self, conv: Conv, precision: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """(input, weight, gradient of the output)."""
        out, n, dtype = (conv.side - 1) // conv.stride + 1, self.batch, PRECISIONS[precision or self.precision]
        x = self.tensor(n, conv.inputs, conv.side, conv.side, dtype=dtype)
        weight = self.tensor(conv.outputs, conv.inputs // conv.groups, conv.kernel, conv.kernel, dtype=dtype)
        return x, weight, self.tensor(n, conv.outputs, out, out, dtype=dtype)

    def convs(self, wanted: Any, ways: tuple[str, ...], precision: str = "") -> Iterator[Job]:
        """A row for each (convolution, direction) and way: "32 groups", "merged", "bias", "no bias", one of TRIALS or
        ""."""
        for conv, direction in wanted:
            for way in ways:
                chosen = conv, direction, way, precision
                yield self.key(*chosen), lambda chosen=chosen: self.conv(*chosen)

    def conv(self, conv: Conv, direction: str, way: str, precision: str) -> Row:
        conv = self.fitted(conv)
        x, weight, grad = self.tensors(conv, precision)
        groups, bias = conv.groups, self.tensor(conv.outputs, dtype=x.dtype) if way == "bias" else None
        run = plain = convolution((x, weight, bias, grad), conv, groups, direction)
        if way == "merged":
            wide, groups = merged(weight, groups)
            run = convolution((x, wide, bias, grad), conv, groups, direction)
        passes = 2 if direction == GRADIENTS else 1
        asked = wide if way == "merged" else weight
        work = passes * gflop(asked, grad), passes * megabytes(x, asked, grad)
        trace = way not in NOT_TRACED and not precision
        if way == "merged":
            row = self.measured(run, *work, precision, trace=trace)
            return judged(row, narrowed(run(), weight, conv.groups), plain())
        if way not in TRIALS:
            return self.measured(run, *work, precision, trace=trace)
        with ThreadPoolExecutor(1) as fresh:  # what the library has chosen for a convolution, a thread keeps
            return fresh.submit(self.measured, run, *work, precision, way, trace).result()

    def measured(
        self, run: Callable[[], Any], flop: float, mb: float, precision: str = "", trials: str = "limit 10",
        trace: bool = True,
    ) -> Row:  # fmt: skip
        """The row of an operation of so many GFLOP and MB; trace: with its kernels."""
        with tried(*TRIALS[trials]):
            start = time.perf_counter()
            run()
            if self.context.gpu:
                torch.cuda.synchronize()
            first = time.perf_counter() - start
            seconds = self.context.sizes.seconds / 20
            row = self.watch.time(run, warmup=1, least=5, most=30, cold=True, seconds=seconds)
            kernels = traced(run, self.context.gpu) if trace else {}
        row["first_s"] = first
        if trace:
            names = sorted(kernels, key=lambda name: -kernels[name][0])
            row |= {"kernels": [name[:200] for name in names[:6]]}
            row |= {"layout": [name[:200] for name in layout_kernels(names)]}
        return row | self.worth(row["ms"], flop, mb, precision or self.precision)

    def worth(self, ms: float, flop: float, mb: float, precision: str) -> Row:
        """What a time means beside the rates of the part `floor`, where they were measured."""
        copy, rate = rates(self.context)
        row: Row = {"gflop": flop, "mb": mb}
        if flop:
            row["tflop_s"] = flop / ms
        if flop and precision in rate:
            row["percent_of_matmul"] = 100 * flop / ms / rate[precision]
        if copy:
            bytes_ms, flop_ms = mb / copy, flop / rate.get(precision, float("inf"))
            row["floor_ms"] = max(bytes_ms, flop_ms)
            row |= {"gb_s": mb / ms} if bytes_ms >= flop_ms else {}
        return row

    def step(self, what: str, wanted: Any, ways: tuple[str, str], variant: str) -> Job:
        """What the second way wins of a step over the first, from rows that are there."""
        pairs = [(conv.calls, *(self.key(conv, direction, way) for way in ways)) for conv, direction in wanted]
        return self.saved(what, pairs, variant)

    def saved(self, what: str, pairs: Any, variant: str) -> Job:
        """pairs: (calls a step, key of the slow row, key of the fast one). Where the library refuses the fast way, it
        is the slow one's time; "refused" counts those."""

        def add() -> Row:
            rows = load(self.context.out)["parts"].get("probe", {}).get("rows", {})
            refused = {fast for _, _, fast in pairs if rows.get(fast, {}).get("skipped", "").startswith(REFUSED)}
            taken = [(calls, slow, slow if fast in refused else fast) for calls, slow, fast in pairs]
            right = {key for key, row in rows.items() if "ms" in row and "error" not in row}
            missing = [key for _, *keys in taken for key in keys if key not in right]
            if missing:
                raise Skip(f"{len(missing)} of its rows are missing, the first: {missing[0]}")
            if len(refused) == len(pairs):
                raise Skip(f"{REFUSED}: the library refuses all {len(pairs)}")
            won = sum(calls * (rows[slow]["ms"] - rows[fast]["ms"]) for calls, slow, fast in taken)
            predicted = PREDICTED_GAIN_MS[variant] if self.batch == 32 else None
            return {"ms": won, "predicted_ms": predicted, "refused": len(refused), "pairs": len(pairs)}

        return f"step: {what}", add

    def stem(self) -> Iterator[Job]:
        """conv1 of 3, 4 and 8 channels, and the max-pool after it: torch's in three ways, and with bias and ReLU by two
        passes and by one. On a GPU torch 2.14 computes the indices also where nobody asks for them."""
        yield from self.convs([(conv, "forward") for conv in CONV1], ("",))
        for way in ("indices", "no indices", "with gradient", "then bias_relu", "bias_relu in one"):
            yield f"max-pool {self.precision} {way}", lambda way=way: self.pool(way)
        three, four, _ = (self.key(conv, "forward", "") for conv in CONV1)
        pools = (f"max-pool {self.precision} {way}" for way in ("then bias_relu", "bias_relu in one"))
        yield self.saved("stem", [(1, three, four), (1, *pools)], "stem")

    def pool(self, way: str) -> Row:
        side = self.side(400)
        x, grad = self.tensor(self.batch, 64, side, side), self.tensor(self.batch, 64, side // 2, side // 2)
        bias, mb, places = self.tensor(64).float(), megabytes(x, grad), 8 * grad.numel() / 1e6
        if way == "with gradient":
            x.requires_grad_()
            return self.measured(lambda: torch.autograd.grad(F.max_pool2d(x, 3, 2, 1), x, grad), 0.0, 2 * (mb + places))
        if way in ("indices", "no indices"):
            kept = way == "indices"
            return self.measured(lambda: F.max_pool2d(x, 3, 2, 1, return_indices=kept), 0.0, mb + kept * places)
        if missing := native.load("detcore"):
            raise Skip(missing)
        with native.using("native"):
            if way == "then bias_relu":
                return self.measured(lambda: bias_relu(F.max_pool2d(x, 3, 2, 1), bias), 0.0, mb)
            return self.measured(lambda: pool_bias_relu(x, bias), 0.0, mb)

    def followed(self, conv: Conv) -> Iterator[Job]:
        """The convolution, bias, residual where the name says so, ReLU: by the op after the library's convolution, and
        by the library in one; without gradients."""
        yield self.key(conv, "forward", "bias_relu"), lambda: self.epilogue(conv, False)
        yield self.key(conv, "forward", "fused"), lambda: self.epilogue(conv, True)

    def epilogue(self, conv: Conv, fused: bool) -> Row:
        if missing := native.load("detcore"):
            raise Skip(missing)
        conv = self.fitted(conv)
        x, weight, out = self.tensors(conv)
        bias, residual = self.tensor(conv.outputs), out if "residual" in conv.name else None
        wide = bias.float()
        place = (conv.stride,) * 2, (conv.kernel // 2,) * 2, (1, 1), conv.groups

        def ours() -> Tensor:
            return bias_relu(F.conv2d(x, weight, None, *place), wide, residual)

        def theirs() -> Tensor:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *place)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *place)

        mb = megabytes(x, weight, out) + (megabytes(out) if residual is not None else 0.0)
        with native.using("native"):
            if not fused:
                return self.measured(ours, gflop(weight, out), mb)
            wanted = ours()
            attempt(theirs)  # its trials have memory of their own
            # What it does not write, or reads of what nobody has written, it finds in freed memory.
            del [torch.full_like(out, float("nan")) for _ in range(3)][:]
            found = attempt(theirs)
            return judged(attempt(lambda: self.measured(theirs, gflop(weight, out), mb)), found, wanted)

    def heads(self) -> Iterator[Job]:
        """The heads' widest convolutions by kernels of our own, in 16 and in 8 bits."""
        for conv in (TOWER[0], CLASSES[0]):
            for way in HEADS:
                yield f"{conv.name} {way}", lambda conv=conv, way=way: self.head(conv, way)

    def head(self, conv: Conv, way: str) -> Row:
        tensors = self.tensors(self.fitted(conv))
        flop = 0.0 if way.startswith("quantise") else gflop(*tensors[1:])
        try:
            with native.using("auto", "fp8_heads"):
                native.fp8_heads(self.device.type)
        except UserError as error:
            raise Skip(str(error)) from error
        return self.measured(conv3x3.ways(*tensors)[way], flop, megabytes(*tensors))

    def products(self) -> Iterator[Job]:
        """P3's convolutions as one matrix product of [cells, 2304] and [2304, outputs], in bf16 and in 8 bits."""
        for name, width in (("tower", 256), ("class", 2384)):  # 8 bits want a multiple of 16, of which 2376 is none
            narrow = [(E4M3, True), (E4M3, False), (E5M2, True)] if name == "tower" else [(E4M3, True)]
            yield f"product {name} P3 {self.precision}", lambda width=width: self.product(width, None, False)
            for dtype, fast in narrow:
                words = str(dtype).removeprefix("torch.float8_") + (" fast sums" if fast else " exact sums")
                chosen = width, dtype, fast
                yield f"product {name} P3 {words}", lambda chosen=chosen: self.product(*chosen)

    def product(self, width: int, dtype: torch.dtype | None, fast: bool) -> Row:
        """dtype: of the first matrix, the second's being e4m3; None for both in the usual precision."""
        cells, depth = self.batch * self.side(100) ** 2, 2304
        if not self.context.gpu:
            depth, width = 144, 32  # a CPU takes seconds for a product of 8-bit numbers
        a, b = self.tensor(cells, depth), self.tensor(width, depth)
        work = 2 * cells * depth * width / 1e9
        if dtype is None:
            mb = megabytes(a, b) + cells * width * a.element_size() / 1e6
            return self.measured(lambda: torch.mm(a, b.t()), work, mb)
        narrow, right = a.to(dtype), b.to(E4M3)
        one = torch.ones((), device=self.device)

        def run() -> Tensor:
            return torch._scaled_mm(
                narrow, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        return attempt(lambda: self.measured(run, work, megabytes(narrow, right) + 2 * cells * width / 1e6))
