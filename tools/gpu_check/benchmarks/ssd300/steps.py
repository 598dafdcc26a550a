"""The part `ssd300`."""

from collections.abc import Iterable

from tools.gpu_check.inference import infer
from tools.gpu_check.state import Context, Job
from tools.gpu_check.steps import ALL_BUT_FP8, Scale, run_options, train_row
from tools.gpu_check.timing import Stopwatch

GFLOP_PER_IMAGE = 120.9
"""Of a training step with ResNet-50 and 81 classes, by torch.utils.flop_counter (2 per multiplication and addition)."""

# Mode, ops, precision, batch as a multiple of the main one; the most telling ones first.
TRAINING = (
    ("graph", "native", "bf16", 1), ("eager", "native", "bf16", 1), ("eager", "reference", "bf16", 1),
    ("graph", "native", "fp16", 1), ("graph", "native", "tf32", 1), ("graph", "native", "bf16", 2),
    ("compiled+graph", "native", "bf16", 1),
)  # fmt: skip
INFERENCE = (("graph", "native", 1), ("eager", "native", 1), ("eager", "reference", 1), ("graph", "native", 1 / 4))


def ssd300(context: Context) -> Iterable[Job]:
    """images/s of training steps and of inference with post-processing, the batch being on the device.

    128 images with ResNet-50 on a GPU, as in the published figures. The weights are random: such a model finds more
    than a trained one, so the rate of inference is a cautious one.
    """
    from ssd300.config import Config

    watch = Stopwatch(context)
    main = context.sizes.batch * 4 if context.gpu else context.sizes.batch
    backbone = "resnet50" if context.gpu else "resnet18"
    training, inference = TRAINING[: 3 if context.quick else None], INFERENCE[: 3 if context.quick else None]
    if not context.gpu:
        training = tuple(("eager", ops, "fp32", 1) for ops in ("native", "reference"))
        inference = tuple(("eager", ops, 1) for ops in ("native", "reference"))
    for number, (mode, ops, precision, times) in enumerate(training):
        options = run_options(context, main * times, precision, mode, ops)
        key = f"training {precision} b{main * times} {mode} {ops}"
        chosen = Config(backbone=backbone, **options), mode, context, watch, Scale(GFLOP_PER_IMAGE)
        yield key, lambda chosen=(*chosen, context.gpu and not number): train_row(*chosen)
        if not number:  # the backbone's variants, which it shares with RetinaNet
            varied = Config(backbone=backbone, **options, variants=ALL_BUT_FP8["variants"]), *chosen[1:]
            yield f"{key} {ALL_BUT_FP8['what']}", lambda varied=varied: train_row(*varied)
    for mode, ops, times in inference:
        precision, batch = "bf16" if context.gpu else "fp32", int(main * times)
        config = Config(backbone=backbone, **run_options(context, batch, precision, "eager", ops))
        yield (
            f"inference {precision} b{batch} {mode} {ops}",
            lambda a=(config, mode): infer(a[0], "forward+postprocess", a[1], context, watch),
        )
