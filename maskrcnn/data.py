"""What Mask R-CNN does to its images, and how it finds objects in them."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.recipes import Recipe, shortest_edge
from detcore.detection.detector import Detector
from maskrcnn.config import Config
from maskrcnn.model import MaskRCNN
from maskrcnn.postprocess import postprocess

MULTIPLE = 32  # of which the sides of a canvas are multiples: the stride of the coarsest map that is not pooled


def recipe(config: Config) -> Recipe:
    """Images keep their aspect, with a short side of INPUT.MIN_SIZE and at most MAX_SIZE; in training those with
    annotations, mirrored every other time."""
    multiple = config.dataloader_size_divisibility or MULTIPLE
    training = (config.input_min_size_train, config.input_max_size_train)
    evaluation = (config.input_min_size_test, config.input_max_size_test)
    made = shortest_edge(*training, multiple=multiple)
    other = None if evaluation == training else shortest_edge(*evaluation, mirror=0.0, multiple=multiple)
    return dataclasses.replace(made, trains=annotated, evaluation=other)


def annotated(index: CocoIndex) -> np.ndarray:
    """bool [n]: images with annotations."""
    return index.box_count() > 0


def infer(model: MaskRCNN, batch: Batch, autocast: Callable[[], AbstractContextManager]) -> tuple[Tensor, ...]:
    """Boxes, scores, labels and, with a mask head, masks and their places as `detection.Detector` has them."""
    with autocast():
        found = postprocess(model, batch.images, batch.extent)
    return tuple(found if found.masks is not None else found[:3])


DETECTOR = Detector(
    recipe, infer, classes=80, masks=lambda config: config.mask_on and not config.rpn_only,
    proposals=lambda config: config.rpn_only,
)  # fmt: skip
