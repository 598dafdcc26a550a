"""The part `maskrcnn`."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from tools.gpu_check.inference import infer
from tools.gpu_check.state import Context, Job
from tools.gpu_check.steps import Scale, run_options, train_row
from tools.gpu_check.timing import Stopwatch

GFLOP_PER_IMAGE = 1100.0
"""Of a training step of R-50-FPN at 800 x 1088, with 512 regions and 128 masks: three times the forward pass by
torch.utils.flop_counter (2 per multiplication and addition), less what does not train; rounded."""

# Mode, ops, precision, images; the first of each list is in the core list.
TRAINING = (
    ("graph", "native", "bf16", 12), ("eager", "native", "bf16", 12), ("graph", "reference", "bf16", 12),
    ("graph", "native", "tf32", 4),
)  # fmt: skip
INFERENCE = (("graph", "native", 8), ("graph", "native", 1), ("eager", "native", 8), ("eager", "reference", 8))
SMALL = [
    "MODEL.BACKBONE.CONV_BODY", "R-18-FPN", "MODEL.BACKBONE.OUT_CHANNELS", "16", "MODEL.ROI_MASK_HEAD.CONV_LAYERS",
    "(16,)", "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "32", "INPUT.MIN_SIZE_TRAIN", "64", "INPUT.MAX_SIZE_TRAIN", "96",
    "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96", "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "50",
    "MODEL.RPN.PRE_NMS_TOP_N_TEST", "50", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", "20", "MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "10",
]  # fmt: skip
"""For a processor, to see that it works."""


def make_config(context: Context, images: int, precision: str, mode: str, ops: str) -> Any:
    """R-50-FPN as published, from random weights."""
    from detcore.config import load
    from maskrcnn.config import IGNORED_FLAGS, Config
    from maskrcnn.flags import translate_flags

    words = ["--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x_bs96.yaml", "MODEL.WEIGHT", ""]
    config = load(Config, translate_flags([*words, *([] if context.gpu else SMALL)]), {}, IGNORED_FLAGS).config
    own = run_options(context, images, precision, mode, ops)
    return dataclasses.replace(config, eval_batch_size=images, **own)


def maskrcnn(context: Context) -> Iterable[Job]:
    """images/s of training steps and of inference up to the masks' probabilities, the batch being on the device.

    12 images of 800 x 1088 train and 8 are looked at, with what else is told by the key. The weights are random; the
    shapes are fixed, so that what is found does not matter.
    """
    watch = Stopwatch(context)
    training, inference = TRAINING, INFERENCE
    if not context.gpu:
        training = tuple(("eager", ops, "fp32", context.sizes.batch) for ops in ("native", "reference"))
        inference = tuple(("eager", ops, context.sizes.batch) for ops in ("native", "reference"))
    jobs: list[list[Job]] = [[], []]
    for mode, ops, precision, images in training[: 2 if context.quick else None]:
        chosen = (context, images, precision, mode, ops)
        profiled = context.gpu and not jobs[0]
        key = f"training {precision} b{images} {mode} {ops}"
        jobs[0].append((key, lambda c=chosen, p=profiled: train_row(
            make_config(*c), c[3], context, watch, Scale(GFLOP_PER_IMAGE), p
        )))  # fmt: skip
    for mode, ops, images in inference[: 2 if context.quick else None]:
        precision = "bf16" if context.gpu else "fp32"
        chosen = (context, images, precision, "eager", ops)
        key = f"inference {precision} b{images} {mode} {ops}"
        jobs[1].append((key, lambda c=chosen, m=mode: infer(make_config(*c), "forward+postprocess", m, context, watch)))
    firsts = [kind.pop(0) for kind in jobs]
    yield from (*firsts, *jobs[0], *jobs[1])
