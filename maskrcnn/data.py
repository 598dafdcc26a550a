"""What Mask R-CNN does to its images, and how it finds objects in them."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from detcore.data.batch import Batch
from detcore.data.recipes import Recipe, shortest_edge
from detcore.detection.detector import Detector
from maskrcnn.config import Config
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
    return dataclasses.replace(made, trains=lambda index: index.box_count() > 0, evaluation=other)


def infer(
    model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Boxes, scores, labels and masks as `detection.Detector` has them."""
    with autocast():
        return postprocess(model, batch.images, batch.extent)


DETECTOR = Detector(recipe, infer, classes=80)
