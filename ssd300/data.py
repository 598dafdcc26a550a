"""What SSD300 does to its images, and how it finds objects in them.

All loaders take the order of both originals: crop, mirror, resize, colours. The colours change as in the original's
DALI pipeline: hue and saturation, contrast about 128, brightness. Its Pillow version takes these steps in random order
and contrast about the picture's mean, and turns the hue in HSV. All images train, also those without objects, and all
validation images are scored; with --legacy not those without annotations.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from detcore.data.augment import Augment
from detcore.data.batch import Batch
from detcore.data.recipes import Recipe, central_square, ssd_crop, stretch
from detcore.detection.detector import Detector
from ssd300 import config as constants
from ssd300.config import Config
from ssd300.postprocess import postprocess

HUE, LEGACY_HUE = 18.0, 0.5  # degrees; the original meant +-.05 of a turn and gave DALI +-.5, which takes degrees


def recipe(config: Config) -> Recipe:
    """A random crop, mirrored every other time and recoloured, or less by --augmentation; in evaluation all of an
    image,
    and with --legacy, in prediction, the square in its middle."""
    if config.augmentation == "ssd":
        made = ssd_crop(config.image_size, Augment(hue=LEGACY_HUE if config.legacy else HUE))
    else:
        made = stretch(config.image_size, mirror=0.0 if config.augmentation == "none" else 0.5)
    return dataclasses.replace(made, predict_view=central_square) if config.legacy else made


def infer(
    model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels as `detection.Detector` has them; 200 an image."""
    with autocast():
        outputs = model(batch.images)
    return postprocess(
        outputs,
        model.priors,
        score_thresh=constants.SCORE_THRESHOLD,
        per_class=constants.TOPK_PER_CLASS,
        nms_thresh=constants.NMS_THRESHOLD,
        detections=constants.DETECTIONS_PER_IMAGE,
    )


DETECTOR = Detector(recipe, infer, classes=80, scores_empty=lambda config: not config.legacy)
