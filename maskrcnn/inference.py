"""Mask R-CNN for images at hand: `main`, and `COCODemo` as the original's demo/predictor.py has it.

hubconf.py gives both to torch.hub. Images are shown to the network as in evaluation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from detcore import UserError
from detcore.config import load
from detcore.data.transforms import read_image
from detcore.detection.drawing import draw
from detcore.detection.inference import look
from detcore.device.select import select_backend
from detcore.training.checkpoint import load_checkpoint
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.data import DETECTOR
from maskrcnn.flags import translate_flags
from maskrcnn.train import build_model, complete


class Found(NamedTuple):
    """What is in an image, by falling score.

    boxes: float32 [d, 4], x1, y1, x2, y2 in pixels of the image. scores: float32 [d]. labels: the d names. masks: uint8
    [d, h, w], 1 inside; None where the network has no mask head.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: list[str]
    masks: np.ndarray | None


class COCODemo:
    """A network that looks at one image after another.

    checkpoint: of this program, which knows its configuration and its classes; for another's the configuration goes on
    as train_net.py takes it: "--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", "MODEL.MASK_ON", "True".
    names: of the classes of such a checkpoint, without the background; else they are called 1, 2, ...
    confidence_threshold: the lowest score that counts. min_image_size: short side of what the network sees; None: the
    configuration's. device: as --device. Raises UserError for checkpoints and settings that do not fit.
    """

    def __init__(
        self, checkpoint: str | Path, *configuration: str, names: Sequence[str] = (), confidence_threshold: float = 0.7,
        min_image_size: int | None = None, device: str = "auto",
    ):  # fmt: skip
        size = ["INPUT.MIN_SIZE_TEST", str(min_image_size)] if min_image_size else []
        words = ["--mode", "predict", "--images", ".", "--checkpoint", str(checkpoint), "--device", device]
        words += ["--score-threshold", str(confidence_threshold)]
        found = load(Config, translate_flags([*words, *configuration, *size]), {}, IGNORED_FLAGS)
        self.config = complete(found.config, found.sources)
        saved = load_checkpoint(self.config.checkpoint, self.config.program)
        count = len(saved.get("classes") or names) or self.config.roi_box_head_num_classes - 1
        own = [(i, name) for i, name in saved.get("classes") or []]
        self.classes = own or list(enumerate(names or map(str, range(1, count + 1)), 1))
        self.threshold = confidence_threshold
        self.backend = select_backend(self.config.device, self.config.precision)
        self.model = self.backend.place(build_model(self.config, count)).eval()
        self._ids = torch.tensor([i for i, _ in self.classes], device=self.backend.device)

    def compute_prediction(self, image: np.ndarray | Tensor) -> Found:
        """What is in an image: uint8 [h, w, 3], blue first as OpenCV reads it, or a tensor [3, h, w], red first."""
        pixels = _tensor(image)
        found = self._look(pixels)
        boxes = found.rows[:, 1:5].float()
        boxes[:, 2:] += boxes[:, :2]
        names = dict(self.classes)
        labels = [names[int(category)] for category in found.rows[:, 6].tolist()]
        masks = None
        if found.masks is not None:
            masks = np.zeros((len(labels), *pixels.shape[1:]), np.uint8)
            for mask, one in zip(masks, found.masks.dictionaries(), strict=True):
                mask[:] = coco_mask.decode(one)
        return Found(boxes.numpy(), found.rows[:, 5].float().numpy(), labels, masks)

    def run_on_opencv_image(self, image: np.ndarray) -> np.ndarray:
        """A copy of an image, uint8 [h, w, 3], blue first, with boxes, names, scores and masks drawn."""
        pixels = _tensor(image)
        found = self._look(pixels)
        drawn = draw(pixels, found.rows[:, 1:], dict(self.classes), found.masks)
        return np.ascontiguousarray(drawn.permute(1, 2, 0).numpy()[..., ::-1])

    def _look(self, pixels: Tensor):
        return look(self.config, DETECTOR, self.model, pixels, self.backend, self._ids, self.threshold)


def _tensor(image: np.ndarray | Tensor) -> Tensor:
    """uint8 [3, h, w], red first."""
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"a tensor is uint8 [3, h, w], this one is {image.dtype} {list(image.shape)}")
        return image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"an image is uint8 [h, w, 3], this one is {image.dtype} {list(image.shape)}")
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1)


def main(images: Sequence[str | Path], checkpoint: str | Path, *configuration: str, **how) -> list[Found]:
    """What is in each image, a path or a URL. The rest as `COCODemo` takes it."""
    demo = COCODemo(checkpoint, *configuration, **how)
    return [demo.compute_prediction(read_image(image)) for image in images]
