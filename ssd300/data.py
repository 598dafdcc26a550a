"""SSD300's data: what training does to its images, and the way from a model to its COCO metrics.

All loaders take the order of both originals: crop, mirror, resize, colours. The colours change as in the original's
DALI pipeline: hue and saturation, contrast about 128, brightness. Its Pillow version takes these steps in random order
and contrast about the picture's mean, and turns the hue in HSV. All images train, also those without objects, and all
validation images are scored; with --legacy not those without annotations.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from detcore import detection
from detcore.backend import Backend
from detcore.data import Batch
from detcore.data.augment import Augment
from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace
from detcore.detection import Detector, Inference, open_index
from detcore.task import Context, Data
from ssd300 import config as constants
from ssd300.config import Config
from ssd300.postprocess import postprocess

__all__ = ["DETECTOR", "class_count", "detect", "open_data", "open_index", "train_stream"]

HUE, LEGACY_HUE = 18.0, 0.5  # degrees; the original meant +-.05 of a turn and gave DALI +-.5, which takes degrees


def _postprocess(model: nn.Module, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return postprocess(
        outputs,
        model.priors,
        score_thresh=constants.SCORE_THRESHOLD,
        per_class=constants.TOPK_PER_CLASS,
        nms_thresh=constants.NMS_THRESHOLD,
        detections=constants.DETECTIONS_PER_IMAGE,
    )


def _train_options(config: Config) -> dict[str, Any]:
    whole = Augment(hue=LEGACY_HUE if config.legacy else HUE)
    return {
        "hflip": 0.0 if config.augmentation == "none" else 0.5,
        "augment": whole if config.augmentation == "ssd" else None,
    }


def _window(config: Config, height: int, width: int) -> tuple[int, int, int, int]:
    """All of an image, or with --legacy the square in its middle."""
    if not config.legacy:
        return 0, 0, height, width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


DETECTOR = Detector(
    _postprocess,
    _train_options,
    synthetic_classes=80,
    window=_window,
    scores_empty=lambda config: not config.legacy,
)


def class_count(config: Config) -> int:
    """As `detection.class_count`."""
    return detection.class_count(DETECTOR, config)


def detect(model: nn.Module, batch: Batch, backend: Backend, category_ids: Tensor) -> Tensor:
    """As `detection.detect`; 200 rows an image."""
    return detection.detect(DETECTOR, model, batch, backend, category_ids)


def train_stream(
    config: Config, index: CocoIndex, context: Context, epoch: int, step: int, pace: Pace | None = None
) -> Iterator[Batch]:
    """As `detection.train_stream`."""
    return detection.train_stream(DETECTOR, config, index, context, epoch, step, pace)


def open_data(config: Config, context: Context, inference: Inference | None = None) -> Data:
    """As `detection.open_data`."""
    return detection.open_data(DETECTOR, config, context, inference)
