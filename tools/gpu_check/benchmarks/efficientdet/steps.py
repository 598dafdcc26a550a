"""The part `efficientdet`."""

from collections.abc import Iterable

from tools.gpu_check.inference import infer
from tools.gpu_check.state import Context, Job
from tools.gpu_check.steps import Scale, run_options, train_row
from tools.gpu_check.timing import Stopwatch

GFLOP_PER_IMAGE = 15.0
"""Of a training step of D0 with 90 classes: three times the forward pass by torch.utils.flop_counter (2 per
multiplication and addition), whose count of the backward pass takes no notice of depthwise convolutions."""

PREDICTED_GAIN_MS = {"norm_activations": (8.0, 13.0), "pyramid_nodes": (1.6, 2.4)}
"""What each variant is calculated to win of a training step of 128 images in bf16 on an H100, ms: at least, at most
(docs/LOG.md says from what)."""
# Mode, ops, precision, images, variants; the first of each list is in the core list.
TRAINING = (
    ("graph", "native", "bf16", 128, ()), ("eager", "native", "bf16", 128, ()),
    *(("graph", "native", "bf16", 128, (name,)) for name in PREDICTED_GAIN_MS),
    ("graph", "reference", "bf16", 128, ()), ("graph", "native", "tf32", 64, ()),
    ("compiled+graph", "native", "bf16", 128, ()),
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
        training = tuple(("eager", ops, "fp32", context.sizes.batch, ()) for ops in ("native", "reference"))
        inference = tuple(("eager", ops, context.sizes.batch) for ops in ("native", "reference"))
    jobs: list[list[Job]] = [[], []]
    for mode, ops, precision, images, variants in training[: 2 if context.quick else None]:
        config = Config(**more, **run_options(context, images, precision, mode, ops), variants=variants)
        profiled = context.gpu and not jobs[0]
        chosen = config, mode, context, watch, Scale(GFLOP_PER_IMAGE), profiled
        key = " ".join((f"training {precision} b{images} {mode} {ops}", *(f"+{name}" for name in variants)))
        predicted = {"predicted_gain_ms": PREDICTED_GAIN_MS[variants[0]]} if variants else {}
        jobs[0].append((key, lambda chosen=chosen, predicted=predicted: train_row(*chosen) | predicted))
    for mode, ops, images in inference[: 2 if context.quick else None]:
        precision = "bf16" if context.gpu else "fp32"
        config = Config(**more, **run_options(context, images, precision, "eager", ops))
        key = f"inference {precision} b{images} {mode} {ops}"
        jobs[1].append((key, lambda a=(config, mode): infer(a[0], "forward+postprocess", a[1], context, watch)))
    firsts = [kind.pop(0) for kind in jobs]
    yield from (*firsts, *jobs[0], *jobs[1])
