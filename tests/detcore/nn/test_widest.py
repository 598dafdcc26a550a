"""The largest tensor of an image, against the layers' sizes by hand."""

import pytest
import torch

from detcore.detection.detector import LARGEST_TENSOR
from detcore.device.cpu import CpuBackend
from detcore.nn.widest import widest
from single_stage_detector.model import RetinaNet
from ssd300.model import SSD300

CPU = CpuBackend(torch.device("cpu"), "fp32")


@pytest.mark.parametrize(
    ("backbone", "classes", "elements"),
    [
        ("resnext50_32x4d", 264, 100 * 100 * 9 * 264),  # the class logits of P3
        ("resnext50_32x4d", 3, 64 * 400 * 400),  # the first convolution
        ("resnext101_32x8d", 3, 512 * 200 * 200),  # the second stage's, before its stride
    ],
)
def test_retinanet_at_its_own_size(backbone, classes, elements):
    model = RetinaNet(backbone, classes).eval()
    assert widest(model, (800, 800), CPU) == elements
    assert widest(model, (800, 800), CpuBackend(torch.device("cpu"), "bf16")) == elements


def test_openimages_fits_up_to_90_images_and_ssd300_always():
    assert LARGEST_TENSOR // (100 * 100 * 9 * 264) == 90
    ssd = SSD300("resnet50", 80).eval()
    with torch.inference_mode():  # as evaluations are prepared
        assert widest(ssd, (300, 300), CPU) == 1024 * 38 * 38
    assert LARGEST_TENSOR // (1024 * 38 * 38) > 1000


def test_it_follows_the_image_and_leaves_the_model_as_it_is():
    model = RetinaNet("resnet18", 2, (64, 96)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert widest(model, (64, 96), CPU) == 64 * 32 * 48
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
