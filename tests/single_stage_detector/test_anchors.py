"""Anchors against the golden values of the reference and torchvision's generator."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from single_stage_detector.anchors import anchors, cell_anchors, grids

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "retinanet.json").read_text())["anchors"]


@pytest.fixture(scope="module")
def at_800() -> torch.Tensor:
    return anchors((800, 800), grids((800, 800)))


def test_grids_at_800():
    assert [list(g) for g in grids((800, 800))] == GOLDEN["grids"]


def test_count_order_and_sums(at_800):
    assert at_800.shape == (GOLDEN["count"], 4)
    assert at_800.dtype == torch.float32
    for index, box in GOLDEN["selected"].items():
        assert at_800[int(index)].tolist() == box, index
    assert at_800.double().sum(0).tolist() == GOLDEN["column_sums"]


def test_cell_anchors_of_each_level():
    for size, (level, boxes) in zip((32, 64, 128, 256, 512), GOLDEN["base_anchors"].items()):
        assert cell_anchors(size).tolist() == boxes, level


@pytest.mark.parametrize("size", [(800, 800), (320, 512), (100, 75), (33, 64), (257, 191)])
def test_equal_to_torchvision_for_any_image(size):
    base = (16, 40, 100, 200, 333)
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in base)
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, *grid) for grid in grids(size)]
    expected = generator(ImageList(torch.zeros(1, 3, *size), [size]), maps)[0]
    assert torch.equal(anchors(size, grids(size), base), expected)


def test_levels_must_fit():
    with pytest.raises(ValueError, match="zip"):
        anchors((64, 64), grids((64, 64)), sizes=(32, 64))
