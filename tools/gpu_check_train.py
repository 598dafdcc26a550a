"""The parts `train` and `peers` of tools/gpu_check.py: images/s of a whole training step, ours and torchvision's.

Ours goes through what a real run goes through: `build_task`, `engine.make_train_step` and with it the backend's
compile_step, chosen by the options of Config; the batch is synthetic and lies on the device, so no loader limits it.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from gpu_check_core import Context, Job, Row, Skip, Stopwatch, load, words
from gpu_check_ops import rates
from gpu_check_profile import profile_step
from gpu_check_table import PUBLISHED

from detcore.device import backend, native
from detcore.nn import optim

GFLOP_PER_IMAGE = 1169.0
"""Calculated, of a training step at 800x800 with 264 classes (2 per multiplication and addition)."""
PREDICTED_GAIN_MS = {
    "merged_groups": (3.0, 5.0), "conv_epilogues": (2.9, 2.9), "frozen_stage": (2.6, 2.6),
    "residual_gradient": (2.0, 2.0), "class_bias": (2.0, 2.0), "stem": (0.3, 2.0), "multi_cast": (0.5, 0.5),
    "small_levels": (0.5, 1.5), "fp8_heads": (-1.0, 10.0), "cudnn_benchmark_limit": (0.0, 4.0),
}  # fmt: skip
"""What each variant is calculated to win of a step of 32 images in bf16 on an H100, ms: at least, at most (docs/LOG.md
says from what). The frozen stage's 2.6 are among those of conv_epilogues, which switches it on as well."""
LOSS_LIMITS = {"bf16": (2**-7, 2**-5), "fp32": (1e-4, 1e-3)}
"""How far the first and the later loss of a row may lie from the main one's, relative. In bf16 a value is rounded to
2^-9 of itself: a loss, the mean over very many of them, moves by less than four such roundings. After UPDATES updates
four times as much, since Adam's first ones take of a gradient little but its sign, also where that is rounding."""
FP8_LOSS_LIMIT = 0.05
"""The same of both with fp8_heads, whose forward pass rounds each value of the heads to 2^-4 of itself."""
COMPILE_SECONDS = 180.0
"""A part with less time compiles last, so that the variants are measured."""
UPDATES = 5
"""Updates at RATE between the two losses of a row."""
RATE = 1e-4


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


NARROW = tuple(name for name in native.VARIANTS if name != "fp8_heads")
ALL_BUT_FP8 = {"variants": NARROW, "what": "+all but fp8_heads"}
# The first is the main row, which the others are compared with, and the core list's; then the most telling ones. The
# same step again tells how far two measurements of one thing lie apart.
CASES = (
    Case("graph", "native", profiled=True), Case("compiled+graph", "native"),
    Case("graph", "native", variants=(), what="again"),
    *(Case("graph", "native", variants=(name,), what=f"+{name}") for name in native.VARIANTS),
    Case("graph", "native", **ALL_BUT_FP8, profiled=True),
    Case("graph", "native", variants=tuple(native.VARIANTS), what="+all"),
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


def published(device: str) -> tuple[str, float] | None:
    """(card, images/s) of the published figure for this card; None where none fits."""
    return next(((name, value) for name, value in PUBLISHED.items() if name in device), None)


def retinanet(context: Context, batch: int, precision: str, mode: str, ops: str, **more: Any):
    """RetinaNet's Config: the benchmark's model on a GPU, a small one on a CPU; more: other fields of it."""
    from single_stage_detector.config import Config

    s = context.sizes
    return Config(
        num_classes=s.classes, image_size=(s.image, s.image), backbone=s.backbone, fpn_channels=s.channels,
        head_convs=s.head_convs, **run_options(context, batch, precision, mode, ops), **more,
    )  # fmt: skip


def run_options(context: Context, batch: int, precision: str, mode: str, ops: str) -> dict[str, Any]:
    """Options of a Config that every program has."""
    own = {"graphs": "on" if "graph" in mode else "off", "compile": "compiled" in mode, "ops": ops}
    device = "cuda" if context.gpu else "cpu"
    return {"synthetic": True, "device": device, "precision": precision, "batch_size": batch, "seed": 1, **own}


class Program:
    """Device, task and a batch of a config of any of the programs; the same objects as in engine.train.

    Raises Skip for native ops that are not built.
    """

    def __init__(self, config: Any):
        from detcore.data.synthetic import synthetic_batches
        from detcore.detection.detector import class_count
        from detcore.processes.launcher import World
        from detcore.training import engine
        from detcore.training.task import Context as RunContext

        missing = native.load(config.program) if config.ops == "native" else ""
        if missing:
            raise Skip(missing)
        self.config = config
        self.backend = engine.open_device(config, World())
        torch.manual_seed(1)
        self.task = import_module(f"{config.program}.train").build_task(config, RunContext(self.backend, World(), 1))
        self.classes = class_count(import_module(f"{config.program}.data").DETECTOR, config)
        shape = (config.image_size, config.batch_size, config.max_boxes)
        self.batch = self.backend.to_device(next(synthetic_batches(self.classes, *shape, 1)))


class TrainStep(Program):
    """A training step, warmed up, to be called."""

    def __init__(self, config: Any):
        from detcore.training import engine
        from detcore.training.state import State

        super().__init__(config)
        state = State(self.task.model, self.task.optimizer, self.backend.scaler(), None)
        self.step = engine.make_train_step(self.task, state, self.task.model, config, self.backend)
        self.task.model.train()

    def __call__(self) -> dict[str, torch.Tensor]:
        return self.step([self.batch])

    def losses(self) -> tuple[float, float]:
        """The loss of the fresh weights and that after UPDATES updates, which warm the step up.

        The weights are the same in each row: the first loss tells whether its forward pass computes the same, the
        second whether its gradients do. After it the weights stay near where they are, as long as the clock runs.
        """
        optim.set_lr(self.task.optimizer, RATE)
        values = [float(sum(self().values())) for _ in range(UPDATES + 1)]
        optim.set_lr(self.task.optimizer, 1e-6)
        return values[0], values[-1]

    def close(self) -> None:
        self.backend.close()


def judge(row: Row, batch: int, context: Context, precision: str, gflop: float = GFLOP_PER_IMAGE) -> Row:
    """images/s and what they mean: against the published figure of RetinaNet and the floor of gflop an image."""
    row |= {"batch": batch, "precision": precision, "images_per_s": 1e3 * batch / row["ms"]}
    row |= {"images_per_s_p10": 1e3 * batch / row["p90_ms"], "images_per_s_p90": 1e3 * batch / row["p10_ms"]}
    if not context.gpu:
        return row
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    card = published(torch.cuda.get_device_name())
    if card and gflop == GFLOP_PER_IMAGE:
        row["x_published"] = row["images_per_s"] / card[1]
    _, rate = rates(context)
    if precision in rate:
        row["percent_of_flop_floor"] = 100 * row["images_per_s"] * gflop / 1e3 / rate[precision]
    return row


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
    row = measure(config, case.mode, context, watch, GFLOP_PER_IMAGE, case.profiled)
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


def train_row(
    config: Any, mode: str, context: Context, watch: Stopwatch, gflop: float = GFLOP_PER_IMAGE, profiled: bool = False
) -> Row:
    """images/s of the training step of a config of any program, its losses (`TrainStep.losses`; "error" where one is
    not finite), and under "profile" its kernels by family."""
    step = TrainStep(config)
    try:
        losses = [value if math.isfinite(value) else str(value) for value in step.losses()]
        row = watch.time(step, warmup=1, least=5, most=100)
        row |= {"mode": mode, "ops": config.ops, "loss": losses[0], "later_loss": losses[1]}
        if not all(isinstance(value, float) for value in losses):
            row["error"] = f"a loss is not finite: {losses[0]}, after {UPDATES} updates {losses[1]}"
        row = judge(row, config.batch_size, context, config.precision, gflop)
        if profiled:
            row["profile"] = profile_step(step, context, gflop)
    finally:
        step.close()
        forget_compiled(mode)
    return row


def forget_compiled(mode: str) -> None:
    if "compiled" in mode:
        torch._dynamo.reset()


def peers(context: Context) -> Iterable[Job]:
    """torchvision's RetinaNet: the same backbone, classes, trained layers, image size and number of anchors, AMP.

    Its data never changes shape either. Compiled twice: backbone and heads alone, which its loops over images leave
    whole, and everything.
    """
    watch = Stopwatch(context)
    precisions = ("bf16", "fp16") if context.gpu and not context.quick else ("bf16",) if context.gpu else ("fp32",)
    for mode in ("eager", "compiled parts", "compiled") if context.gpu else ("eager",):
        for precision in precisions if mode == "eager" else precisions[:1]:
            key = f"torchvision {precision} b{context.sizes.batch} {mode}"
            yield key, lambda mode=mode, precision=precision: peer(context, watch, precision, mode)


def peer(context: Context, watch: Stopwatch, precision: str, mode: str) -> Row:
    try:
        row = watch.time(torchvision_step(context, precision, mode), warmup=5, least=5, most=100)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if mode == "eager":
            raise
        raise Skip(f"torchvision's own model does not run under torch.compile here: {words(error)}") from error
    finally:
        forget_compiled(mode)
    return judge(row, context.sizes.batch, context, precision) | {"mode": mode, "ops": "torchvision"}


def torchvision_step(context: Context, precision: str, mode: str) -> Callable[[], Any]:
    """Its whole step: AMP forward, loss, backward, fused Adam, with channels_last weights as ours."""
    from bench_train_step import batch, torchvision_model

    s, device = context.sizes, context.device
    chosen = backend.select(device.type, precision)
    images, boxes, labels = batch(s.image, s.batch, s.classes, 10, seed=1)
    torch.manual_seed(1)
    model = chosen.place(torchvision_model(s.backbone, s.classes, s.image)).train()
    if mode == "compiled":
        model = torch.compile(model)
    elif mode == "compiled parts":
        model.backbone, model.head = torch.compile(model.backbone), torch.compile(model.head)
    as_floats = [image.to(device).float() / 255 for image in images]
    targets = [{"boxes": b.to(device), "labels": k.to(device)} for b, k in zip(boxes, labels, strict=True)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=context.gpu)
    scaler = chosen.scaler()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with chosen.autocast():
            loss = sum(model(as_floats, targets).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step
