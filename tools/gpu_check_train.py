"""The parts `train` and `peers` of tools/gpu_check.py: images/s of a whole training step, ours and torchvision's.

Ours goes through what a real run goes through: `build_task`, `engine.make_train_step` and with it the backend's
compile_step, chosen by the options of Config; the batch is synthetic and lies on the device, so no loader limits it.
"""

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from gpu_check_core import Context, Job, Row, Skip, Stopwatch, words
from gpu_check_ops import rates
from gpu_check_table import PUBLISHED

from detcore import backend, native

GFLOP_PER_IMAGE = 1169.0
"""Calculated, of a training step at 800x800 with 264 classes (2 per multiplication and addition)."""

# Mode, ops, precision, batch as a multiple of the main one; the most telling ones first, torch.compile last (minutes).
CASES = (
    ("graph", "native", "bf16", 1), ("eager", "native", "bf16", 1), ("eager", "reference", "bf16", 1),
    ("graph", "reference", "bf16", 1), ("graph", "native", "bf16", 2), ("graph", "native", "bf16", 1 / 2),
    ("graph", "native", "bf16", 1 / 4), ("graph", "native", "fp16", 1), ("graph", "native", "tf32", 1),
    ("eager", "native", "bf16", 1 / 4), ("eager", "native", "bf16", 2), ("compiled", "native", "bf16", 1),
    ("compiled+graph", "native", "bf16", 1), ("compiled", "reference", "bf16", 1),
)  # fmt: skip


def published(device: str) -> tuple[str, float] | None:
    """(card, images/s) of the published figure for this card; None where none fits."""
    return next(((name, value) for name, value in PUBLISHED.items() if name in device), None)


def retinanet(context: Context, batch: int, precision: str, mode: str, ops: str):
    """RetinaNet's Config: the benchmark's model on a GPU, a small one on a CPU."""
    from single_stage_detector.config import Config

    s = context.sizes
    return Config(
        num_classes=s.classes, image_size=(s.image, s.image), backbone=s.backbone, fpn_channels=s.channels,
        head_convs=s.head_convs, **run_options(context, batch, precision, mode, ops),
    )  # fmt: skip


def run_options(context: Context, batch: int, precision: str, mode: str, ops: str) -> dict[str, Any]:
    """Options of a Config that every program has."""
    own = {"graphs": "on" if "graph" in mode else "off", "compile": "compiled" in mode, "ops": ops}
    device = "cuda" if context.gpu else "cpu"
    return {"synthetic": True, "device": device, "precision": precision, "batch_size": batch, "seed": 1, **own}


class TrainStep:
    """The training step of a config of any of the programs, ready to be called; the same objects as in engine.train.

    Raises Skip for native ops that are not built.
    """

    def __init__(self, config: Any):
        from detcore import engine, optim
        from detcore.data.synthetic import synthetic_batches
        from detcore.detection import class_count
        from detcore.launcher import World
        from detcore.state import State
        from detcore.task import Context as RunContext

        missing = native.load(config.program) if config.ops == "native" else ""
        if missing:
            raise Skip(missing)
        self.config = config
        self.backend = engine.open_device(config, World())
        torch.manual_seed(1)
        self.task = import_module(f"{config.program}.train").build_task(config, RunContext(self.backend, World(), 1))
        state = State(self.task.model, self.task.optimizer, self.backend.scaler(), None)
        self.step = engine.make_train_step(self.task, state, self.task.model, config, self.backend)
        optim.set_lr(self.task.optimizer, 1e-6)  # weights stay near where they are, as long as the clock runs
        self.task.model.train()
        self.classes = class_count(import_module(f"{config.program}.data").DETECTOR, config)
        shape = (config.image_size, config.batch_size, config.max_boxes)
        self.batch = self.backend.to_device(next(synthetic_batches(self.classes, *shape, 1)))

    def __call__(self) -> dict[str, torch.Tensor]:
        return self.step([self.batch])

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
    watch = Stopwatch(context)
    for mode, ops, precision, times in cases(context):
        batch = max(1, int(context.sizes.batch * times))
        chosen = retinanet(context, batch, precision, mode, ops), mode
        yield f"{precision} b{batch} {mode} {ops}", lambda a=chosen: train_row(*a, context, watch)


def train_row(config: Any, mode: str, context: Context, watch: Stopwatch, gflop: float = GFLOP_PER_IMAGE) -> Row:
    """images/s of the training step of a config, and its loss, of any program."""
    step = TrainStep(config)
    try:
        row = watch.time(step, warmup=5, least=5, most=100)
        loss = float(sum(step().values()))
    finally:
        step.close()
        forget_compiled(mode)
    row |= {"mode": mode, "ops": config.ops, "loss": loss if math.isfinite(loss) else str(loss)}
    return judge(row, config.batch_size, context, config.precision, gflop)


def cases(context: Context) -> Iterable[tuple[str, str, str, float]]:
    if context.gpu:
        return CASES[:4] if context.quick else CASES
    return (("eager", "native", "fp32", 1), ("eager", "reference", "fp32", 1))


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
