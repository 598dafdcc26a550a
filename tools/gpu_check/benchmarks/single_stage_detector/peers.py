"""The part `peers`: images/s of a training step of torchvision's RetinaNet."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from detcore.device.select import select_backend
from tools.bench.train_step import batch, torchvision_model
from tools.gpu_check.benchmarks.single_stage_detector.train import SCALE
from tools.gpu_check.state import Context, Job, Row, Skip, words
from tools.gpu_check.steps import forget_compiled, judge
from tools.gpu_check.timing import Stopwatch


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
    return judge(row, context.sizes.batch, context, precision, SCALE) | {"mode": mode, "ops": "torchvision"}


def torchvision_step(context: Context, precision: str, mode: str) -> Callable[[], Any]:
    """Its whole step: AMP forward, loss, backward, fused Adam, with channels_last weights as ours."""
    s, device = context.sizes, context.device
    chosen = select_backend(device.type, precision)
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
