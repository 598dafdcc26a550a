"""What EfficientDet trains with, what it sees, and Waymo's metrics."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detcore.data.batch import whole_images
from detcore.data.recipes import Draws
from detcore.evaluation.coco import GroundTruth, evaluate
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
    seen = [v.windows[:, :1:-1] - v.windows[:, 1::-1] for v in views]
    scale = np.concatenate([(v.sizes / s * SIZES).max(1) / 512 for v, s in zip(views, seen, strict=True)])
    assert 0.09 < scale.min() < 0.12 and 1.95 < scale.max() <= 2.02 and abs(scale.mean() - 1.05) < 0.05
    assert abs(np.mean([v.mirrored.mean() for v in views]) - 0.5) < 0.05
    for v, s in zip(views[:9], seen, strict=False):
        assert v.fill == (124, 116, 104) and v.canvas == (512, 512) and not v.offsets.any() and v.cubic is None
        np.testing.assert_allclose(v.sizes[:, 0] / v.sizes[:, 1], s[:, 0] / s[:, 1], rtol=0.5 / 3)
    assert any((s < SIZES).any() for s in seen)


def test_interpolations_of_training_and_evaluation():
    config = dataclasses.replace(Config(), train_interpolation="random", interpolation="bicubic")
    cubic = np.concatenate([view(config, epoch).cubic for epoch in range(100)])
    assert abs(cubic.mean() - 0.5) < 0.1 and len({tuple(view(config, epoch).cubic) for epoch in range(20)}) > 5
    assert recipe(config).eval_view(SIZES, (512, 512)).cubic.all()
    assert recipe(Config()).eval_view(SIZES, (512, 512)).cubic is None


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
    config = dataclasses.replace(Config(), waymo=True, dataset="waymo")
    by_iou = {number: [0.1 * k for k in range(10)] for number in (1, 2, 3)}
    by_iou[1][4], by_iou[2][0], by_iou[3][0] = 0.50271, 0.61788, 0.39072
    found = waymo_metrics(config, by_iou)
    assert found["L2_ALL_NS"] == pytest.approx(0.50377, abs=5e-6) and found["AP_vehicle"] == 0.50271
    assert (found["AP_pedestrian"], found["AP_cyclist"]) == (0.61788, 0.39072)
    assert waymo_metrics(Config(), by_iou) == {}


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ((0.5, 0.25, -1.0), 0.375), ((-1.0, 0.25, -1.0), 0.25), ((0.0, 0.75, -1.0), 0.375), ((0.0, 0.0, 0.0), 0.0),
        ((-1.0, -1.0, -1.0), -1.0),
    ],
)  # fmt: skip
def test_waymos_mean_is_of_the_classes_with_boxes(values, mean):
    """A class without any true box, whose AP is -1, has no part in it; one of which nothing is found has."""
    config = dataclasses.replace(Config(), waymo=True, dataset="waymo")
    found = waymo_metrics(config, {number: [ap] * 10 for number, ap in enumerate(values, 1)})
    assert found == {
        "L2_ALL_NS": mean, "AP_vehicle": values[0], "AP_pedestrian": values[1], "AP_cyclist": values[2],
    }  # fmt: skip


def test_waymos_metrics_of_true_and_found_boxes():
    """The golden boxes of the evaluation, IoU .6, without a cyclist: none of one class, all of the other."""
    boxes = np.array([[50, 10, 20, 20], [100, 10, 20, 20]], np.float64)
    labels, areas, crowd = np.array([1, 2]), np.full(2, 400.0), np.zeros(2, np.uint8)
    truth = GroundTruth(np.array([1]), np.array([1, 2, 3]), np.array([1, 1]), labels, boxes, areas, crowd)
    detections = np.array([(1, 50, 10, 20, 12, 0.9, 1), (1, 100, 10, 20, 12, 0.9, 2)], np.float64)
    result = evaluate(truth, detections, per_class=True, waymo=True)
    found = waymo_metrics(dataclasses.replace(Config(), waymo=True), result["per_class_by_iou"])
    assert found == pytest.approx({"L2_ALL_NS": 0.5, "AP_vehicle": 0, "AP_pedestrian": 1, "AP_cyclist": -1})
    assert found["L2_ALL_NS"] * 100 == pytest.approx(result["L2_ALL_NS"])


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
