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
from efficientdet.config import Config
from efficientdet.postprocess import postprocess

SCALES = (0.1, 2.0)  # of the canvas, that a training image is made
SMALLEST = 32  # pixels of a side; smaller images do not train
WAYMO_IOU = {1: ("vehicle", 0.7), 2: ("pedestrian", 0.5), 3: ("cyclist", 0.5)}


def recipe(config: Config) -> Recipe:
    """Images keep their aspect and lie at the top left of the canvas; in training with a random scale and mirrored
    every other time, or less by --augmentation."""
    mirror = 0.0 if config.augmentation == "none" else 0.5
    scales = SCALES if config.augmentation == "jitter" else (1.0, 1.0)
    return dataclasses.replace(letterbox(config.image_size, config.fill, mirror, scales), trains=trains)


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
    original calls it. by_iou: AP at .5, .55, ... of each category id."""
    if not config.waymo:
        return {}
    values = {name: by_iou[number][round((iou - 0.5) / 0.05)] for number, (name, iou) in WAYMO_IOU.items()}
    mean = sum(values.values()) / len(values)
    return {"L2_ALL_NS": mean, **{f"AP_{name}": value for name, value in values.items()}}


DETECTOR = Detector(
    recipe, infer, classes=90, scores_empty=lambda config: not config.legacy, extra_metrics=waymo_metrics
)
