"""SSD300 for a few images at hand: `main` as NVIDIA's inference script has it, and the steps that it is made of.

hubconf.py gives the same steps to torch.hub. Images are shown to the model as in validation: all of the image, resized
to 300 x 300. `legacy` shows it what the original's script did: the square in the middle, with other scaling.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detcore import UserError
from detcore.config import from_dict
from detcore.data import torch_loader
from detcore.data.recipes import central_square, stretched
from detcore.data.transforms import read_image
from detcore.device.select import select_backend
from detcore.training.checkpoint import load_checkpoint
from ssd300.anchors import IMAGE_SIZE, priors
from ssd300.config import BENCHMARK, NMS_THRESHOLD, SCORE_THRESHOLD, TOPK_PER_CLASS, Config
from ssd300.model import SSD300, known_backbone, known_classes, load_original_state, scale_as_the_originals_inference
from ssd300.postprocess import postprocess

CHECKPOINT = Path("/checkpoints/SSD300v1.1.pt")  # where the original's documentation mounts it
MOST, THRESHOLD = 20, 0.3
"""Detections of an image at most, and the score that they must be above, in the original's script."""
Detections = list[np.ndarray]
"""Boxes float32 [d, 4]: left, top, right, bottom of 0..1; classes int64 [d] from 1 on; scores float32 [d], falling."""

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""Names of the classes 1 to 80 of a model that was trained on COCO."""
_COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_IDS = tuple(i for i in range(1, 91) if i not in _COCO_UNUSED)


def class_entries(saved: dict[str, Any]) -> list[tuple[int, str]]:
    """Category id and name of each class of a checkpoint; empty if it can't be told.

    This program writes them. The original writes names alone ("label_map", with the background as 0), or nothing: then
    80 classes are COCO's. Ids are COCO's where the names are, else 1, 2, ...
    """
    if saved.get("classes"):
        return [(category, name) for category, name in saved["classes"]]
    count = known_classes(saved.get("ema") or saved.get("model", saved))
    labels = saved.get("label_map")
    names = tuple(labels[i] for i in sorted(labels) if i) if isinstance(labels, dict) else ()
    if not names and count == len(COCO_NAMES):
        names = COCO_NAMES
    if len(names) != count:
        return []
    return list(zip(_COCO_IDS if names == COCO_NAMES else range(1, count + 1), map(str, names), strict=True))


def prepare(image: Tensor, legacy: bool = False) -> np.ndarray:
    """A uint8 image [3, h, w] as the model wants it: uint8 [300, 300, 3]."""
    view = (central_square if legacy else stretched)(np.array([image.shape[-2:]]), (IMAGE_SIZE, IMAGE_SIZE))
    return torch_loader.render(image, view, 0, Config.antialias).numpy()


def decode(outputs: tuple[Tensor, Tensor], most: int = MOST) -> list[Detections]:
    """What the model's outputs say of each image; nothing found is three empty arrays."""
    deltas, _ = outputs
    boxes, scores, labels = postprocess(
        outputs, priors().to(deltas.device), SCORE_THRESHOLD, TOPK_PER_CLASS, NMS_THRESHOLD, most
    )
    found = []
    for one_boxes, one_labels, one_scores in zip(boxes.cpu(), labels.cpu(), scores.cpu(), strict=True):
        real = one_labels >= 0
        found.append([(one_boxes[real] / IMAGE_SIZE).numpy(), one_labels[real].numpy() + 1, one_scores[real].numpy()])
    return found


def pick_best(detections: Detections, threshold: float = THRESHOLD) -> Detections:
    """Those of one image whose score is above the threshold."""
    good = detections[2] > threshold
    return [values[good] for values in detections]


def load_model(checkpoint: Path, backbone: str | None = None) -> tuple[SSD300, list[str]]:
    """The model of a checkpoint, on the CPU, and the names of its classes 1, 2, ...

    Where a checkpoint does not say its backbone, as the original's, the weights do, unless `backbone` says another.
    Raises UserError for a file that is no checkpoint of SSD300.
    """
    saved = load_checkpoint(checkpoint, BENCHMARK)
    stored = saved.get("config") or {}
    config = from_dict(Config, {key: stored[key] for key in ("backbone", "predictor_norm") if key in stored})
    state = saved.get("ema") or saved.get("model", saved)
    count = known_classes(state)
    if count is None:
        raise UserError(f"{checkpoint} holds no SSD300: it has no conf.0.bias")
    found = config.backbone if "backbone" in stored else known_backbone(state)
    model = SSD300(backbone or found or config.backbone, count, config.predictor_norm)
    load_original_state(model, state, str(checkpoint))
    entries = class_entries(saved) or enumerate(map(str, range(1, count + 1)))
    return model.eval(), [name for _, name in entries]


@torch.no_grad()
def main(
    images: Sequence[str | Path],
    checkpoint: Path | None = None,
    *,
    threshold: float = THRESHOLD,
    most: int = MOST,
    legacy: bool = False,
    device: str = "auto",
    precision: str = "tf32",
) -> list[Detections]:
    """What a trained model finds in images, which are paths or URLs: [boxes, classes, scores] for each.

    checkpoint: none takes the file that the variable SSD300_CHECKPOINT names, else /checkpoints/SSD300v1.1.pt. Boxes
    are fractions of the image, with legacy of the square in its middle. Raises UserError for an image or a checkpoint
    that can't be read.
    """
    place = select_backend(device, precision)
    model, _ = load_model(Path(checkpoint or os.environ.get("SSD300_CHECKPOINT", CHECKPOINT)))
    if legacy:
        scale_as_the_originals_inference(model)
    model = place.place(model)
    found = []
    for uri in images:
        pixels = torch.from_numpy(prepare(read_image(uri), legacy)).permute(2, 0, 1)[None]
        with place.autocast():
            outputs = model(pixels.to(place.device))
        found += [pick_best(one, threshold) for one in decode(outputs, most)]
    return found
