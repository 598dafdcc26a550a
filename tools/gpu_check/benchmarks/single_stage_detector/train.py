"""The part `train`: images/s of RetinaNet's whole training step."""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from tools.gpu_check.benchmarks.single_stage_detector.table import GFLOP_PER_IMAGE, PUBLISHED
from tools.gpu_check.state import Context, Job, Row, load
from tools.gpu_check.steps import ALL_BUT_FP8, Scale, run_options, train_row
from tools.gpu_check.timing import Stopwatch

PREDICTED_GAIN_MS = {
    "merged_groups": (3.0, 5.0), "conv_epilogues": (2.9, 2.9), "frozen_stage": (2.6, 2.6),
    "residual_gradient": (2.0, 2.0), "class_bias": (2.0, 2.0), "stem": (0.3, 2.0), "multi_cast": (0.5, 0.5),
    "small_levels": (0.5, 1.5), "fp8_heads": (-1.0, 10.0), "cudnn_benchmark_limit": (0.0, 4.0),
}  # fmt: skip
"""What each variant is calculated to win of a step of 32 images in bf16 on an H100, ms: at least, at most (docs/LOG.md
says from what). The frozen stage's 2.6 are among those of conv_epilogues, which switches it on as well."""
VARIANTS = tuple(name for name in PREDICTED_GAIN_MS if name != "cudnn_benchmark_limit")
LOSS_LIMITS = {"bf16": (2**-7, 2**-5), "fp32": (1e-4, 1e-3)}
"""How far the first and the later loss of a row may lie from the main one's, relative. In bf16 a value is rounded to
2^-9 of itself: a loss, the mean over very many of them, moves by less than four such roundings. After UPDATES updates
four times as much, since Adam's first ones take of a gradient little but its sign, also where that is rounding."""
FP8_LOSS_LIMIT = 0.05
"""The same of both with fp8_heads, whose forward pass rounds each value of the heads to 2^-4 of itself."""
COMPILE_SECONDS = 180.0
"""A part with less time compiles last, so that the variants are measured."""
SCALE = Scale(GFLOP_PER_IMAGE, PUBLISHED)


@dataclass(frozen=True)
class Case:
    """A row of the part `train`.

    times: its batch as a multiple of the main one. variants: those that are on; what: how the key calls them. limit:
    cudnn_benchmark_limit, None for the default. profiled: with its kernels by family.
    """

    mode: str
    ops: str
    precision: str = "bf16"
    times: float = 1
    variants: tuple[str, ...] | None = None
    what: str = ""
    limit: int | None = None
    profiled: bool = False

    def key(self, context: Context) -> str:
        return f"{self.precision} b{self.batch(context)} {self.mode} {self.ops}" + f" {self.what}" * bool(self.what)

    def batch(self, context: Context) -> int:
        return max(1, int(context.sizes.batch * self.times))


# The first is the main row, which the others are compared with, and the core list's; then the most telling ones. The
# same step again tells how far two measurements of one thing lie apart.
CASES = (
    Case("graph", "native", profiled=True), Case("compiled+graph", "native"),
    Case("graph", "native", variants=(), what="again"),
    *(Case("graph", "native", variants=(name,), what=f"+{name}") for name in VARIANTS),
    Case("graph", "native", **ALL_BUT_FP8, profiled=True),
    Case("graph", "native", variants=VARIANTS, what="+all"),
    Case("graph", "native", limit=0, what="cudnn_benchmark_limit 0"),
    Case("eager", "native"), Case("eager", "reference", profiled=True), Case("graph", "reference"),
    Case("graph", "native", times=2), Case("graph", "native", times=1 / 2), Case("graph", "native", times=1 / 4),
    Case("graph", "native", "fp16"), Case("graph", "native", "tf32"), Case("eager", "native", times=1 / 4),
    Case("eager", "native", times=2), Case("compiled", "native"), Case("compiled", "reference"),
)  # fmt: skip
QUICK_CASES = (CASES[0], Case("graph", "native", **ALL_BUT_FP8), Case("eager", "native"), Case("eager", "reference"))
CPU_CASES = (
    Case("eager", "native", "fp32", profiled=True), Case("eager", "reference", "fp32"),
    Case("eager", "native", "fp32", **ALL_BUT_FP8),
)  # fmt: skip


def retinanet(context: Context, batch: int, precision: str, mode: str, ops: str, **more: Any):
    """RetinaNet's Config: the benchmark's model on a GPU, a small one on a CPU; more: other fields of it."""
    from single_stage_detector.config import Config

    s = context.sizes
    return Config(
        num_classes=s.classes, image_size=(s.image, s.image), backbone=s.backbone, fpn_channels=s.channels,
        head_convs=s.head_convs, **run_options(context, batch, precision, mode, ops), **more,
    )  # fmt: skip


def train(context: Context) -> Iterable[Job]:
    """images/s of the training step in every mode; keys such as "bf16 b32 graph native"."""
    watch, chosen = Stopwatch(context), cases(context)
    if context.left() < COMPILE_SECONDS:
        chosen = sorted(chosen, key=lambda case: "compiled" in case.mode)
    for case in chosen:
        yield case.key(context), lambda case=case: case_row(case, context, watch)


def cases(context: Context) -> tuple[Case, ...]:
    if not context.gpu:
        return CPU_CASES
    return QUICK_CASES if context.quick else CASES


def case_row(case: Case, context: Context, watch: Stopwatch) -> Row:
    """The row of a case, beside the main one where it computes the same, with "error" where it does not; a variant's
    with predicted_gain_ms."""
    more: dict[str, Any] = {} if case.variants is None else {"variants": case.variants}
    more |= {} if case.limit is None else {"cudnn_benchmark_limit": case.limit}
    config = retinanet(context, case.batch(context), case.precision, case.mode, case.ops, **more)
    measure = train_row if case.limit is None else apart
    row = measure(config, case.mode, context, watch, SCALE, case.profiled)
    if more:
        row |= {"predicted_gain_ms": predicted_gain(case, context), "variants": case.variants or ()}
    row |= beside_main(row, case, context)
    wrong = apart_by(row, case)
    return row | ({"error": wrong} if wrong and "error" not in row else {})


def apart_by(row: Row, case: Case) -> str:
    """What is wrong with losses that lie further from the main row's than rounding explains; "" if nothing is."""
    limits = LOSS_LIMITS.get(case.precision, ())
    if "fp8_heads" in (case.variants or ()):
        limits = (FP8_LOSS_LIMIT,) * 2
    for name, limit in zip(("loss", "later_loss"), limits):
        difference = row.get(f"{name}_difference", 0.0)
        if difference > limit:
            return f"{name} {row[name]:.6g} differs by {difference:.2g} from the main row's, allowed are {limit:.2g}"
    return ""


def apart(*arguments: Any) -> Row:
    """train_row in a process of its own: what cuDNN has chosen for a convolution, a process keeps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train_row, *arguments).result()


def predicted_gain(case: Case, context: Context) -> tuple[float, float] | None:
    """What a case is calculated to win at least and at most, ms a step; None for another batch than 32.

    With conv_epilogues the frozen stage's share is counted once.
    """
    if case.batch(context) != 32:
        return None
    if case.limit is not None:
        return PREDICTED_GAIN_MS["cudnn_benchmark_limit"]
    names = set(case.variants or ())
    if "conv_epilogues" in names:
        names.discard("frozen_stage")
    gains = [PREDICTED_GAIN_MS[name] for name in names]
    return sum(low for low, _ in gains), sum(high for _, high in gains)


def beside_main(row: Row, case: Case, context: Context) -> Row:
    """gain_ms against the main row, the first case's, and the relative differences of both losses; {} for others than
    its batch and precision, and without that row."""
    main = cases(context)[0]
    found = load(context.out)["parts"].get("train", {}).get("rows", {}).get(main.key(context), {})
    if case == main or "ms" not in found or (case.precision, case.times) != (main.precision, main.times):
        return {}
    differences = {
        f"{name}_difference": abs(row[name] - found[name]) / abs(found[name])
        for name in ("loss", "later_loss")
        if isinstance(row[name], float) and isinstance(found[name], float)
    }
    return {"gain_ms": found["ms"] - row["ms"], **differences}
