"""The part `efficientdet`."""

from collections.abc import Iterable

from tools.gpu_check.inference import infer
from tools.gpu_check.state import Context, Job
from tools.gpu_check.steps import Scale, run_options, train_row
from tools.gpu_check.timing import Stopwatch

GFLOP_PER_IMAGE = 15.0
"""Of a training step of D0 with 90 classes: three times the forward pass by torch.utils.flop_counter (2 per
multiplication and addition), whose count of the backward pass takes no notice of depthwise convolutions."""

# Mode, ops, precision, images; the first of each list is in the core list.
TRAINING = (
    ("graph", "native", "bf16", 128), ("eager", "native", "bf16", 128), ("graph", "reference", "bf16", 128),
    ("graph", "native", "tf32", 64), ("compiled+graph", "native", "bf16", 128),
)  # fmt: skip
INFERENCE = (("graph", "native", 8), ("graph", "native", 64), ("eager", "native", 64), ("eager", "reference", 64))


def efficientdet(context: Context) -> Iterable[Job]:
    """images/s of training steps and of inference with post-processing of D0, the batch being on the device.

    128 images train and 8 are looked at, with what else is told by the key. The weights are random: such a model finds
    more than a trained one, so the rate of inference is a cautious one.
    """
    from efficientdet.config import Config

    watch = Stopwatch(context)
    more, training, inference = {}, TRAINING, INFERENCE
    if not context.gpu:
        more = {"model": "tf_efficientdet_lite0", "input_size": 64}
        training = tuple(("eager", ops, "fp32", context.sizes.batch) for ops in ("native", "reference"))
        inference = tuple(("eager", ops, context.sizes.batch) for ops in ("native", "reference"))
    jobs: list[list[Job]] = [[], []]
    for mode, ops, precision, images in training[: 2 if context.quick else None]:
        config = Config(**more, **run_options(context, images, precision, mode, ops))
        profiled = context.gpu and not jobs[0]
        chosen = config, mode, context, watch, Scale(GFLOP_PER_IMAGE), profiled
        key = f"training {precision} b{images} {mode} {ops}"
        jobs[0].append((key, lambda chosen=chosen: train_row(*chosen)))
    for mode, ops, images in inference[: 2 if context.quick else None]:
        precision = "bf16" if context.gpu else "fp32"
        config = Config(**more, **run_options(context, images, precision, "eager", ops))
        key = f"inference {precision} b{images} {mode} {ops}"
        jobs[1].append((key, lambda a=(config, mode): infer(a[0], "forward+postprocess", a[1], context, watch)))
    firsts = [kind.pop(0) for kind in jobs]
    yield from (*firsts, *jobs[0], *jobs[1])
