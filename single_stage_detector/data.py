"""The data sets of the single-stage detector, and the way from a model to its COCO metrics."""

from collections.abc import Iterator

from torch import Tensor, nn

from detcore import detection
from detcore.backend import Backend
from detcore.data import Batch
from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace
from detcore.detection import Detector, Inference, open_index
from detcore.task import Context, Data
from single_stage_detector import config as constants
from single_stage_detector.config import Config
from single_stage_detector.model import Outputs
from single_stage_detector.postprocess import postprocess

__all__ = ["DETECTOR", "class_count", "detect", "open_data", "open_index", "train_stream"]


def _postprocess(model: nn.Module, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    logits, deltas, *class_bias = outputs
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


DETECTOR = Detector(
    postprocess=_postprocess,
    train_options=lambda config: {"hflip": 0.5 if config.data_augmentation == "hflip" else 0.0},
    synthetic_classes=264,
)


def class_count(config: Config) -> int:
    """As `detection.class_count`."""
    return detection.class_count(DETECTOR, config)


def detect(model: nn.Module, batch: Batch, backend: Backend, category_ids: Tensor) -> Tensor:
    """As `detection.detect`; 300 rows an image."""
    return detection.detect(DETECTOR, model, batch, backend, category_ids)


def train_stream(
    config: Config, index: CocoIndex, context: Context, epoch: int, step: int, pace: Pace | None = None
) -> Iterator[Batch]:
    """As `detection.train_stream`."""
    return detection.train_stream(DETECTOR, config, index, context, epoch, step, pace)


def open_data(config: Config, context: Context, inference: Inference | None = None) -> Data:
    """As `detection.open_data`."""
    return detection.open_data(DETECTOR, config, context, inference)
