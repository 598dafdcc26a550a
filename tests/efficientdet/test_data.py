"""What EfficientDet trains with, what it sees, and Waymo's metrics."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detcore.data.batch import whole_images
from detcore.data.recipes import Draws
from efficientdet.config import Config
from efficientdet.data import DETECTOR, infer, recipe, trains, waymo_metrics
from efficientdet.model import EfficientDet

SIZES = np.array([[480, 640], [300, 200], [1000, 1000], [37, 512]])


def view(config: Config, epoch: int = 0):
    images = np.arange(len(SIZES))
    boxes = [np.zeros((0, 4), np.float32)] * len(SIZES)
    return recipe(config).view(Draws(3, epoch, images), SIZES, boxes, config.image_size)


def test_training_views():
    """The aspect is kept; scales from a tenth of the canvas to two, half of the images mirrored."""
    views = [view(Config(), epoch) for epoch in range(200)]
    scale = np.concatenate([v.sizes.max(1) / 512 for v in views])
    assert 0.09 < scale.min() < 0.12 and 1.95 < scale.max() <= 2 and abs(scale.mean() - 1.05) < 0.05
    assert abs(np.mean([v.mirrored.mean() for v in views]) - 0.5) < 0.05
    for v in views[:9]:
        assert v.fill == (124, 116, 104) and v.canvas == (512, 512) and (v.offsets <= 0).all()
        np.testing.assert_allclose(v.sizes[:, 0] / v.sizes[:, 1], SIZES[:, 0] / SIZES[:, 1], rtol=0.5 / 3)
    assert any((v.offsets < 0).any() for v in views)


@pytest.mark.parametrize("augmentation, mirrors", [("flip", True), ("none", False)])
def test_less_augmentation(augmentation, mirrors):
    config = dataclasses.replace(Config(), augmentation=augmentation)
    views = [view(config, epoch) for epoch in range(20)]
    assert all((v.sizes.max(1) == 512).all() and not v.offsets.any() for v in views)
    assert any(v.mirrored.any() for v in views) == mirrors


def test_evaluation_sees_all_of_an_image():
    seen = recipe(Config()).eval_view(SIZES, (512, 512))
    assert seen.sizes.tolist() == [[384, 512], [512, 341], [512, 512], [37, 512]] and not seen.offsets.any()


def test_images_that_train():
    """Those with boxes whose sides have 32 pixels."""
    index = SimpleNamespace(
        box_count=lambda: np.array([1, 0, 3, 2]), heights=np.array([32, 99, 31, 99]), widths=np.array([32, 99, 99, 31])
    )
    assert trains(index).tolist() == [True, False, False, False]


def test_waymos_metrics():
    """Vehicles at IoU .7, the others at .5, as published: 50.271, 61.788 and 39.072 have the mean 50.377."""
    config = dataclasses.replace(Config(), waymo=True, dataset="custom")
    by_iou = {number: [0.1 * k for k in range(10)] for number in (1, 2, 3)}
    by_iou[1][4], by_iou[2][0], by_iou[3][0] = 0.50271, 0.61788, 0.39072
    found = waymo_metrics(config, by_iou)
    assert found["L2_ALL_NS"] == pytest.approx(0.50377, abs=5e-6) and found["AP_vehicle"] == 0.50271
    assert (found["AP_pedestrian"], found["AP_cyclist"]) == (0.61788, 0.39072)
    assert waymo_metrics(Config(), by_iou) == {}


@torch.no_grad()
def test_detections_lie_on_the_image():
    """Clipped to what the image covers of the canvas; 100 an image, with either suppression."""
    torch.manual_seed(1)
    model = EfficientDet("tf_efficientdet_lite0", 3, (64, 64)).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    size = torch.tensor([[64, 64], [64, 64]])
    batch = whole_images(images, torch.zeros(2, 1, 4), torch.full((2, 1), -1), torch.arange(2), size)
    batch = batch._replace(extent=torch.tensor([[64, 64], [48, 20]]))
    for soft in (False, True):
        model.soft_nms = soft
        boxes, scores, labels = infer(model, batch, lambda: torch.autocast("cpu", enabled=False))
        assert boxes.shape == (2, 100, 4) and scores.shape == labels.shape == (2, 100)
        assert boxes[1, :, 2].max() <= 20 and boxes[1, :, 3].max() <= 48 and boxes.min() >= 0
    assert DETECTOR.scores_empty(Config()) and not DETECTOR.scores_empty(dataclasses.replace(Config(), legacy=True))
