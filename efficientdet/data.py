"""What EfficientDet does to its images, and how it finds objects in them."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor, nn

from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.recipes import Recipe, letterbox
from detcore.detection.detector import Detector
from detcore.evaluation import waymo
from detcore.evaluation.coco import THRESHOLDS
from efficientdet.config import Config
from efficientdet.postprocess import postprocess

SCALES = (0.1, 2.0)  # of the canvas, that a training image is made
SMALLEST = 32  # pixels of a side; smaller images do not train


def recipe(config: Config) -> Recipe:
    """Images keep their aspect and lie at the top left of the canvas; in training with a random scale and mirrored
    every other time, or less by --augmentation. Scaled as --interpolation and --train-interpolation say."""
    mirror = 0.0 if config.augmentation == "none" else 0.5
    scales = SCALES if config.augmentation == "jitter" else (1.0, 1.0)
    methods = config.train_interpolation, config.interpolation
    return dataclasses.replace(letterbox(config.image_size, config.fill, mirror, scales, *methods), trains=trains)


def trains(index: CocoIndex) -> np.ndarray:
    """bool [n]: images with boxes and of at least 32 pixels a side."""
    return (index.box_count() > 0) & (np.minimum(index.heights, index.widths) >= SMALLEST)


def infer(
    model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels as `detection.Detector` has them; 100 an image."""
    with autocast():
        logits, deltas = model(batch.images)
    return postprocess(logits, deltas, model.anchors, batch.extent, soft=model.soft_nms)


def waymo_metrics(config: Config, by_iou: dict[int, list[float]]) -> dict[str, float]:
    """With --waymo: AP at IoU .7 of vehicles and .5 of pedestrians and cyclists, and their mean "L2_ALL_NS", as the
    original calls it; from 0 to 1, -1 without any true box. by_iou: AP at each of THRESHOLDS of each category id."""
    if not config.waymo:
        return {}
    values = {name: by_iou[number][THRESHOLDS.index(iou)] for number, (name, iou) in waymo.CLASSES.items()}
    return {"L2_ALL_NS": waymo.class_mean(values.values()), **{f"AP_{name}": ap for name, ap in values.items()}}


DETECTOR = Detector(
    recipe, infer, classes=90, scores_empty=lambda config: not config.legacy, extra_metrics=waymo_metrics
)
