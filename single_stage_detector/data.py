"""What RetinaNet does to its images, and how it finds objects in them."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from detcore.data.batch import Batch
from detcore.data.recipes import Recipe, stretch
from detcore.detection.detector import Detector
from single_stage_detector import config as constants
from single_stage_detector.config import Config
from single_stage_detector.postprocess import postprocess


def recipe(config: Config) -> Recipe:
    """The whole image, scaled to the model's size, mirrored every other time in training."""
    return stretch(config.image_size, mirror=0.5 if config.data_augmentation == "hflip" else 0.0)


def infer(
    model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels as `detection.Detector` has them; 300 an image."""
    with autocast():
        logits, deltas, *class_bias = model(batch.images)
    return postprocess(
        logits,
        deltas,
        model.anchors,
        model.image_size,
        score_thresh=constants.SCORE_THRESHOLD,
        topk=constants.TOPK_PER_LEVEL,
        nms_thresh=constants.NMS_THRESHOLD,
        detections=constants.DETECTIONS_PER_IMAGE,
        class_bias=class_bias[0] if class_bias else None,
    )


DETECTOR = Detector(recipe, infer, classes=264)
